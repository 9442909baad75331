"""Runs that are killed or interrupted end with the same bits as runs that are not."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from resfast import runtime
from resfast.cli.train import main
from resfast.config.schema import Config
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.training.loop import Interrupted, train
from tests.conftest import TINY_OPTIONS, change, interrupt_at
from tests.test_training import assert_same_weights

LONG = ["--epochs", "12", "--dropout", "0.1", "--ema", "0.9", "--augment", "strong"]
ROW = re.compile(r" *(epoch|\d+/12)\b")
"""The heading of the table of epochs, and its rows."""


def command(tree: Path, folder: Path, name: str) -> list[str]:
    run = [sys.executable, "-m", "resfast.train", *TINY_OPTIONS, *LONG]
    run += ["--data", f"folder:{tree}", "--data-dir", str(folder / "data")]
    return [*run, "--out", str(folder), "--name", name]


def resume(path: Path) -> list[str]:
    return [sys.executable, "-m", "resfast.train", "--resume", str(path)]


@pytest.fixture(scope="module")
def whole(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run in this process, and how many seconds one of its epochs took."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(command(image_tree, folder, "whole")[3:]) == 0
    rows = (folder / "whole" / records.METRICS).read_text().splitlines()
    epochs = [json.loads(row) for row in rows]
    seconds = sum(row["train_seconds"] + row["eval_seconds"] for row in epochs)
    return folder / "whole", seconds / 12


def test_a_run_killed_at_random_points_ends_with_the_same_weights(
    whole: tuple[Path, float], image_tree: Path, tmp_path: Path
):
    reference, epoch_seconds = whole
    chance = random.Random(0)
    path = tmp_path / "killed"
    arguments = command(image_tree, tmp_path, "killed")
    for _ in range(3):
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        # Counted in epochs, not in seconds alone: how fast a run is varies between processes. The
        # table's heading is the first of these lines.
        remaining = 1 + chance.randrange(3)
        for line in process.stdout:
            remaining -= bool(ROW.match(line))
            if not remaining:
                break
        time.sleep(chance.uniform(0, epoch_seconds))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        arguments = resume(path)
    done = subprocess.run(resume(path), capture_output=True, text=True, check=True)
    assert "test accuracy" in done.stdout
    assert_same_weights(path, reference)
    epochs = [line for line in (path / records.METRICS).read_text().splitlines() if line]
    assert len(epochs) == 12


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_names_the_command_to_go_on(
    whole: tuple[Path, float], image_tree: Path, tmp_path: Path, sent: signal.Signals, code: int
):
    process = subprocess.Popen(
        command(image_tree, tmp_path, "stopped"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.lstrip().startswith("2/12"):
            break
    process.send_signal(sent)
    _, error = process.communicate()
    assert process.returncode == code, error
    assert "Traceback" not in error
    advice = re.search(r"continue with: python (-m resfast\.train --resume \S+)", error)
    assert advice, error
    if sent == signal.SIGINT:
        subprocess.run([sys.executable, *advice[1].split()], capture_output=True, check=True)
    else:  # without another process
        assert main(advice[1].split()[2:]) == 0
    assert_same_weights(tmp_path / "stopped", whole[0])


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_stopping_after_any_step_changes_nothing(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, epoch: int, step: int
):
    tiny = change(tiny, dropout=0.3, head=(6,), schedule="plateau", patience=0, warmup=0.2)
    whole = train(change(tiny, name="whole"))

    interrupt_at(monkeypatch, 4 * epoch + step)
    with pytest.raises(Interrupted) as stopped:
        train(tiny)
    monkeypatch.undo()
    state = checkpoint.load_state(stopped.value.path / records.CHECKPOINT)
    assert (state["epoch"], state["step"]) == (epoch, step + 1)
    result = train(resume=stopped.value.path)
    assert_same_weights(result.path, whole.path)
    for key in ("test_accuracy", "tta_accuracy", "best_accuracy", "best_epoch"):
        assert result.summary[key] == whole.summary[key]


@pytest.mark.parametrize("order", [(3000, 2000), (2000, 3000)])
def test_the_peak_of_memory_is_that_of_all_sessions(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
):
    monkeypatch.setattr(runtime, "peak_memory", lambda device: order[0])
    with monkeypatch.context() as interrupting:
        interrupt_at(interrupting, 5)
        with pytest.raises(Interrupted) as stopped:
            train(tiny)
    monkeypatch.setattr(runtime, "peak_memory", lambda device: order[1])
    assert train(resume=stopped.value.path).summary.peak_memory_bytes == 3000


def test_a_run_without_a_checkpoint_starts_from_its_beginning(tiny: Config):
    whole = train(change(tiny, name="whole"))
    (whole.path / records.CHECKPOINT).unlink()
    leftover = whole.path / f".{records.CHECKPOINT}.1.abcd.tmp"
    leftover.write_bytes(b"half a checkpoint")
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    again = train(resume=whole.path)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not leftover.exists()
