"""Augmentation: the policy, which is data, and the sampler, which draws parameters from it.

What is drawn for an image is a pure function of (policy, seed, epoch, index of the image): it does
not depend on the batch, on the number of workers or ranks, or on the device, and nothing has to be
saved to draw it again. :func:`resfast.ops.augment.op.augment` carries it out.

Shapes: N images in the data set, B rows, H x W pixels, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from resfast.errors import ResfastError, nearest
from resfast.ops.augment.op import AugmentParams, MixParams, Padding
from resfast.ops.philox.op import philox, uniform

Flip = Literal["none", "random", "alternating"]
ResizeBy = Literal["resize", "crop"]

# Streams of Philox, with what its four words decide. A stream is drawn only where it is used, and
# no draw looks at another's: changing one augmentation leaves the others' draws as they are.
_SHIFT = 1  # rows, columns
_FLIP = 2  # mirrored or not
_ROTATE = 3  # angle
_RESIZE = 4  # area, ratio, top, left
_CUTOUT = 5  # centre's row, column
_JITTER = 6  # brightness, contrast, saturation
_CHANCE = 7  # auto-contrast, grey
_MIX = 8  # MixUp or CutMix, lambda, centre's row, column
_PARTNER = 9  # second image
_ORDER = 10  # key of the shuffle, two words
_CROP = 11  # top, left of the window that a smaller batch shows
WINDOW_STREAM = 32  # random-resized crop by DALI, of images at their full size: as _RESIZE

_MAX_ANGLE = 30.0
LOG_RATIO = math.log(4 / 3)
_LUMA = (0.299, 0.587, 0.114)
_QUANTILES = 4096
_CHUNK_BYTES = 1 << 20  # with its sums, what a cache holds


@dataclass(frozen=True)
class Augment:
    """What is done to training images. 0, ``none`` or, of ``resize``, 1 leave a step out.

    Raises:
        ResfastError: a value out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    crop: int = 0
    """Largest random translation along either side, in pixels."""
    padding: Padding = "reflect"
    """What a translation or rotation shifts in: the reflected image, or black (zero)."""
    flip: Flip = "none"
    """Mirroring left to right: each image with probability 1/2 (random), or so in epoch 0 and in
    each later epoch exactly the images that were not in the one before (alternating; Jordan,
    "94% on CIFAR-10 in 3.29 Seconds", arXiv:2404.00498, section 3.6)."""
    resize: float = 1.0
    """Random-resized crop (Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842): a
    window of this part of the image's area up to all of it, width to height 3/4 to 4/3, clipped to
    the image and stretched to its size, bilinear."""
    rotate: float = 0.0
    """Largest rotation about the image's centre, in degrees either way, at most 30, bilinear."""
    cutout: int = 0
    """Side of a square set to the mean, in pixels, its centre anywhere in the image (DeVries and
    Taylor, arXiv:1708.04552)."""
    brightness: float = 0.0
    """Pixels are multiplied by a factor from 1 - this to 1 + this."""
    contrast: float = 0.0
    """The distance to the image's mean grey is multiplied by a factor from 1 ± this."""
    saturation: float = 0.0
    """The distance to the pixel's own grey is multiplied by a factor from 1 ± this."""
    autocontrast: float = 0.0
    """Probability of stretching each channel to 0 … 255."""
    grey: float = 0.0
    """Probability of turning the image grey."""
    mixup: float = 0.0
    """Alpha of MixUp, its lambda from Beta(alpha, alpha) (Zhang et al., arXiv:1710.09412)."""
    cutmix: float = 0.0
    """Alpha of CutMix, likewise (Yun et al., arXiv:1905.04899). With MixUp too, each batch takes
    one of the two with probability 1/2."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others, so that labels are parts of classes."""
        return bool(self.mixup or self.cutmix)

    def __str__(self) -> str:
        """What differs from doing nothing, as :func:`parse_augment` reads it, or ``none``."""
        changed = [
            f"{field.name}={_text(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(changed) or "none"


_DEFAULTS = {field.name: field.default for field in fields(Augment)}
_WORDS = {"padding": get_args(Padding), "flip": get_args(Flip)}
_MOST = {"rotate": _MAX_ANGLE, "mixup": math.inf, "cutmix": math.inf}


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return str(int(value)) if value == int(value) and value < 1e15 else repr(value)


def _check_value(name: str, value: object) -> None:
    shown = f"--augment {name}={value}"
    default = _DEFAULTS[name]
    if isinstance(default, str):
        if value not in _WORDS[name]:
            hint = nearest(str(value), _WORDS[name])
            raise ResfastError(f"{shown} is unknown: expected {', '.join(_WORDS[name])}{hint}")
    elif isinstance(default, int):
        if type(value) is not int or value < 0:
            raise ResfastError(f"{shown} is out of range: expected a whole number of pixels, 0 up")
    else:
        most = _MOST.get(name, 1.0)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and 0 <= value <= most):
            expected = "a number, 0 up" if math.isinf(most) else f"0 to {most:g}"
            raise ResfastError(f"{shown} is out of range: expected {expected}")
        if name == "resize" and not value:
            raise ResfastError(f"{shown} is out of range: expected more than 0, at most 1")


