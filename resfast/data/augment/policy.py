"""The policy: what is done to training images, as data, and its spelling on the command line."""

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
