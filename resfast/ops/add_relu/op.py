"""``resfast::add_relu``: the end of a residual block, ``relu(x + residual)``, for training.

Forward and backward (``resfast::add_relu_backward``) are one pass over memory each. Only the result
is saved for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..conv import reference as conv_reference
from ..registration import fallback, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """``relu(x + residual)``, with gradients.

    Args:
        x: any shape, float32, bfloat16 or float16.
        residual: the same shape, dtype and device.

    Returns:
        A new tensor in the memory format of ``x``; the sum is computed in float32 and rounded once.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that differ.
    """
    check_arguments(x, residual)
    return torch.ops.resfast.add_relu(x, residual)


def check_arguments(
    x: Tensor, residual: Tensor, first: str = "x", second: str = "residual"
) -> None:
    """Checks the operator's arguments, which messages call ``first`` and ``second``.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that differ.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"{first} is {x.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    for verb, error, expected, found in (
        ("is", TypeError, x.dtype, residual.dtype),
        ("is on", ValueError, x.device, residual.device),
        ("is", ValueError, list(x.shape), list(residual.shape)),
    ):
        if found != expected:
            raise error(f"{second} {verb} {found}; expected {expected}, like {first}")


def _cpu(x: Tensor, residual: Tensor) -> Tensor:
    check_arguments(x, residual)
    return conv_reference.add_relu(x, residual)


def _backward_cpu(grad: Tensor, result: Tensor) -> Tensor:
    check_arguments(grad, result, "grad", "result")
    return conv_reference.add_relu_backward(grad, result)


def _fake(x: Tensor, residual: Tensor) -> Tensor:
    check_arguments(x, residual)
    return torch.empty_like(x)


def _backward_fake(grad: Tensor, result: Tensor) -> Tensor:
    check_arguments(grad, result, "grad", "result")
    return torch.empty_like(result)


def _cuda(x: Tensor, residual: Tensor) -> Tensor:
    from . import triton as triton_add_relu

    check_arguments(x, residual)
    return triton_add_relu.add_relu(x, residual)


def _backward_cuda(grad: Tensor, result: Tensor) -> Tensor:
    from . import triton as triton_add_relu

    check_arguments(grad, result, "grad", "result")
    return triton_add_relu.add_relu_backward(grad, result)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    (result,) = ctx.saved_tensors
    grad_sum = torch.ops.resfast.add_relu_backward(grad, result)
    return grad_sum, grad_sum  # x and residual have the same gradient


register(
    "add_relu(Tensor x, Tensor residual) -> Tensor",
    cpu=fallback(_cpu),
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup,
    backward=_gradients,
    opaque=True,
)
register(
    "add_relu_backward(Tensor grad, Tensor result) -> Tensor",
    cpu=fallback(_backward_cpu),
    cuda=_backward_cuda,
    fake=_backward_fake,
    opaque=True,
)