_STANDARD = Augment(crop=4, flip="alternating", cutout=8)
POLICIES: dict[str, Augment] = {
    "none": Augment(),
    "light": Augment(crop=2, flip="alternating"),
    "standard": _STANDARD,
    # MixUp's alpha is in the range its paper finds best for ImageNet, CutMix's is its paper's.
    "strong": replace(
        _STANDARD,
        rotate=15,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        mixup=0.2,
        cutmix=1.0,
    ),
    # A report that names its steps and not their strengths: these are ours.
    "report-001": Augment(
        crop=4,
        flip="random",
        resize=0.6,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        autocontrast=0.2,
        grey=0.1,
        mixup=1.0,
        cutmix=1.0,
    ),
}
"""Named policies."""


def parse_augment(text: str) -> Augment:
    """Reads a policy: ``standard``, ``crop=4,flip=alternating`` or ``standard,cutout=0``.

    Args:
        text: items parted by commas: the name of a policy of :data:`POLICIES` (none where there is
            no name), then values that override its own.

    Raises:
        ResfastError: an unknown name, key or value, with the nearest known one, or a key twice.
    """
    policy = POLICIES["none"]
    values: dict[str, int | float | str] = {}
    for position, item in enumerate(text.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            if position == 0 and key in POLICIES:
                policy = POLICIES[key]
                continue
            known = (*POLICIES, *_DEFAULTS)
            hint = nearest(key, known)
            if key in POLICIES:
                hint = ": the name of a policy stands first"
            elif key in _DEFAULTS:
                hint = f": give {key} a value, {key}={_example(key)}"
            raise ResfastError(
                f"--augment {text!r}: {key!r} is not a policy; expected one of "
                f"{', '.join(POLICIES)}, or KEY=VALUE{hint}"
            )
        if key not in _DEFAULTS:
            raise ResfastError(
                f"--augment {text!r}: {key!r} is unknown; expected one of "
                f"{', '.join(_DEFAULTS)}{nearest(key, _DEFAULTS)}"
            )
        if key in values:
            raise ResfastError(f"--augment {text!r}: {key} is given twice; leave one out")
        kind = type(_DEFAULTS[key])
        try:
            values[key] = kind(value)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise ResfastError(
                f"--augment {text!r}: {key}={value} is not {expected}; write for example "
                f"{key}={_example(key)}"
            ) from None
    return replace(policy, **values)


def _example(key: str) -> str:
    used = (getattr(policy, key) for policy in POLICIES.values())
    return next(
        (_text(value) for value in used if value != _DEFAULTS[key]), _WORDS.get(key, ".")[-1]
    )


def check_augment(augment: Augment, height: int, width: int) -> None:
    """Checks that the steps of ``augment`` fit images of ``height`` x ``width`` pixels.

    Raises:
        ResfastError: one does not.
    """
    least, most = sorted((height, width))
    images = f"images of {height}x{width} pixels"
    if augment.crop >= least:
        raise ResfastError(
            f"--augment crop={augment.crop} does not fit {images}: choose crop=0 to {least - 1}"
        )
    if augment.cutout > least:
        raise ResfastError(
            f"--augment cutout={augment.cutout} does not fit {images}: choose cutout=0 to {least}"
        )
    if augment.rotate:
        # The corners of a long image swing past the one reflection that pads its short side.
        angle = math.radians(augment.rotate)
        reach = math.cos(angle) * (least - 1) + math.sin(angle) * (most - 1)
        if reach > 3 * (least - 1):
            raise ResfastError(
                f"--augment rotate={_text(augment.rotate)} turns {images} beyond their padding: "
                "choose a smaller angle, or rotate=0"
            )


def needs_statistics(augment: Augment) -> bool:
    """Whether :func:`sample` needs the :func:`statistics` of the images."""
    return bool(augment.autocontrast or augment.contrast)


def statistics(images: Tensor) -> Tensor:
    """Least, greatest and mean value of each channel of each image, float32 ``[N, C, 3]``.

    Args:
        images: uint8 ``[N, H, W, C]``, contiguous. They are read in pieces of 1 MiB or one image.

    Raises:
        TypeError: ``images`` is not uint8.
        ValueError: ``images`` is not ``[N, H, W, C]``.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}; expected torch.uint8")
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images are {list(images.shape)}; expected [N, H, W, C]")
    count, height, width, channels = images.shape
    result = torch.empty((count, channels, 3), device=images.device)
    at_once = max(1, _CHUNK_BYTES // images[:1].numel()) if count else 1
    for chunk, out in zip(images.split(at_once), result.split(at_once), strict=True):
        rows = chunk.reshape(-1, height, width * channels)
        shape = (-1, width, channels)
        out[..., 0] = _over_rows(torch.minimum, rows).view(shape).amin(1)
        out[..., 1] = _over_rows(torch.maximum, rows).view(shape).amax(1)
        total = _over_rows(torch.add, rows.int()).view(shape).sum(1)  # exact
        out[..., 2] = total.double() / (height * width)
    return result


def _over_rows(combine: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
    """``[N, H, M]`` to ``[N, M]`` by halves; torch's own reductions are 10 times slower here."""
    while (count := rows.shape[1]) > 1:
        half = count // 2
        last = rows[:, 2 * half :]
        rows = combine(rows[:, :half], rows[:, half : 2 * half])
        rows = torch.cat([rows, last], 1) if count % 2 else rows
    return rows[:, 0]


def generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and the numbers of ``stream`` alone."""
    value = seed & 0xFFFFFFFFFFFFFFFF
    for number in stream:  # splitmix64 over the numbers
        value = (value + 0x9E3779B97F4A7C15 * (number + 1)) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return torch.Generator().manual_seed(value & 0x7FFFFFFFFFFFFFFF)


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
    """Draws what is done to some images in one epoch, without waiting for the device.

    Without rotation and random-resized crop, the geometry is ``shift`` and ``flip`` (exact); with
    one of them it is all in ``affine``. The steps of the color run in the order auto-contrast,
    brightness, contrast, saturation, grey without clamping in between, as one matrix; auto-contrast
    and contrast look at the whole source image. torchvision clamps after each step and looks at
    what it crops before.

    Args:
        augment: the policy.
        indices: int64 ``[B]``, the images' places in the data set.
        size: height and width of the images, in pixels.
        channels: their channels. Saturation and grey need 3, and do nothing with another number.
        seed: seed of the run.
        epoch: epoch, from 0.
        statistics: of these images, one row per entry of ``indices``; see :func:`statistics`.

    Returns:
        One row per entry of ``indices``, on its device; None for what is off.

    Raises:
        ResfastError: the policy does not fit the images.
        TypeError: ``indices`` is not int64.
        ValueError: ``statistics`` is missing or of another shape, or epoch is out of range.
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
        drawn = _below(words(_SHIFT)[:2], 2 * augment.crop + 1) - augment.crop
        shift = drawn.to(torch.int32).T.contiguous()
    if augment.flip != "none":
        alternating = augment.flip == "alternating"
        flip = words(_FLIP, 0 if alternating else epoch)[0] < 2**31
        if alternating and epoch % 2:
            flip = ~flip
    if augment.rotate or augment.resize < 1:
        angle = window = None
        if augment.rotate:
            angle = _either_way(words(_ROTATE)[0], math.radians(augment.rotate))
        if augment.resize < 1:
            window = _window(words(_RESIZE), augment.resize, size)
        affine = affine_maps(size, shift, flip, angle, window)
        shift = flip = None
    if augment.cutout:
        drawn = words(_CUTOUT)
        cutout = _box(drawn[0], drawn[1], augment.cutout, augment.cutout, size)
    steps = [augment.brightness, augment.contrast, augment.autocontrast]
    if channels == 3:
        steps += [augment.saturation, augment.grey]
    color = None
    if any(steps):
        color = _color(augment, words(_JITTER), words(_CHANCE), channels, statistics)
    return AugmentParams(shift=shift, flip=flip, affine=affine, color=color, cutout=cutout)


def sample_mix(
    augment: Augment,
    indices: Tensor,
    *,
    count: int,
    size: tuple[int, int],
    seed: int,
    epoch: int,
) -> MixParams | None:
    """Draws what the images of one batch are mixed with, without waiting for the device.

    The partner of an image is any image of the data set and a function of (seed, epoch, index).
    The choice between MixUp and CutMix, lambda and the box hold for the batch and are a function
    of (seed, epoch, first index of the batch).

    Args:
        augment: the policy.
        indices: int64 ``[B]``, the batch's places in the data set.
        count: images in the data set, below 2^31.
        size: height and width of the images, in pixels.
        seed: seed of the run.
        epoch: epoch, from 0.

    Returns:
        One row per entry of ``indices``, on its device; None where the policy mixes nothing.

    Raises:
        TypeError: ``indices`` is not int64.
        ValueError: ``count`` or epoch is out of range.
    """
    batch = len(indices)
    if not augment.mixes:
        return None
    partner = _partners(indices, count=count, seed=seed, epoch=epoch)
    weight, box = _mixings(augment, indices[:1], size=size, seed=seed, epoch=epoch)
    return MixParams(partner, weight.expand(batch).contiguous(), box.expand(batch, 4).contiguous())


def sample_mixes(
    augment: Augment, indices: Tensor, *, size: tuple[int, int], seed: int, epoch: int
) -> MixParams | None:
    """:func:`sample_mix` for all batches of an epoch at once; ``indices`` are those of all images.

    Returns:
        One row per image of the data set: its partner, and the weight and box of a batch that
        begins with it, for :meth:`~resfast.ops.augment.op.MixParams.of_batch`.
    """
    if not augment.mixes:
        return None
    return MixParams(
        _partners(indices, count=len(indices), seed=seed, epoch=epoch),
        *_mixings(augment, indices, size=size, seed=seed, epoch=epoch),
    )


def _partners(indices: Tensor, *, count: int, seed: int, epoch: int) -> Tensor:
    """The image that each is mixed with, int64 ``[B]``."""
    if not 1 <= count < 2**31:
        raise ValueError(f"count {count} is out of range; expected 1 to 2^31 - 1")
    return _below(philox(indices, seed=seed, epoch=epoch, stream=_PARTNER)[0], count)


def _mixings(
    augment: Augment, firsts: Tensor, *, size: tuple[int, int], seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """Weight ``[F]`` and box ``[F, 4]`` of the batches that begin with the images ``firsts``."""
    drawn = philox(firsts, seed=seed, epoch=epoch, stream=_MIX)
    chance = uniform(drawn[1])
    weight = torch.ones_like(chance)
    box = torch.zeros((len(chance), 4), dtype=torch.int32, device=firsts.device)
    if augment.cutmix:
        side = (1 - _beta(chance, augment.cutmix)).sqrt()
        height, width = ((side * pixels).round().to(torch.int64) for pixels in size)
        box = _box(drawn[2], drawn[3], height, width, size)
    if augment.mixup:
        weight = _beta(chance, augment.mixup)
    if augment.mixup and augment.cutmix:
        cuts = drawn[0] < 2**31
        weight = torch.where(cuts, 1.0, weight)
        box = torch.where(cuts[:, None], box, 0)
    return weight, box


def order(count: int, *, seed: int, epoch: int, device: torch.device | str) -> Tensor:
    """The order of an epoch: a random permutation, int64 ``[count]``, the same on every device."""
    indices = torch.arange(count, device=device)
    words = philox(indices, seed=seed, epoch=epoch, stream=_ORDER)
    return torch.argsort((words[0] << 30) | (words[1] >> 2), stable=True)


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
    return philox(places, seed=seed, epoch=epoch, stream=_CROP)[:2]


def cropped(images: Tensor, pixels: int, words: Tensor) -> Tensor:
    """:func:`smaller` by showing a window, drawn from ``words`` of :func:`crop_words`."""
    batch, _, height, width = images.shape
    rows = images.permute(0, 2, 3, 1)
    window = torch.arange(pixels, device=images.device)
    y = _below(words[0], height - pixels + 1)[:, None] + window
    x = _below(words[1], width - pixels + 1)[:, None] + window
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


def mixed_labels(labels: Tensor, partner_labels: Tensor, own_part: Tensor, classes: int) -> Tensor:
    """Labels of mixed images: the part of each class, float32 ``[B, classes]``.

    Args:
        labels: int64 ``[B]``, of the own images.
        partner_labels: int64 ``[B]``, of those they are mixed with.
        own_part: float32 ``[B]``, :meth:`~resfast.ops.augment.op.MixParams.own_part`.
        classes: number of classes.
    """
    numbers = torch.arange(classes, device=labels.device)
    own_part = own_part[:, None]
    own, partner = labels[:, None] == numbers, partner_labels[:, None] == numbers
    return own * own_part + partner * (1 - own_part)


def affine_maps(
    size: tuple[int, int],
    shift: Tensor | None = None,
    flip: Tensor | None = None,
    angle: Tensor | None = None,
    window: Tensor | None = None,
) -> Tensor:
    """Maps from the result's pixels to the source's, float32 ``[B, 2, 3]``; None leaves a step out.

    The source is turned about its centre, ``window`` of that is moved by ``shift``, stretched to
    the image's size and mirrored. Without ``angle`` and ``window`` it is what ``shift`` and
    ``flip`` of :class:`~resfast.ops.augment.op.AugmentParams` are, exactly.

    Args:
        size: height and width, in pixels.
        shift: ``[B, 2]``, rows and columns, in pixels of the turned source.
        flip: bool ``[B]``.
        angle: float64 ``[B]``, in radians, counter-clockwise, within ±30°; with one, sides whose
            ratio :func:`check_augment` takes.
        window: float64 ``[B, 4]``: top, left, height and width, in pixels, of a rectangle inside
            the image; 0 is the outer edge of the first pixel.
    """
    # float64 throughout and one rounding, so that every device comes to the same float32.
    height, width = size
    given = next(value for value in (shift, flip, angle, window) if value is not None)
    zero = torch.zeros(len(given), dtype=torch.float64, device=given.device)
    one = zero + 1
    cos, sin = (one, zero) if angle is None else (angle.cos(), angle.sin())
    down, right = (zero, zero) if shift is None else shift.double().unbind(1)
    stretch_y = stretch_x = one
    if window is not None:
        top, left, window_height, window_width = window.unbind(1)
        stretch_y, stretch_x = window_height / height, window_width / width
        down = down + top + (window_height - height) / 2
        right = right + left + (window_width - width) / 2
    if flip is not None:
        stretch_x = torch.where(flip, -stretch_x, stretch_x)
    rows = []
    for along_y, along_x, moved, side in (
        (cos * stretch_y, sin * stretch_x, cos * down + sin * right, height),
        (-sin * stretch_y, cos * stretch_x, cos * right - sin * down, width),
    ):
        # From the centre the operator reaches 1.5 (side - 1) either way: one reflection. The map
        # itself takes `reach` of it at the corners, the rest is what it may be moved by. A shift
        # below the side never meets this limit on its own.
        reach = (along_y.abs() * (height - 1) + along_x.abs() * (width - 1)) / 2
        room = (1.5 * (side - 1) - reach).clamp(min=0)
        moved = torch.minimum(torch.maximum(moved, -room), room)
        start = moved + ((side - 1) - along_y * (height - 1) - along_x * (width - 1)) / 2
        rows.append(torch.stack([along_y, along_x, start], 1))
    return torch.stack(rows, 1).to(torch.float32)


def _below(words: Tensor, bound: int) -> Tensor:
    """int64 in 0 … bound - 1, uniform: floor(u * bound) for u = words / 2^32, exactly."""
    return (words * bound) >> 32


def _either_way(words: Tensor, most: float) -> Tensor:
    """float64, uniform from -most to most."""
    return (uniform(words).double() * 2 - 1) * most


def _window(words: Tensor, least: float, size: tuple[int, int]) -> Tensor:
    """Windows of random-resized crop, float64 ``[B, 4]`` as :func:`affine_maps` takes them.

    Where torchvision draws again up to ten times for a window inside the image, this one is
    clipped to it; it is not rounded to whole pixels either.
    """
    height, width = size
    chance = uniform(words).double()
    area = height * width * (least + (1 - least) * chance[0])
    ratio = (LOG_RATIO * (2 * chance[1] - 1)).exp()
    window_height = (area / ratio).sqrt().clamp(1, height)
    window_width = (area * ratio).sqrt().clamp(1, width)
    top, left = chance[2] * (height - window_height), chance[3] * (width - window_width)
    return torch.stack([top, left, window_height, window_width], 1)


def _box(
    row_words: Tensor,
    column_words: Tensor,
    height: Tensor | int,
    width: Tensor | int,
    size: tuple[int, int],
) -> Tensor:
    """Rectangles about a uniform pixel, cut off at the border: int32 ``[B, 4]``."""
    top = _below(row_words, size[0]) - height // 2
    left = _below(column_words, size[1]) - width // 2
    bottom, right = (top + height).clamp(max=size[0]), (left + width).clamp(max=size[1])
    return torch.stack([top.clamp(min=0), left.clamp(min=0), bottom, right], 1).to(torch.int32)


def _color(
    augment: Augment, jitter: Tensor, chances: Tensor, channels: int, statistics: Tensor | None
) -> Tensor:
    """The color map of each image, float32 ``[B, C, C + 1]``."""
    luma = _LUMA if channels == 3 else (1 / channels,) * channels
    brightness, contrast, saturation, _ = uniform(jitter)[..., None] * 2 - 1
    stretched, grey, _, _ = uniform(chances)[..., None]
    # Up to saturation each channel is its own: gain * pixel + bias.
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
    return torch.cat([matrix, bias[..., None]], 2)


def _weighted(values: Tensor, weights: tuple[float, ...]) -> Tensor:
    """``[B, 1]`` from ``[B, C]``; added up in one order, so that devices agree."""
    return sum(values[:, c] * weight for c, weight in enumerate(weights))[:, None]


def _beta(chance: Tensor, alpha: float) -> Tensor:
    """Draws from Beta(alpha, alpha): its quantiles at ``chance``, float32 in [0, 1)."""
    table = _beta_quantiles(alpha, chance.device)
    position = chance * _QUANTILES
    index = position.long()
    low = table[index]
    return low + (table[index + 1] - low) * (position - index)


@cache
def _beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at steps of 1 / 4096, float32 ``[4097]``."""
    from scipy.special import betaincinv

    steps = torch.arange(_QUANTILES + 1, dtype=torch.float64) / _QUANTILES
    return torch.from_numpy(betaincinv(alpha, alpha, steps.numpy())).float().to(device)
