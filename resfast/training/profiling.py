"""Profiles a training step: time by operator, and comparison with a matrix product."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from resfast import atomic, runtime
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.models.summary import count_macs
from resfast.training import loop as trainer

TOP = 15
"""Operators in the table."""
_STEPS = {"cpu": (2, 3, 3), "cuda": (10, 20, 5)}
"""Numbers of steps to warm up, to time without the profiler, and to record, by device."""
_MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}


@dataclass(frozen=True)
class Operator:
    """Time spent in one operator or kernel.

    Attributes:
        name: its name; for fused code, the names of the fused operators.
        seconds: seconds per step, excluding operators that it calls.
        share: fraction of all operators' time, 0 to 1.
        calls: calls per step.
    """

    name: str
    seconds: float
    share: float
    calls: float


@dataclass(frozen=True)
class Profile:
    """Profile of a training step.

    Attributes:
        step_seconds: mean duration of the steps timed without the profiler.
        images: batch size.
        size: height and width of the images, in pixels.
        flops: FLOPs per step of direct convolution, 2 per multiply-add, with the backward pass
            counted as twice the forward pass.
        matmul_flops: FLOP/s of a matrix product in the compute dtype, measured on this device.
        operators: the slowest operators, slowest first.
        trace: path of the trace.
    """

    step_seconds: float
    images: int
    size: int
    flops: int
    matmul_flops: float
    operators: tuple[Operator, ...]
    trace: Path

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization (Chowdhery et al., arXiv:2204.02311, appendix B)."""
        return self.flops / self.step_seconds / self.matmul_flops

    def __str__(self) -> str:
        lines = [f"{'ms/step':>10} {'share':>6} {'calls':>7}  operator"]
        for op in self.operators:
            lines.append(f"{1000 * op.seconds:10.3f} {op.share:6.1%} {op.calls:7.1f}  {op.name}")
        lines.append(
            f"step of {self.images} images of {self.size}x{self.size} pixels: "
            f"{1000 * self.step_seconds:.2f} ms, {self.images / self.step_seconds:,.0f} images/s"
        )
        lines.append(
            f"MFU {self.mfu:.1%}: {self.flops / 1e9:,.1f} GFLOP per step (3 x 2 x MACs x images; "
            f"Winograd needs fewer) against {self.matmul_flops / 1e9:,.0f} GFLOP/s of a matrix "
            "product measured here"
        )
        lines.append(f"trace: {self.trace} (open it in chrome://tracing or ui.perfetto.dev)")
        return "\n".join(lines)


def profile(config: Config, path: str | Path) -> Profile:
    """Trains for a few steps and profiles them; leaves no run behind.

    The steps are the first of the actual training, after compilation and a few warm-up steps. A
    recipe that starts with small images or batches is therefore profiled with those.

    Args:
        config: configuration of the training.
        path: the Chrome trace to write (JSON).

    Returns:
        The times of the operators and of the step, and how they compare with a matrix product.

    Raises:
        ResfastError: bad input, too few training steps, or a trace that cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ResfastError(
            f"--profile {path}: there is no folder {path.parent}; create it or choose another path"
        )
    if config.run.runs > 1:
        raise ResfastError(f"--profile and --runs {config.run.runs} exclude each other; choose one")
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            run=replace(
                config.run, name="profile", out=Path(folder), save_seconds=1e9, max_seconds=None,
                tensorboard=False, wandb=False,
            ),
            evaluation=replace(config.evaluation, eval_every=0, target=None, early_stop=0),
        )  # fmt: skip
        device = runtime.resolve_device(config.runtime.device)
        precision = runtime.resolve_precision(config.runtime.precision, device)
        recorder, shared = _Recorder(device, runtime.DTYPES[precision]), trainer.Shared()
        # Makes loops generated for the CPU appear in the profile by name.
        with torch._inductor.config.patch("cpp.enable_kernel_profile", True):
            try:
                trainer.train(config, shared=shared, after_step=recorder)
            except _Recorded:
                pass
            except trainer.Interrupted:
                raise KeyboardInterrupt from None
            else:
                raise ResfastError(
                    f"--profile needs at least {sum(recorder.steps)} training steps, but there are "
                    f"{recorder.seen}; use more --epochs or a smaller --batch-size"
                )
    recorder.save(path)
    return recorder.result(shared.step.model, path)


class _Recorded(Exception):
    """Ends the training once all requested steps are recorded."""


class _Recorder:
    """Callback after each training step: times some steps, then records some."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.steps, self.seen = _STEPS[device.type], 0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)

    def __call__(self, step: int, images: Tensor) -> None:
        warm_up, timed, recorded = self.steps
        self.seen = step + 1
        if self.seen == warm_up:
            self.matmul_flops = matmul_flops(self.device, self.dtype)
            runtime.synchronize(self.device)
            self.start = time.perf_counter()
        elif self.seen == warm_up + timed:
            runtime.synchronize(self.device)
            self.step_seconds = (time.perf_counter() - self.start) / timed
            self.images, self.size = len(images), images.shape[2]
            self.profiler.start()
        elif self.seen == warm_up + timed + recorded:
            runtime.synchronize(self.device)
            self.profiler.stop()
            raise _Recorded

    def save(self, path: Path) -> None:
        """Writes the trace."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(file))
            atomic.save(path, file.read_bytes())

    def result(self, model: nn.Module, path: Path) -> Profile:
        """The profile of the training of ``model``."""
        steps = self.steps[2]
        cuda = self.device.type == "cuda"
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = self.profiler.key_averages()
        micros = [(getattr(row, key), row) for row in rows]
        total = sum(value for value, _ in micros)
        micros.sort(key=lambda pair: pair[0], reverse=True)
        operators = tuple(
            Operator(row.key, value / 1e6 / steps, value / total, row.count / steps)
            for value, row in micros[:TOP]
            if value > 0
        )
        return Profile(
            step_seconds=self.step_seconds,
            images=self.images,
            size=self.size,
            flops=3 * 2 * count_macs(model, self.size) * self.images,
            matmul_flops=self.matmul_flops,
            operators=operators,
            trace=path,
        )


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product: the best of a few square sizes, 5 repetitions each."""
    best = 0.0
    for size in _MATRIX_SIZES[device.type]:
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        left @ right
        for _ in range(5):
            best = max(best, 2 * size**3 / _seconds(lambda a=left, b=right: a @ b, device))
    return best


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000
