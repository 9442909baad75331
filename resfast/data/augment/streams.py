"""Philox streams used by augmentation, and the order of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.ops.philox.op import philox

# Streams of Philox, with what their four words decide. Streams are independent, so changing one
# augmentation does not change the random parameters of the others.
SHIFT = 1  # rows, columns
FLIP = 2  # mirrored or not
ROTATE = 3  # angle
RESIZE = 4  # area, ratio, top, left
CUTOUT = 5  # centre's row, column
JITTER = 6  # brightness, contrast, saturation, hue
CHANCE = 7  # auto-contrast, grey
MIX = 8  # MixUp or CutMix, lambda, centre's row, column
PARTNER = 9  # second image
ORDER = 10  # key of the shuffle, two words
CROP = 11  # top, left of the window that progressive image sizes crop to
LABEL_NOISE = 12  # of the whole run, not of Philox: which labels are replaced, and by what
NOISE = 13  # key of the image's noise, two words
CORRUPTION = 14  # of a kind, severity and chunk of images, not of Philox: all random numbers
FROST = 15  # of a whole evaluation, not of Philox: the texture
WINDOW_STREAM = 32  # as RESIZE, for random-resized crop in DALI on full-size images


def generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator that depends only on ``seed`` and the numbers of ``stream``."""
    value = seed & 0xFFFFFFFFFFFFFFFF
    for number in stream:  # splitmix64 over the numbers
        value = (value + 0x9E3779B97F4A7C15 * (number + 1)) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return torch.Generator().manual_seed(value & 0x7FFFFFFFFFFFFFFF)


def order(count: int, *, seed: int, epoch: int, device: torch.device | str) -> Tensor:
    """The order of an epoch: a random permutation, int64 ``[count]``, the same on every device."""
    indices = torch.arange(count, device=device)
    words = philox(indices, seed=seed, epoch=epoch, stream=ORDER)
    return torch.argsort((words[0] << 30) | (words[1] >> 2), stable=True)


def below(words: Tensor, bound: int) -> Tensor:
    """Uniform int64 in 0 … bound - 1: floor(u * bound) for u = words / 2^32, exactly."""
    return (words * bound) >> 32
