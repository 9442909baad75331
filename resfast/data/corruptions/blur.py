"""Corruptions that blur: defocus, frosted glass, motion and zoom."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from resfast.data.corruptions.filters import (
    disk,
    filtered,
    gaussian_blur,
    motion_blur,
    scale_of,
    uniform,
    zoomed,
)


def defocus_blur(images: Tensor, severity: int, random: Generator) -> Tensor:
    """A lens out of focus: a disk with a soft edge."""
    radius, sigma = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    scale = scale_of(images)
    return filtered(images, disk(radius * scale, sigma * scale))


def glass_blur(images: Tensor, severity: int, random: Generator) -> Tensor:
    """Frosted glass: pixels take the place of their neighbours, between two Gaussian blurs.

    As in the published images, a pixel is replaced by one within ``reach`` that stays where it is.
    """
    sigma, reach, times = (
        (0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)
    )[severity - 1]  # fmt: skip
    scale = scale_of(images)
    sigma, reach = sigma * scale, max(1, round(reach * scale))
    images = (gaussian_blur(images, sigma) * 255).floor() / 255
    count, channels, height, width = images.shape
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    inside = (rows > reach) & (columns > reach)
    inside &= (rows <= height - reach) & (columns <= width - reach)
    for _ in range(times):
        moved = torch.randint(-reach, reach, (2, count, height, width), generator=random) * inside
        at_rows = (rows + moved[0]).clamp(0, height - 1)
        at_columns = (columns + moved[1]).clamp(0, width - 1)
        places = (at_rows * width + at_columns).view(count, 1, -1).expand(-1, channels, -1)
        images = images.reshape(count, channels, -1).gather(2, places)
        images = images.view(count, channels, height, width)
    return gaussian_blur(images, sigma)


def motion_blurred(images: Tensor, severity: int, random: Generator) -> Tensor:
    """A moving camera, within 45 degrees of the horizontal."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    scale = scale_of(images)
    degrees = uniform(-45, 45, (len(images),), random)
    return motion_blur(images, radius * scale, sigma * scale, degrees)


def zoom_blur(images: Tensor, severity: int, random: Generator) -> Tensor:
    """A camera that moves towards the object: the mean of enlargements in steps of 1 %."""
    steps = (7, 12, 16, 21, 26)[severity - 1]  # as many as NumPy's arange gives
    total = images.clone()
    for step in range(steps):
        total += zoomed(images, 1 + step / 100)
    return total / (steps + 1)
