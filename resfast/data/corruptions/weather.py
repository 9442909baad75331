"""Corruptions by weather: snow, frost, fog and brightness."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from resfast.data.augment.streams import FROST, generator
from resfast.data.corruptions.filters import (
    gaussian_blur,
    motion_blur,
    scale_of,
    uniform,
    zoomed,
)

_TEXTURE = 256  # side of the frost texture, in pixels of a 32-pixel image


def snow(images: Tensor, severity: int, random: Generator) -> Tensor:
    """Flakes that fall, on a brightened image."""
    mean, deviation, zoom, least, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    scale = scale_of(images)
    shape = (len(images), 1, *images.shape[2:])
    flakes = zoomed(mean + deviation * torch.randn(shape, generator=random), zoom * max(scale, 1))
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    degrees = uniform(45, 135, (len(images),), random)
    flakes = motion_blur(flakes, radius * scale, sigma * scale, degrees)
    bright = _grey(images) * 1.5 + 0.5
    return kept * images + (1 - kept) * images.maximum(bright) + flakes + flakes.flip(2, 3)


def _grey(images: Tensor) -> Tensor:
    """Luma of RGB images (ITU-R BT.601), ``[B, 1, H, W]``."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def frost(images: Tensor, severity: int, random: Generator) -> Tensor:
    """Crystals of ice on a window, from a synthetic texture: not the photographs of the paper."""
    kept, added = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    count, channels, height, width = images.shape
    texture = _frost_texture(max(1, round(scale_of(images))), max(height, width))
    if channels == 1:
        texture = texture.mean(0, keepdim=True)
    side = texture.shape[1]
    tops = torch.randint(0, side - height + 1, (count,), generator=random).tolist()
    lefts = torch.randint(0, side - width + 1, (count,), generator=random).tolist()
    crops = [
        texture[:, top : top + height, left : left + width]
        for top, left in zip(tops, lefts, strict=True)
    ]
    return kept * images + added * torch.stack(crops)


@functools.cache
def _frost_texture(scale: int, least: int) -> Tensor:
    """Bluish white crystals on a dark pane, float32 ``[3, S, S]`` in 0..1.

    Needles grow from random seeds in six directions with side branches, as in hoarfrost; a plasma
    makes the ice thicker in some places.
    """
    random = generator(0, FROST)
    side = max(_TEXTURE, 2 * least // scale)
    seeds = side * side // 250
    starts = uniform(0, side, (seeds, 1, 2), random)
    angles = uniform(0, 2 * torch.pi, (seeds, 1), random) + torch.arange(6) * torch.pi / 3
    lengths = (6 + 26 * torch.rand(seeds, 1, generator=random) ** 2).expand(-1, 6)
    needles = _needles(side, starts.expand(-1, 6, -1), angles, lengths)
    for part in (0.35, 0.6, 0.85):
        forks = starts + (part * lengths)[..., None] * _direction(angles)
        for turn in (-torch.pi / 3, torch.pi / 3):
            needles += _needles(side, forks, angles + turn, 0.35 * lengths)
    sharp = gaussian_blur(needles[None, None], 0.6)
    soft = gaussian_blur(needles[None, None], 3.0)
    cloud = plasma(1, side, 2.0, random)
    ice = (0.55 * sharp / sharp.quantile(0.97) + 0.35 * soft / soft.quantile(0.97)).clamp(0, 1)
    ice = (ice * (0.45 + 0.8 * cloud) + 0.18 * cloud).clamp(0, 1)
    tint = torch.tensor([0.80, 0.92, 1.0]).view(3, 1, 1)
    pane = torch.tensor([0.10, 0.14, 0.20]).view(3, 1, 1)
    texture = pane + (1 - pane) * ice[0] * tint
    if scale > 1:
        texture = F.interpolate(
            texture[None], scale_factor=scale, mode="bicubic", align_corners=False
        )[0].clamp(0, 1)
    return texture


def _direction(angles: Tensor) -> Tensor:
    """Unit vectors ``[..., 2]``, rows and columns."""
    return torch.stack([angles.sin(), angles.cos()], -1)


def _needles(side: int, starts: Tensor, angles: Tensor, lengths: Tensor) -> Tensor:
    """A map ``[side, side]``, which wraps around, of needles that get thinner towards their end.

    Args:
        side: of the map.
        starts: rows and columns ``[S, 6, 2]``.
        angles: ``[S, 6]``.
        lengths: ``[S, 6]``.
    """
    along = torch.arange(0, float(lengths.max()), 0.7)
    places = starts[:, :, None] + along[:, None] * _direction(angles)[:, :, None]
    rows, columns = (places.round().long() % side).unbind(-1)
    part = along / lengths[..., None]
    drawn = torch.zeros(side, side)
    weights = torch.where(part < 1, 1 - 0.8 * part, 0.0)
    return drawn.index_put_((rows, columns), weights, accumulate=True)


def fog(images: Tensor, severity: int, random: Generator) -> Tensor:
    """Mist of uneven density."""
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    height, width = images.shape[2:]
    mist = plasma(len(images), max(height, width), decay, random)[:, :, :height, :width]
    most = images.amax((1, 2, 3), keepdim=True)
    return (images + amount * mist) * most / (most + amount)


def plasma(count: int, side: int, decay: float, random: Generator) -> Tensor:
    """Fractal height maps by the diamond-square algorithm, ``[count, 1, side, side]`` in 0..1.

    Source: Fournier, Fussell and Carpenter, "Computer Rendering of Stochastic Models" (1982). The
    map wraps around; the amplitude of a step is divided by the square of ``decay`` for the next.
    """
    whole = 1 << max(1, (side - 1).bit_length())
    maps = torch.zeros(count, whole, whole)
    step, amplitude = whole, 1.0

    def displaced(mean: Tensor) -> Tensor:
        return mean + uniform(-amplitude, amplitude, mean.shape, random)

    while step >= 2:
        half = step // 2
        corners = maps[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        centres = displaced((pairs + pairs.roll(-1, 2)) / 4)
        maps[:, half::step, half::step] = centres
        beside = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        maps[:, ::step, half::step] = displaced(beside / 4)
        below = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        maps[:, half::step, ::step] = displaced(below / 4)
        step, amplitude = half, amplitude / decay**2
    maps -= maps.amin((1, 2), keepdim=True)
    maps /= maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return maps[:, None, :side, :side]


def brightness(images: Tensor, severity: int, random: Generator) -> Tensor:
    """A larger value in HSV, with hue and saturation unchanged."""
    added = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    value = images.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, images * brighter / value.clamp(min=1e-12), brighter)
