"""Batches at a smaller size than the data set's, for training at progressive sizes."""

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
    """A batch at a smaller size, for training at progressive sizes.

    ``resize`` is antialiased bilinear, as torchvision's and Pillow's, as two matrix products.
    ``crop`` shows a window whose place is drawn for each image, a function of (seed, epoch, place
    in the epoch).

    Args:
        images: ``[B, C, H, W]`` in ``channels_last``, augmented.
        pixels: height and width of the result, at most H and W.
        by: how.
        seed: seed of the run.
        epoch: epoch, from 0.
        first: place of the first image in the epoch's order.

    Returns:
        ``[B, C, pixels, pixels]`` in ``channels_last``, of the same dtype; ``images`` itself where
        it has that size.

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
    """What :func:`cropped` draws windows from, int64 ``[2, P]``, for places in the epoch."""
    return philox(places, seed=seed, epoch=epoch, stream=CROP)[:2]


def cropped(images: Tensor, pixels: int, words: Tensor) -> Tensor:
    """:func:`smaller` by showing a window, drawn from ``words`` of :func:`crop_words`."""
    batch, _, height, width = images.shape
    rows = images.permute(0, 2, 3, 1)
    window = torch.arange(pixels, device=images.device)
    y = below(words[0], height - pixels + 1)[:, None] + window
    x = below(words[1], width - pixels + 1)[:, None] + window
    number = torch.arange(batch, device=images.device)[:, None, None]
    return rows[number, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


@cache
def _bilinear(
    size: int, smaller: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Weights of pixels with interleaved channels, ``[smaller * channels, size * channels]``."""
    scale = size / smaller
    centre = (torch.arange(smaller, dtype=torch.float64) + 0.5) * scale
    distance = torch.arange(size) + 0.5 - centre[:, None]
    weights = (1 - (distance / scale).abs()).clamp(min=0)
    weights = weights / weights.sum(1, keepdim=True)
    weights = torch.kron(weights, torch.eye(channels, dtype=torch.float64))
    return weights.to(device, dtype)
