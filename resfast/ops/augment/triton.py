"""``resfast::augment`` on CUDA: one Triton kernel.

The result is written in 16-byte vectors. If the number of channels does not divide the length of a
vector, vectors start in the middle of a pixel. A thread therefore computes all pixels that its
vector overlaps and selects elements by ``phase``, the channel that the vector starts with. Reads
are clamped to the images for any parameters.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Without fused multiply-add, rotations round as in the CPU kernels."""
BLOCK = 1024
"""Elements that a program writes at once: 16 bytes per thread in a 16-bit dtype."""
MAX_STEPS = 4
"""Maximum number of blocks of one image that one program writes."""


@triton.jit
def _row(table, index, LENGTH: tl.constexpr):
    """The values of one row of a table; empty if there is no table."""
    values = ()
    if table is not None:
        for i in tl.static_range(LENGTH):
            values += (tl.load(table + index * LENGTH + i),)
    return values


@triton.jit
def _image(images, index, count, shift, flip, affine, color, cutout, SIZE, CHANNELS: tl.constexpr):
    """The address of an image and its row in each table."""
    index = tl.minimum(tl.maximum(index, 0), count - 1).to(tl.int64)
    return (
        images + index * SIZE,
        _row(shift, index, 2),
        _row(flip, index, 1),
        _row(affine, index, 6),
        _row(color, index, CHANNELS * (CHANNELS + 1)),
        _row(cutout, index, 4),
    )


@triton.jit
def _inside(box, y, x):
    return (y >= box[0]) & (y < box[2]) & (x >= box[1]) & (x < box[3])


@triton.jit
def _reflect(position, SIZE: tl.constexpr):
    position = tl.abs(position)
    return tl.maximum(tl.minimum(position, 2 * (SIZE - 1) - position), 0)


@triton.jit
def _fetch(
    image,
    y,
    x,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ZERO_PADDING: tl.constexpr,
):
    """The channels of the source pixels at ``y`` and ``x``, float32."""
    values = ()
    if ZERO_PADDING:
        inside = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
        pixel = image + (y * WIDTH + x) * CHANNELS
        for c in tl.static_range(CHANNELS):
            values += (tl.load(pixel + c, mask=inside, other=0).to(tl.float32),)
    else:
        pixel = image + (_reflect(y, HEIGHT) * WIDTH + _reflect(x, WIDTH)) * CHANNELS
        for c in tl.static_range(CHANNELS):
            values += (tl.load(pixel + c).to(tl.float32),)
    return values


@triton.jit
def _prepared(
    image,
    shift,
    flip,
    affine,
    color,
    cutout,
    offset,
    scale,
    y,
    x,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ZERO_PADDING: tl.constexpr,
):
    """The channels of one augmented image at ``y`` and ``x``, before mixing."""
    if len(affine) > 0:
        source_y = affine[0] * y + affine[1] * x + affine[2]
        source_x = affine[3] * y + affine[4] * x + affine[5]
        top, left = tl.floor(source_y), tl.floor(source_x)
        down, right = source_y - top, source_x - left
        top, left = top.to(tl.int32), left.to(tl.int32)
        a = _fetch(image, top, left, HEIGHT, WIDTH, CHANNELS, ZERO_PADDING)
        b = _fetch(image, top, left + 1, HEIGHT, WIDTH, CHANNELS, ZERO_PADDING)
        c = _fetch(image, top + 1, left, HEIGHT, WIDTH, CHANNELS, ZERO_PADDING)
        d = _fetch(image, top + 1, left + 1, HEIGHT, WIDTH, CHANNELS, ZERO_PADDING)
        pixel = ()
        for i in tl.static_range(CHANNELS):
            upper = a[i] * (1 - right) + b[i] * right
            lower = c[i] * (1 - right) + d[i] * right
            pixel += (upper * (1 - down) + lower * down,)
    else:
        source_y, source_x = y, x
        if len(flip) > 0:
            source_x = tl.where(flip[0], WIDTH - 1 - source_x, source_x)
        if len(shift) > 0:
            source_y, source_x = source_y + shift[0], source_x + shift[1]
        pixel = _fetch(image, source_y, source_x, HEIGHT, WIDTH, CHANNELS, ZERO_PADDING)

    values = ()
    for d in tl.static_range(CHANNELS):
        value = pixel[d]
        if len(color) > 0:
            value = color[d * (CHANNELS + 1)] * pixel[0]
            for c in tl.static_range(1, CHANNELS):
                value += color[d * (CHANNELS + 1) + c] * pixel[c]
            value += color[d * (CHANNELS + 1) + CHANNELS]
            value = tl.minimum(tl.maximum(value, 0.0), 255.0)
        value = (value - offset[d]) * scale[d]
        if len(cutout) > 0:
            value = tl.where(_inside(cutout, y, x), 0.0, value)
        values += (value,)
    return values


