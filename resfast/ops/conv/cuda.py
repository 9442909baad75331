"""``resfast::conv2d_bias_act`` on CUDA: our kernels and cuDNN's, the fastest by measurement.

- ``ours:TILE,SPLITS``: the implicit GEMM of ``csrc/cuda/conv/conv.cuh``; every shape and dtype.
- ``hopper:CONFIGURATION``: TMA and wgmma with CUTLASS (``csrc/cuda/conv_hopper/``), on sm_90 only.
- ``cudnn``: its fused calls for ReLU; for others its convolution, then our epilogue.
- ``torch``: one operation after the other, where nothing else works.

Each shape is measured once on each kind of GPU, and the choice is kept in
``$XDG_CACHE_HOME/resfast/conv-cuda.json``. What is measured is the time on the GPU, which is what
counts under CUDA graphs and for large batches, with weights that have left the L2 cache and an
input that was just written, as between the layers of a network.

``RESFAST_CONV=ours``, ``hopper``, ``cudnn`` or ``torch`` takes only those that are named so, and
``ours:2,1`` that very one, wherever it applies.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resfast import runtime
from resfast.ops.conv import choice as conv_choice
from resfast.ops.conv import reference as conv_reference
from resfast.ops.conv.choice import Call, Plan, Times
from resfast.ops.conv.reference import channels_last

CHOICES = conv_choice.Choices("conv-cuda.json")
MOST_OF_OURS = 6
"""Tiles and splits that are measured, of those that ``csrc/cuda/conv/conv_plan.h`` thinks best."""
MOST_OF_HOPPER = 6
ROUNDS = 12
FLUSHES = 4
"""Times that as much as the L2 cache holds is written before each call. It also gives the processor
the time to launch what is measured before the GPU comes to it."""
ROWS = 4
"""Of the first and of the last images, on which a result is checked."""
MAX_ERROR, MAX_ERROR_FLOAT32 = 0.02, 1e-4
"""Of a way, root mean square relative to that of the result; the second without TF32."""

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[int], list[int], str, float]
"""Those of the operator."""


@dataclass(frozen=True)
class Way:
    """``run(x, weight, bias, residual)``, with the bias as ``prepare_bias(bias, weight)`` gives it.

    All tensors of images and filters come in ``channels_last``, and so does the result.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    prepare_bias: Callable[[Tensor | None, Tensor], Tensor | None] = lambda bias, weight: bias


def conv2d_bias_act(*args: Any) -> Tensor:
    """The operator, for a weight that is not known to stay the same."""
    args = _with_slope(*args)
    x, weight, bias, residual = args[:4]
    way, _ = _choose(args)
    return way.run(
        channels_last(x),
        channels_last(weight),
        way.prepare_bias(bias, weight),
        None if residual is None else channels_last(residual),
    )


def plan(*args: Any) -> Plan:
    """The way for arguments like these; the weight and the bias stay those that are given here."""
    args = _with_slope(*args)
    weight, bias, has_residual = channels_last(args[1]), args[2], args[3] is not None
    way, settled = _choose(args)
    run, bias = way.run, way.prepare_bias(bias, weight)

    def planned(x: Tensor, residual: Tensor | None) -> Tensor:
        if has_residual:
            residual = channels_last(residual)
        return run(channels_last(x), weight, bias, residual)

    shape = conv_reference.output_shape(args[0], weight, *args[4:6])
    return Plan(way.name, torch.Size(shape), planned, settled)


def tf32(dtype: torch.dtype) -> bool:
    """Whether a convolution of this dtype may be rounded to TF32, by torch's switches for cuDNN."""
    # Set by torch.backends.cudnn.allow_tf32 too, which cannot always be read.
    return dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"


def may_measure() -> bool:
    """Not while a CUDA graph is captured: nothing that is launched then runs."""
    return not torch.cuda.is_current_stream_capturing()


@functools.cache
def machine(device: torch.device) -> str:
    """The part of a key that says where something was measured."""
    name, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return f"{name}|{capability}|{conv_choice.versions()}|cuDNN {cudnn}"


def _with_slope(*args: Any) -> Arguments:
    return args if len(args) == 8 else (*args, conv_reference.TORCH_NEGATIVE_SLOPE)


# -- the ways --------------------------------------------------------------------------------------


