"""Corruptions by processing: contrast, elastic distortion, coarse pixels and JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from resfast.data.corruptions.filters import gaussian_blur, uniform


def contrast(images: Tensor, severity: int, random: Generator) -> Tensor:
    """A smaller distance to the mean of each channel."""
    kept = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    means = images.mean((2, 3), keepdim=True)
    return means + kept * (images - means)


def elastic_transform(images: Tensor, severity: int, random: Generator) -> Tensor:
    """An affine map that moves three points at random, and then a smooth random displacement.

    Source: Simard et al., "Best Practices for Convolutional Neural Networks" (2003).
    """
    count, _, height, width = images.shape
    side = min(height, width)
    parts = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    strength, sigma, jitter = (side * part for part in parts)
    middle = torch.tensor([width // 2, height // 2], dtype=torch.float32)
    third = float(side // 3)
    points = middle + torch.tensor([[third, third], [third, -third], [-third, -third]])
    moved = points + uniform(-jitter, jitter, (count, 3, 2), random)
    # The map from the moved points back to the points: where each pixel comes from.
    ones = torch.ones(count, 3, 1)
    back = torch.linalg.solve(torch.cat([moved, ones], 2), points.expand(count, 3, 2))
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float32),
        torch.arange(width, dtype=torch.float32),
        indexing="ij",
    )
    grid = torch.stack([columns, rows], -1)
    affine = torch.cat([grid, torch.ones_like(grid[..., :1])], -1).view(1, -1, 3) @ back
    images = _sampled(images, affine.view(count, height, width, 2))
    if not strength:
        return images
    noise = uniform(-1, 1, (count, 2, height, width), random)
    shifts = strength * gaussian_blur(noise, sigma, truncate=3)
    return _sampled(images, grid + shifts.permute(0, 2, 3, 1))


def _sampled(images: Tensor, places: Tensor) -> Tensor:
    """Images at ``places`` ``[B, H, W, 2]``, columns and rows in pixels, mirrored at the edge."""
    height, width = images.shape[2:]
    span = torch.tensor([max(width - 1, 1), max(height - 1, 1)])
    return F.grid_sample(
        images, places / span * 2 - 1, mode="bilinear", padding_mode="reflection",
        align_corners=True,
    )  # fmt: skip


def pixelate(images: Tensor, severity: int, random: Generator) -> Tensor:
    """A smaller image, enlarged without smoothing."""
    kept = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]

    def step(image: Any) -> Any:
        small = tuple(max(1, int(side * kept)) for side in image.size)
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return _each(images, step)


def jpeg_compression(images: Tensor, severity: int, random: Generator) -> Tensor:
    """A JPEG file of low quality."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def step(image: Any) -> Any:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _each(images, step)


def _each(images: Tensor, step: Callable[[Any], Any]) -> Tensor:
    """Each image in turn through Pillow."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    done = np.empty_like(pixels)
    for row, image in enumerate(pixels):
        grey = image.shape[2] == 1
        result = np.asarray(step(Image.fromarray(image[..., 0] if grey else image)))
        done[row] = result[..., None] if grey else result
    return torch.from_numpy(done).permute(0, 3, 1, 2).float() / 255
