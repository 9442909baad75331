"""``resfast::conv2d_bias_act`` on the CPU: several algorithms, the fastest by measurement.

- ``oneDNN``: torch's own library, with the epilogue as post-operations; every shape and dtype.
- ``gemm``: our kernel for AVX512-BF16, over patches of the input (``csrc/cpu/conv/conv_gemm.cpp``).
- ``winograd``: for 3x3 kernels, with the same kernel: F(2x2, 3x3) of Lavin and Gray
  (arXiv:1509.09308) for stride 1, 2.25 times fewer multiplications, and the same idea for stride 2,
  1.44 times fewer (``csrc/cpu/conv/conv_winograd.cpp``). Larger tiles, where allowed, take up to 4
  times fewer and round off 3 times as much.
- ``direct``: for 3x3 kernels and AMX, over images laid out so that nothing is copied per tap or
  wasted on edges (``csrc/cpu/conv/conv_direct.cpp``); fast for batches that fill groups of 32.

The last three are for bfloat16 without groups or dilation.
:class:`~resfast.ops.conv.op.ConvBiasAct` asks for a plan once per shape. The choice is cached in
``$XDG_CACHE_HOME/resfast/conv-cpu.json`` by processor, version, shape and number of threads, unless
the machine was too busy to measure. ``RESFAST_CONV=oneDNN``, ``gemm``, ``winograd`` or ``direct``
forces that algorithm wherever it applies.

NaN and infinity must reach only the results that depend on them. Winograd's algorithm spreads them
over a tile, oneDNN's AMX kernels over neighbouring pixels, and our GELU is finite at -infinity.
Batches with such values, which the sum of the batch tells, therefore take ``gemm``.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from . import choice as conv_choice
from . import reference as conv_reference
from .choice import Plan, Run

ALGORITHMS = conv_choice.NAMES["cpu"]
CHOICES = conv_choice.Choices("conv-cpu.json")
ONEDNN_NAMES = {
    "none": "none",
    "leaky_relu": "leaky_relu",
    "silu": "swish",
    "hardswish": "hardswish",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}
"""oneDNN's names of the activations that it computes as torch does. Its ReLU, ReLU6 and hard
sigmoid make NaN a number, and its GELU differs from torch's at infinity (torch 2.15)."""
TILES = (4, 3, 2)
"""Output sizes of Winograd tiles for stride 1, largest first."""
MAX_GROUP_BYTES = 16 * 2**20
"""Maximum size of a group of images that a thread of the direct kernels lays out at once."""
MOST_COMPARED = 16
"""Images of a batch whose results are compared: float32 copies of a large one take memory."""
MAX_ERROR = 0.02
"""Maximum RMS error of a candidate relative to the result's RMS: a few roundings to bfloat16."""


