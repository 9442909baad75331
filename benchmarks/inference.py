"""The cases of the inference benchmarks: layers and networks, in several implementations.

A case is a layer of ``resnet-2111`` or ``resnet18`` (convolution, batch norm, activation, with or
without a residual) or a whole network, at one batch size, in one dtype, on one device. Its variants
get the same ``channels_last`` inputs. Their results are compared with float32 before they are
timed. Timed calls alternate, so that other load on the machine affects all variants equally.
"""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.fx.experimental import optimization
from torch.utils.flop_counter import FlopCounterMode

import resfast
from benchmarks.plain_step import with_plain_convolutions
from benchmarks.report import timed
from resfast import runtime
from resfast.errors import ResfastError
from resfast.models.presets import preset
from resfast.models.resnet import ResNetSpec
from resfast.ops.conv.op import ConvBiasAct
from resfast.runtime import DTYPES

IMAGE_SIZE = 32
MODELS = ("resnet-2111", "resnet18")
EAGER, FOLDED, COMPILE, TUNED = "eager", "eager, folded", "compile", "compile max-autotune"
CUDNN, OURS, GRAPH = "cuDNN", "resfast", "resfast, CUDA graph"

ROUND_SECONDS = {"cpu": 0.03, "cuda": 0.02}
CASE_SECONDS = {"layer": 0.6, "model": 5.0}
ROUNDS = (5, 15)
MAX_ERROR = {"layer": 0.02, "model": 0.06}
"""Relative RMS error against float32, which allows for a few roundings."""
MAX_ERROR_FP32 = 1e-4
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


class BadOutputError(Exception):
    """A variant computes a wrong result."""


@dataclass(frozen=True)
class Layer:
    """Shape of a convolution and its epilogue; the input is ``size`` x ``size`` pixels."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int
    residual: bool = False
    relu: bool = True

    def __str__(self) -> str:
        what = f"conv{self.kernel}x{self.kernel}-{self.in_channels}-{self.out_channels}"
        what += f"-s{self.stride}-{self.size}px"
        return what + "-add" * self.residual + "-relu" * self.relu


def layers(spec: ResNetSpec, size: int = IMAGE_SIZE) -> tuple[Layer, ...]:
    """The convolutions of a network of basic blocks with 1x1 shortcuts, in order."""
    found = [Layer(3, spec.stem, 3, 1, size)]
    width = spec.stem
    for blocks, channels, stride in zip(spec.blocks, spec.channels, spec.strides, strict=True):
        for step in (stride, *[1] * (blocks - 1)):
            found.append(Layer(width, channels, 3, step, size))
            if step != 1 or width != channels:
                found.append(Layer(width, channels, 1, step, size, relu=False))
            size, width = -(-size // step), channels
            found.append(Layer(width, channels, 3, 1, size, residual=True))
    return tuple(found)


class LayerModule(nn.Module):
    """A :class:`Layer` in ordinary PyTorch."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        padding = layer.kernel // 2
        channels = layer.in_channels, layer.out_channels
        self.conv = nn.Conv2d(*channels, layer.kernel, layer.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.out_channels)
        self.relu = layer.relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        return F.relu(out) if self.relu else out


