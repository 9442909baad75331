"""``resfast::conv2d_bias_act`` on CUDA: our kernels and cuDNN's, the fastest by measurement.

- ``ours:TILE,SPLITS``: the implicit GEMM of ``csrc/cuda/conv/conv.cuh``; every shape and dtype.
- ``hopper:CONFIGURATION``: TMA and wgmma with CUTLASS (``csrc/cuda/conv_hopper/``), on sm_90 only.
- ``cudnn``: cuDNN's fused calls for ReLU; otherwise its convolution, followed by our epilogue.
- ``torch``: unfused PyTorch operators, the fallback if nothing else works.

Only the last two compute several groups or dilation. Activations that our kernels lack
(:data:`~resfast.ops.conv.reference.KERNEL_ACTIVATIONS`) follow them as an operator of their own.

Each shape is measured once on each kind of GPU, and the choice is cached in
``$XDG_CACHE_HOME/resfast/conv-cuda.json``. Measured is the time on the GPU, which is what matters
with CUDA graphs and large batches, with weights evicted from the L2 cache and an input that was
just written, as between the layers of a network.

``RESFAST_CONV=ours``, ``hopper``, ``cudnn`` or ``torch`` allows only candidates of that kind, and
``ours:2,1`` only that one, wherever it applies.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from . import choice as conv_choice
from . import reference as conv_reference
from .choice import Call, Plan, Times
from .reference import channels_last

CHOICES = conv_choice.Choices("conv-cuda.json")
MAX_OURS = 6
"""Tiles and splits to measure, of those that ``csrc/cuda/conv/conv_plan.h`` ranks best."""
MAX_HOPPER = 6
ROUNDS = 12
FLUSHES = 4
"""Number of times that the L2 cache is overwritten before each call. This also lets the CPU launch
the measured call before the GPU reaches it."""
CHECKED_IMAGES = 4
"""Results are checked on this many of the first and of the last images."""
MAX_ERROR, MAX_ERROR_FLOAT32 = 0.02, 1e-4
"""Maximum RMS error relative to the result's RMS; the second is for float32 without TF32."""

Arguments = tuple[
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    list[int],
    list[int],
    str,
    float,
    int,
    Sequence[int],
]
"""Arguments of the operator."""


@dataclass(frozen=True)
class Candidate:
    """``run(x, weight, bias, residual)``, with the bias prepared by ``prepare_bias(bias, weight)``.

    x, weight and residual are in ``channels_last``, and so is the result.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    prepare_bias: Callable[[Tensor | None, Tensor], Tensor | None] = lambda bias, weight: bias


def conv2d_bias_act(*args: Any) -> Tensor:
    """The operator for weights that may change between calls."""
    args = _with_defaults(*args)
    x, weight, bias, residual = args[:4]
    candidate, _ = _choose(args)
    return candidate.run(
        channels_last(x),
        channels_last(weight),
        candidate.prepare_bias(bias, weight),
        None if residual is None else channels_last(residual),
    )


def plan(*args: Any) -> Plan:
    """The plan for arguments like these, with this weight and this bias."""
    args = _with_defaults(*args)
    weight, bias, has_residual = channels_last(args[1]), args[2], args[3] is not None
    candidate, settled = _choose(args)
    run, bias = candidate.run, candidate.prepare_bias(bias, weight)

    def planned(x: Tensor, residual: Tensor | None) -> Tensor:
        if has_residual:
            residual = channels_last(residual)
        return run(channels_last(x), weight, bias, residual)

    shape = conv_reference.output_shape(args[0], weight, *args[4:6], args[9])
    return Plan(candidate.name, torch.Size(shape), planned, settled)


def tf32(dtype: torch.dtype) -> bool:
    """Whether torch's cuDNN settings allow TF32 for convolutions of this dtype."""
    # torch.backends.cudnn.allow_tf32 sets this too, but cannot always be read.
    return dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"


def may_measure() -> bool:
    """Whether kernels can be timed: not during CUDA graph capture, where nothing runs."""
    return not torch.cuda.is_current_stream_capturing()


@functools.cache
def machine(device: torch.device) -> str:
    """The part of a cache key that describes the GPU and its software."""
    name, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return f"{name}|{capability}|{conv_choice.versions()}|cuDNN {cudnn}"


def _with_defaults(*args: Any) -> Arguments:
    defaults = (conv_reference.TORCH_NEGATIVE_SLOPE, 1, (1, 1))
    return (*args, *defaults[len(args) - 7 :])


# -- candidates ------------------------------------------------------------------------------------