def _ways(args: Arguments) -> dict[str, Way]:
    """Those that apply, by name; the first is the best guess, ``torch`` is always the last."""
    x, weight, _, _, stride, padding, activation, slope = args
    geometry = stride, padding
    capability = _capability(x.device)
    found = []
    has_ours = _built("conv2d_cuda") and capability >= runtime.MIN_COMPUTE_CAPABILITY
    if has_ours:
        kernel = torch.ops.resfast.conv2d_cuda.default
        flat = _offers("conv2d_cuda_candidates", x, weight, *geometry, _processors(x.device))
        for tile, splits in zip(flat[::2], flat[1::2], strict=True):
            rest = (*geometry, activation, slope, tile, splits, tf32(x.dtype))
            found.append(Way(f"ours:{tile},{splits}", _then(kernel, rest)))
    if _built("conv2d_hopper") and capability == (9, 0) and x.dtype != torch.float32:
        kernel = torch.ops.resfast.conv2d_hopper.default
        for config in _offers("conv2d_hopper_configs", x, weight, *geometry):
            rest = (*geometry, activation, slope, config)
            found.append(Way(f"hopper:{config}", _then(kernel, rest)))
    if torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled:
        if activation == "relu":
            found.append(Way("cudnn", functools.partial(_cudnn_relu, *geometry), _cudnn_bias))
        elif has_ours:
            run = functools.partial(_cudnn_then_epilogue, *geometry, activation, slope)
            found.append(Way("cudnn", run))
    found.append(Way("torch", functools.partial(_torch, *geometry, activation, slope)))
    return {way.name: way for way in found}


def _offers(name: str, *args: Any) -> list[int]:
    """What one of our kernels lists, best guess first."""
    try:
        return getattr(torch.ops.resfast, name)(*args)
    except RuntimeError as error:  # beyond its 32-bit positions; all else is checked before
        conv_choice.warn_once(str(error).partition("\n")[0])
        return []


def _built(name: str) -> bool:
    return hasattr(torch.ops.resfast, name)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _then(kernel: Any, rest: tuple) -> Callable[..., Tensor]:
    return lambda x, weight, bias, residual: kernel(x, weight, bias, residual, *rest)


def _cudnn_bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    """Of the weight's dtype; torch would make zeros in each call."""
    if bias is None:
        return weight.new_zeros(weight.shape[0])
    return bias.to(weight.dtype)


def _cudnn_relu(
    stride: list[int],
    padding: list[int],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    rest = (bias, stride, padding, (1, 1), 1)
    if residual is None:
        return channels_last(torch.cudnn_convolution_relu(x, weight, *rest))
    return channels_last(torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, *rest))


