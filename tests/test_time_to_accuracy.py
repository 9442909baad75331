"""Rows, ablation tables and the plot of accuracy against seconds."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks import time_to_accuracy as tta
from benchmarks.time_to_accuracy import main, row_of, views
from resfast.cli.train import command_line
from resfast.config.files import load
from resfast.config.recipes import RECIPES
from resfast.config.schema import Config
from resfast.config.validate import check
from resfast.errors import ResfastError
from resfast.inference.scoring import evaluate
from resfast.runs import folder as records
from resfast.runs import plots, targets
from resfast.training import loop as trainer
from resfast.training import seeds as runs
from tests.conftest import change


@pytest.fixture
def options(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The only fast recipe is the tiny one; where rows and runs go."""
    for name in [name for name in RECIPES if name.startswith("fast")]:
        monkeypatch.delitem(RECIPES, name)
    recipe = replace(change(tiny, epochs=2, eval_every=0, name=None), recipe="fast-tiny")
    monkeypatch.setitem(RECIPES, "fast-tiny", recipe)
    return ["--out", str(tmp_path / "rows"), "--runs-folder", str(tmp_path / "runs")]


def only_row(folder: Path) -> dict:
    (path,) = folder.glob("time-to-accuracy-*.json")
    return json.loads(path.read_text())


def no_training(*args: object, **kwargs: object) -> None:
    raise AssertionError("trained")