@dataclass(frozen=True)
class Convolution:
    """Arguments of the operator but for the residual, and the largest side of a Winograd tile."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    activation: str
    negative_slope: float = conv_reference.TORCH_NEGATIVE_SLOPE
    groups: int = 1
    dilation: Sequence[int] = (1, 1)
    tile: int = 2

    @property
    def is_dense(self) -> bool:
        """Whether it is what our kernels compute: one group, without dilation."""
        return self.groups == 1 and max(self.dilation) == 1

    def shape(self) -> list[int]:
        return conv_reference.output_shape(
            self.x, self.weight, self.stride, self.padding, self.dilation
        )

    def reference(self, x: Tensor, residual: Tensor | None) -> Tensor:
        geometry = (self.stride, self.padding)
        rest = (self.activation, self.negative_slope, self.groups, self.dilation)
        return conv_reference.conv2d_bias_act(x, self.weight, self.bias, residual, *geometry, *rest)

    def activated(self, x: Tensor) -> Tensor:
        """The activation of a value that nothing else reads, in place where torch can."""
        return conv_reference.ACTIVATIONS[self.activation](x, self.negative_slope, True)


def conv2d_bias_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> Tensor:
    """The operator for weights that may change between calls: oneDNN."""
    conv = Convolution(x, weight, bias, *rest)
    run = _onednn(conv, None)
    if _must_be_finite("oneDNN", conv):
        run = _checked(run, conv, {})
    return run(x, residual)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
    packed: dict[Any, Any],
    largest_tile: int = 2,
) -> Plan:
    """The algorithm for arguments like these.

    Args:
        x: as in the operator.
        weight: as in the operator.
        bias: as in the operator.
        residual: as in the operator.
        rest: the other arguments of the operator.
        packed: caches packed weights between plans.
        largest_tile: the largest side of a Winograd tile.
    """
    conv = Convolution(x, weight, bias, *rest)
    conv = replace(conv, tile=fastest_tile(x, max(conv.stride), conv.padding[0], largest_tile))
    names = [name for name in ALGORITHMS if _applies(name, conv)]
    named = conv_choice.forced("cpu")
    chosen = named if named in names else None
    if chosen is None and (named or len(names) == 1 or x.numel() == 0):
        chosen = names[0]
    if chosen is None:
        geometry = (conv.stride, conv.padding, residual is not None, conv.dilation)
        sizes = conv_choice.describe_sizes(x, weight, *geometry)
        key = f"{machine()}|{torch.get_num_threads()} threads|{sizes}"
        key += f"|tile {conv.tile}" if conv.tile > 2 else ""
        chosen = CHOICES.get(key, names)
        if chosen is None:
            chosen, steady = _fastest(names, conv, residual)
            runtime.release_memory(x.device)  # of the weights that the others packed
            CHOICES.put(key, chosen, keep=steady)
    run = BUILDERS[chosen](conv, packed)
    if x.numel() and _must_be_finite(chosen, conv):
        run = _checked(run, conv, packed)
    return Plan(chosen, torch.Size(conv.shape()), run)


def fastest_tile(x: Tensor, stride: int, padding: int, largest: int = max(TILES)) -> int:
    """The tile with the fewest multiplications for an image size, including waste at the edges.

    Args:
        x: ``[N, C, H, W]``.
        stride: stride of rows and columns.
        padding: padding of rows and columns.
        largest: the largest tile allowed.
    """
    if stride != 1:
        return 2

    def points(tile: int) -> int:
        rows, columns = (-(-(size + 2 * padding - 2) // tile) for size in x.shape[2:])
        return rows * columns * (tile + 2) ** 2

    # torch.compile breaks the graph at min() with a key (2.11) and of a generator (2.15).
    best = min(TILES)
    for tile in reversed(TILES):
        if tile <= largest and points(tile) <= points(best):
            best = tile
    return best


def _applies(name: str, conv: Convolution) -> bool:
    x = conv.x
    if name == "oneDNN":
        return True
    if x.dtype != torch.bfloat16 or x.numel() == 0 or not conv.is_dense or not _has_kernels():
        return False
    if name == "gemm":
        return True
    fits = list(conv.weight.shape[2:]) == [3, 3] and list(conv.stride) in ([1, 1], [2, 2])
    if name == "direct":
        return fits and has_amx() and group_is_small(x, conv.shape()[3])
    return fits


@functools.cache
def _has_kernels() -> bool:
    built = hasattr(torch.ops.resfast, "conv_bf16_supported")  # only for x86-64
    return built and torch.ops.resfast.conv_bf16_supported()


def group_images(columns: int) -> int:
    """Images that the direct kernels lay out as one group (``csrc/cpu/conv/conv_direct.h``).

    Args:
        columns: width of the result.
    """
    return max(2, 32 // math.gcd(columns, 32))


def group_is_small(x: Tensor, columns: int) -> bool:
    """Whether a group of images takes at most :data:`MAX_GROUP_BYTES`.

    Args:
        x: ``[N, C, H, W]``, input of a convolution or gradient of its result.
        columns: width of the result.
    """
    return group_images(columns) * x.shape[1:].numel() * 2 <= MAX_GROUP_BYTES


@functools.cache
def has_amx() -> bool:
    """Whether the kernels were built and this processor has AMX for bfloat16."""
    return _has_kernels() and torch.ops.resfast.conv_bf16_amx()


# -- oneDNN ----------------------------------------------------------------------------------------


@functools.cache
def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolution supports ``dtype`` on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    ):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _onednn_is_wrong(dtype: torch.dtype, conv: Convolution) -> bool:
    """Whether oneDNN's AMX kernels read uninitialized memory (seen with torch 2.15).

    They do for results that are one column wide, with a horizontal stride of at least 2. Columns of
    zeros that make the result two columns wide avoid it.
    """
    return dtype != torch.float32 and conv.stride[1] > 1 and conv.shape()[3] == 1


def _onednn(conv: Convolution, packed: dict[Any, Any] | None) -> Run:
    x, stride, groups = conv.x, conv.stride, conv.groups
    dtype = x.dtype if _onednn_has(x.dtype) else torch.float32
    if not _onednn_has(dtype) or x.numel() == 0:
        return conv.reference
    bias = None if conv.bias is None else conv.bias.to(dtype)
    weight = conv.weight.to(dtype)
    widened = _onednn_is_wrong(dtype, conv)
    sizes = [*x.shape[:3], x.shape[3] + (stride[1] if widened else 0)]
    padding, dilation = list(conv.padding), list(conv.dilation)
    if packed is not None:
        key = ("oneDNN", x.shape)
        if key not in packed:
            packed[key] = torch.ops.mkldnn._reorder_convolution_weight(
                weight, padding, stride, dilation, groups, sizes
            )
        weight = packed[key]
    name = ONEDNN_NAMES.get(conv.activation)
    scalars = [conv.negative_slope] if conv.activation == "leaky_relu" else []
    rest = (padding, stride, dilation, groups)
    unary = torch.ops.mkldnn._convolution_pointwise.default
    binary = torch.ops.mkldnn._convolution_pointwise.binary
    act = torch.relu_ if conv.activation == "relu" else conv.activated
    channels_last = torch.channels_last

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        input_dtype = x.dtype
        x = x.to(dtype)
        if widened:
            x = F.pad(x, (0, stride[1]))
        x = x.contiguous(memory_format=channels_last)
        if residual is None:
            out = unary(x, weight, bias, *rest, name or "none", scalars, "")
            out = act(out) if name is None else out
        elif widened:
            out = act(unary(x, weight, bias, *rest, "none", [], "")[..., :1] + residual.to(dtype))
        else:
            residual = residual.to(dtype).contiguous(memory_format=channels_last)
            out = act(binary(x, residual, weight, bias, *rest, "add", 1.0, None, [], ""))
        if widened:
            out = out[..., :1]
        return out.to(input_dtype).contiguous(memory_format=channels_last)

    return run


# -- our kernels -----------------------------------------------------------------------------------


def _resfast(name: str, conv: Convolution, packed: dict[Any, Any]) -> Run:
    weight, bias, stride, slope = conv.weight, conv.bias, conv.stride, conv.negative_slope
    tiles = (conv.tile,) if name == "winograd" else ()
    key = (name, *tiles)
    if key not in packed:
        pack = getattr(torch.ops.resfast, f"conv_{name}_pack")
        packed[key] = pack(weight.contiguous(), *(stride[:1] if tiles else ()), *tiles)
    packed_weight, kernel = packed[key], getattr(torch.ops.resfast, f"conv_{name}").default
    geometry = [*weight.shape, *stride, *conv.padding]
    apart = conv.activation not in conv_reference.KERNEL_ACTIVATIONS
    code = 0 if apart else conv_reference.KERNEL_ACTIVATIONS.index(conv.activation)
    channels_last = torch.channels_last

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=channels_last)
        out = kernel(x, packed_weight, bias, residual, geometry, code, slope, *tiles)
        return conv.activated(out) if apart else out

    return run


BUILDERS: dict[str, Callable[..., Run]] = {
    "oneDNN": _onednn,
    "gemm": functools.partial(_resfast, "gemm"),
    "winograd": functools.partial(_resfast, "winograd"),
    "direct": functools.partial(_resfast, "direct"),
}


# -- NaN and infinity ------------------------------------------------------------------------------


def _must_be_finite(name: str, conv: Convolution) -> bool:
    """Whether an algorithm is right only where every input is finite."""
    if conv.x.dtype == torch.float32:
        return False
    return name != "gemm" or conv.activation == "gelu"


def _is_finite(tensor: Tensor | None) -> bool:
    """False if a value is NaN or infinite, and sometimes for very large values."""
    return tensor is None or math.isfinite(tensor.sum())


def _checked(run: Run, conv: Convolution, packed: dict[Any, Any]) -> Run:
    """``run``, but an exact algorithm if the weights or a batch are not finite."""
    is_gelu = conv.activation == "gelu"

    @functools.cache
    def exact() -> Run:
        if not _applies("gemm", conv):
            return conv.reference
        if not is_gelu:
            return _resfast("gemm", conv, packed)
        gemm = _resfast("gemm", replace(conv, activation="none"), packed)
        return lambda x, residual: _gelu(gemm(x, residual))

    if not (_is_finite(conv.weight) and _is_finite(conv.bias)):
        return exact()

    def checked(x: Tensor, residual: Tensor | None) -> Tensor:
        finite = _is_finite(x) and (not is_gelu or _is_finite(residual))
        return (run if finite else exact())(x, residual)

    return checked


def _gelu(x: Tensor) -> Tensor:
    """Exact GELU in float32; ``F.gelu`` may be NaN at infinity."""
    wide = x.float()
    return (0.5 * wide * (1 + torch.erf(wide * math.sqrt(0.5)))).to(x.dtype)


# -- choice ----------------------------------------------------------------------------------------


@torch.inference_mode()
def _fastest(names: list[str], conv: Convolution, residual: Tensor | None) -> tuple[str, bool]:
    """The fastest of the algorithms that are accurate on these arguments."""
    x, weight = conv.x, conv.weight
    compared = torch.linspace(0, len(x) - 1, min(len(x), MOST_COMPARED)).round().long()
    exact = replace(conv, weight=weight.float()).reference(
        x[compared].float(), None if residual is None else residual[compared].float()
    )
    is_near = conv_choice.near(exact, MAX_ERROR)
    trusted = "gemm" if "gemm" in names else "oneDNN"
    if not exact.isfinite().all():  # comparison is impossible
        return trusted, False
    runs = {}
    for name in names:
        runs[name] = BUILDERS[name](conv, {})
        if _must_be_finite(name, conv):
            runs[name] = _checked(runs[name], conv, {})
    return conv_choice.fastest(
        {name: functools.partial(run, x, residual) for name, run in runs.items()},
        is_right=lambda result: is_near(result[compared]),
        seconds=conv_choice.host_seconds,
        trusted=trusted,
        what=f"{list(x.shape)} with {list(weight.shape)}",
    )


@functools.cache
def machine() -> str:
    """The part of a key that identifies the processor and the software."""
    name = platform.processor()
    if text := runtime.cpu_info():
        kept = ("model name", "model\t", "cpu fam")
        lines = [line for line in text.splitlines() if line.startswith(kept)]
        name = " ".join(dict.fromkeys(line.partition(":")[2].strip() for line in lines))
    return f"{name}|{conv_choice.versions()}"
