"""``resfast::conv2d_aside``: a convolution whose weight gradient does not hold up the others.

In a CUDA graph the weight's gradient, which only the optimizer waits for, is computed on a branch
of its own beside the gradients of the layers before it, most of which leave part of a GPU idle.
The products are PyTorch's (cuDNN). Where no graph is captured, all is done in order.

Shapes: x ``[N, C, H, W]``, weight ``[K, C, R, S]``, result ``[N, K, P, Q]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfast import runtime
from resfast.kernels.conv_reference import channels_last, new_map, output_shape

torch.library.define(
    "resfast::conv2d_aside",
    "(Tensor x, Tensor weight, int stride, int padding) -> (Tensor, Tensor)",
)
torch.library.define(
    "resfast::conv2d_aside_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor rounded, int stride, int padding, "
    "bool[2] needed) -> (Tensor, Tensor)",
)


def conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution without bias, with gradients.

    Whoever captures a graph must call :func:`resfast.runtime.join_aside` behind the backward pass,
    before anything reads the weight's gradient, and must not let a backward pass add to another's.

    Args:
        x: ``[N, C, H, W]``, bfloat16 or float16; fast in ``channels_last``.
        weight: float32 ``[K, C, R, S]``, rounded to x's dtype.
        stride: of rows and columns.
        padding: zeros on each side, likewise.

    Returns:
        ``[N, K, P, Q]`` in ``channels_last`` memory, of x's dtype. The weight's gradient is
        float32, with the weight's strides.

    Raises:
        TypeError: a tensor of a wrong dtype.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != torch.float32:
        raise TypeError(
            f"x is {x.dtype} and weight {weight.dtype}; expected bfloat16 or float16, and float32"
        )
    return torch.ops.resfast.conv2d_aside(x, weight, stride, padding)[0]


def _forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    rounded = weight.to(x.dtype, memory_format=torch.channels_last, copy=True)
    out = torch.conv2d(channels_last(x), rounded, None, stride, padding)
    return channels_last(out), rounded


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rounded: Tensor,
    stride: int,
    padding: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:
    grad, x = channels_last(grad), channels_last(x)
    rest = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
    for_x = for_weight = x.new_empty(0)
    if needed[1]:
        with runtime.aside(grad, x):
            exact = torch.ops.aten.convolution_backward(
                grad, x, rounded, *rest, [False, True, False]
            )[1]
            for_weight = torch.empty_like(weight).copy_(exact)
    if needed[0]:
        for_x = torch.ops.aten.convolution_backward(grad, x, rounded, *rest, [True, False, False])
        for_x = channels_last(for_x[0])
    return for_x, for_weight


for _key in ("cpu", "cuda"):
    torch.library.impl("resfast::conv2d_aside", _key)(_forward)
    torch.library.impl("resfast::conv2d_aside_backward", _key)(_backward)


@torch.library.register_fake("resfast::conv2d_aside")
def _fake(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    out = new_map(x, output_shape(x, weight, [stride] * 2, [padding] * 2))
    return out, torch.empty_like(weight, dtype=x.dtype, memory_format=torch.channels_last)


@torch.library.register_fake("resfast::conv2d_aside_backward")
def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rounded: Tensor,
    stride: int,
    padding: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:
    for_x = torch.empty_like(x, memory_format=torch.channels_last) if needed[0] else x.new_empty(0)
    return for_x, torch.empty_like(weight) if needed[1] else x.new_empty(0)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.where = inputs[2:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    needed = list(ctx.needs_input_grad[:2])
    both = torch.ops.resfast.conv2d_aside_backward(grad, *ctx.saved_tensors, *ctx.where, needed)
    first, second = (one if wanted else None for one, wanted in zip(both, needed, strict=True))
    return first, second, None, None


torch.library.register_autograd("resfast::conv2d_aside", _gradients, setup_context=_setup)
