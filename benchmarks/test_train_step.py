"""Times a bf16 training step of a recipe against that of a plain PyTorch script.

The recipes are ``default`` (resnet-2111, batch size 512) and ``fast94`` (speednet-94, batch size
500, images of 32x32 pixels); the script trains the same network.

Each trains in its own process, because allocator settings are process-wide. Timed steps alternate
between the two, so that other load on the machine affects both equally. Run it with ``make bench``
on an otherwise idle machine. Environment variables:

- ``RESFAST_BENCH_ROUNDS``: timed rounds per row (default 10); the speed-up is over twice as many.
- ``RESFAST_BENCH_BATCH``: images per step, instead of the recipe's.

A round is one step on the CPU and 20 steps on CUDA, so that the device has a queue as in training.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import resfast
from benchmarks.report import version

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = int(os.environ.get("RESFAST_BENCH_ROUNDS", "10"))
BATCH_SIZES = {"default": 512, "fast94": 500}
"""Images per step, by recipe."""
STEPS = {"cpu": 1, "cuda": 20}

pytestmark = pytest.mark.timeout(3600)


class Worker:
    """A process running ``benchmarks.worker``, compiled and warmed up."""

    def __init__(self, module: str, pair: Pair) -> None:
        self.module = module
        self.seconds: list[float] = []
        self.steps = STEPS[pair.device]
        arguments = [module, pair.device, str(pair.batch_size), pair.recipe]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"benchmarks.{self.module} ended with code {self.process.wait()}")
        return line

    def _ask(self, question: str) -> str:
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        return self._answer()

    def round(self) -> None:
        """Trains for one round and appends the seconds per step, measured by the process."""
        self.seconds.append(float(self._ask(str(self.steps))) / self.steps)

    def info(self) -> dict[str, Any]:
        return json.loads(self._ask("info"))

    def close(self) -> None:
        self.process.communicate()


@dataclass
class Pair:
    """The two alternating workers and their comparison."""

    recipe: str
    device: str
    workers: dict[str, Worker] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return int(os.environ.get("RESFAST_BENCH_BATCH", BATCH_SIZES[self.recipe]))

    def __str__(self) -> str:
        return f"{self.recipe}, {self.device}, batch {self.batch_size}, bf16"

    def comparison(self) -> tuple[float, str]:
        """The speed-up of resfast (median over pairs of rounds), and a line of text with it."""
        ours, plain = (self.workers[name].seconds for name in ("resfast", "plain"))
        ratios = [b / a for a, b in zip(ours, plain, strict=True)]
        ratio = statistics.median(ratios)
        return ratio, (
            f"{self}: resfast {statistics.median(ours):.4f} s, "
            f"plain {statistics.median(plain):.4f} s a step; resfast is {ratio:.3f} times as fast "
            f"(median of {len(ratios)} pairs, {min(ratios):.3f} to {max(ratios):.3f})"
        )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((recipe, device), id=f"{recipe}-{device}", marks=marks)
        for recipe in BATCH_SIZES
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    ],
)
def pair(request: pytest.FixtureRequest, comparisons: list[str]) -> Iterator[Pair]:
    import torch

    pair = Pair(*request.param)
    if pair.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        for name in ("resfast", "plain"):
            pair.workers[name] = Worker(f"{name}_step", pair)
        yield pair
        if pair.workers["plain"].seconds:
            comparisons.append(pair.comparison()[1])
    finally:
        for worker in pair.workers.values():
            worker.close()


@pytest.mark.parametrize("name", ["plain", "resfast"])
def test_train_step(name: str, pair: Pair, benchmark: Any) -> None:
    timed = pair.workers[name]
    other = pair.workers["plain" if name == "resfast" else "resfast"]
    steps = "a training step" if timed.steps == 1 else f"{timed.steps} training steps"
    benchmark.group = f"{steps}, {pair}"
    benchmark.pedantic(timed.round, setup=other.round, rounds=ROUNDS)
    median = statistics.median(timed.seconds[-ROUNDS:])
    benchmark.extra_info.update(
        timed.info(),
        images_per_second=round(pair.batch_size / median, 1),
        median_step_seconds=median,
        speed_relative_to_plain=pair.comparison()[0],
        resfast=resfast.__version__,
        triton=version("triton"),
    )
    assert len(timed.seconds) >= ROUNDS
