"""One process writes a folder at a time, and what killed processes left does no harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resfast import atomic
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs.lock import FOLDER_LOCK, locked_folder
from resfast.training import seeds
from resfast.training.loop import train
from tests.conftest import change
from tests.test_training import assert_same_weights, weights

HOLD = """
import sys, time
from pathlib import Path
from resfast.runs.lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def test_a_run_is_not_resumed_while_another_process_writes_it(tiny: Config):
    path = train(change(tiny, epochs=1)).path
    other = hold(path)
    try:
        with pytest.raises(ResfastError, match=rf"is being written by process {other.pid} on .+"):
            train(resume=path)
    finally:
        kill(other)
    assert (path / FOLDER_LOCK).exists()  # as a killed process leaves it
    train(resume=path)
    assert not (path / FOLDER_LOCK).exists()


def test_several_runs_are_locked_together(tiny: Config):
    result = seeds.train(change(tiny, runs=2, epochs=1))
    other = hold(result.path)
    try:
        with pytest.raises(ResfastError, match="is being written by process"):
            seeds.train(resume=result.path)
    finally:
        kill(other)


def test_a_lock_that_a_killed_seed_left_is_removed(tiny: Config):
    result = seeds.train(change(tiny, runs=2, epochs=1))
    left = result.path / "seed0" / FOLDER_LOCK
    other = hold(left.parent)
    seeds.train(resume=result.path)
    assert left.exists()  # another process holds it
    kill(other)
    seeds.train(resume=result.path)
    assert not left.exists()


def test_a_lock_is_free_for_the_next_one_when_its_holder_ends(tmp_path: Path):
    for _ in range(3):
        with locked_folder(tmp_path):
            assert (tmp_path / FOLDER_LOCK).exists()
            with (
                pytest.raises(ResfastError, match=f"process {os.getpid()}"),
                locked_folder(tmp_path),
            ):
                pass
    assert not (tmp_path / FOLDER_LOCK).exists()


def test_a_run_killed_before_it_began_starts_over(tiny: Config, caplog: pytest.LogCaptureFixture):
    whole = train(change(tiny, name="whole")).path
    path = tiny.run.out / "tiny"
    path.mkdir()
    (path / f".{records.CONFIG}.999999@{atomic._host()}.ab12.tmp").write_text("{")
    (path / FOLDER_LOCK).write_text("")
    with pytest.raises(ResfastError, match=r"has nothing to resume: .* --name tiny"):
        train(resume=path)
    with pytest.raises(ResfastError, match="has nothing to resume"):
        seeds.train(resume=path)
    assert_same_weights(train(tiny).path, whole)
    assert "was left by a run that was killed: starting over" in caplog.text
    assert not [file for file in path.iterdir() if atomic.is_temporary(file)]


def test_a_folder_with_anything_else_is_left_alone(tiny: Config):
    path = tiny.run.out / "tiny"
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ResfastError, match="exists; continue it with --resume"):
        train(tiny)


def test_plots_that_a_killed_run_lacks_are_made(tiny: Config):
    result = seeds.train(change(tiny, runs=2, epochs=1))
    missing = result.path / "seed0" / records.CONFUSION
    before = weights(result.path / "seed0")
    missing.unlink()
    seeds.train(resume=result.path)
    assert missing.exists()
    after = weights(result.path / "seed0")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_temporary_files_of_ended_processes_are_removed(tmp_path: Path):
    code = (
        "import os, sys; from pathlib import Path; from resfast import atomic\n"
        "with atomic.replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print(flush=True); os.kill(os.getpid(), 9)\n"
    )
    target, other = tmp_path / "summary.json", tmp_path / "evaluation.json"
    killed = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert atomic.is_temporary(left)
    atomic.save(other, b"{}")
    assert left.exists()  # of another file
    running = tmp_path / left.name.replace(
        left.name.split(".")[3], f"{os.getpid()}@{atomic._host()}"
    )
    running.write_text("in use")
    atomic.save(target, b"{}")
    assert not left.exists()
    assert running.exists()
    assert target.read_bytes() == b"{}"
