"""Finished runs that are continued up to more epochs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import resfast
from resfast.cli.train import main
from resfast.config import files
from resfast.config.schema import Config
from resfast.data.augment import parse_augment
from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.training.loop import Interrupted, train
from tests.conftest import change, interrupt_at
from tests.test_training import assert_same_weights


def continued(path: Path, epochs: float) -> Path:
    saved = files.load(path / records.CONFIG)
    return train(change(saved, epochs=epochs), resume=path).path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / records.METRICS).read_text().splitlines()]


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "constant"},
        {"schedule": "multistep", "milestone_steps": (9,), "drop_last": False, "batch_size": 20},
        {"schedule": "multistep", "milestones": (1,), "optimizer": "adam", "lr": 1e-3},
        {"schedule": "plateau", "patience": 0, "gamma": 0.5, "end_factor": 0.01},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_where_the_length_changes_nothing_both_give_the_same_bits(tiny: Config, values: dict):
    config = change(tiny, warmup=0.0, augment=parse_augment("crop=1,mixup=0.4"), **values)
    whole = train(change(config, epochs=4, name="whole"))
    first = train(change(config, epochs=2))
    assert (first.path / records.SUMMARY).exists()
    path = continued(first.path, 4)
    assert_same_weights(path, whole.path)
    assert [row["train_loss"] for row in rows(path)] == [
        row["train_loss"] for row in rows(whole.path)
    ]
    summary = json.loads((path / records.SUMMARY).read_text())
    assert summary["epochs"] == 4
    assert files.load(path / records.CONFIG).optim.epochs == 4


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "linear"])
def test_the_rate_is_that_of_the_longer_schedule_from_there_on(
    tiny: Config, schedule: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = change(tiny, schedule=schedule, ema=0.0, lookahead=3)
    whole = train(change(config, epochs=5, name="whole"))
    first = train(change(config, epochs=2)).path
    copies = [Path(shutil.copytree(first, first.parent / name)) for name in ("again", "stopped")]
    continued(first, 5)
    assert "continuing" in capsys.readouterr().out
    expected = [row["lr"] for row in rows(whole.path)]
    assert [row["lr"] for row in rows(first)[2:]] == expected[2:]
    assert rows(first)[1]["lr"] != expected[1]
    continued(copies[0], 5)
    assert_same_weights(copies[0], first)
    interrupt_at(monkeypatch, 6)
    with pytest.raises(Interrupted):
        continued(copies[1], 5)
    monkeypatch.undo()
    assert not (copies[1] / records.SUMMARY).exists()  # its result is not that of the longer run
    assert_same_weights(train(resume=copies[1]).path, first)


def test_an_interrupted_run_may_become_longer(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    config = change(tiny, schedule="constant", warmup=0.0)
    whole = train(change(config, epochs=4, name="whole"))
    interrupt_at(monkeypatch, 5)
    with pytest.raises(Interrupted) as stopped:
        train(change(config, epochs=2))
    monkeypatch.undo()
    assert_same_weights(continued(stopped.value.path, 4), whole.path)


def test_what_cannot_become_longer_is_refused(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    path = train(tiny).path
    with pytest.raises(ResfastError, match=r"with --epochs 2: it has 3.*which is more"):
        continued(path, 2)
    saved = files.load(path / records.CONFIG)
    with pytest.raises(ResfastError, match="lr was"):
        train(change(saved, epochs=5, lr=0.2), resume=path)
    half = train(change(tiny, epochs=1.5, name="half")).path
    with pytest.raises(ResfastError, match=r"its 1\.5 epochs end within one"):
        continued(half, 3)
    interrupt_at(monkeypatch, 5)
    with pytest.raises(Interrupted) as stopped:
        train(change(tiny, sizes=((12, 0.9),), name="stopped"))
    monkeypatch.undo()
    with pytest.raises(ResfastError, match="it stopped within an epoch"):
        continued(stopped.value.path, 6)


def test_several_seeds_become_longer_together(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    several = change(tiny, runs=2)
    whole = resfast.train(change(several, epochs=4, schedule="constant", warmup=0.0, name="whole"))
    first = resfast.train(change(several, epochs=2, schedule="constant", warmup=0.0)).path
    saved = files.load(first / records.CONFIG)
    interrupt_at(monkeypatch, 3)  # within the first
    with pytest.raises(Interrupted):
        resfast.train(change(saved, epochs=4), resume=first)
    monkeypatch.undo()
    result = resfast.train(resume=first)
    assert result.summary.accuracies == whole.summary.accuracies
    for seed in ("seed0", "seed1"):
        assert_same_weights(first / seed, whole.path / seed)


def test_more_epochs_by_command(tiny: Config, capsys: pytest.CaptureFixture[str]):
    path = train(change(tiny, epochs=1)).path
    assert main(["--resume", str(path), "--epochs", "2"]) == 0
    assert len(rows(path)) == 2
    assert main(["--resume", str(path), "--epochs", "1"]) == 2
    assert "with --epochs 1: it has 2" in capsys.readouterr().err
