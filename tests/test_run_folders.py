"""The folder of ``--runs`` wherever a run is expected: what each command makes of it."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import resfast
from resfast.cli.evaluate import main as evaluate_command
from resfast.cli.export import main as export_command
from resfast.cli.predict import main as predict_command
from resfast.cli.train import command_line
from resfast.config.files import load as load_config
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.runs.find import expanded, one_of, runs_in, seeds_in
from resfast.runs.statistics import statistics
from resfast.runs.summary import read_run
from resfast.training.loop import train
from resfast.training.seeds import train as train_seeds
from tests.conftest import change


def options(image_tree: Path, folder: Path) -> Config:
    config = change(Config(), model="resnet", blocks=(1, 1), channels=(8, 16), stem=8)
    config = change(config, data=f"folder:{image_tree}", data_dir=folder / "data", image_size=16)
    config = change(config, epochs=1, batch_size=12, lr=0.05, tta="flip", device="cpu")
    return change(config, precision="fp32", compile="off", threads=1, out=folder)


@pytest.fixture(scope="module")
def seeds(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three runs that differ in their seed, with held-out images."""
    folder = tmp_path_factory.mktemp("seeds")
    config = change(options(image_tree, folder), runs=3, name="three", val_fraction=0.25)
    return train_seeds(config).path


def held_out(run: Path) -> float:
    return read_run(run / "summary.json").val_tta_accuracy


def with_accuracies(seeds: Path, target: Path, values: list[float | None]) -> Path:
    """A copy of the seeds with other accuracies on their held-out images."""
    shutil.copytree(seeds, target)
    for number, value in enumerate(values):
        path = target / f"seed{number}" / "summary.json"
        summary = read_run(path)
        changed = replace(summary, val_accuracy=value, val_tta_accuracy=value)
        path.write_text(changed.to_json())
    return target


def test_runs_are_found_at_any_depth_with_numbers_in_order(tmp_path: Path) -> None:
    for name in ("b/seed10", "b/seed2", "a", "deep/er/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").touch()  # stopped before its first epoch
    (tmp_path / "plots").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in runs_in(tmp_path)]
    assert found == ["a", "b/seed2", "b/seed10", "d", "deep/er/c"]
    assert runs_in(tmp_path / "a") == []
    assert runs_in(tmp_path / "missing") == []
    assert expanded([tmp_path / "b", tmp_path / "a"], "x")[2] == tmp_path / "a"
    with pytest.raises(ResfastError, match=r"run .*seed2 is given twice; x has each run once"):
        expanded([tmp_path / "b", tmp_path / "b" / "seed2"], "x")


