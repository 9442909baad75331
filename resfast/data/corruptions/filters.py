"""What several corruptions use: Gaussian, disk and motion filters, and a zoom into the centre."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def scale_of(images: Tensor) -> float:
    """Side of the images relative to CIFAR's 32 pixels, for lengths in pixels."""
    return min(images.shape[2:]) / 32


def gaussian(sigma: float, half: int) -> Tensor:
    """A normalized Gaussian, float32 ``[2 * half + 1]``."""
    x = torch.arange(-half, half + 1, dtype=torch.float32)
    weights = torch.exp(-(x**2) / (2 * sigma**2)) if sigma > 0 else (x == 0).float()
    return weights / weights.sum()


def gaussian_blur(images: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """``images`` ``[B, C, H, W]`` under a Gaussian; the edge is repeated beyond it."""
    half = int(truncate * sigma + 0.5)
    if not half:
        return images
    weights = gaussian(sigma, half)
    channels = images.shape[1]
    padded = F.pad(images, (half, half, half, half), mode="replicate")
    rows = F.conv2d(padded, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def filtered(images: Tensor, kernel: Tensor) -> Tensor:
    """``images`` ``[B, C, H, W]`` under a square kernel, mirrored at the edge."""
    channels, half = images.shape[1], len(kernel) // 2
    half_height, half_width = (min(half, side - 1) for side in images.shape[2:])
    kernel = kernel[
        half - half_height : half + half_height + 1, half - half_width : half + half_width + 1
    ]
    padded = F.pad(images, (half_width, half_width, half_height, half_height), mode="reflect")
    return F.conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)


def disk(radius: float, sigma: float) -> Tensor:
    """A normalized disk, its edge softened by a Gaussian, float32 ``[K, K]``."""
    soft = max(1, round(2 * sigma))
    half = math.ceil(radius) + soft
    x = torch.arange(-half, half + 1, dtype=torch.float32)
    kernel = (x[:, None] ** 2 + x[None] ** 2 <= radius**2).float()
    kernel /= kernel.sum()
    weights = gaussian(sigma, soft)
    return F.conv2d(kernel[None, None], torch.outer(weights, weights)[None, None], padding=soft)[
        0, 0
    ]


def motion_blur(images: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Each image ``[B, C, H, W]`` under half a Gaussian along a line; the edge is repeated.

    Args:
        images: the images.
        radius: half of the length of the line, in pixels.
        sigma: of the Gaussian, in pixels.
        degrees: ``[B]``, the direction of each line.
    """
    count, channels, height, width = images.shape
    steps = torch.arange(2 * math.ceil(radius) + 1, dtype=torch.float32)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    radians = torch.deg2rad(degrees)
    down = (radians.sin()[:, None] * steps).round().long()
    right = (radians.cos()[:, None] * steps).round().long()
    rows, columns = torch.arange(height), torch.arange(width)
    flat = images.reshape(count, channels, -1)
    blurred = torch.zeros_like(flat)
    for step, weight in enumerate(weights.tolist()):
        if weight < 1e-4:
            break
        at_rows = (rows + down[:, step, None]).clamp(0, height - 1)
        at_columns = (columns + right[:, step, None]).clamp(0, width - 1)
        places = (at_rows[:, :, None] * width + at_columns[:, None]).reshape(count, 1, -1)
        blurred.add_(flat.gather(2, places.expand(-1, channels, -1)), alpha=weight)
    return blurred.view_as(images)


def zoomed(images: Tensor, factor: float) -> Tensor:
    """The centre of ``images`` ``[B, C, H, W]`` enlarged by ``factor`` to their size, bilinear."""
    sides = images.shape[2:]
    inner = [math.ceil(side / factor) for side in sides]
    top, left = ((side - part) // 2 for side, part in zip(sides, inner, strict=True))
    centre = images[:, :, top : top + inner[0], left : left + inner[1]]
    enlarged = [max(round(part * factor), side) for part, side in zip(inner, sides, strict=True)]
    centre = F.interpolate(centre, enlarged, mode="bilinear", align_corners=True)
    top, left = ((part - side) // 2 for side, part in zip(sides, enlarged, strict=True))
    return centre[:, :, top : top + sides[0], left : left + sides[1]]


def uniform(low: float, high: float, shape: tuple[int, ...], random: Generator) -> Tensor:
    """Uniform numbers, float32 of ``shape``."""
    return low + (high - low) * torch.rand(shape, generator=random)
