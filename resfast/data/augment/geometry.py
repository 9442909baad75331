"""Translation, rotation, crop and boxes as numbers: where each pixel of the result comes from."""

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
    """Maps from the result's pixels to the source's, float32 ``[B, 2, 3]``; None leaves a step out.

    The source is turned about its centre, ``window`` of that is moved by ``shift``, stretched to
    the image's size and mirrored. Without ``angle`` and ``window`` it is what ``shift`` and
    ``flip`` of :class:`~resfast.ops.augment.op.AugmentParams` are, exactly.

    Args:
        size: height and width, in pixels.
        shift: ``[B, 2]``, rows and columns, in pixels of the turned source.
        flip: bool ``[B]``.
        angle: float64 ``[B]``, in radians, counter-clockwise, within ±30°; with one, sides whose
            ratio :func:`check_augment` takes.
        window: float64 ``[B, 4]``: top, left, height and width, in pixels, of a rectangle inside
            the image; 0 is the outer edge of the first pixel.
    """
    # float64 throughout and one rounding, so that every device comes to the same float32.
    height, width = size
    given = next(value for value in (shift, flip, angle, window) if value is not None)
    zero = torch.zeros(len(given), dtype=torch.float64, device=given.device)
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
    for along_y, along_x, moved, side in (
        (cos * stretch_y, sin * stretch_x, cos * down + sin * right, height),
        (-sin * stretch_y, cos * stretch_x, cos * right - sin * down, width),
    ):
        # From the centre the operator reaches 1.5 (side - 1) either way: one reflection. The map
        # itself takes `reach` of it at the corners, the rest is what it may be moved by. A shift
        # below the side never meets this limit on its own.
        reach = (along_y.abs() * (height - 1) + along_x.abs() * (width - 1)) / 2
        room = (1.5 * (side - 1) - reach).clamp(min=0)
        moved = torch.minimum(torch.maximum(moved, -room), room)
        start = moved + ((side - 1) - along_y * (height - 1) - along_x * (width - 1)) / 2
        rows.append(torch.stack([along_y, along_x, start], 1))
    return torch.stack(rows, 1).to(torch.float32)


def either_way(words: Tensor, most: float) -> Tensor:
    """float64, uniform from -most to most."""
    return (uniform(words).double() * 2 - 1) * most


def crop_windows(words: Tensor, least: float, size: tuple[int, int]) -> Tensor:
    """Windows of random-resized crop, float64 ``[B, 4]`` as :func:`affine_maps` takes them.

    Where torchvision draws again up to ten times for a window inside the image, this one is
    clipped to it; it is not rounded to whole pixels either.
    """
    height, width = size
    chance = uniform(words).double()
    area = height * width * (least + (1 - least) * chance[0])
    ratio = (LOG_RATIO * (2 * chance[1] - 1)).exp()
    window_height = (area / ratio).sqrt().clamp(1, height)
    window_width = (area * ratio).sqrt().clamp(1, width)
    top, left = chance[2] * (height - window_height), chance[3] * (width - window_width)
    return torch.stack([top, left, window_height, window_width], 1)


def boxes(
    row_words: Tensor,
    column_words: Tensor,
    height: Tensor | int,
    width: Tensor | int,
    size: tuple[int, int],
) -> Tensor:
    """Rectangles about a uniform pixel, cut off at the border: int32 ``[B, 4]``."""
    top = below(row_words, size[0]) - height // 2
    left = below(column_words, size[1]) - width // 2
    bottom, right = (top + height).clamp(max=size[0]), (left + width).clamp(max=size[1])
    return torch.stack([top.clamp(min=0), left.clamp(min=0), bottom, right], 1).to(torch.int32)