class ResidualLayerModule(LayerModule):
    """A :class:`Layer` with the addition of a residual."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out = self.bn(self.conv(x)) + residual
        return F.relu(out) if self.relu else out


@dataclass(frozen=True)
class Case:
    """One benchmark case; ``what`` is a layer or the name of a preset."""

    what: Layer | str
    batch: int
    dtype: Literal["bf16", "fp32"]
    device: Literal["cpu", "cuda"]

    @property
    def kind(self) -> Literal["layer", "model"]:
        return "model" if isinstance(self.what, str) else "layer"

    def __str__(self) -> str:
        return f"{self.what}-batch{self.batch}-{self.dtype}-{self.device}"

    @property
    def variants(self) -> tuple[str, ...]:
        if self.dtype == "fp32":
            return (FOLDED, TUNED, OURS)
        if self.kind == "model":
            graph = (GRAPH,) if self.device == "cuda" else ()
            return (EAGER, FOLDED, COMPILE, TUNED, OURS, *graph)
        if self.device == "cpu":
            return (EAGER, FOLDED, TUNED, OURS)
        # max-autotune on CUDA compiles each shape many times: half an hour for all layers.
        tuned = (TUNED,) if os.environ.get("RESFAST_BENCH_ALL") == "1" else ()
        cudnn = (CUDNN,) if self.what.relu else ()
        return (EAGER, FOLDED, *tuned, *cudnn, OURS)

    @property
    def baseline(self) -> str:
        """The variant that speeds are relative to: the best alternative a user would choose."""
        return next(name for name in (TUNED, CUDNN, FOLDED) if name in self.variants)

    @property
    def target(self) -> float | None:
        """Target for resfast's speed relative to the baseline, or None."""
        if self.what != MODELS[0] or self.dtype != "bf16":
            return None
        if self.device == "cpu":
            return {1: 1.2, 64: 1.4, 512: 1.4}.get(self.batch)
        return 1.5 if self.batch == 1 else 1.15 if self.batch >= 512 else None

    @property
    def matmul_target(self) -> float | None:
        """Target for resfast's fraction of the rate of a matrix product, or None."""
        layer = self.what
        if isinstance(layer, str) or self.device == "cpu" or self.batch != 512:
            return None
        return 0.6 if layer.kernel == 3 and layer.in_channels >= 64 else None


def cases(device: Literal["cpu", "cuda"]) -> tuple[Case, ...]:
    """All cases of a device, the most important first."""
    batches = (1, 64, 512, 8) if device == "cpu" else (1, 512, 2048, 64, 8)
    shapes = dict.fromkeys(layer for name in MODELS for layer in layers(preset(name)))
    dtype = runtime.resolve_precision("auto", torch.device("cpu")) if device == "cpu" else "bf16"
    exact = (1, 64) if (device, dtype) == ("cpu", "bf16") else ()
    return (
        *(Case(MODELS[0], batch, dtype, device) for batch in batches),
        *(Case(shape, batch, dtype, device) for batch in sorted(batches, key=(512).__ne__)
          for shape in shapes),
        *(Case(MODELS[0], batch, "fp32", device) for batch in exact),
        *(Case(MODELS[1], batch, dtype, device) for batch in sorted(batches)),
    )  # fmt: skip


