"""Random parameters of geometric and color augmentation: :func:`sample`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast.data.augment.geometry import affine_maps, boxes, crop_windows, symmetric_uniform
from resfast.data.augment.policy import Augment, check_augment, needs_statistics
from resfast.data.augment.streams import (
    CHANCE,
    CUTOUT,
    FLIP,
    JITTER,
    NOISE,
    RESIZE,
    ROTATE,
    SHIFT,
    below,
)
from resfast.ops.augment.op import AugmentParams
from resfast.ops.philox.op import philox, uniform

_LUMA = (0.299, 0.587, 0.114)


def sample(
    augment: Augment,
    indices: Tensor,
    *,
    size: tuple[int, int],
    channels: int,
    seed: int,
    epoch: int,
    statistics: Tensor | None = None,
) -> AugmentParams:
    """Draws the augmentation of some images in one epoch, without synchronizing with the device.

    Without rotation and random-resized crop, the geometry is in ``shift`` and ``flip`` (exact);
    with either, all of it is in ``affine``. The color steps run in the order auto-contrast,
    brightness, contrast, saturation, hue, grey, as one matrix without clamping in between.
    Auto-contrast and contrast use the whole source image. torchvision clamps after each step and
    uses the cropped image.

    Args:
        augment: the policy.
        indices: int64 ``[B]``, the images' indices into the data set.
        size: height and width of the images, in pixels.
        channels: channels of the images. Saturation, hue and grey need 3 and are ignored
            otherwise.
        seed: seed of the run.
        epoch: epoch, from 0.
        statistics: of these images, one row per entry of ``indices``; see :func:`statistics`.

    Returns:
        One row per entry of ``indices``, on its device; None for steps that are off.

    Raises:
        ResfastError: the policy does not fit the images.
        TypeError: ``indices`` is not int64.
        ValueError: ``statistics`` is missing or has the wrong shape, or ``epoch`` is out of range.
    """
    check_augment(augment, *size)
    if needs_statistics(augment):
        shape = [len(indices), channels, 3]
        if statistics is None:
            raise ValueError(f"statistics is None; auto-contrast and contrast need {shape}")
        if list(statistics.shape) != shape:
            raise ValueError(f"statistics is {list(statistics.shape)}; expected {shape}")

    def words(stream: int, epoch: int = epoch) -> Tensor:
        return philox(indices, seed=seed, epoch=epoch, stream=stream)

    shift = flip = affine = cutout = None
    if augment.crop:
        offsets = below(words(SHIFT)[:2], 2 * augment.crop + 1) - augment.crop
        shift = offsets.to(torch.int32).T.contiguous()
    if augment.flip != "none":
        alternating = augment.flip == "alternating"
        flip = words(FLIP, 0 if alternating else epoch)[0] < 2**31
        if alternating and epoch % 2:
            flip = ~flip
    if augment.rotate or augment.resize < 1:
        angle = window = None
        if augment.rotate:
            angle = symmetric_uniform(words(ROTATE)[0], math.radians(augment.rotate))
        if augment.resize < 1:
            window = crop_windows(words(RESIZE), augment.resize, size)
        affine = affine_maps(size, shift, flip, angle, window)
        shift = flip = None
    if augment.cutout:
        centre = words(CUTOUT)
        cutout = boxes(centre[0], centre[1], augment.cutout, augment.cutout, size)
    steps = [augment.brightness, augment.contrast, augment.autocontrast]
    if channels == 3:
        steps += [augment.saturation, augment.hue, augment.grey]
    color = None
    if any(steps):
        color = _color(augment, words(JITTER), words(CHANCE), channels, statistics)
    noise = None
    if augment.noise:
        high, low = words(NOISE)[:2]
        noise = ((high >> 1) << 32) | low
    return AugmentParams(
        shift=shift, flip=flip, affine=affine, color=color, cutout=cutout, noise=noise
    )


def _color(
    augment: Augment, jitter: Tensor, chances: Tensor, channels: int, statistics: Tensor | None
) -> Tensor:
    """The color map of each image, float32 ``[B, C, C + 1]``."""
    luma = _LUMA if channels == 3 else (1 / channels,) * channels
    brightness, contrast, saturation, hue = uniform(jitter)[..., None] * 2 - 1
    stretched, grey, _, _ = uniform(chances)[..., None]
    # Up to saturation, channels are independent: gain * pixel + bias.
    gain = torch.ones((jitter.shape[1], channels), device=jitter.device)
    bias = torch.zeros_like(gain)
    if augment.autocontrast and statistics is not None:
        low, high, _ = statistics.unbind(2)
        chosen = (stretched < augment.autocontrast) & (high > low)
        gain = torch.where(chosen, 255 / (high - low), 1.0)
        bias = torch.where(chosen, -low * gain, 0.0)
    if augment.brightness:
        factor = 1 + augment.brightness * brightness
        gain, bias = gain * factor, bias * factor
    if augment.contrast and statistics is not None:
        factor = 1 + augment.contrast * contrast
        mean = _weighted(gain * statistics[..., 2] + bias, luma)
        gain, bias = gain * factor, bias * factor + (1 - factor) * mean
    matrix = torch.diag_embed(gain)
    if channels == 3 and (augment.saturation or augment.grey):
        factor = 1 + augment.saturation * saturation
        factor = torch.where(grey < augment.grey, 0.0, factor)
        rest = 1 - factor
        to_grey = torch.stack([gain[:, c] * luma[c] for c in range(3)], 1)
        matrix = matrix * factor[..., None] + (rest * to_grey)[:, None]
        bias = bias * factor + rest * _weighted(bias, luma)
    matrix = torch.cat([matrix, bias[..., None]], 2)
    if channels == 3 and augment.hue:
        turns = _hue_rotations(2 * math.pi * augment.hue * hue[:, 0].double())
        matrix = torch.stack(
            [sum(turns[:, d, c, None] * matrix[:, c] for c in range(3)) for d in range(3)], 1
        )
    return matrix


def _hue_rotations(angles: Tensor) -> Tensor:
    """Rotations of RGB colours by angles about the grey axis in YIQ space, float32 ``[B, 3, 3]``.

    Greys stay, so that the order among saturation, hue and grey is arbitrary. NVIDIA DALI's ``hue``
    is the same map; torchvision's rotates in HSV space, which is not linear.
    """
    luma = torch.tensor([_LUMA], dtype=torch.float64, device=angles.device)
    red, _, blue = torch.eye(3, dtype=torch.float64, device=angles.device)[:, None] - luma
    chroma = torch.cat([0.735514 * red - 0.267962 * blue, 0.477648 * red + 0.412626 * blue])
    back = torch.linalg.inv(torch.cat([luma, chroma]))[:, 1:]
    turned = torch.stack([chroma[1], -chroma[0]])
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    return (luma.expand(3, 3) + cos * (back @ chroma) + sin * (back @ turned)).float()


def _weighted(values: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Weighted sum ``[B, 1]`` of ``[B, C]``, in a fixed order so that all devices agree."""
    return sum(values[:, c] * weight for c, weight in enumerate(weights))[:, None]
