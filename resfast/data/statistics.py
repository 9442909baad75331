"""Mean and standard deviation of the channels of a data set, from exact integer sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast.errors import ResfastError


def channel_mean_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each channel of uint8 ``[N, H, W, C]`` images.

    Both are float32 ``[C]`` on the CPU in units of pixel / 255. Raises ``ResfastError`` for images
    of another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
        raise ResfastError(
            f"images are {images.dtype} {tuple(images.shape)}, expected uint8 [N, H, W, C] with at "
            "least one image: pass the images as load_dataset returns them"
        )
    channels = images.shape[-1]
    sums = torch.zeros(channels, dtype=torch.int64, device=images.device)
    squares = torch.zeros_like(sums)
    for chunk in images.reshape(-1, channels).split(1 << 18):
        values = chunk.to(torch.int64)
        sums += values.sum(0)
        squares += values.square().sum(0)
    return mean_std_of_sums(sums.tolist(), squares.tolist(), images.numel() // channels)


def mean_std_of_sums(sums: list[int], squares: list[int], pixels: int) -> tuple[Tensor, Tensor]:
    """:func:`channel_mean_std` from the sum and the sum of squares of each channel."""
    means = [s / pixels / 255 for s in sums]
    variances = [pixels * q - s * s for s, q in zip(sums, squares, strict=True)]
    stds = [math.sqrt(variance) / pixels / 255 for variance in variances]
    return torch.tensor(means, dtype=torch.float32), torch.tensor(stds, dtype=torch.float32)
