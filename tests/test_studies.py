"""Studies: the catalog, sharing and continuing, statistics, and what is written."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resfast.cli.study import main
from resfast.config.network import network
from resfast.errors import NonFiniteLossError, ResfastError
from resfast.models.presets import build_model
from resfast.models.resnet import count_parameters
from resfast.runs import folder as records
from resfast.runs.lock import lock
from resfast.runs.statistics import statistics
from resfast.studies import runner as running
from resfast.studies.definition import Claim, names, read, study
from resfast.studies.figures import bands
from resfast.studies.ranking import holm, rank, verdicts, welch
from resfast.studies.results import read_results, row_of, save_results
from resfast.studies.runner import Runner, Settings
from resfast.studies.study import run
from resfast.training import loop as trainer
from tests.conftest import interrupt_at
from tests.test_training import assert_same_weights

TINY = """
title = "Widths of a tiny network"
report = "000"
base = "cosine"
seeds = 2
plots = [{ kind = "accuracy" }]

[options]
model = "resnet"
blocks = [1, 1]
channels = [8, 16]
stem = 8
image_size = 16
max_images = 300
epochs = 2
batch_size = 64
compile = "off"
precision = "fp32"
lr = 0.02
record = ["loss"]

[quick.options]
max_images = 100

[[variants]]
name = "narrow"
group = "both"
reported = 0.9

[[variants]]
name = "wide"
group = "both"
options = { channels = [12, 20] }