TABLES = ["shift", "flip", "affine", "color", "cutout", "partner", "weight", "box"]


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["images", "indices", "offset", "scale", *TABLES],
)
def _augment_kernel(
    out,
    images,
    indices,
    offset,
    scale,
    shift,
    flip,
    affine,
    color,
    cutout,
    partner,
    weight,
    box,
    count,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ZERO_PADDING: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,
):
    SIZE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    ALIGNED: tl.constexpr = VECTOR % CHANNELS == 0  # every vector starts with channel 0
    SPAN: tl.constexpr = VECTOR if ALIGNED else VECTOR + CHANNELS - 1
    PLAIN: tl.constexpr = affine is None and color is None and partner is None
    UNROLL: tl.constexpr = STEPS if PLAIN else 1  # unrolling a long body compiles slowly
    program = tl.program_id(0)
    batch = (program // PARTS).to(tl.int64)
    offset, scale = _row(offset, 0, CHANNELS), _row(scale, 0, CHANNELS)
    tables = (shift, flip, affine, color, cutout)
    own = _image(images, tl.load(indices + batch), count, *tables, SIZE, CHANNELS)
    if partner is not None:
        other = _image(images, tl.load(partner + batch), count, *tables, SIZE, CHANNELS)
        own_weight, box = tl.load(weight + batch), _row(box, batch, 4)
    j = tl.arange(0, VECTOR)[None, :]
    for step in tl.range(STEPS, loop_unroll_factor=UNROLL):
        chunk = ((program % PARTS) * STEPS + step) * CHUNKS + tl.arange(0, CHUNKS)
        first = chunk.to(tl.uint32) * VECTOR
        pixel = first // CHANNELS
        phase = 0 if ALIGNED else (first - pixel * CHANNELS).to(tl.int32)[:, None]
        result = tl.full((CHUNKS, VECTOR), 0, tl.float32)
        for i in tl.static_range((SPAN + CHANNELS - 1) // CHANNELS):
            if WIDTH * CHANNELS % VECTOR == 0:  # a vector never crosses rows
                y = pixel // WIDTH
                x = pixel - y * WIDTH + i
            else:
                y = (pixel + i) // WIDTH
                x = pixel + i - y * WIDTH
            y, x = y.to(tl.int32), x.to(tl.int32)
            values = _prepared(*own, offset, scale, y, x, HEIGHT, WIDTH, CHANNELS, ZERO_PADDING)
            if partner is not None:
                others = _prepared(
                    *other, offset, scale, y, x, HEIGHT, WIDTH, CHANNELS, ZERO_PADDING
                )
                w = tl.where(_inside(box, y, x), 0.0, own_weight)
            for c in tl.static_range(CHANNELS):
                if i * CHANNELS + c < SPAN:
                    value = values[c]
                    if partner is not None:
                        value = w * value + (1 - w) * others[c]
                    # Element j takes the value at position j + phase. Because j is known at
                    # compile time, only CHANNELS - 1 of these selections remain.
                    ahead = i * CHANNELS + c - j
                    selected = (ahead == 0) | ((ahead == phase) & (ahead > 0) & (ahead < CHANNELS))
                    result = tl.where(selected, value[:, None], result)
        element = (first.to(tl.int32))[:, None] + j
        target = out + batch * SIZE + element
        if SIZE % (CHUNKS * VECTOR * STEPS) == 0:
            tl.store(target, result.to(out.dtype.element_ty))
        else:
            tl.store(target, result.to(out.dtype.element_ty), mask=element < SIZE)


def augment(
    images: Tensor,
    indices: Tensor,
    offset: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    flip: Tensor | None,
    affine: Tensor | None,
    color: Tensor | None,
    cutout: Tensor | None,
    partner: Tensor | None,
    weight: Tensor | None,
    box: Tensor | None,
    zero_padding: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Launches the kernel; arguments as in :mod:`resfast.ops.augment.op`, already checked.

    Returns:
        ``[B, C, H, W]`` of ``dtype`` in ``channels_last`` memory. Does not synchronize.
    """
    count, height, width, channels = images.shape
    out = torch.empty((len(indices), height, width, channels), dtype=dtype, device=images.device)
    if len(indices):
        constants = layout(height, width, channels, zero_padding, dtype)
        tables = (shift, flip, affine, color, cutout, partner, weight, box)
        with torch.cuda.device_of(images):
            _augment_kernel[(len(indices) * constants["PARTS"],)](
                out, images, indices, offset, scale, *tables, count, **constants, **OPTIONS
            )
    return out.permute(0, 3, 1, 2)


def layout(
    height: int, width: int, channels: int, zero_padding: bool, dtype: torch.dtype
) -> dict[str, int | bool]:
    """The kernel's compile-time constants for an image size.

    Raises:
        ValueError: an image has 2^31 bytes or more, which the kernel cannot address.
    """
    size = height * width * channels
    if size >= 2**31:
        raise ValueError(f"an image has {size} bytes; expected less than 2^31")
    vector = math.gcd(size, 16 // dtype.itemsize)
    blocks = triton.cdiv(size, BLOCK)
    parts = triton.cdiv(blocks, MAX_STEPS)
    return {
        "HEIGHT": height,
        "WIDTH": width,
        "CHANNELS": channels,
        "ZERO_PADDING": zero_padding,
        "VECTOR": vector,
        "CHUNKS": BLOCK // vector,
        "STEPS": triton.cdiv(blocks, parts),
        "PARTS": parts,
    }
