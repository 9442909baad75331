"""Translation, rotation and crop as affine maps, and boxes for cutout and CutMix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast.data.augment.streams import below
from resfast.ops.philox.op import uniform

LOG_RATIO = math.log(4 / 3)


def affine_maps(
    size: tuple[int, int],
    shift: Tensor | None = None,
    flip: Tensor | None = None,
    angle: Tensor | None = None,
    window: Tensor | None = None,
) -> Tensor:
    """Maps from output pixels to source pixels, float32 ``[B, 2, 3]``; None skips a step.

    The source is rotated about its centre; ``window`` of the result is moved by ``shift``,
    stretched to the image's size and mirrored. Without ``angle`` and ``window`` the map equals
    ``shift`` and ``flip`` of :class:`~resfast.ops.augment.op.AugmentParams` exactly.

    Args:
        size: height and width, in pixels.
        shift: ``[B, 2]``, rows and columns, in pixels of the rotated source.
        flip: bool ``[B]``.
        angle: float64 ``[B]``, in radians, counter-clockwise, within ±30°; ``size`` must then have
            an aspect ratio that :func:`check_augment` accepts.
        window: float64 ``[B, 4]``: top, left, height and width, in pixels, of a rectangle inside
            the image; 0 is the outer edge of the first pixel.
    """
    # float64 throughout with one final rounding, so that all devices give the same float32.
    height, width = size
    some = next(value for value in (shift, flip, angle, window) if value is not None)
    zero = torch.zeros(len(some), dtype=torch.float64, device=some.device)
    one = zero + 1
    cos, sin = (one, zero) if angle is None else (angle.cos(), angle.sin())
    down, right = (zero, zero) if shift is None else shift.double().unbind(1)
    stretch_y = stretch_x = one
    if window is not None:
        top, left, window_height, window_width = window.unbind(1)
        stretch_y, stretch_x = window_height / height, window_width / width
        down = down + top + (window_height - height) / 2
        right = right + left + (window_width - width) / 2
    if flip is not None:
        stretch_x = torch.where(flip, -stretch_x, stretch_x)
    rows = []
    for along_y, along_x, offset, side in (
        (cos * stretch_y, sin * stretch_x, cos * down + sin * right, height),
        (-sin * stretch_y, cos * stretch_x, cos * right - sin * down, width),
    ):
        # The operator reads up to 1.5 (side - 1) from the centre: one reflection. The corners of
        # the map use `reach` of that; the offset is limited to the rest. A shift below the side
        # never reaches this limit on its own.
        reach = (along_y.abs() * (height - 1) + along_x.abs() * (width - 1)) / 2
        limit = (1.5 * (side - 1) - reach).clamp(min=0)
        offset = torch.minimum(torch.maximum(offset, -limit), limit)
        start = offset + ((side - 1) - along_y * (height - 1) - along_x * (width - 1)) / 2
        rows.append(torch.stack([along_y, along_x, start], 1))
    return torch.stack(rows, 1).to(torch.float32)


def symmetric_uniform(words: Tensor, limit: float) -> Tensor:
    """float64, uniform from -limit to limit."""
    return (uniform(words).double() * 2 - 1) * limit


def crop_windows(words: Tensor, min_area: float, size: tuple[int, int]) -> Tensor:
    """Windows of random-resized crop, float64 ``[B, 4]`` as for :func:`affine_maps`.

    Windows are clipped to the image, where torchvision redraws up to ten times, and are not
    rounded to whole pixels. ``min_area`` is a fraction of the image's area.
    """
    height, width = size
    draws = uniform(words).double()
    area = height * width * (min_area + (1 - min_area) * draws[0])
    ratio = (LOG_RATIO * (2 * draws[1] - 1)).exp()
    window_height = (area / ratio).sqrt().clamp(1, height)
    window_width = (area * ratio).sqrt().clamp(1, width)
    top, left = draws[2] * (height - window_height), draws[3] * (width - window_width)
    return torch.stack([top, left, window_height, window_width], 1)


def boxes(
    row_words: Tensor,
    column_words: Tensor,
    height: Tensor | int,
    width: Tensor | int,
    size: tuple[int, int],
) -> Tensor:
    """Rectangles centred on a uniformly drawn pixel, clipped to the image, int32 ``[B, 4]``.

    The columns are top, left, bottom and right.
    """
    top = below(row_words, size[0]) - height // 2
    left = below(column_words, size[1]) - width // 2
    bottom, right = (top + height).clamp(max=size[0]), (left + width).clamp(max=size[1])
    return torch.stack([top.clamp(min=0), left.clamp(min=0), bottom, right], 1).to(torch.int32)