def _candidates(args: Arguments) -> dict[str, Candidate]:
    """The applicable candidates by name: the best guess first, ``torch`` always last."""
    x, weight, _, _, stride, padding, activation, slope, groups, dilation = args
    if activation not in conv_reference.KERNEL_ACTIVATIONS:
        plain = _candidates((*args[:6], "none", *args[7:]))
        return {name: _then(candidate, activation) for name, candidate in plain.items()}
    geometry = stride, padding
    capability = _capability(x.device)
    is_dense = groups == 1 and max(dilation) == 1
    found = []
    has_ours = _built("conv2d_cuda") and capability >= runtime.MIN_COMPUTE_CAPABILITY
    if has_ours and is_dense:
        kernel = torch.ops.resfast.conv2d_cuda.default
        sizes = x, weight, *geometry
        flat = _configurations("conv2d_cuda_candidates", *sizes, _multiprocessors(x.device))
        for tile, splits in zip(flat[::2], flat[1::2], strict=True):
            rest = (*geometry, activation, slope, tile, splits, tf32(x.dtype))
            found.append(Candidate(f"ours:{tile},{splits}", _bound(kernel, rest)))
    is_hopper = _built("conv2d_hopper") and capability == (9, 0)
    if is_hopper and is_dense and x.dtype != torch.float32:
        kernel = torch.ops.resfast.conv2d_hopper.default
        for config in _configurations("conv2d_hopper_configs", x, weight, *geometry):
            rest = (*geometry, activation, slope, config)
            found.append(Candidate(f"hopper:{config}", _bound(kernel, rest)))
    whole = (*geometry, dilation, groups)
    if torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled:
        if activation == "relu":
            run = functools.partial(_cudnn_relu, whole)
            found.append(Candidate("cudnn", run, _cudnn_bias))
        elif has_ours:
            run = functools.partial(_cudnn_then_epilogue, whole, activation, slope)
            found.append(Candidate("cudnn", run))
    found.append(Candidate("torch", functools.partial(_torch, whole, activation, slope)))
    return {candidate.name: candidate for candidate in found}


def _then(candidate: Candidate, activation: str) -> Candidate:
    """A candidate, followed by an activation in place."""
    function = conv_reference.ACTIVATIONS[activation]

    def run(*tensors: Tensor | None) -> Tensor:
        return function(candidate.run(*tensors), 0.0, True)

    return replace(candidate, run=run)


def _configurations(name: str, *args: Any) -> list[int]:
    """The configurations that one of our kernels lists, best guess first."""
    try:
        return getattr(torch.ops.resfast, name)(*args)
    except RuntimeError as error:  # exceeds 32-bit indices; everything else is already checked
        conv_choice.warn_once(str(error).partition("\n")[0])
        return []


def _built(name: str) -> bool:
    return hasattr(torch.ops.resfast, name)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _bound(kernel: Any, rest: tuple) -> Callable[..., Tensor]:
    return lambda x, weight, bias, residual: kernel(x, weight, bias, residual, *rest)


def _cudnn_bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    """The bias in the weight's dtype; zeros if None, which torch would create in every call."""
    if bias is None:
        return weight.new_zeros(weight.shape[0])
    return bias.to(weight.dtype)


Geometry = tuple[list[int], list[int], Sequence[int], int]
"""Stride, padding, dilation and groups."""