[[claims]]
text = "Wide is better than narrow"
better = "wide"
worse = "narrow"
"""


ALL_PLOTS = """plots = [
  { kind = "accuracy" }, { kind = "curves" }, { kind = "parameters" }, { kind = "seconds" },
  { kind = "band", column = "loss", label = "training loss (nats)" },
]"""


@pytest.fixture
def tiny_study(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def settings(tmp_path: Path, **values: object) -> Settings:
    usual: dict = {"data": "digits", "data_dir": tmp_path / "data", "out": tmp_path / "studies"}
    return Settings(**usual | {"device": "cpu", "threads": 1} | values)


def changed(path: Path, *pairs: tuple[str, str]) -> Path:
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


# -- the catalog ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_each_variant_of_the_catalog_is_a_training(name: str):
    found = study(name)
    assert found.title
    assert found.seed_count(quick=True) >= 2
    assert found.seed_count(quick=False) >= 2
    for variant in found.variants:
        config, quick = (found.config(variant, is_quick) for is_quick in (False, True))
        assert quick.data.max_images
        assert quick.optim.epochs < config.optim.epochs
        with torch.device("meta"):
            model = build_model(network(config.model), image_size=config.data.image_size)
            build_model(network(quick.model), image_size=quick.data.image_size)
        if variant.parameters is not None:
            assert count_parameters(model) == variant.parameters
    assert len({plot.file for plot in found.plots}) == len(found.plots)


def test_the_catalog_has_the_parameters_that_the_reports_state():
    stated = [(variant.stated, variant) for name in names() for variant in study(name).variants]
    numbers = [(text.split()[0], variant) for text, variant in stated if text[:1].isdigit()]
    assert len(numbers) > 15
    for text, variant in numbers:
        exact = "," in text
        count = int(text.replace(",", "")) if exact else 1e6 * float(text)
        assert variant.parameters == pytest.approx(count, rel=0 if exact else 1e-3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 0.02", "learning_rate = 0.02", "no option 'learning_rate'"),
        ("epochs = 2", "epochs = -2", "optim.epochs"),
        ("channels = [12, 20]", 'activation = "swish"', "model.activation"),
        ('name = "wide"', 'name = "narrow"', "there twice"),
        ('worse = "narrow"', 'worse = "deep"', "no variant 'deep'"),
        ('worse = "narrow"', "", "needs better and worse"),
        ('base = "cosine"', 'base = "sine"', "no table 'sine'"),
        ('title = "Widths of a tiny network"', "", "title"),
        ('kind = "accuracy"', 'kind = "band"', "exactly if its kind is band"),
        ("channels = [12, 20]", 'teacher = "run of huge"', "needs 'huge'"),
        ("[options]", "[options", "expected a study as TOML"),
    ],
)
def test_a_study_that_cannot_be_trained_is_refused(
    tiny_study: Path, old: str, new: str, message: str
):
    with pytest.raises(ResfastError, match=re.escape(message)):
        read(changed(tiny_study, (old, new)))


def test_the_command_lists_studies_and_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in names())
    for args, message in (
        ([], "needs the NAME"),
        (["width-dept"], "did you mean 'width-depth'"),
        (["missing.toml"], "no file missing.toml"),
        (["width-depth", "--seeds", "0", "--out", str(tmp_path)], "--seeds 0 is out of range"),
        (["width-depth", "--variants", "deap", "--out", str(tmp_path)], "did you mean 'deep'"),
    ):
        assert main(args) == 2
        assert message in capsys.readouterr().err


# -- training -------------------------------------------------------------------------------------


def test_a_study_writes_rows_a_ranking_and_figures(
    tiny_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    changed(tiny_study, ('plots = [{ kind = "accuracy" }]', ALL_PLOTS))
    opened = []
    open_data = running.open_configured_data
    monkeypatch.setattr(
        running, "open_configured_data", lambda *args: opened.append(1) or open_data(*args)
    )
    out = tmp_path / "studies"
    args = [str(tiny_study), "--data", "digits", "--out", str(out), "--threads", "1"]
    args += ["--data-dir", str(tmp_path / "data"), "--device", "cpu"]
    assert main(args) == 0
    assert len(opened) == 1
    shown = capsys.readouterr().out
    folder = out / "tiny"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("narrow", "0"), ("narrow", "1"), ("wide", "0"), ("wide", "1"),
    ]  # fmt: skip
    for row in rows:
        path = folder / "runs" / row["variant"] / f"seed{row['seed']}"
        saved = json.loads((path / records.SUMMARY).read_text())
        assert float(row["accuracy"]) == pytest.approx(saved["test_accuracy"], rel=1e-5)
        assert int(row["parameters"]) == saved["params"]
        assert int(row["train_images"]) == 300
        assert not (path / records.CURVES).exists()
    text = (folder / "summary.md").read_text()
    assert text in shown
    for name in ("narrow", "wide"):
        found = statistics([float(row["accuracy"]) for row in rows if row["variant"] == name])
        assert f"| {found.mean:.2%} |" in text
    assert "Wide is better than narrow" in text
    for figure in ("accuracy", "curves", "parameters", "seconds", "loss"):
        assert f"({figure}.png)" in text
        with Image.open(folder / f"{figure}.png") as image:
            assert image.width > 800
            assert np.asarray(image.convert("L")).std() > 5  # it shows something
    # Again: nothing is trained, and the rows stay.
    before = (folder / "results.csv").read_bytes()
    assert main(args) == 0
    assert "runs in" not in capsys.readouterr().out
    assert (folder / "results.csv").read_bytes() == before
    # One variant alone leaves the rows of the other.
    assert main([*args, "--variants", "wide", "--seeds", "1"]) == 0
    assert (folder / "results.csv").read_bytes() == before
    assert main([*args, "--quick"]) == 2
    assert "with quick false, not true" in capsys.readouterr().err
    changed(tiny_study, ("channels = [12, 20]", "channels = [12, 24]"))
    assert main(args) == 2
    assert "has the variant wide with other options" in capsys.readouterr().err


def test_a_run_of_a_study_has_the_bits_of_the_same_run_alone(tiny_study: Path, tmp_path: Path):
    found = read(tiny_study)
    Runner(found, settings(tmp_path), print).train()
    shared = tmp_path / "studies" / "tiny" / "runs" / "wide" / "seed1"
    alone = Runner(found, settings(tmp_path, out=tmp_path / "alone"), print)
    trainer.train(alone.config(alone.units[-1]))
    other = tmp_path / "alone" / "tiny" / "runs" / "wide" / "seed1"
    assert_same_weights(shared, other)


def test_an_interrupted_study_continues_where_it_stopped(
    tiny_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = read(tiny_study)
    whole = run(found, settings(tmp_path, out=tmp_path / "whole"), print)
    args = [str(tiny_study), "--data", "digits", "--out", str(tmp_path / "studies")]
    args += ["--data-dir", str(tmp_path / "data"), "--device", "cpu", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 12)  # in the second epoch of the second run
        assert main(args) == 130
    assert "the same command continues the study" in capsys.readouterr().err
    folder = tmp_path / "studies" / "tiny"
    assert len(read_results(folder / "results.csv")) == 1
    assert "Not trained with all seeds: narrow, wide" in (folder / "summary.md").read_text()
    finished = folder / "runs" / "narrow" / "seed0" / records.SUMMARY
    before = finished.stat().st_mtime_ns
    assert main(args) == 0
    assert "resuming" in capsys.readouterr().out
    assert finished.stat().st_mtime_ns == before
    both = zip(whole.rows, read_results(folder / "results.csv"), strict=True)
    for one, other in both:
        assert (one.variant, one.seed) == (other.variant, other.seed)
        assert other.accuracy == pytest.approx(one.accuracy, rel=1e-5)
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-5)


@pytest.mark.timeout(120)
def test_processes_share_a_study_and_a_killed_one_leaves_its_run_to_the_others(
    tiny_study: Path, tmp_path: Path, image_tree: Path
):
    changed(tiny_study, ("epochs = 2", "epochs = 40"), ("batch_size = 64", "batch_size = 12"))
    data = f"folder:{image_tree}"
    command = [sys.executable, "-m", "resfast.study", str(tiny_study), "--data", data]
    command += ["--out", str(tmp_path / "studies"), "--data-dir", str(tmp_path / "data")]
    command += ["--device", "cpu", "--threads", "1"]
    folder = tmp_path / "studies" / "tiny"
    first = folder / "runs" / "narrow" / "seed0"

    def begun() -> subprocess.Popen:
        """A process that is training."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline, is_training = time.monotonic() + 60, False
        while not is_training:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
            if (first / records.METRICS).exists():
                with lock(folder / "locks" / "narrow-seed0", wait=False) as is_free:
                    is_training = not is_free
        return process

    killed = begun()
    killed.kill()
    killed.communicate()
    assert not (first / records.SUMMARY).exists()
    other, lines = begun(), []
    result = run(read(tiny_study), settings(tmp_path, data=data), lines.append)
    shown, errors = other.communicate()
    assert other.returncode == 0
    assert "resuming" in shown
    theirs, ours = (re.findall(r"run (\d) of 4", text) for text in (errors, "\n".join(lines)))
    assert len(ours) == result.progress.trained > 0
    assert sorted(theirs + ours) == ["1", "2", "3", "4"]
    assert len(read_results(folder / "results.csv")) == len(result.rows) == 4
    assert (folder / "summary.md").read_text() in shown


