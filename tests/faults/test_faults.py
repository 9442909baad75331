"""Commands that are killed at a file event, or find no space, lose nothing and can be repeated.

``RESFAST_FAULTS=1000`` (``make faults``) tries so many faults; by default few of each kind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from resfast import atomic
from resfast.runs.checkpoint import load_weights
from tests.conftest import TINY_OPTIONS, write_tree

FAULTS = int(os.environ.get("RESFAST_FAULTS", "60"))
"""Faults to try, over all kinds."""

pytestmark = [
    pytest.mark.timeout(60 + 10 * FAULTS),
    pytest.mark.skipif(sys.platform != "linux", reason="audit hooks and fork as on Linux"),
]


@dataclass
class Answer:
    code: int
    events: int
    output: str


class Zygote:
    """Runs commands in forked processes; see :mod:`tests.faults.zygote`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        self.count = 0

    def run(self, folder: Path, *argv: str, **faults: Any) -> Answer:
        output = folder.with_name(f"{folder.name}.output")
        command = {"argv": argv, "folder": str(folder), "output": str(output), **faults}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        return Answer(answer["code"], answer["events"], output.read_text())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    found = Zygote()
    yield found
    found.close()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("faults"), train=12, test=4)


@pytest.fixture(scope="module")
def trained(zygote: Zygote, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trainings of ``KINDS``."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in KINDS:
        answer = zygote.run(folder, *train(tree, kind))
        assert answer.code == 0, answer.output
    return folder


KINDS = {
    "plotted": ("--runs", "1"),
    "plain": ("--runs", "1", "--no-plots"),
    "seeds": ("--runs", "2", "--no-plots"),
}
"""Trainings by name."""


def train(tree: Path, kind: str) -> list[str]:
    options = ["--data", f"folder:{tree}", "--data-dir", "data", "--out", "runs", "--epochs", "2"]
    return ["train", *TINY_OPTIONS, *options, *KINDS[kind], "--name", kind]


def share(part: float, most: int) -> list[int]:
    """Numbers from 1 to ``most``, evenly spaced, as many as a part of all faults."""
    count = min(most, max(3, round(part * FAULTS)))
    return sorted({1 + index * (most - 1) // max(1, count - 1) for index in range(count)})


def again(zygote: Zygote, folder: Path, tree: Path, kind: str) -> Answer:
    """Continues a training that was stopped, as its own messages say."""
    run = folder / "runs" / kind
    if (run / "config.json").exists():
        return zygote.run(folder, "train", "--resume", str(run))
    return zygote.run(folder, *train(tree, kind))


def weights(run: Path) -> list[dict[str, torch.Tensor]]:
    files = sorted(run.rglob("model.safetensors"))
    assert len(files) == (2 if run.name == "seeds" else 1)
    return [load_weights(file).tensors for file in files]


def assert_whole(folder: Path, expected: Path, kind: str) -> None:
    """The folder has what an undisturbed training leaves, and nothing else."""
    found, right = folder / "runs" / kind, expected / "runs" / kind
    for tensors, wanted in zip(weights(found), weights(right), strict=True):
        assert all(torch.equal(tensors[name], value) for name, value in wanted.items())
    names = [
        {path.relative_to(run).as_posix() for path in run.rglob("*")} for run in (found, right)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(("kind", "part"), [("plotted", 0.2), ("seeds", 0.2)])
def test_a_training_killed_at_any_file_event_ends_with_the_same_bits(
    zygote: Zygote, tree: Path, trained: Path, tmp_path: Path, kind: str, part: float
):
    whole = tmp_path / "whole"
    whole.mkdir()
    events = zygote.run(whole, *train(tree, kind)).events
    assert events > 20
    for number in share(part, events):
        folder = tmp_path / f"kill{number}"
        folder.mkdir()
        killed = zygote.run(folder, *train(tree, kind), kill_at=number)
        assert killed.code == -9, killed.output
        answer = again(zygote, folder, tree, kind)
        assert answer.code == 0, f"event {number}: {answer.output}"
        assert_whole(folder, trained, kind)
        shutil.rmtree(folder)


def test_a_training_that_is_asked_to_stop_saves_and_continues(
    zygote: Zygote, tree: Path, trained: Path, tmp_path: Path
):
    whole = tmp_path / "whole"
    whole.mkdir()
    events = zygote.run(whole, *train(tree, "plain")).events
    for number in share(0.1, events):
        folder = tmp_path / f"stop{number}"
        folder.mkdir()
        stopped = zygote.run(folder, *train(tree, "plain"), kill_at=number, signal="SIGTERM")
        assert stopped.code in (-15, 0, 143), stopped.output
        assert "Traceback" not in stopped.output
        answer = again(zygote, folder, tree, "plain")
        assert answer.code == 0, f"event {number}: {answer.output}"
        assert_whole(folder, trained, "plain")
        shutil.rmtree(folder)


def test_a_training_without_space_says_so_and_continues(
    zygote: Zygote, tree: Path, trained: Path, tmp_path: Path
):
    least = 4096  # the output of the command is a file too
    sizes = {file.stat().st_size for file in trained.rglob("*") if file.is_file()}
    sizes = {size for size in sizes if size > least}
    for size in [sorted(sizes)[index - 1] for index in share(0.1, len(sizes))]:
        folder = tmp_path / f"full{size}"
        folder.mkdir()
        full = zygote.run(folder, *train(tree, "plain"), most_bytes=size - 1)
        assert full.code in (0, 2), full.output
        assert "Traceback" not in full.output
        if full.code:
            assert "File too large" in full.output
        answer = again(zygote, folder, tree, "plain")
        assert answer.code == 0, f"{size} bytes: {answer.output}"
        assert_whole(folder, trained, "plain")
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("argv", "results"),
    [
        (("evaluate", "runs/plain", "--out", "."), ("evaluation.json", "evaluation-confusion.png")),
        (("predict", "runs/plain", "images", "--csv", "found.csv"), ("found.csv",)),
        (("data", "--shards", "shards", "--data", "folder:tree"), ("shards/classes.json",)),
    ],
    ids=["evaluate", "predict", "shards"],
)
def test_a_command_killed_at_any_file_event_can_be_repeated(
    zygote: Zygote, tree: Path, trained: Path, tmp_path: Path, argv: tuple, results: tuple
):
    def place(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(trained / "runs", folder / "runs")
        shutil.copytree(tree / "test" / "left", folder / "images")
        shutil.copytree(tree, folder / "tree")
        return folder

    whole = place("whole")
    done = zygote.run(whole, *argv)
    assert done.code == 0, done.output
    assert all((whole / name).is_file() for name in results)
    for number in share(0.08, done.events):
        folder = place(f"kill{number}")
        killed = zygote.run(folder, *argv, kill_at=number)
        assert killed.code == -9, killed.output
        answer = zygote.run(folder, *argv)
        # Its last events may be after its last file.
        is_complete = "already has shards" in answer.output or "already exists" in answer.output
        assert answer.code == 0 or is_complete, f"event {number}: {answer.output}"
        assert all((folder / name).is_file() for name in results)
        assert not [path for path in folder.rglob("*") if atomic.is_temporary(path)]
        shutil.rmtree(folder)
