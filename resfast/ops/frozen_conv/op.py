"""``resfast::frozen_conv_act``: a first convolution that is not trained, its bias and activation.

Images have few channels, for which cuDNN uses tensor cores and memory badly, and oneDNN vectors.
``activation(conv2d(padded x, weight) + bias)`` is computed in one pass, on CUDA by a Triton kernel
and in bfloat16 on a CPU with AVX512-BF16 in C++. Only the bias has a gradient.

Shapes: x ``[N, C, H, W]``, weight ``[K, C, R, R]``, result ``[N, K, P, Q]`` with
P = H + before + after - R + 1 and Q = W + before + after - R + 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..conv import cpu as conv_cpu
from ..conv.reference import (
    ACTIVATIONS,
    KERNEL_ACTIVATIONS,
    channels_last,
    new_map,
)
from ..registration import register

AVAILABLE = runtime.has_triton()
"""Whether Triton is installed, which CUDA needs."""
ON_CPU = conv_cpu._has_kernels() and hasattr(torch.ops.resfast, "frozen_conv_forward")
"""Whether the C++ kernels are built and this processor has AVX512-BF16."""
MAX_PATCH_SIZE, MAX_FILTERS = 64, 256
"""Largest weight to use the operator for: C * R * R values per filter, and filters. A Triton
program holds it in registers; on the CPU a matrix product is faster from some size on."""


def applies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether to use this operator for a convolution in a training step.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[K, C, R, S]``.
        bias: ``[K]``, or None.
    """
    return (
        isinstance(x, Tensor)  # tracers pass proxies
        and torch.is_grad_enabled()
        and (
            (x.device.type == "cuda" and AVAILABLE and x.dtype in (torch.bfloat16, torch.float16))
            or (x.device.type == "cpu" and ON_CPU and x.dtype == torch.bfloat16)
        )
        and not (x.requires_grad or weight.requires_grad)
        and bias is not None
        and weight.dtype == bias.dtype == torch.float32
        and weight.shape[2] == weight.shape[3]
        and weight[0].numel() <= MAX_PATCH_SIZE
        and weight.shape[0] <= MAX_FILTERS
    )


def frozen_conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    before: int = 0,
    after: int = 0,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """``activation(conv2d(x, weight) + bias)`` with zeros around x; a gradient only for the bias.

    Args:
        x: ``[N, C, H, W]``, bfloat16, float16 or float32; fast in ``channels_last``.
        weight: float32 ``[K, C, R, R]``, rounded to x's dtype.
        bias: float32 ``[K]``.
        before: rows and columns of zeros above and left of the image.
        after: rows and columns of zeros below and right of the image.
        activation: ``none``, ``relu``, ``leaky_relu``, ``silu`` or ``gelu`` (exact GELU).
        negative_slope: slope of ``leaky_relu`` for negative values.

    Returns:
        ``[N, K, P, Q]`` in ``channels_last`` memory, of x's dtype, rounded once.

    Raises:
        ValueError: an unknown activation, or padded images smaller than the weight.
        RuntimeError: x or weight requires grad while gradients are recorded.
    """
    if activation not in KERNEL_ACTIVATIONS:
        known = ", ".join(KERNEL_ACTIVATIONS)
        raise ValueError(f"activation is {activation!r}; expected one of {known}")
    if min(_shape(x, weight, before, after)[2:]) < 1:
        raise ValueError(
            f"images of {x.shape[2]}x{x.shape[3]} with {before} and {after} rows of zeros are "
            f"smaller than a weight of {weight.shape[2]}x{weight.shape[3]}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError("frozen_conv_act has a gradient only for the bias; use conv2d")
    return torch.ops.resfast.frozen_conv_act(
        x, weight, bias, before, after, activation, negative_slope
    )


def _shape(x: Tensor, weight: Tensor, before: int, after: int) -> list[int]:
    n, _, h, w = x.shape
    more = before + after - weight.shape[2] + 1
    return [n, weight.shape[0], h + more, w + more]


def _before_activation(x: Tensor, weight: Tensor, bias: Tensor, before: int, after: int) -> Tensor:
    rounded = weight.to(x.dtype).float()
    return F.conv2d(F.pad(x.float(), (before, after, before, after)), rounded, bias)


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    before: int,
    after: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    if ON_CPU and x.dtype == torch.bfloat16:
        number = KERNEL_ACTIVATIONS.index(activation)
        kernel = torch.ops.resfast.frozen_conv_forward
        return kernel(channels_last(x), weight, bias, before, after, number, negative_slope)
    z = _before_activation(x, weight, bias, before, after)
    return channels_last(ACTIVATIONS[activation](z, negative_slope).to(x.dtype))


def _backward_cpu(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    before: int,
    after: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    if ON_CPU and x.dtype == torch.bfloat16:
        number = KERNEL_ACTIVATIONS.index(activation)
        kernel = torch.ops.resfast.frozen_conv_backward
        maps = channels_last(grad), channels_last(x)
        return kernel(*maps, weight, bias, before, after, number, negative_slope)
    z = _before_activation(x, weight, bias, before, after).requires_grad_()
    with torch.enable_grad():
        out = ACTIVATIONS[activation](z, negative_slope)
    (for_z,) = torch.autograd.grad(out, z, grad.float())
    return for_z.sum((0, 2, 3))


def _cuda(x: Tensor, *rest: Any) -> Tensor:
    from . import triton as triton_frozen_conv

    return triton_frozen_conv.forward(channels_last(x), *rest)


def _backward_cuda(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    from . import triton as triton_frozen_conv

    return triton_frozen_conv.backward(channels_last(grad), channels_last(x), *rest)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, before: int, after: int, *_: Any) -> Tensor:
    return new_map(x, _shape(x, weight, before, after))


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(bias)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for_bias = None
    if ctx.needs_input_grad[2]:
        backward = torch.ops.resfast.frozen_conv_act_backward
        for_bias = backward(grad, *ctx.saved_tensors, *ctx.rest)
    return None, None, for_bias, None, None, None, None


register(
    "frozen_conv_act(Tensor x, Tensor weight, Tensor bias, int before, int behind, str activation, "
    "float negative_slope) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup,
    backward=_gradients,
)
register(
    "frozen_conv_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, int before, "
    "int behind, str activation, float negative_slope) -> Tensor",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
