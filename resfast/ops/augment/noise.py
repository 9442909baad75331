"""Normal noise on a batch of images, a function of a key for each image.

A separate pass after ``resfast::augment``: a generator for each element would slow down the kernel
for all other policies. The numbers are looked up in a table, so that they are the same everywhere.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..philox.op import philox

_PER_COUNTER = 8
"""Numbers from the four words of a counter: two of 16 bits each."""


def add_noise(images: Tensor, keys: Tensor, amount: float, scale: Tensor) -> Tensor:
    """Images with noise added.

    Args:
        images: float32 ``[B, C, H, W]`` in ``channels_last``, normalized.
        keys: int64 ``[B]``, at least 0; images with the same key get the same noise.
        amount: standard deviation in units of pixel / 255.
        scale: float32 ``[C]``, of :func:`resfast.ops.augment.op.normalization`.

    Returns:
        Of the shape, dtype and layout of ``images``.
    """
    pixels = images.permute(0, 2, 3, 1)
    noise = normal(keys, pixels[0].numel() if len(pixels) else 0).view(pixels.shape)
    return (pixels + noise * (amount * 255 * scale)).permute(0, 3, 1, 2)


def normal(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers, of 65,536 different values, float32 ``[B, count]``.

    Args:
        keys: int64 ``[B]``, at least 0.
        count: numbers for each key.
    """
    each = -(-count // _PER_COUNTER)
    counters = torch.arange(each, device=keys.device)
    words = philox((keys[:, None] + counters).flatten(), seed=0, epoch=0, stream=0)
    words = words.view(4, len(keys), each)
    halves = torch.stack([words & 0xFFFF, words >> 16])  # [2, 4, B, counters]
    values = _quantiles(keys.device)[halves]
    return values.permute(2, 3, 1, 0).reshape(len(keys), each * _PER_COUNTER)[:, :count]


@cache
def _quantiles(device: torch.device) -> Tensor:
    """Quantiles of the standard normal distribution at the middle of 65,536 equal parts."""
    parts = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return torch.special.ndtri(parts).float().to(device)
