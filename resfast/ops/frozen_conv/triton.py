"""``resfast::frozen_conv_act`` and its backward on CUDA, in Triton.

A program gathers the patches of a block of pixels directly from the images, as rows of a matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conv.reference import new_map
from ..norm_act.triton import _activated, _before_activation, _plus

BLOCK = 128
"""Pixels per tile."""
MAX_PROGRAMS = 528
"""Maximum number of programs of the backward: four per multiprocessor of an H200."""
INTEGERS = ["pixels", "height", "width", "rows", "columns", "before"]
"""Arguments excluded from specialization."""


@triton.jit
def _filters(weight, filters, NUMBERS: tl.constexpr, DEPTH: tl.constexpr, FILTERS: tl.constexpr):
    """The weight as ``[DEPTH, FILTERS]``, padded with zeros."""
    k, f = tl.arange(0, DEPTH), tl.arange(0, FILTERS)
    inside = (k < NUMBERS)[:, None] & (f < filters)[None, :]
    return tl.load(weight + f[None, :] * NUMBERS + k[:, None], mask=inside, other=0.0)


@triton.jit
def _convolved(
    x,
    matrix,
    shift,
    pixel,
    pixels,
    height,
    width,
    rows,
    columns,
    before,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """float32 ``[BLOCK, FILTERS]`` before the activation."""
    k = tl.arange(0, DEPTH)
    line = pixel // columns
    image = line // rows
    top, left = line - image * rows - before, pixel - line * columns - before
    y = top[:, None] + (k // (CHANNELS * KERNEL))[None, :]
    across = left[:, None] + (k // CHANNELS % KERNEL)[None, :]
    inside = (k < CHANNELS * KERNEL * KERNEL)[None, :] & (pixel < pixels)[:, None]
    inside &= (y >= 0) & (y < height) & (across >= 0) & (across < width)
    place = (image[:, None] * height + y) * width + across
    patch = tl.load(x + place * CHANNELS + (k % CHANNELS)[None, :], mask=inside, other=0.0)
    return tl.dot(patch, matrix.to(patch.dtype)) + shift


@triton.jit(do_not_specialize=INTEGERS)
def _forward_kernel(
    out,
    x,
    weight,
    bias,
    slope,
    pixels,
    filters,
    height,
    width,
    rows,
    columns,
    before,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    DEPTH: tl.constexpr,
    FILTERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    f = tl.arange(0, FILTERS)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    matrix = _filters(weight, filters, CHANNELS * KERNEL * KERNEL, DEPTH, FILTERS)
    shift = tl.load(bias + f, mask=f < filters, other=0.0)[None, :]
    z = _convolved(
        x, matrix, shift, pixel, pixels, height, width, rows, columns, before,
        CHANNELS, KERNEL, DEPTH,
    )  # fmt: skip
    target = out + pixel.to(tl.int64)[:, None] * filters + f[None, :]
    value = _activated(z, slope, ACTIVATION).to(out.dtype.element_ty)
    tl.store(target, value, mask=(pixel < pixels)[:, None] & (f < filters)[None, :])


@triton.jit(do_not_specialize=[*INTEGERS, "blocks"])
def _backward_kernel(
    partials,
    grad,
    x,
    weight,
    bias,
    slope,
    pixels,
    filters,
    height,
    width,
    rows,
    columns,
    before,
    blocks,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    DEPTH: tl.constexpr,
    FILTERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    f = tl.arange(0, FILTERS)
    matrix = _filters(weight, filters, CHANNELS * KERNEL * KERNEL, DEPTH, FILTERS)
    shift = tl.load(bias + f, mask=f < filters, other=0.0)[None, :]
    total = tl.full((FILTERS,), 0, tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        z = _convolved(
            x, matrix, shift, pixel, pixels, height, width, rows, columns, before,
            CHANNELS, KERNEL, DEPTH,
        )  # fmt: skip
        inside = (pixel < pixels)[:, None] & (f < filters)[None, :]
        source = grad + pixel.to(tl.int64)[:, None] * filters + f[None, :]
        value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        total += tl.reduce(_before_activation(value, z, slope, ACTIVATION), 0, _plus)
    tl.store(partials + tl.program_id(0) * filters + f, total, mask=f < filters)


def _constants(weight: Tensor, activation: str) -> dict[str, int | str]:
    filters, channels, kernel = weight.shape[:3]
    return {
        "CHANNELS": channels,
        "KERNEL": kernel,
        "DEPTH": max(16, triton.next_power_of_2(channels * kernel**2)),
        "FILTERS": max(16, triton.next_power_of_2(filters)),
        "ACTIVATION": activation,
        "BLOCK": BLOCK,
        "num_warps": 4,
    }


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    before: int,
    after: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Launches the kernel; arguments as in :mod:`resfast.ops.frozen_conv.op`, x channels_last."""
    (n, _, h, w), (filters, _, kernel, _) = x.shape, weight.shape
    rows, columns = (side + before + after - kernel + 1 for side in (h, w))
    out = new_map(x, [n, filters, rows, columns])
    pixels = n * rows * columns
    if pixels:
        matrix = weight.permute(0, 2, 3, 1).contiguous()
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(pixels, BLOCK),)](
                out, x, matrix, bias, negative_slope, pixels, filters, h, w, rows, columns, before,
                **_constants(weight, activation),
            )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    before: int,
    after: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Launches the backward kernel; returns the gradient of the bias, float32 ``[K]``."""
    (n, filters, rows, columns), (h, w) = grad.shape, x.shape[2:]
    blocks = triton.cdiv(n * rows * columns, BLOCK)
    partials = bias.new_zeros((min(blocks, MAX_PROGRAMS), filters))
    if blocks:
        matrix = weight.permute(0, 2, 3, 1).contiguous()
        with torch.cuda.device_of(x):
            _backward_kernel[(len(partials),)](
                partials, grad, x, matrix, bias, negative_slope, n * rows * columns, filters, h, w,
                rows, columns, before, blocks, **_constants(weight, activation),
            )  # fmt: skip
    return partials.sum(0)
