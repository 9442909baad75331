"""``resfast::basic_block``: a residual block of two 3x3 convolutions, for inference.

``h = activation(conv2d(x, weight1) + bias1)``, ``y = activation(conv2d(h, weight2) + bias2 + x)``
with stride 1 and padding 1. ``h`` is rounded to x's dtype, as in two calls of
``resfast::conv2d_bias_act``, which is what runs on the CPU. On CUDA, where it is faster, one kernel
computes both and keeps ``h`` in shared memory (``csrc/cuda/basic_block/basic_block.cuh``).

Shapes: x and y ``[N, C, H, W]``, weights ``[C, C, 3, 3]``, biases ``[C]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import runtime
from ..conv import choice as conv_choice
from ..conv import cuda as conv_cuda
from ..conv import op as conv
from ..conv import reference as conv_reference
from ..conv.op import ConvBiasAct
from ..conv.reference import TORCH_NEGATIVE_SLOPE, new_map
from ..registration import register

ACTIVATIONS = ("relu", "leaky_relu")
DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of the kernel."""
CHANNEL_MULTIPLE = 16
"""The kernel needs a multiple of this number of channels."""
MAX_MEASURED = 4
"""Number of tile and cluster sizes to measure, of those that the cost model ranks first."""
SEPARATE = "two convolutions"
_ONE = [1, 1]


def basic_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: conv.Activation = "relu",
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
) -> Tensor:
    """Two 3x3 convolutions with an identity shortcut around them.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16 or float16, any strides; fast in ``channels_last``.
        weight1: weight of the first convolution, ``[C, C, 3, 3]``, of x's dtype.
        bias1: its bias, float32 ``[C]``.
        weight2: weight of the second convolution, of the same shape and dtype.
        bias2: its bias, float32 ``[C]``.
        activation: ``relu`` or ``leaky_relu``, the same for both.
        negative_slope: slope of ``leaky_relu`` for negative values.

    Returns:
        ``[N, C, H, W]`` in ``channels_last`` memory, of x's dtype.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or a value out of range.
        RuntimeError: a tensor requires grad while gradients are recorded.
    """
    return torch.ops.resfast.basic_block(
        x, weight1, bias1, weight2, bias2, activation, negative_slope
    )


def check_arguments(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
) -> None:
    """Checks the operator's arguments.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or a value out of range.
    """
    for name, weight, bias in (("first", weight1, bias1), ("second", weight2, bias2)):
        try:
            conv.check_arguments(x, weight, bias, None, _ONE, _ONE, activation, negative_slope)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} convolution: {error}") from None
        expected = [x.shape[1], x.shape[1], 3, 3]
        if list(weight.shape) != expected:
            shape = list(weight.shape)
            raise ValueError(f"{name} convolution: weight is {shape}; expected {expected}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r} is not in the block; expected one of "
            f"{', '.join(ACTIVATIONS)}, or use two convolutions"
        )


def _two_convolutions(*args: Any) -> Tensor:
    return _compose(torch.ops.resfast.conv2d_bias_act.default, *args)


def _compose(
    convolve: Callable[..., Tensor],
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *epilogue: Any,
) -> Tensor:
    h = convolve(x, weight1, bias1, None, _ONE, _ONE, *epilogue)
    return convolve(h, weight2, bias2, x, _ONE, _ONE, *epilogue)


def _cpu(*args: Any) -> Tensor:
    check_arguments(*args)
    return _two_convolutions(*args)


def _cuda(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
) -> Tensor:
    args = (x, weight1, bias1, weight2, bias2, activation, negative_slope)
    check_arguments(*args)
    chosen = plan(*args)
    return _two_convolutions(*args) if chosen is None else _kernel(*args, *chosen)


def _kernel(*args: Any) -> Tensor:
    """Runs the kernel: the operator's arguments, then tile and cluster."""
    return torch.ops.resfast.basic_block_cuda.default(*args)


def _fake(x: Tensor, *args: Any) -> Tensor:
    check_arguments(x, *args)
    return new_map(x, list(x.shape))


def _refuse(ctx: Any, inputs: tuple, output: Tensor) -> None:
    names = ("x", "weight1", "bias1", "weight2", "bias2")
    for name, tensor in zip(names, inputs, strict=False):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(conv.GRAD.format(name=name))