def test_a_recipe_becomes_a_row_of_several_seeds_and_a_plot(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--runs", "2", *options, "--", "--seed", "4"]) == 0
    row = only_row(tmp_path / "rows")
    folder = tmp_path / "runs" / "time-to-accuracy-fast-tiny"
    summary = json.loads((folder / records.SUMMARY).read_text())
    assert row["recipe"] == "fast-tiny"
    assert row["seeds"] == [4, 5]
    for name in ("accuracies", "mean", "sd", "data_digest", "peak_memory_bytes", "timing_rule"):
        assert row[name] == summary[name], name
    assert row["seconds"]["timed"] == summary["seconds"]["timed"]
    assert row["data"].startswith("folder:")
    assert row["versions"]["torch"] == torch.__version__
    assert row["threads"] == 1
    # 2 epochs of 48 images forward and backward, 16 test images and their mirrors forward.
    assert row["flops"] == 2 * summary["macs"] * (3 * 2 * 48 + 2 * 16)
    assert "--recipe fast-tiny --seed 4 --runs 2" in row["command"]
    assert (tmp_path / "rows" / "time-to-accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert f"{row['mean']:.2%}" in capsys.readouterr().out


def test_what_was_interrupted_goes_on_and_what_is_there_is_kept(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train, calls = trainer.train, []

    def stopping(config: Config | None = None, **kwargs: object) -> trainer.Result:
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(config, **kwargs)

    monkeypatch.setattr(trainer, "train", stopping)
    assert main(["fast-tiny", "--runs", "3", *options]) == 130
    assert not list((tmp_path / "rows").glob("*.json"))
    assert main(["fast-tiny", "--runs", "3", *options]) == 0
    assert [config.runtime.seed for config in calls] == [0, 1, 1, 2]
    assert only_row(tmp_path / "rows")["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("mirror", [1.0, 0.5, 0.125])
@pytest.mark.parametrize("select", [1.0, 0.25])
@pytest.mark.parametrize("kind", ["none", "flip", "shift", "multi-crop"])
def test_views_are_the_forward_passes_of_an_evaluation(kind: str, select: float, mirror: float):
    class Counting(nn.Module):
        seen = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += len(x)
            return x.mean((2, 3))

    model = Counting()
    batches = [(torch.randn(8, 3, 6, 6), torch.zeros(8, dtype=torch.int64)) for _ in range(2)]
    evaluate(model, batches, tta=kind, tta_select=select, tta_mirror=mirror)
    assert model.seen == 16 * views(kind, select, mirror)


def test_one_run_is_a_row_without_a_deviation(options: list[str], tmp_path: Path):
    assert main(["--runs", "1", *options, "--", "--seed", "4"]) == 0
    row = only_row(tmp_path / "rows")
    summary = json.loads((tmp_path / "runs/time-to-accuracy-fast-tiny/summary.json").read_text())
    assert (row["seeds"], row["accuracies"]) == ([4], [summary["tta_accuracy"]])
    assert (row["sd"], row["confidence_interval"]) == (None, None)
    assert row["seconds"]["timed"] == {"mean": summary["timed_seconds"], "sd": None}
    assert row["command"] == "python -m resfast.train --recipe fast-tiny --seed 4"
    for name in ("threads", "versions", "date", "peak_memory_bytes", "compile_seconds"):
        assert row[name] == summary[name], name


@pytest.mark.parametrize("count", [1, 2])
def test_folders_of_runs_become_rows_of_the_table_of_targets(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
):
    config = change(RECIPES["fast-tiny"], runs=count, name="some")
    folder = runs.train(config).path
    table = tmp_path / "targets.json"
    table.write_text("[]")
    monkeypatch.setattr(tta, "ROOT", tmp_path)
    monkeypatch.setattr(targets, "TABLE", table)
    monkeypatch.setattr(trainer, "train", no_training)
    before = targets.read(table)
    assert before == ()
    for _ in range(2):  # the second time in place of the first
        assert main(["--add", str(folder), "--out", str(tmp_path / "rows")]) == 0
    (row,) = targets.read(table)
    summary = json.loads((folder / records.SUMMARY).read_text())
    assert (row.recipe, row.runs, row.device) == ("fast-tiny", count, "cpu")
    assert row.accuracy == summary["mean" if count > 1 else "tta_accuracy"]
    assert row.sd == summary.get("sd")
    assert row.timed_seconds == summary["timed_seconds"]
    assert (tmp_path / row.source).exists()
    assert row.hardware in summary["device"]
    picked, _ = targets.pick(
        0.01, 1e6, device=torch.device("cpu"), data=config.data.data, rows=[row]
    )
    assert picked == row


def test_a_run_is_added_as_the_recipe_whose_numbers_it_has(
    options: list[str], monkeypatch: pytest.MonkeyPatch
):
    config = RECIPES["fast-tiny"]
    longer = replace(change(config, epochs=3), recipe="fast-longer")
    monkeypatch.setitem(RECIPES, "fast-longer", longer)
    # Where it runs, under which name and how often it is scored are not numbers of a recipe.
    free = {"threads": 2, "eval_every": 1, "name": "x", "runs": 3}
    assert tta.recipe_of(change(config, **free)) == "fast-tiny"
    assert tta.recipe_of(change(config, epochs=3, **free)) == "fast-longer"
    assert tta.recipe_of(change(longer, epochs=2)) == "fast-tiny"
    with pytest.raises(
        ResfastError, match=r"no recipe \(the closest is fast-longer, but with lr 7\.0 instead of"
    ):
        tta.recipe_of(change(config, epochs=3, lr=7.0))


@pytest.mark.parametrize("epochs", [28, 70])
def test_a_run_of_default_is_known_by_its_length(epochs: int):
    path = tta.RESULTS / f"2026-11-28-cpu/fast-resnet-2111-{epochs}-epochs-seed0/config.json"
    config = load(path)
    assert config.recipe == "fast-resnet-2111"  # trained before default had these values
    assert tta.recipe_of(config) == "default"
    assert tta.point_of(replace(config, recipe="default")) == f"--epochs {epochs}"
    other = change(config, model="resnet-453")
    assert tta.recipe_of(other) == "default"
    point = tta.point_of(replace(other, recipe="default"))
    assert point == f"--epochs {epochs} --model resnet-453"
    with pytest.raises(ResfastError, match=r"closest is default, but with filter_keep 0\.6 inst"):
        tta.recipe_of(change(config, filter_keep=0.6))


def test_recipes_for_one_length_have_no_options():
    assert tta.point_of(change(RECIPES["fast94"], epochs=9)) == ""
    assert tta.point_of(RECIPES["default"]) == ""  # the number of epochs is not known yet


def test_a_run_with_other_numbers_stays_out_of_the_table(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = trainer.train(change(RECIPES["fast-tiny"], epochs=1, name="short")).path
    table = tmp_path / "targets.json"
    table.write_text("[]")
    monkeypatch.setattr(targets, "TABLE", table)
    monkeypatch.setattr(tta, "ROOT", tmp_path)
    assert main(["--add", str(folder), "--out", str(tmp_path / "rows")]) == 2
    assert table.read_text() == "[]"
    assert not (tmp_path / "rows").exists()


def test_rows_that_would_not_be_honest_are_refused(options: list[str], tmp_path: Path):
    config = RECIPES["fast-tiny"]
    one = trainer.train(change(config, name="one")).path
    summary = json.loads((one / records.SUMMARY).read_text())
    del summary["date"], summary["versions"]
    (one / records.SUMMARY).write_text(json.dumps(summary))
    with pytest.raises(ResfastError, match="does not have its versions, date; an older resfast"):
        row_of(one)
    cut = runs.train(change(config, name="cut", runs=2, max_seconds=1e-9)).path
    with pytest.raises(ResfastError, match=r"cut short \(max_seconds\)"):
        row_of(cut)
    held = runs.train(change(config, name="held", runs=2, val_fraction=0.25, score_test=False)).path
    row = row_of(held)
    assert (row.scored_on, row.accuracy) == ("val", "val_tta_accuracy")
    with pytest.raises(ResfastError, match="held-out training images"):
        tta.target_row(row, "x.json")
    summary = json.loads((held / records.SUMMARY).read_text())
    (held / records.SUMMARY).write_text(json.dumps(summary | {"finished": 1}))
    with pytest.raises(ResfastError, match=r"1 of 2 runs; continue with.*--resume"):
        row_of(held)
    (held / records.SUMMARY).unlink()
    with pytest.raises(ResfastError, match="cannot read"):
        row_of(held)


COMPONENTS = [
    {"component": "without averaging", "options": "--ema 0"},
    {"component": "twice the rate", "options": "--lr 0.1"},
]


def test_an_ablation_compares_each_component_with_the_whole(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "components.json"
    file.write_text(json.dumps(COMPONENTS[:1]))
    command = ["fast-tiny", "--ablation", str(file), "--runs", "2", *options]
    assert main(command) == 0
    rows = json.loads((tmp_path / "rows" / "ablation-fast-tiny.json").read_text())
    assert [row["component"] for row in rows] == ["fast-tiny", "without averaging"]
    config = json.loads(
        (tmp_path / "runs/ablation-fast-tiny-without-averaging/seed1/config.json").read_text()
    )
    assert config["optim"]["ema"] == 0
    table = (tmp_path / "rows" / "ablation-fast-tiny.md").read_text().splitlines()
    whole, without = (row["row"] for row in rows)
    difference = 100 * (without["mean"] - whole["mean"])
    assert len(table) == 6
    assert table[4].startswith(f"| fast-tiny |  | {whole['mean']:.2%} ± {whole['sd']:.2%} |")
    assert f"| `--ema 0` | {without['mean']:.2%}" in table[5]
    assert f"| {difference:+.2f} ± " in table[5]
    assert f"| {without['flops'] / 1e15:.3g} | " in table[5]

    # Lines that are there are kept; only the new one is trained.
    file.write_text(json.dumps(COMPONENTS))
    train, trained = runs.train, []

    def watching(config: Config, **kwargs: object) -> trainer.Result:
        trained.append(config.run.name)
        return train(config, **kwargs)

    monkeypatch.setattr(runs, "train", watching)
    assert main(command) == 0
    assert trained == ["ablation-fast-tiny-twice-the-rate"]
    again = json.loads((tmp_path / "rows" / "ablation-fast-tiny.json").read_text())
    assert again[:2] == rows
    assert len(again) == 3


def test_the_components_of_fast94_can_be_switched():
    components = json.loads((tta.ROOT / "benchmarks/data/ablation-fast94.json").read_text())
    whole, seen = command_line(["--recipe", "fast94"])[1], []
    for component in map(tta.Component.model_validate, components):
        config = command_line(["--recipe", "fast94", *shlex.split(component.options)])[1]
        check(config)
        seen.append(config)
    assert len(seen) >= 15
    assert all(a != b for a, b in combinations([whole, *seen], 2))


@pytest.mark.parametrize(
    ("switch", "message"),
    [("--ema 0.9", "changes nothing of fast-tiny"), ("--lr 0", r"--lr 0\.0 is out of range")],
)
def test_all_components_are_checked_before_anything_is_trained(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str, message: str
):
    monkeypatch.setattr(trainer, "train", no_training)
    components = [tta.Component(component="bad", options=switch)]
    with pytest.raises(ResfastError, match=message):
        tta.ablation("fast-tiny", components, 2, [], tmp_path / "runs", tmp_path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return figures


KINDS = ("timed", "whitening", "train", "final_eval", "eval", "compile", "total")
VERSIONS = {"resfast": "0.1.0", "torch": "2", "python": "3.11.7", "cuda": None, "cudnn": None}


def some_row(**values: object) -> tta.Row:
    return tta.Row(
        **{
            "recipe": "fast94", "model": "speednet-94", "params": 2_000_000, "device": "cpu",
            "hardware": "AMD EPYC", "threads": 2, "versions": VERSIONS, "precision": "bf16",
            "data": "folder:cifar10-jpeg.tar.xz", "data_digest": "d", "scored_on": "test",
            "accuracy": "tta_accuracy", "seeds": [0, 1], "accuracies": [0.5, 0.6], "mean": 0.55,
            "sd": 0.07, "confidence_interval": (0.1, 1.0), "total_seconds": 9.0,
            "seconds": {kind: {"mean": 3.0, "sd": 0.1} for kind in KINDS}, "compile_seconds": 2.0,
            "timing_rule": "", "flops": 5, "peak_memory_bytes": 7, "date": "2026-11-21",
            "command": "",
        }
        | values
    )  # fmt: skip


def test_the_plot_shows_whose_on_what_and_where(drawn: list[Figure], tmp_path: Path):
    jpeg, original = some_row(), some_row(recipe="fast95", data="cifar10")
    tta.save_plot([jpeg, original], tta.public_results(), tmp_path / "plot.png")
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log"
    words = [text.get_text() for text in axes.texts]
    assert any(w.startswith("fast94 (cifar10-jpeg.tar.xz)\n55.00%, 3 s, AMD EPYC") for w in words)
    assert any(w.startswith("fast95\n") for w in words)
    assert any(w.startswith("airbench94_muon\n94.01%, 2.59 s, NVIDIA A100") for w in words)
    assert any("(CIFAR-10 as JPEG, quality 75)" in w and "621 s" in w for w in words)
    assert any("1500 to 2100 s" in w for w in words)
    found = {}
    for container, text in zip(axes.containers, words[::1], strict=True):
        line = container.lines[0]
        hollow = line.get_markerfacecolor() == "white"
        found[text.split("\n")[0].split(" (")[0]] = line.get_marker(), hollow
    assert found["fast94"] == ("s", False)
    assert found["fast95"] == ("o", False)
    assert found["airbench96_faster"] == ("o", True)
    assert found["airbench94_muon, ported to the CPU"] == ("s", True)


def test_public_results_are_those_of_their_sources():
    found = {p.name: (p.accuracy, p.seconds) for p in tta.public_results()}
    assert found["airbench94_muon"] == (0.9401, (2.59, 2.59))
    assert found["Hiverge 2025"] == (0.9401, (2.015, 2.015))
    assert found["airbench96_faster"] == (0.96, (27.3, 27.3))
    assert found["ResNet-18, standard training"] == (0.96, (420, 420))
    assert found["airbench94_muon, ported to the CPU"] == (0.9066, (621, 621))
    assert all(p.source for p in tta.public_results())


def test_the_plot_alone_trains_nothing(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer, "train", no_training)
    assert main(["--plot", "--out", str(tmp_path)]) == 2
    tta.write_row(some_row(), tmp_path)
    assert main(["--plot", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "time-to-accuracy.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast-tny"], "unknown recipe 'fast-tny'; did you mean 'fast-tiny'"),
        (["fast-tiny", "--runs", "0"], "--runs 0 is out of range"),
        (["fast-tiny", "--plot"], "do not train"),
        (["--ablation", "x.json"], "exactly one recipe"),
        (["fast-tiny", "--ablation", "missing.json"], "cannot read missing.json"),
        (["fast-tiny", "--lr", "0"], "unrecognized arguments: --lr"),
        (["fast-tiny", "--", "--lr", "0"], "--lr 0.0 is out of range"),
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    try:
        code = main([*options, *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_damaged_ablation_or_row_names_the_place(options: list[str], tmp_path: Path):
    file = tmp_path / "components.json"
    file.write_text(json.dumps([{"component": "a", "options": "", "more": 1}]))
    with pytest.raises(ResfastError, match="more"):
        tta.read_components(file)
    file.write_text(json.dumps([{"component": "A b", "options": ""}] * 2))
    with pytest.raises(ResfastError, match="same name"):
        tta.read_components(file)
    path = tta.write_row(some_row(), tmp_path)
    path.write_text(path.read_text().replace('"mean": 0.55', '"mean": 55'))
    with pytest.raises(ResfastError, match="mean"):
        tta.read_rows(tmp_path)


def test_the_command_of_a_row_names_no_folder_of_the_machine():
    given = "--data folder:/a/b.tar.xz --data-dir /c --epochs 2 --out=/d --data=shards:/e/f"
    shown = tta.without_folders(given.split())
    assert shown == "--data folder:b.tar.xz --epochs 2 --data shards:f".split()
