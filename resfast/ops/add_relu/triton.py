"""``resfast::add_relu`` and its backward on CUDA: one Triton kernel each, one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward_kernel(out, x, residual, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(x + at, mask=mask).to(tl.float32)
    value += tl.load(residual + at, mask=mask).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)  # NaN stays, as in torch
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(out, grad, result, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(grad + at, mask=mask)
    dead = tl.load(result + at, mask=mask).to(tl.float32) <= 0
    tl.store(out + at, tl.where(dead, 0.0, value).to(out.dtype.element_ty), mask=mask)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """Launches the kernel; arguments as in :mod:`resfast.ops.add_relu.op`, already checked."""
    return _launch(_forward_kernel, *_aligned(x, residual))


def add_relu_backward(grad: Tensor, result: Tensor) -> Tensor:
    """Launches the backward kernel."""
    result, grad = _aligned(result, grad)
    return _launch(_backward_kernel, grad, result)


def _aligned(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, dense and with the strides of ``torch.empty_like(first)``."""
    out = []
    strides = torch.empty_like(first, device="meta").stride()
    for tensor in (first, second):
        if tensor.stride() != strides:
            copy = torch.empty_strided(
                tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
            )
            tensor = copy.copy_(tensor)
        out.append(tensor)
    return out[0], out[1]


def _launch(kernel: triton.JITFunction, first: Tensor, second: Tensor) -> Tensor:
    out = torch.empty_like(second)
    count = out.numel()
    if count:
        with torch.cuda.device_of(first):
            kernel[(triton.cdiv(count, BLOCK),)](out, first, second, count, BLOCK=BLOCK)
    return out