def _no_backward(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(conv.GRAD.format(name="a tensor"))


register(
    "basic_block(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, "
    "str activation, float negative_slope=0.01) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_refuse,
    backward=_no_backward,
)


def applies(first: nn.Module, second: nn.Module) -> bool:
    """Whether the kernel can compute two layers that run as ``second(first(x), x)``."""
    if not isinstance(first, ConvBiasAct) or not isinstance(second, ConvBiasAct):
        return False
    channels, weight = first.weight.shape[0], first.weight
    leaky = first.activation == "leaky_relu"
    return (
        weight.dtype in DTYPES
        and channels % CHANNEL_MULTIPLE == 0
        and first.activation in ACTIVATIONS
        and first.activation == second.activation
        and (not leaky or first.negative_slope == second.negative_slope)
        and (weight.dtype, weight.device) == (second.weight.dtype, second.weight.device)
        and all(
            list(layer.weight.shape) == [channels, channels, 3, 3]
            and layer.stride == layer.padding == layer.dilation == _ONE
            and layer.groups == 1
            for layer in (first, second)
        )
    )


class BasicBlock(nn.Module):
    """Two :class:`~resfast.ops.conv.op.ConvBiasAct` with an identity shortcut, for inference.

    ``conv2(conv1(x), x)``; on CUDA as one kernel for shapes where that was measured to be faster.

    Args:
        conv1: the first layer.
        conv2: the second layer; see :func:`applies` for the pairs that are supported.

    Shape: ``[N, C, H, W]`` of the weights' dtype to the same in ``channels_last`` memory.

    Raises:
        ValueError: the pair of layers is not supported.
        TypeError, ValueError, RuntimeError: in calls, those of :func:`basic_block`.
    """

    def __init__(self, conv1: ConvBiasAct, conv2: ConvBiasAct) -> None:
        super().__init__()
        if not applies(conv1, conv2):
            raise ValueError(
                f"{conv1} and {conv2} are not a basic block; expected two ConvBiasAct of 3x3, "
                "stride and padding 1, with as many filters as channels (a multiple of "
                f"{CHANNEL_MULTIPLE}), in bfloat16 or float16 and with the same activation, relu "
                "or leaky_relu"
            )
        self.conv1, self.conv2 = conv1, conv2

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_cuda:  # torch.fx passes proxies
            return self.conv2(self.conv1(x), x)
        if x.ndim == 3:
            return self.forward(x[None])[0]
        args = self._arguments(x)
        if torch.onnx.is_in_onnx_export():  # ONNX has no operator of ours
            return self.conv2(self.conv1(x), x)
        if type(x) is not Tensor or torch.compiler.is_compiling():
            return torch.ops.resfast.basic_block(*args)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(conv.GRAD.format(name="x"))
        chosen = plan(*args)
        return self.conv2(self.conv1(x), x) if chosen is None else _kernel(*args, *chosen)

    def _arguments(self, x: Tensor) -> tuple[Any, ...]:
        """The operator's arguments."""
        first, second = self.conv1, self.conv2
        layers = (first.weight, first.bias, second.weight, second.bias)
        return (x, *layers, first.activation, first.negative_slope)


# -- the choice on CUDA ----------------------------------------------------------------------------

_plans: dict[tuple, tuple[int, int] | None] = {}


def plan(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
) -> tuple[int, int] | None:
    """Tile and cluster of the kernel for CUDA arguments like these; None for two convolutions.

    The first call for a shape measures which is faster; the result is stored in the same file as
    the choices of :mod:`resfast.ops.conv.cuda`. It is always None if RESFAST_CONV names an
    algorithm, and for a new shape during the capture of a CUDA graph.
    """
    if conv_choice.forced("cuda"):
        return None
    key = (x.device, x.dtype, x.shape, activation)
    if key not in _plans:
        args = (x, weight1, bias1, weight2, bias2, activation, negative_slope)
        check_arguments(*args)
        candidates = _candidates(x)
        name = _choose(args, candidates) if candidates else SEPARATE
        if name is None:
            return None
        _plans[key] = candidates.get(name)
    return _plans[key]


def _candidates(x: Tensor) -> dict[str, tuple[int, int]]:
    """Tile and cluster sizes that may be faster than two convolutions, by name."""
    if x.dtype not in DTYPES or x.numel() == 0 or x.shape[1] % CHANNEL_MULTIPLE:
        return {}
    built = hasattr(torch.ops.resfast, "basic_block_cuda")
    if not built or torch.cuda.get_device_capability(x.device) < runtime.MIN_COMPUTE_CAPABILITY:
        return {}
    flat = torch.ops.resfast.basic_block_cuda_candidates(x)
    pairs = list(zip(flat[::2], flat[1::2], strict=True))[:MAX_MEASURED]
    return {f"block:{tile},{cluster}": (tile, cluster) for tile, cluster in pairs}


def _choose(args: tuple, candidates: dict[str, tuple[int, int]]) -> str | None:
    """Name of the fastest candidate; None if it is unknown and cannot be measured now."""
    x, weight1, bias1, weight2, bias2, *epilogue = args
    key = f"block|{conv_cuda.choice_key((x, weight2, bias2, x, _ONE, _ONE, *epilogue))}"
    what = f"a basic block of {list(x.shape)} in {x.dtype}"
    with torch.cuda.device(x.device), torch.inference_mode():
        name = conv_cuda.CHOICES.get(key, [SEPARATE, *candidates])
        if name is not None or not conv_cuda.may_measure():
            return name
        try:
            parts = (conv_cuda.ends(x), weight1, bias1, weight2, bias2)
            wide = (None if part is None else part.double() for part in parts)
            exact = _compose(conv_reference.conv2d_bias_act, *wide, *epilogue)
            if not exact.isfinite().all():
                return None
            is_right = conv_choice.near(exact, conv_cuda.MAX_ERROR)
            given = conv_reference.channels_last(x)
            scratch = given.clone()
            rest = args[1:]
            calls = {SEPARATE: functools.partial(_two_convolutions, scratch, *rest)}
            for candidate, pair in candidates.items():
                calls[candidate] = functools.partial(_kernel, scratch, *rest, *pair)
            name, steady = conv_choice.fastest(
                calls,
                is_right=lambda out: is_right(conv_cuda.ends(out)),
                seconds=functools.partial(conv_cuda.seconds, fresh=lambda: scratch.copy_(given)),
                trusted=SEPARATE,
                what=what,
            )
        except torch.OutOfMemoryError:
            conv_choice.warn_once(f"no GPU memory to measure {what}: two convolutions")
            return None
        conv_cuda.CHOICES.put(key, name, keep=steady)
        return name