def test_a_folder_of_seeds_has_a_configuration_or_names_them_so(
    seeds: Path, tmp_path: Path
) -> None:
    assert [run.name for run in seeds_in(seeds)] == ["seed0", "seed1", "seed2"]
    for name in ("variant/seed0", "variant/seed7", "mixed/seed0", "mixed/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
    assert [run.name for run in seeds_in(tmp_path / "variant")] == ["seed0", "seed7"]
    assert seeds_in(tmp_path / "mixed") == []
    assert seeds_in(tmp_path) == []
    assert seeds_in(seeds.parent) == []
    assert seeds_in(seeds / "seed0") == []


def test_the_best_on_held_out_images_stands_for_all(seeds: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = with_accuracies(seeds, tmp_path / "best", [0.5, 0.75, 0.625])
    assert one_of(folder, "model.safetensors", said.append) == folder / "seed1"
    assert said == [f"of the 3 runs in {folder}: seed1, the best on held-out images"]
    (folder / "seed1" / "model.safetensors").unlink()
    assert one_of(folder, "model.safetensors", said.append) == folder / "seed2"
    for run in (folder / "seed0", folder / "seed2"):
        (run / "model.safetensors").unlink()
    with pytest.raises(ResfastError, match=r"none of the 3 runs in .* has model\.safetensors"):
        one_of(folder, "model.safetensors", said.append)


def test_without_held_out_images_the_first_stands_for_all(seeds: Path, tmp_path: Path) -> None:
    """And not the best on the test images."""
    said: list[str] = []
    folder = with_accuracies(seeds, tmp_path / "first", [None, None, None])
    for number, accuracy in enumerate((0.1, 0.9, 0.5)):
        path = folder / f"seed{number}" / "summary.json"
        path.write_text(replace(read_run(path), tta_accuracy=accuracy).to_json())
    assert one_of(folder, "model.safetensors", said.append) == folder / "seed0"
    assert "seed0, the first, as none were held out" in said[0]
    assert one_of(folder / "seed2", "model.safetensors", said.append) == folder / "seed2"


def test_evaluate_scores_each_seed_and_their_mean(
    seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_command([str(seeds), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    each = [resfast.evaluate(seeds / f"seed{n}", device="cpu") for n in range(3)]
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = statistics([one.with_tta.accuracy for one in each])
    assert record["tta_accuracy"]["mean"] == pytest.approx(found.mean)
    assert record["tta_accuracy"]["confidence_interval"] == pytest.approx([found.low, found.high])
    assert [one["test_accuracy"] for one in record["each"]] == [one.accuracy for one in each]
    for number, one in enumerate(each):
        own = json.loads((tmp_path / "out" / f"seed{number}" / "evaluation.json").read_text())
        assert own["test_accuracy"] == one.accuracy
        assert f"seed{number}  {one.accuracy:>8.2%}  {one.with_tta.accuracy:>8.2%}" in printed
    assert f"mean   {statistics([o.accuracy for o in each]).mean:>8.2%}" in printed
    assert f"interval of the mean {found.low:.2%} to {found.high:.2%}" in printed


def test_evaluate_leaves_out_unfinished_seeds(
    seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "some"
    shutil.copytree(seeds, folder)
    (folder / "seed1" / "model.safetensors").unlink()
    assert evaluate_command([str(folder), "--device", "cpu"]) == 0
    assert "left out, without model.safetensors: seed1" in capsys.readouterr().out
    for name in ("seed0", "seed2"):
        (folder / name / "model.safetensors").unlink()
    assert evaluate_command([str(folder), "--device", "cpu"]) == 2
    assert "finish them with python -m resfast.train --resume" in capsys.readouterr().err


def test_predict_takes_the_mean_of_the_softmax(
    seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    target = tmp_path / "out.csv"
    command = [str(seeds), str(tmp_path / "images.npy"), "--device", "cpu", "--csv", str(target)]
    assert predict_command(command) == 0
    assert "the mean of the probabilities of 3 of 3 runs" in capsys.readouterr().err
    members = [resfast.load(seeds / f"seed{n}", device="cpu") for n in range(3)]
    mean = torch.stack([one.probabilities(torch.from_numpy(images)) for one in members]).mean(0)
    rows = list(csv.reader(target.open()))[1:]
    assert [int(label) for _, label in rows] == mean.argmax(1).tolist()


def test_predict_prints_the_probabilities_of_the_mean(
    seeds: Path, image_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = image_tree / "test" / "left" / "000.png"
    assert predict_command([str(seeds), str(image), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    pairs = [dict(resfast.predict(seeds / f"seed{n}", [image], device="cpu")[0]) for n in range(3)]
    for name in ("left", "right"):
        assert f"{sum(one[name] for one in pairs) / 3:.2%}" in printed


def test_export_writes_the_run_that_stands_for_all(
    seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_accuracies(seeds, tmp_path / "best", [0.5, 0.75, 0.625])
    assert export_command([str(folder), "--format", "torch-export"]) == 0
    assert (folder / "seed1" / "export" / "model.pt2").is_file()
    assert "seed1, the best on held-out images" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["init_from", "teacher", "pseudo_from"])
def test_training_learns_from_the_run_that_stands_for_all(
    option: str, seeds: Path, image_tree: Path, tmp_path: Path
) -> None:
    """And the configuration that is saved names it, so that a resumed run has the same one."""
    folder = with_accuracies(seeds, tmp_path / "best", [0.5, 0.75, 0.625])
    config = change(options(image_tree, tmp_path / "runs"), name="learner", **{option: folder})
    if option == "pseudo_from":
        images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
        np.save(tmp_path / "more.npy", images)
        config = change(config, unlabelled=tmp_path / "more.npy", pseudo_threshold=0.0)
    result = train(config)
    saved = load_config(result.path / "config.json")
    assert getattr(saved.transfer, option) == folder / "seed1"


def test_the_command_line_names_the_run_that_stands_for_all(
    seeds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values of the recipe that depend on the other network are those for this run."""
    _, config = command_line(["--init-from", str(seeds), "--epochs", "2"])
    best = max(range(3), key=lambda n: held_out(seeds / f"seed{n}"))
    assert config.transfer.init_from == seeds / f"seed{best}"
    assert f"seed{best}, the best on held-out images" in capsys.readouterr().out
