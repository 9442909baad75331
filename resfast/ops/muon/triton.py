"""Muon's step on CUDA: Triton kernels for filters of one shape.

A step is one pass over weight, gradient and momentum, then three matrix products per Newton-Schulz
iteration: G = X X^T, a I + b G + c G G, and that times X. The very last one updates the weight.
Norms are stored as sums of squares per block, which their readers add up in a fixed order.

Shapes: B matrices ``[S, L]``, S <= L: K filters of n weights each, transposed if K > n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Elements per program in the first pass."""
TILE, DEPTH = 32, 128
"""Side of the square tile of X X^T that a program computes, and the chunk of L it loads at once."""
ROWS, COLUMNS, INNER = 64, 64, 64
"""Tile height, tile width and chunk of the inner dimension of the other products."""


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
def _norm(sums, parts, min_norm):
    total = 0.0
    for start in range(0, parts, 1024):
        at = start + tl.arange(0, 1024)
        total += tl.reduce(tl.load(sums + at, mask=at < parts, other=0.0), 0, _add)
    return tl.maximum(tl.sqrt_rn(total), min_norm)


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
    min_norm,
    a,
    b,
    c,
    NORMALIZE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x x^T from its lower triangle; with POLYNOMIAL, a I + b x + c x x^T for a symmetric x."""
    tiles = (size + TILE - 1) // TILE
    top, left = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch = tl.program_id(1).to(tl.int64)
    if left <= top:
        i, j = top * TILE + tl.arange(0, TILE), left * TILE + tl.arange(0, TILE)
        x += batch * size * length
        total = tl.full((TILE, TILE), 0, tl.float32)
        for start in range(0, length, DEPTH):
            k = start + tl.arange(0, DEPTH)
            left_rows = tl.load(
                x + i[:, None] * stride + k[None, :] * step,
                mask=(i < size)[:, None] & (k < length)[None, :],
                other=0.0,
            )
            right_columns = tl.load(
                x + j[None, :] * stride + k[:, None] * step,
                mask=(j < size)[None, :] & (k < length)[:, None],
                other=0.0,
            )
            total = tl.dot(left_rows, right_columns, total)
        inside = (i < size)[:, None] & (j < size)[None, :]
        if NORMALIZE:
            norm = _norm(sums + batch * 2 * parts, parts, min_norm)
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
    min_norm,
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
    """out = factor x; with MOVE, out is a weight that is updated by factor x."""
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
        total = total / _norm(sums, parts, min_norm)
    target = out + batch * size * length + i[:, None] * stride + j[None, :] * step
    inside = (i < size)[:, None] & (j < length)[None, :]
    if MOVE:
        if RATE_IN_MEMORY:
            rate = tl.load(rate)
        keep = 1.0 - rate * decay
        if KEEP_NORM:
            keep = keep * norm / _norm(sums + parts, parts, min_norm)
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
    min_norm: float,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Updates filters of one shape, without synchronizing with the device.

    Args:
        weights: float32, K filters each, dense, with contiguous filters one after another.
        grads: gradients, with the same strides.
        buffers: momentum buffers, with the same strides.
        lr: learning rate, a number or a float32 0-d tensor on the device.
        momentum: Nesterov momentum.
        weight_decay: decoupled; a weight loses ``lr * weight_decay`` of itself.
        steps: Newton-Schulz iterations.
        normalize: first rescale each weight to the Frobenius norm sqrt(K).
        coefficients: coefficients of the quintic polynomial.
        min_norm: lower bound of the norms that are divided by.
        dtype: dtype of the operands of the products, bfloat16 or float32.
    """
    filters, count = weights[0].shape[0], weights[0].numel()
    length = count // filters
    strides = (1, length) if filters > length else (length, 1)
    small, large = sorted((filters, length))
    batch, parts = len(weights), triton.cdiv(count, BLOCK)
    new_empty = weights[0].new_empty
    x, gram, factor = (
        new_empty(shape, dtype=dtype)
        for shape in ((batch, count), (batch, small, small), (batch, small, small))
    )
    sums = new_empty((batch, 2, parts))
    tiles = triton.cdiv(small, TILE) ** 2, batch
    blocks = triton.cdiv(small, ROWS) * triton.cdiv(large, COLUMNS)
    symmetric_options = {"TILE": TILE, "num_warps": 4, "num_stages": 4}
    tile_sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "INNER": INNER, "num_warps": 4}
    rate = {"rate": lr, "RATE_IN_MEMORY": isinstance(lr, Tensor)}
    apply_options = {
        "decay": weight_decay,
        "scale": math.sqrt(max(1.0, filters / length)),
        "norm": math.sqrt(filters),
        **rate,
        **tile_sizes,
    }
    with torch.cuda.device_of(x):
        for b, (weight, grad, buffer) in enumerate(zip(weights, grads, buffers, strict=True)):
            _nesterov_kernel[(parts,)](
                weight, grad, buffer, x[b], sums[b], momentum, count, parts,
                NORMALIZE=normalize, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
        for iteration in range(steps):
            is_first, is_last = iteration == 0, iteration + 1 == steps
            _symmetric_kernel[tiles](
                gram, x, sums, small, large, *strides, parts, min_norm, *coefficients,
                NORMALIZE=is_first, POLYNOMIAL=False, DEPTH=DEPTH, **symmetric_options,
            )  # fmt: skip
            _symmetric_kernel[tiles](
                factor, gram, sums, small, small, small, 1, parts, min_norm, *coefficients,
                NORMALIZE=False, POLYNOMIAL=True, DEPTH=INNER, **symmetric_options,
            )  # fmt: skip
            # The last iteration writes to weights, which are separate tensors.
            next_x = None if is_last else torch.empty_like(x)
            batched = [(next_x, factor, x, sums)]
            for tensors in zip(weights, factor, x, sums, strict=True) if is_last else batched:
                _apply_kernel[(blocks, 1 if is_last else batch)](
                    *tensors, size=small, length=large, stride=strides[0], step=strides[1],
                    parts=parts, min_norm=min_norm, NORMALIZE=is_first, MOVE=is_last,
                    KEEP_NORM=is_last and normalize, **apply_options,
                )  # fmt: skip
            x = next_x
