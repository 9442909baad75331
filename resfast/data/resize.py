"""Resizes images on the CPU while they are loaded."""

from __future__ import annotations

import torch
from torch import Tensor


def sized_rgb(images: Tensor, size: int) -> Tensor:
    """uint8 ``[N, H, W, C]``, C 1 or 3, as RGB ``[N, size, size, 3]``, resized if necessary."""
    if images.shape[1:3] != (size, size):
        images = resize(images, size)
    return images.expand(-1, -1, -1, 3).contiguous()


def resize(images: Tensor, size: int) -> Tensor:
    """``images`` ``[N, H, W, C]`` in 0..255 as uint8 ``[N, size, size, C]``, bicubic."""
    resized = torch.empty((len(images), size, size, images.shape[-1]), dtype=torch.uint8)
    for chunk, out in zip(images.split(1024), resized.split(1024), strict=True):
        pixels = chunk.to(torch.float32)
        if images.shape[1:3] != (size, size):
            pixels = torch.nn.functional.interpolate(
                pixels.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True
            ).permute(0, 2, 3, 1)
        out.copy_(pixels.round().clamp(0, 255))
    return resized
