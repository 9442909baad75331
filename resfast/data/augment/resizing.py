"""Shrinks batches to less than the data set's image size, for progressive image sizes."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from resfast.data.augment.streams import CROP, below
from resfast.ops.philox.op import philox

ResizeBy = Literal["resize", "crop"]


def smaller(
    images: Tensor, pixels: int, *, by: ResizeBy, seed: int, epoch: int, first: int
) -> Tensor:
    """Shrinks a batch, for training at progressive image sizes.

    ``resize`` is antialiased bilinear, like torchvision's and Pillow's, done as two matrix
    products. ``crop`` takes a random window of each image, which depends on (seed, epoch, position
    in the epoch).

    Args:
        images: ``[B, C, H, W]`` in ``channels_last``, augmented.
        pixels: height and width of the result, at most H and W.
        by: method.
        seed: seed of the run.
        epoch: epoch, from 0.
        first: position of the first image in the epoch's order.

    Returns:
        ``[B, C, pixels, pixels]`` in ``channels_last``, of the same dtype; ``images`` itself if
        it already has that size.

    Raises:
        ValueError: ``pixels`` is larger than the images.
    """
    batch, _, height, width = images.shape
    if pixels > min(height, width):
        raise ValueError(f"pixels is {pixels}; expected at most the images' {height}x{width}")
    if (height, width) == (pixels, pixels):
        return images
    if by == "resize":
        return resized(images, pixels)
    places = torch.arange(first, first + batch, device=images.device)
    return cropped(images, pixels, crop_words(places, seed=seed, epoch=epoch))


def resized(images: Tensor, pixels: int) -> Tensor:
    """:func:`smaller` by antialiased bilinear interpolation."""
    batch, channels, height, width = images.shape
    rows = images.permute(0, 2, 3, 1)
    down = _bilinear(height, pixels, 1, images.dtype, images.device)
    across = _bilinear(width, pixels, channels, images.dtype, images.device)
    rows = torch.bmm(down.expand(batch, -1, -1), rows.reshape(batch, height, width * channels))
    rows = rows.view(batch * pixels, width * channels) @ across.T
    return rows.view(batch, pixels, pixels, channels).permute(0, 3, 1, 2)


def crop_words(places: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Random words for :func:`cropped`, int64 ``[2, P]``, for positions in the epoch's order."""
    return philox(places, seed=seed, epoch=epoch, stream=CROP)[:2]


def cropped(images: Tensor, pixels: int, words: Tensor) -> Tensor:
    """:func:`smaller` by cropping to a window drawn from the ``words`` of :func:`crop_words`."""
    batch, _, height, width = images.shape
    rows = images.permute(0, 2, 3, 1)
    window = torch.arange(pixels, device=images.device)
    y = below(words[0], height - pixels + 1)[:, None] + window
    x = below(words[1], width - pixels + 1)[:, None] + window
    image = torch.arange(batch, device=images.device)[:, None, None]
    return rows[image, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


@cache
def _bilinear(
    size: int, smaller: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Weights for rows of interleaved channels, ``[smaller * channels, size * channels]``."""
    scale = size / smaller
    centre = (torch.arange(smaller, dtype=torch.float64) + 0.5) * scale
    distance = torch.arange(size) + 0.5 - centre[:, None]
    weights = (1 - (distance / scale).abs()).clamp(min=0)
    weights = weights / weights.sum(1, keepdim=True)
    weights = torch.kron(weights, torch.eye(channels, dtype=torch.float64))
    return weights.to(device, dtype)