def test_a_run_that_diverges_is_a_result(tiny_study: Path, tmp_path: Path):
    path = changed(tiny_study, ("channels = [12, 20]", "lr = 1e30"))
    result = run(read(path), settings(tmp_path, seeds=1), print)
    assert [row.stopped for row in result.rows] == [None, "diverged"]
    text = (result.path / "summary.md").read_text()
    assert "Runs whose loss became infinite or NaN: wide (1)." in text
    assert "| Wide is better than narrow | the report | not measured |" in text
    again = run(read(path), settings(tmp_path, seeds=1), print)
    assert again.progress.trained == 0


def test_a_teacher_and_pseudo_labels_come_from_the_same_seed(tiny_study: Path, tmp_path: Path):
    path = changed(
        tiny_study,
        ("channels = [12, 20]", 'teacher = "run of narrow"'),
        ("[[claims]]", '[[variants]]\nname = "pseudo"\n[variants.options]\nunlabelled = "rest"\n'
         'pseudo_from = "run of narrow"\npseudo_threshold = 0.0\n[[claims]]'),
    )  # fmt: skip
    result = run(read(path), settings(tmp_path, variants=("pseudo", "wide")), print)
    assert {row.variant for row in result.rows} == {"narrow", "wide", "pseudo"}
    for seed in (0, 1):
        runs = result.path / "runs"
        saved = json.loads((runs / "wide" / f"seed{seed}" / records.CONFIG).read_text())
        assert Path(saved["transfer"]["teacher"]) == runs / "narrow" / f"seed{seed}"
    counts = {row.variant: row.train_images for row in result.rows}
    assert counts["narrow"] == 300
    assert counts["pseudo"] == 900
    images = np.load(result.path / "unlabelled.npy")
    assert images.shape == (600, 16, 16, 3)


def test_a_study_costs_little_more_than_its_trainings(tiny_study: Path, tmp_path: Path):
    """At most 1.05 times on a machine of its own; other tests run beside this one."""
    changed(tiny_study, ("epochs = 2", "epochs = 4"), ("max_images = 300", "max_images = 600"))
    runner = Runner(read(tiny_study), settings(tmp_path, seeds=3), print)
    runner.train()
    progress = runner.progress
    assert progress.trained == 6
    assert progress.seconds <= 1.5 * progress.training_seconds


