"""Inference: layers and whole networks, fused by resfast and in other implementations.

``benchmarks/inference.py`` defines what is timed. All variants of a case are timed together, in
alternation, in the first of its tests; each test then passes its own times to pytest-benchmark.
Environment variables:

- ``RESFAST_BENCH_MINUTES``: cases that would start more than this many minutes after the first are
  skipped (default 5); the most important cases come first.
- ``RESFAST_BENCH_ALL=1``: on CUDA, also compile layers with max-autotune, which takes long.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import statistics
import time
from typing import Any

import pytest
import torch

from benchmarks import inference
from benchmarks.inference import Case, Measured
from benchmarks.report import hardware, rate, verdict
from resfast import runtime
from resfast.runtime import DTYPES

MINUTES = float(os.environ.get("RESFAST_BENCH_MINUTES", "5"))
CASES = inference.cases("cpu") + inference.cases("cuda")

pytestmark = pytest.mark.timeout(1800)


class RecordedTime:
    """A clock for pytest-benchmark that replays times measured earlier."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


CLOCK = RecordedTime()
started: list[float] = []
matmul_rates: dict[tuple[str, str], float] = {}


def _needs(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _marks(device: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if device == "cuda" else []


@pytest.mark.parametrize("what", ["matmul-bf16", "matmul-fp32", "copy"])
@pytest.mark.parametrize("device", [pytest.param(d, marks=_marks(d)) for d in ("cpu", "cuda")])
def test_machine(what: str, device: str, benchmark, comparisons: list[str]) -> None:
    """The rates that the layers are compared with."""
    _needs(device)
    runtime.prepare(torch.device(device), threads=0, tf32=False, tuned_allocator=True)
    name, _, dtype = what.partition("-")
    if name == "matmul":
        side = inference.MATMUL_SIDE[device]
        a, b = torch.randn(2, side, side, device=device).to(DTYPES[dtype])
        out, work = torch.empty_like(a), {"flops": 2 * side**3}
    else:
        a = torch.ones(inference.COPY_BYTES[device] // 4, device=device)
        out, work = torch.empty_like(a), {"bytes": 2 * a.nbytes}

    def run() -> None:
        torch.mm(a, b, out=out) if name == "matmul" else out.copy_(a)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"machine, {device}"
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    (amount,) = work.values()
    per_second = amount / benchmark.stats.stats.min
    benchmark.extra_info.update(
        hardware(device), kind="machine", case=name, name=name, device=device, **work,
        **({"dtype": dtype} if dtype else {}),
    )  # fmt: skip
    if name == "matmul":
        matmul_rates[device, dtype] = per_second
    unit = "TFLOP/s" if name == "matmul" else "TB/s"
    comparisons.append(f"{what}, {device}: {per_second / 1e12:.3g} {unit}, the best of 10")


@functools.lru_cache(maxsize=1)
def measure(case: Case) -> Measured:
    if not started:
        started.append(time.monotonic())
    if time.monotonic() - started[0] > 60 * MINUTES:
        pytest.skip(f"RESFAST_BENCH_MINUTES ({MINUTES:g} minutes) have passed")
    gc.collect()  # the networks of the previous case are in reference cycles
    return inference.measure(case)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(
            case, variant, id=re.sub("[, ]+", "-", f"{case}-{variant}"), marks=_marks(case.device)
        )
        for case in CASES
        for variant in case.variants
    ],
)
def test_inference(case: Case, variant: str, benchmark, comparisons: list[str]) -> None:
    _needs(case.device)
    measured = measure(case)
    if variant in measured.missing:
        pytest.skip(measured.missing[variant])
    if variant in measured.failed:
        raise measured.failed[variant]
    seconds, ratios = measured.seconds[variant], measured.ratios(variant)
    times, ours = iter(seconds), variant in (inference.OURS, inference.GRAPH)
    what = case.what if case.kind == "model" else "layers"
    benchmark.group = f"{what}, batch {case.batch}, {case.dtype}, {case.device}"
    benchmark.pedantic(CLOCK.forward, setup=lambda: ((next(times),), {}), rounds=len(seconds))
    benchmark.extra_info.update(
        hardware(case.device),
        kind=case.kind,
        case=str(case.what),
        name=variant,
        device=case.device,
        batch=case.batch,
        dtype=case.dtype,
        flops=measured.flops,
        bytes=measured.bytes if case.kind == "layer" else None,
        relative_error=measured.errors[variant],
        images_per_second=case.batch / statistics.median(seconds),
        baseline=case.baseline if ratios else None,
        ratio=statistics.median(ratios) if ratios else None,
        ratio_range=(min(ratios), max(ratios)) if ratios else None,
        target=case.target if ours else None,
        matmul_target=case.matmul_target if ours else None,
    )
    if ours:
        comparisons.append(f"{case}: {variant}: {_summary(len(seconds), **benchmark.extra_info)}")


def _summary(turns: int, **info: Any) -> str:
    parts = [rate(info["images_per_second"])]
    if info["ratio"]:
        parts.append(
            f"{info['ratio']:.2f} times {info['baseline']} (median of {turns} turns, "
            + "{:.2f} to {:.2f})".format(*info["ratio_range"])
        )
        if target := info["target"]:
            parts.append(f"target {target}: {verdict(info['ratio'], target)}")
    matmul = matmul_rates.get((info["device"], info["dtype"]))
    if matmul and info["kind"] == "layer":
        part = info["flops"] * info["images_per_second"] / info["batch"] / matmul
        parts.append(f"{part:.0%} of the rate of a matrix product")
        if target := info["matmul_target"]:
            parts.append(f"target {target:.0%}: {verdict(part, target)}")
    return "; ".join(parts)