def build(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The case's module, in float32 and in eval mode, and its inputs in the dtype of the case.

    Batch norms have random weights, biases and statistics, so that wrong folding shows.
    """
    torch.manual_seed(0)
    if isinstance(case.what, str):
        module, shapes = resfast.create_model(case.what), [(3, IMAGE_SIZE, IMAGE_SIZE)]
    else:
        layer = case.what
        module = (ResidualLayerModule if layer.residual else LayerModule)(layer)
        shapes = [(layer.in_channels, layer.size, layer.size)]
        shapes += [(layer.out_channels, layer.size, layer.size)] * layer.residual
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.momentum = 1.0
    module.train()(*(torch.randn(64, *shape) for shape in shapes))
    last, dtype = torch.channels_last, DTYPES[case.dtype]
    inputs = (torch.randn(case.batch, *shape).to(case.device, dtype) for shape in shapes)
    module = module.eval().requires_grad_(False).to(case.device, memory_format=last)
    return module, tuple(x.to(memory_format=last) for x in inputs)


def reference(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, int, int]:
    """The float32 result, the operations of a call, and the bytes of inputs, weights and result.

    Operations count two per multiply-accumulate of convolutions and linear layers. Bytes are those
    that one pass in the inputs' dtype must move, which is meaningful for a single layer only.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        output = module(*(x.float() for x in inputs))
    weights = sum(conv.weight.numel() for conv in module.modules() if isinstance(conv, nn.Conv2d))
    values = sum(x.numel() for x in inputs) + weights + output.numel()
    return output, counter.get_total_flops(), values * inputs[0].element_size()


def fold(module: nn.Module) -> nn.Module:
    """A copy with batch norms folded by ``torch.fx``."""
    return optimization.fuse(with_plain_convolutions(copy.deepcopy(module)))


def variant(name: str, case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable:
    """One implementation of the case, already compiled or captured if it needs to be."""
    dtype = DTYPES[case.dtype]
    if name in (OURS, GRAPH):
        example = tuple(x[:1].float() for x in inputs)
        run = resfast.fuse(module, dtype, example=example, cuda_graph=name == GRAPH)
        if case.kind == "layer":  # without the conversion of the network's output to float32
            (run,) = (part for part in run.modules() if isinstance(part, ConvBiasAct))
    else:
        plain = copy.deepcopy(module) if name in (EAGER, COMPILE, TUNED) else fold(module)
        run = plain.to(dtype=dtype, memory_format=torch.channels_last)
        if name == CUDNN:
            run = cudnn(run.conv)
        elif name == COMPILE:
            run = torch.compile(run, dynamic=False)
        elif name == TUNED:
            run = torch.compile(run, dynamic=False, mode="max-autotune")
    with inductor.patch(freezing=name == TUNED):
        run(*inputs)
    return run


def cudnn(conv: nn.Conv2d) -> Callable:
    """cuDNN's fused convolution (+ residual) + ReLU."""
    rest = (conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, conv.weight, *rest)
        return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, *rest)

    return run


def relative_error(output: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of ``expected``; NaN if the shapes differ."""
    if output.shape != expected.shape:
        return math.nan
    difference = output.float() - expected
    return float(difference.square().mean().sqrt() / expected.square().mean().sqrt())


def take_turns(
    calls: Mapping[str, Callable[[], object]], device: str, seconds: float
) -> dict[str, list[float]]:
    """Seconds per call of each, by round; every round times each of them once.

    Args:
        calls: functions to time, by name, each already called once.
        device: ``cpu`` or ``cuda``, which is synchronized at the end of each measurement.
        seconds: approximate total time, within 5 to 15 rounds.
    """

    once = {name: timed(call, 1, device) for name, call in calls.items()}
    repeats = {name: math.ceil(ROUND_SECONDS[device] / once[name]) for name in calls}
    turn = sum(once[name] * repeats[name] for name in calls) or 1.0
    rounds = min(max(int(seconds / turn), ROUNDS[0]), ROUNDS[1])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, repeats[name], device))
    return times


@dataclass
class Measured:
    """Results of a case by variant: seconds per call in each round, errors and failures."""

    case: Case
    flops: int
    bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)

    def ratios(self, name: str) -> list[float] | None:
        """Speed-up over the baseline in each round."""
        base, own = self.seconds.get(self.case.baseline), self.seconds.get(name)
        return base and own and [b / a for a, b in zip(own, base, strict=True)]


@torch.no_grad()
def measure(case: Case) -> Measured:
    """Builds, checks and times all variants of a case; one failure does not stop the others."""
    device = torch.device(case.device)
    runtime.prepare(device, threads=0, tf32=False, tuned_allocator=True)
    torch.compiler.reset()
    module, inputs = build(case)
    expected, *work = reference(module, inputs)
    measured = Measured(case, *work)
    compiler = runtime.compiler_missing(device)
    limit = MAX_ERROR_FP32 if case.dtype == "fp32" else MAX_ERROR[case.kind]
    runs = {}
    for name in case.variants:
        if name in (COMPILE, TUNED) and compiler:
            measured.missing[name] = compiler
            continue
        try:
            run = variant(name, case, module, inputs)
            error = measured.errors[name] = relative_error(run(*inputs), expected)
            if not error <= limit:
                raise BadOutputError(
                    f"{case}: {name} has a relative error of {error:.3g} against float32; expected "
                    f"at most {limit}"
                )
            runs[name] = functools.partial(run, *inputs)
        except (RuntimeError, TypeError, ValueError, ResfastError, BadOutputError) as error:
            measured.failed[name] = error
    measured.seconds = take_turns(runs, case.device, CASE_SECONDS[case.kind])
    return measured