def _cudnn_relu(
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if residual is None:
        return channels_last(torch.cudnn_convolution_relu(x, weight, bias, *geometry))
    out = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
    return channels_last(out)


def _cudnn_then_epilogue(
    geometry: Geometry,
    activation: str,
    slope: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    out = channels_last(F.conv2d(x, weight, None, *geometry))
    if activation == "none" and bias is None and residual is None:
        return out
    return torch.ops.resfast.conv2d_epilogue_.default(out, bias, residual, activation, slope)


def _torch(
    geometry: Geometry,
    activation: str,
    slope: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    out = F.conv2d(x, weight, None, *geometry).float()
    if bias is not None:
        out = out + bias[:, None, None]
    if residual is not None:
        out = out + residual
    out = conv_reference.ACTIVATIONS[activation](out, slope)
    return channels_last(out.to(x.dtype))


# -- choice ----------------------------------------------------------------------------------------


_chosen: dict[tuple, Candidate] = {}


def _choose(args: Arguments) -> tuple[Candidate, bool]:
    """The candidate to use, and whether that is final: not while measuring is impossible."""
    x, weight, _, residual, stride, padding, activation, slope, groups, dilation = args
    sizes = x.shape, weight.shape, *stride, *padding, *dilation, groups, residual is None
    named = os.environ.get("RESFAST_CONV")
    key = (*sizes, x.dtype, tf32(x.dtype), x.device, activation, slope, named)
    candidate = _chosen.get(key)
    if candidate is not None:
        return candidate, True
    candidate, settled = _choose_among(_candidates(args), args)
    if settled:
        _chosen[key] = candidate
    return candidate, settled


def choice_key(args: tuple[Any, ...]) -> str:
    """The key in the cache file: everything that the choice depends on."""
    x, weight, _, residual, stride, padding, activation, *more = _with_defaults(*args)
    kinds = "+".join(kind for kind in ("cuda", "hopper") if _built(f"conv2d_{kind}")) or "no"
    precision = "tf32" if tf32(x.dtype) else str(x.dtype).removeprefix("torch.")
    geometry = (stride, padding, residual is not None, more[2])
    sizes = conv_choice.describe_sizes(x, weight, *geometry)
    parts = (machine(x.device), f"{kinds} kernels", precision, sizes, activation)
    return "|".join([*parts, conv_choice.forced("cuda") or "any"])


def _allowed(candidates: dict[str, Candidate], named: str | None) -> dict[str, Candidate]:
    """The candidates worth measuring, or those that RESFAST_CONV names."""
    if len(candidates) > 1 and named != "torch":
        candidates = {name: value for name, value in candidates.items() if name != "torch"}
    of_name = {name: value for name, value in candidates.items() if name == named}
    of_kind = {name: value for name, value in candidates.items() if name.partition(":")[0] == named}
    allowed, counts = {}, {"ours": MAX_OURS, "hopper": MAX_HOPPER}
    for name, candidate in (of_name or of_kind or candidates).items():
        kind = name.partition(":")[0]
        counts[kind] = counts.get(kind, 1) - 1
        if counts[kind] >= 0:
            allowed[name] = candidate
    return allowed


def _choose_among(candidates: dict[str, Candidate], args: Arguments) -> tuple[Candidate, bool]:
    if args[0].numel() == 0:
        return candidates["torch"], True
    allowed = _allowed(candidates, conv_choice.forced("cuda"))
    first = next(iter(allowed))
    with torch.cuda.device(args[0].device):
        key = choice_key(args)
        name = first if len(allowed) == 1 else CHOICES.get(key, allowed)
        if not may_measure():
            return candidates[name or first], name is not None
        if name is None:
            name = _fastest(key, allowed, args)
        elif name == "cudnn":  # cuDNN searches for its fastest algorithm in every process
            with torch.inference_mode(), _cudnn_benchmark():
                _call(candidates[name], args)()
        return candidates[name or first], name is not None


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Lets cuDNN time its algorithms in the first call for a shape and keep the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _call(candidate: Candidate, args: Arguments) -> Call:
    x, weight, bias, residual, *_ = args
    return functools.partial(
        candidate.run,
        channels_last(x),
        weight := channels_last(weight),
        candidate.prepare_bias(bias, weight),
        None if residual is None else channels_last(residual),
    )


@torch.inference_mode()
def _fastest(key: str, candidates: dict[str, Candidate], args: Arguments) -> str | None:
    """The fastest of the candidates that are accurate on these arguments.

    None if that cannot be determined: out of memory, or the exact result is not finite.
    """
    x, weight, bias, residual, *rest = args
    what = f"{list(x.shape)} with {list(weight.shape)} in {x.dtype}"
    try:
        exact = _exact(args)
        if not exact.isfinite().all():
            return None
        # Measures on copies, which nothing else reads or writes.
        original, added = channels_last(x), None if residual is None else residual.clone()
        scratch = (original.clone(), weight.clone(), bias, added, *rest)
        calls = {name: _call(candidate, scratch) for name, candidate in candidates.items()}
        loose = x.dtype != torch.float32 or tf32(x.dtype)
        is_right = conv_choice.near(exact, MAX_ERROR if loose else MAX_ERROR_FLOAT32)
        with _cudnn_benchmark():
            chosen, steady = conv_choice.fastest(
                calls,
                is_right=lambda out: is_right(ends(out)),
                seconds=functools.partial(seconds, fresh=lambda: scratch[0].copy_(original)),
                trusted="torch",
                what=what,
            )
    except torch.OutOfMemoryError:
        conv_choice.warn_once(f"not enough GPU memory to measure the convolution of {what}")
        return None
    CHOICES.put(key, chosen, keep=steady)
    return chosen


def ends(tensor: Tensor) -> Tensor:
    """The first and the last images, where a wrong tile would be visible."""
    if tensor.shape[0] <= 2 * CHECKED_IMAGES:
        return tensor
    return torch.cat([tensor[:CHECKED_IMAGES], tensor[-CHECKED_IMAGES:]])


def _exact(args: Arguments) -> Tensor:
    """The result for the images of :func:`ends` in float64, which TF32 settings do not affect."""
    x, weight, bias, residual, *rest = args
    added = None if residual is None else ends(residual).double()
    bias = None if bias is None else bias.double()
    out = conv_reference.conv2d_bias_act(ends(x).double(), weight.double(), bias, added, *rest)
    return out.to(x.dtype).double()  # values that overflow the dtype become infinite


def seconds(calls: Mapping[str, Call], fresh: Callable[[], Any]) -> Times:
    """Times on the GPU, measured in turns with events; ``fresh`` writes the input before each."""
    flush = torch.empty(_l2_bytes(torch.cuda.current_device()), dtype=torch.uint8, device="cuda")
    times: Times = {name: [] for name in calls}
    for turn in range(ROUNDS + 2):
        events = {}
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(FLUSHES):
                flush.zero_()
            fresh()
            begin.record()
            call()
            end.record()
            events[name] = begin, end
        end.synchronize()
        if turn >= 2:  # the first turns warm up
            for name, (begin, end) in events.items():
                times[name].append(begin.elapsed_time(end) / 1000)
    return times


@functools.cache
def _l2_bytes(device: int) -> int:
    return max(torch.cuda.get_device_properties(device).L2_cache_size, 1 << 24)