# -- locks, statistics, rows ----------------------------------------------------------------------


def test_a_lock_is_held_by_one_and_free_again(tmp_path: Path):
    path = tmp_path / "lock"
    with lock(path, wait=False) as first:
        assert first
        with lock(path, wait=False) as second:
            assert not second
    with lock(path, wait=True) as third:
        assert third
    with (
        pytest.raises(ResfastError, match="cannot write"),
        lock(tmp_path / "no" / "lock", wait=True),
    ):
        pass


def test_differences_and_corrections_are_those_of_the_textbook():
    from scipy.stats import ttest_ind

    first, second = [0.91, 0.93, 0.92], [0.88, 0.90, 0.85, 0.89]
    found = welch(first, second)
    expected = ttest_ind(first, second, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert holm([0.01, None, 0.04, 0.03]) == [0.03, None, 0.06, 0.06]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert welch([0.5], [0.4, 0.5]).p is None
    assert welch([0.5, 0.5], [0.4, 0.4]).p is None  # no spread to judge by


def test_a_ranking_calls_noise_no_difference():
    ranked = rank(
        {
            "good": [0.90, 0.91, 0.92],
            "as good": [0.905, 0.90, 0.915],
            "bad": [0.50, 0.51, 0.52],
            "lost": [None, None, None],
        }
    )
    assert [item.name for item in ranked] == ["good", "as good", "bad", "lost"]
    assert ranked[0].to_best is None
    assert not ranked[1].to_best.is_significant
    assert ranked[2].to_best.is_significant
    assert ranked[2].to_best.mean == pytest.approx(-0.4)
    assert (ranked[3].found, ranked[3].diverged) == (None, 3)


def test_a_claim_holds_only_beyond_noise():
    runs = {"a": [0.90, 0.91, 0.92], "b": [0.60, 0.61, 0.62], "c": [0.905, 0.91, 0.90], "d": [None]}
    claims = [
        Claim(text="1", better="a", worse="b"),
        Claim(text="2", better="b", worse="a"),
        Claim(text="3", better="a", worse="c"),
        Claim(text="4", alike=("a", "c")),
        Claim(text="5", alike=("a", "b")),
        Claim(text="6", variant="a", at_least=0.91),
        Claim(text="7", variant="b", at_least=0.91),
        Claim(text="8", better="a", worse="d"),
    ]
    assert [verdict for verdict, _ in verdicts(claims, runs)] == [
        "held", "did not hold", "not distinguishable", "no difference beyond noise",
        "did not hold", "held", "did not hold", "not measured",
    ]  # fmt: skip


def test_a_band_lies_between_the_variants_of_a_group(tiny_study: Path, tmp_path: Path):
    runner = Runner(read(tiny_study), settings(tmp_path), print)
    for unit in runner.units:
        unit.path.mkdir(parents=True)
        wide = unit.variant.name == "wide"
        values = [3.0, math.inf] if wide else [1.0 + unit.seed, 2.0, 4.0]
        lines = ["step,epoch,learning_rate,loss", *(f"{i},1,0.1,{v}" for i, v in enumerate(values))]
        (unit.path / records.STEPS).write_text("\n".join(lines) + "\n")
    low, high = bands(runner.units, "loss")["both"]
    assert low.tolist() == [1.5, 2.0, 4.0]
    assert high.tolist() == [3.0, 2.0, 4.0]


def test_rows_are_read_back(tiny_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def diverge(config, **_):
        path = config.run.out / config.run.name
        path.mkdir(parents=True)
        records.write_config(path, config)
        raise NonFiniteLossError("the loss is nan")

    monkeypatch.setattr(running.trainer, "train", diverge)
    runner = Runner(read(tiny_study), settings(tmp_path), print)
    runner.train()
    rows = [row_of(unit) for unit in runner.finished()]
    save_results(tmp_path / "rows.csv", rows)
    assert read_results(tmp_path / "rows.csv") == rows
    (tmp_path / "rows.csv").write_text("variant,group,seed\na,,x\n")
    with pytest.raises(ResfastError, match="expected the results"):
        read_results(tmp_path / "rows.csv")
