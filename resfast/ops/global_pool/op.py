"""``resfast::global_pool``: maximum, mean or both of each channel of a map, for bfloat16 training.

PyTorch's gradients of both are slow on ``channels_last`` maps on the CPU: several passes, in
another memory format. This operator reads and writes each map once.

Shapes: x ``[N, C, H, W]``; result ``[N, C]``, or ``[N, 2 C]`` for ``both``, the maxima first.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..conv import cpu as conv_cpu
from ..conv.reference import channels_last, new_map
from ..registration import register

Kind = Literal["max", "avg", "both"]
AVAILABLE = conv_cpu._has_kernels() and hasattr(torch.ops.resfast, "pool_forward")
"""Whether the kernels are built and this processor has AVX512-BF16."""


def applies(x: Tensor) -> bool:
    """Whether :func:`global_pool` computes this and is faster than PyTorch: in training, bfloat16.

    Args:
        x: ``[N, C, H, W]``.
    """
    return (
        isinstance(x, Tensor)  # tracers pass proxies
        and AVAILABLE
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.dim() == 4
        and x.numel() > 0
    )


def global_pool(x: Tensor, kind: Kind) -> Tensor:
    """Maximum or mean of each channel, with a gradient.

    The gradient of a maximum goes to its first pixel, row by row, as in
    ``torch.nn.functional.max_pool2d``; NaN is a maximum. Means are computed in float32.

    Args:
        x: bfloat16 ``[N, C, H, W]`` on a CPU with AVX512-BF16; fast in ``channels_last``.
        kind: ``max``, ``avg`` or ``both``.

    Returns:
        bfloat16 ``[N, C]``, or ``[N, 2 C]`` for ``both``: the maxima, then the means.

    Raises:
        TypeError: x is not bfloat16.
        ValueError: an unknown kind, or x without pixels.
        RuntimeError: the C++ kernels are missing.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(get_args(Kind))}")
    if x.dtype != torch.bfloat16:
        raise TypeError(f"x is {x.dtype}; expected torch.bfloat16")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x is {list(x.shape)}; expected [N, C, H, W], none of them 0")
    return torch.ops.resfast.global_pool(x, kind)[0]


def _parts(kind: str) -> tuple[bool, bool]:
    return kind != "avg", kind != "max"


def _cpu(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return torch.ops.resfast.pool_forward(channels_last(x), *_parts(kind))


def _backward_cpu(grad: Tensor, positions: Tensor, size: list[int], kind: str) -> Tensor:
    kernel = torch.ops.resfast.pool_backward
    return kernel(grad.contiguous(), positions, size, *_parts(kind))


def _fake(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    images, channels = x.shape[:2]
    maxima, means = _parts(kind)
    features = x.new_empty(images, channels * (maxima + means))
    return features, x.new_empty(images if maxima else 0, channels, dtype=torch.int32)


def _backward_fake(grad: Tensor, positions: Tensor, size: list[int], kind: str) -> Tensor:
    return new_map(grad, size)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, ctx.kind = inputs
    ctx.size = list(x.shape)
    ctx.save_for_backward(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    backward = torch.ops.resfast.global_pool_backward
    return backward(grad, *ctx.saved_tensors, ctx.size, ctx.kind), None


register(
    "global_pool(Tensor x, str kind) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    setup_context=_setup,
    backward=_gradients,
)
register(
    "global_pool_backward(Tensor grad, Tensor positions, int[] size, str kind) -> Tensor",
    cpu=_backward_cpu,
    fake=_backward_fake,
)
