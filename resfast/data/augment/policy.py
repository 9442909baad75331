"""Augmentation policies as data, and their notation on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from resfast.errors import ResfastError, nearest
from resfast.ops.augment.op import Padding

Flip = Literal["none", "random", "alternating"]
_MAX_ANGLE = 30.0


@dataclass(frozen=True)
class Augment:
    """The augmentation of training images. 0, ``none`` or ``resize=1`` turns a step off.

    Raises:
        ResfastError: a value out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    crop: int = 0
    """Maximum random translation along each axis, in pixels."""
    padding: Padding = "reflect"
    """Fills the border that translation or rotation exposes: the reflected image, or black
    (zero)."""
    flip: Flip = "none"
    """Horizontal flip: each image with probability 1/2 (random), or the same in epoch 0 and in
    each later epoch exactly the images not flipped in the one before (alternating; Jordan,
    "94% on CIFAR-10 in 3.29 Seconds", arXiv:2404.00498, section 3.6)."""
    resize: float = 1.0
    """Random-resized crop (Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842):
    minimum area of the window as a fraction of the image's; its aspect ratio is 3/4 to 4/3. It is
    clipped to the image and stretched to its size, bilinear."""
    rotate: float = 0.0
    """Maximum rotation about the image's centre in either direction, in degrees, at most 30,
    bilinear."""
    cutout: int = 0
    """Side of a square set to the mean, in pixels, centred anywhere in the image (DeVries and
    Taylor, arXiv:1708.04552)."""
    brightness: float = 0.0
    """Pixels are multiplied by a factor from 1 - this to 1 + this."""
    contrast: float = 0.0
    """The difference from the image's mean grey is multiplied by a factor from 1 ± this."""
    saturation: float = 0.0
    """The difference from the pixel's own grey is multiplied by a factor from 1 ± this."""
    hue: float = 0.0
    """Colours are rotated about the grey axis in YIQ space, by up to this part of a circle in
    either direction, at most 0.5."""
    autocontrast: float = 0.0
    """Probability of stretching each channel to 0 … 255."""
    grey: float = 0.0
    """Probability of converting the image to grey."""
    noise: float = 0.0
    """Standard deviation of normal noise, drawn for each channel of each pixel and added after all
    other steps, in units of pixel / 255; not clipped."""
    mixup: float = 0.0
    """MixUp: lambda is drawn from Beta(alpha, alpha) with this alpha (Zhang et al.,
    arXiv:1710.09412)."""
    cutmix: float = 0.0
    """CutMix: lambda is drawn from Beta(alpha, alpha) with this alpha (Yun et al.,
    arXiv:1905.04899). If MixUp is on too, each batch uses one of the two with probability 1/2."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others, which makes labels soft."""
        return bool(self.mixup or self.cutmix)

    def __str__(self) -> str:
        """The steps that are on, in the notation of :func:`parse_augment`, or ``none``."""
        changed = [
            f"{field.name}={_text(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(changed) or "none"


_DEFAULTS = {field.name: field.default for field in fields(Augment)}
_WORDS = {"padding": get_args(Padding), "flip": get_args(Flip)}
_EXAMPLES = {"hue": "0.1", "noise": "0.05"}
"""Values of steps that no policy has."""
_MAX_VALUES = {"rotate": _MAX_ANGLE, "hue": 0.5, "mixup": math.inf, "cutmix": math.inf}


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
            raise ResfastError(
                f"{shown} is out of range: expected a whole number of pixels, at least 0"
            )
    else:
        limit = _MAX_VALUES.get(name, 1.0)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and 0 <= value <= limit):
            expected = "a number of at least 0" if math.isinf(limit) else f"0 to {limit:g}"
            raise ResfastError(f"{shown} is out of range: expected {expected}")
        if name == "resize" and not value:
            raise ResfastError(f"{shown} is out of range: expected above 0, at most 1")


_STANDARD = Augment(crop=4, flip="alternating", cutout=8)
POLICIES: dict[str, Augment] = {
    "none": Augment(),
    "light": Augment(crop=2, flip="alternating"),
    "standard": _STANDARD,
    # MixUp's alpha is in the range its paper finds best for ImageNet; CutMix's is from its paper.
    "strong": replace(
        _STANDARD,
        rotate=15,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        mixup=0.2,
        cutmix=1.0,
    ),
    # The report names its steps but not their strengths; these are ours.
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
        text: comma-separated items: optionally the name of a policy in :data:`POLICIES` (default
            ``none``), then values that override it.

    Raises:
        ResfastError: an unknown name, key or value (the message suggests the nearest known one), or
            a repeated key.
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
                hint = ": the name of a policy must come first"
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
                f"--augment {text!r}: {key}={value} is not {expected}; for example, use "
                f"{key}={_example(key)}"
            ) from None
    return replace(policy, **values)


def _example(key: str) -> str:
    if key in _EXAMPLES:
        return _EXAMPLES[key]
    values = (getattr(policy, key) for policy in POLICIES.values())
    return next(
        (_text(value) for value in values if value != _DEFAULTS[key]), _WORDS.get(key, ".")[-1]
    )


def check_augment(augment: Augment, height: int, width: int) -> None:
    """Checks that the steps of ``augment`` fit images of ``height`` x ``width`` pixels.

    Raises:
        ResfastError: a step does not fit.
    """
    short, long = sorted((height, width))
    images = f"images of {height}x{width} pixels"
    if augment.crop >= short:
        raise ResfastError(
            f"--augment crop={augment.crop} does not fit {images}: choose crop=0 to {short - 1}"
        )
    if augment.cutout > short:
        raise ResfastError(
            f"--augment cutout={augment.cutout} does not fit {images}: choose cutout=0 to {short}"
        )
    if augment.rotate:
        # The corners of a long image rotate past the single reflection that pads its short side.
        angle = math.radians(augment.rotate)
        reach = math.cos(angle) * (short - 1) + math.sin(angle) * (long - 1)
        if reach > 3 * (short - 1):
            raise ResfastError(
                f"--augment rotate={_text(augment.rotate)} rotates {images} beyond their padding: "
                "choose a smaller angle, or rotate=0"
            )


def needs_statistics(augment: Augment) -> bool:
    """Whether :func:`sample` needs the :func:`statistics` of the images."""
    return bool(augment.autocontrast or augment.contrast)