def _cudnn_then_epilogue(
    stride: list[int],
    padding: list[int],
    activation: str,
    slope: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    out = channels_last(F.conv2d(x, weight, None, stride, padding))
    if activation == "none" and bias is None and residual is None:
        return out
    return torch.ops.resfast.conv2d_epilogue_.default(out, bias, residual, activation, slope)


def _torch(
    stride: list[int],
    padding: list[int],
    activation: str,
    slope: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    out = F.conv2d(x, weight, None, stride, padding).float()
    if bias is not None:
        out = out + bias[:, None, None]
    if residual is not None:
        out = out + residual
    out = conv_reference.ACTIVATIONS[activation](out, slope)
    return channels_last(out.to(x.dtype))


# -- choice ----------------------------------------------------------------------------------------


_chosen: dict[tuple, Way] = {}


def _choose(args: Arguments) -> tuple[Way, bool]:
    """The way to take, and whether that is settled: not while nothing can be measured."""
    x, weight, _, residual, stride, padding, activation, slope = args
    sizes = x.shape, weight.shape, *stride, *padding, residual is None
    named = os.environ.get("RESFAST_CONV")
    key = (*sizes, x.dtype, tf32(x.dtype), x.device, activation, slope, named)
    way = _chosen.get(key)
    if way is not None:
        return way, True
    way, settled = _choose_among(_ways(args), args)
    if settled:
        _chosen[key] = way
    return way, settled


def choice_key(args: Arguments) -> str:
    """In the file: all that the choice depends on."""
    x, weight, _, residual, stride, padding, activation, _ = args
    kinds = "+".join(kind for kind in ("cuda", "hopper") if _built(f"conv2d_{kind}")) or "no"
    precision = "tf32" if tf32(x.dtype) else str(x.dtype).removeprefix("torch.")
    sizes = conv_choice.describe_sizes(x, weight, stride, padding, residual is not None)
    parts = (machine(x.device), f"{kinds} kernels", precision, sizes, activation)
    return "|".join([*parts, conv_choice.forced("cuda") or "any"])


def _allowed(ways: dict[str, Way], named: str | None) -> dict[str, Way]:
    """Of all that apply those that are worth measuring, or those that are named."""
    if len(ways) > 1 and named != "torch":
        ways = {name: way for name, way in ways.items() if name != "torch"}
    of_name = {name: way for name, way in ways.items() if name == named}
    of_kind = {name: way for name, way in ways.items() if name.partition(":")[0] == named}
    allowed, counts = {}, {"ours": MOST_OF_OURS, "hopper": MOST_OF_HOPPER}
    for name, way in (of_name or of_kind or ways).items():
        kind = name.partition(":")[0]
        counts[kind] = counts.get(kind, 1) - 1
        if counts[kind] >= 0:
            allowed[name] = way
    return allowed


def _choose_among(ways: dict[str, Way], args: Arguments) -> tuple[Way, bool]:
    if args[0].numel() == 0:
        return ways["torch"], True
    allowed = _allowed(ways, conv_choice.forced("cuda"))
    first = next(iter(allowed))
    with torch.cuda.device(args[0].device):
        key = choice_key(args)
        name = first if len(allowed) == 1 else CHOICES.get(key, allowed)
        if not may_measure():
            return ways[name or first], name is not None
        if name is None:
            name = _fastest(key, allowed, args)
        elif name == "cudnn":  # it looks for its fastest algorithm in every process
            with torch.inference_mode(), _cudnn_searches():
                _call(ways[name], args)()
        return ways[name or first], name is not None


@contextlib.contextmanager
def _cudnn_searches() -> Iterator[None]:
    """cuDNN measures its algorithms in its first call for a shape, and remembers the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _call(way: Way, args: Arguments) -> Call:
    x, weight, bias, residual, *_ = args
    return functools.partial(
        way.run,
        channels_last(x),
        weight := channels_last(weight),
        way.prepare_bias(bias, weight),
        None if residual is None else channels_last(residual),
    )


@torch.inference_mode()
def _fastest(key: str, ways: dict[str, Way], args: Arguments) -> str | None:
    """The fastest of the ways whose result on these very numbers is good enough.

    None where that cannot be told: for lack of memory, or of a finite result to compare with.
    """
    x, weight, bias, residual, *rest = args
    what = f"{list(x.shape)} with {list(weight.shape)} in {x.dtype}"
    try:
        exact = _exact(args)
        if not exact.isfinite().all():
            return None
        # Copies, so that nobody else reads or writes what is measured.
        given, added = channels_last(x), None if residual is None else residual.clone()
        scratch = (given.clone(), weight.clone(), bias, added, *rest)
        calls = {name: _call(way, scratch) for name, way in ways.items()}
        loose = x.dtype != torch.float32 or tf32(x.dtype)
        is_right = conv_choice.near(exact, MAX_ERROR if loose else MAX_ERROR_FLOAT32)
        with _cudnn_searches():
            chosen, steady = conv_choice.fastest(
                calls,
                is_right=lambda out: is_right(ends(out)),
                seconds=functools.partial(seconds, fresh=lambda: scratch[0].copy_(given)),
                trusted="torch",
                what=what,
            )
    except torch.OutOfMemoryError:
        conv_choice.warn_once(f"no GPU memory to measure the convolution of {what}: not measured")
        return None
    CHOICES.put(key, chosen, keep=steady)
    return chosen


def ends(tensor: Tensor) -> Tensor:
    """The first and the last images, where a wrong tile would show."""
    count = tensor.shape[0]
    return tensor if count <= 2 * ROWS else torch.cat([tensor[:ROWS], tensor[-ROWS:]])


def _exact(args: Arguments) -> Tensor:
    """The result for those images in float64, which no switch of float32 changes."""
    x, weight, bias, residual, *rest = args
    some = None if residual is None else ends(residual).double()
    bias = None if bias is None else bias.double()
    out = conv_reference.conv2d_bias_act(ends(x).double(), weight.double(), bias, some, *rest)
    return out.to(x.dtype).double()  # overflows of the dtype are infinite


def seconds(calls: Mapping[str, Call], fresh: Callable[[], Any]) -> Times:
    """Times on the GPU, measured in turns by events; ``fresh`` writes the input before each."""
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
