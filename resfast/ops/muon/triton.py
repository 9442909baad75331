"""What Muon does on CUDA: Triton kernels for filters of one shape.

A step is one pass over weight, gradient and momentum, then three products an iteration of
Newton-Schulz, X X^T, a I + b G + c G G and that times X, of which the last one moves the weight.
Norms are kept as sums of squares of blocks, which whoever needs a norm adds up in one order.

Shapes: B matrices of ``[S, L]``, S <= L: K filters of n numbers each, transposed where K > n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Numbers that a program of the first pass goes over."""
TILE, DEPTH = 32, 128
"""Side of a square of X X^T that a program computes, and how much of L it loads at a time."""
ROWS, COLUMNS, INNER = 64, 64, 64
"""Likewise of the other products."""


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _nesterov_kernel(
    weight,
    grad,
    buffer,
    update,
    sums,
    momentum,
    count,
    parts,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """buffer <- momentum buffer + grad; update <- grad + momentum buffer, and sums of squares."""
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gradient = tl.load(grad + at, mask=inside, other=0.0)
    velocity = tl.load(buffer + at, mask=inside, other=0.0) * momentum + gradient
    tl.store(buffer + at, velocity, mask=inside)
    rounded = (gradient + momentum * velocity).to(update.dtype.element_ty)
    tl.store(update + at, rounded, mask=inside)
    value = rounded.to(tl.float32)
    tl.store(sums + program, tl.reduce(value * value, 0, _add))
    if NORMALIZE:
        value = tl.load(weight + at, mask=inside, other=0.0)
        tl.store(sums + parts + program, tl.reduce(value * value, 0, _add))


@triton.jit
def _norm(sums, parts, least):
    total = 0.0
    for start in range(0, parts, 1024):
        at = start + tl.arange(0, 1024)
        total += tl.reduce(tl.load(sums + at, mask=at < parts, other=0.0), 0, _add)
    return tl.maximum(tl.sqrt_rn(total), least)


@triton.jit
def _symmetric_kernel(
    out,
    x,
    sums,
    size,
    length,
    stride,
    step,
    parts,
    least,
    a,
    b,
    c,
    NORMALIZE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x x^T by its lower triangle; a I + b x + c x x^T with POLYNOMIAL, for a symmetric x."""
    tiles = (size + TILE - 1) // TILE
    top, left = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch = tl.program_id(1).to(tl.int64)
    if left <= top:
        i, j = top * TILE + tl.arange(0, TILE), left * TILE + tl.arange(0, TILE)
        x += batch * size * length
        total = tl.full((TILE, TILE), 0, tl.float32)
        for start in range(0, length, DEPTH):
            k = start + tl.arange(0, DEPTH)
            one = tl.load(
                x + i[:, None] * stride + k[None, :] * step,
                mask=(i < size)[:, None] & (k < length)[None, :],
                other=0.0,
            )
            other = tl.load(
                x + j[None, :] * stride + k[:, None] * step,
                mask=(j < size)[None, :] & (k < length)[:, None],
                other=0.0,
            )
            total = tl.dot(one, other, total)
        inside = (i < size)[:, None] & (j < size)[None, :]
        if NORMALIZE:
            norm = _norm(sums + batch * 2 * parts, parts, least)
            total = total / (norm * norm)
        if POLYNOMIAL:
            value = tl.load(x + i[:, None] * stride + j[None, :] * step, mask=inside, other=0.0)
            total = c * total + b * value.to(tl.float32)
            total += tl.where(i[:, None] == j[None, :], a, 0.0)
        result = total.to(out.dtype.element_ty)
        out += batch * size * size
        tl.store(out + i[:, None] * size + j[None, :], result, mask=inside)
        tl.store(out + j[None, :] * size + i[:, None], result, mask=inside)


@triton.jit
def _apply_kernel(
    out,
    factor,
    x,
    sums,
    rate,
    size,
    length,
    stride,
    step,
    parts,
    least,
    decay,
    scale,
    norm,
    NORMALIZE: tl.constexpr,
    MOVE: tl.constexpr,
    KEEP_NORM: tl.constexpr,
    RATE_IN_MEMORY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """factor x; with MOVE out is a weight that moves by it."""
    across = (length + COLUMNS - 1) // COLUMNS
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    factor += batch * size * size
    x += batch * size * length
    total = tl.full((ROWS, COLUMNS), 0, tl.float32)
    for start in range(0, size, INNER):
        k = start + tl.arange(0, INNER)
        left = tl.load(
            factor + i[:, None] * size + k[None, :],
            mask=(i < size)[:, None] & (k < size)[None, :],
            other=0.0,
        )
        right = tl.load(
            x + k[:, None] * stride + j[None, :] * step,
            mask=(k < size)[:, None] & (j < length)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total)
    sums += batch * 2 * parts
    if NORMALIZE:
        total = total / _norm(sums, parts, least)
    target = out + batch * size * length + i[:, None] * stride + j[None, :] * step
    inside = (i < size)[:, None] & (j < length)[None, :]
    if MOVE:
        if RATE_IN_MEMORY:
            rate = tl.load(rate)
        keep = 1.0 - rate * decay
        if KEEP_NORM:
            keep = keep * norm / _norm(sums + parts, parts, least)
        total = keep * tl.load(target, mask=inside, other=0.0) - rate * scale * total
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


def step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    steps: int,
    normalize: bool,
    coefficients: tuple[float, float, float],
    least: float,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Moves filters of one shape, without waiting for the device.

    Args:
        weights: float32, K filters each, dense, a filter behind the other in memory.
        grads: of the same strides.
        buffers: momentum, likewise.
        lr: learning rate, a number or a float32 0-d tensor on the device.
        momentum: of Nesterov.
        weight_decay: part of itself, times lr, that a weight loses.
        steps: iterations of Newton-Schulz.
        normalize: bring each weight to the Frobenius norm sqrt(K) first.
        coefficients: of the quintic.
        least: norm that a smaller one is replaced by.
        dtype: of the factors of products, bfloat16 or float32.
    """
    filters, count = weights[0].shape[0], weights[0].numel()
    length = count // filters
    strides = length, 1
    if filters > length:
        strides = 1, length
    small, large = sorted((filters, length))
    batch, parts = len(weights), triton.cdiv(count, BLOCK)
    new = weights[0].new_empty
    x, gram, factor = (
        new(sizes, dtype=dtype)
        for sizes in ((batch, count), (batch, small, small), (batch, small, small))
    )
    sums = new((batch, 2, parts))
    tiles = triton.cdiv(small, TILE) ** 2, batch
    blocks = triton.cdiv(small, ROWS) * triton.cdiv(large, COLUMNS)
    squares = {"TILE": TILE, "num_warps": 4, "num_stages": 4}
    sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "INNER": INNER, "num_warps": 4}
    rate = {"rate": lr, "RATE_IN_MEMORY": isinstance(lr, Tensor)}
    scale = math.sqrt(max(1.0, filters / length))
    moving = {"decay": weight_decay, "scale": scale, "norm": math.sqrt(filters), **rate, **sizes}
    with torch.cuda.device_of(x):
        for b, (weight, grad, buffer) in enumerate(zip(weights, grads, buffers, strict=True)):
            _nesterov_kernel[(parts,)](
                weight, grad, buffer, x[b], sums[b], momentum, count, parts,
                NORMALIZE=normalize, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
        for done in range(steps):
            first, last = done == 0, done + 1 == steps
            _symmetric_kernel[tiles](
                gram, x, sums, small, large, *strides, parts, least, *coefficients,
                NORMALIZE=first, POLYNOMIAL=False, DEPTH=DEPTH, **squares,
            )  # fmt: skip
            _symmetric_kernel[tiles](
                factor, gram, sums, small, small, small, 1, parts, least, *coefficients,
                NORMALIZE=False, POLYNOMIAL=True, DEPTH=INNER, **squares,
            )  # fmt: skip
            moved = None if last else torch.empty_like(x)
            together = [(moved, factor, x, sums)]
            for tensors in zip(weights, factor, x, sums, strict=True) if last else together:
                _apply_kernel[(blocks, 1 if last else batch)](
                    *tensors, size=small, length=large, stride=strides[0], step=strides[1],
                    parts=parts, least=least, NORMALIZE=first, MOVE=last,
                    KEEP_NORM=last and normalize, **moving,
                )  # fmt: skip
            x = moved
