"""The fifteen common corruptions of images, at five severities.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", arXiv:1903.12261; the constants are those of CIFAR-10-C. Lengths in pixels grow with
the images. Random numbers, the frost texture and the filters of motion blur are our own, so the
images are not those of CIFAR-10-C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

from resfast.data.augment.streams import CORRUPTION, generator
from resfast.data.corruptions.blur import defocus_blur, glass_blur, motion_blurred, zoom_blur
from resfast.data.corruptions.digital import (
    contrast,
    elastic_transform,
    jpeg_compression,
    pixelate,
)
from resfast.data.corruptions.noise import gaussian_noise, impulse_noise, shot_noise
from resfast.data.corruptions.weather import brightness, fog, frost, snow
from resfast.data.test_sets import SEVERITIES, Corrupted, CorruptedSets
from resfast.errors import ResfastError, nearest

Corruption = Callable[[Tensor, int, Generator], Tensor]
"""From float32 ``[B, C, H, W]`` in 0..1, a severity and a generator, to the same."""

KINDS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blurred,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}
"""In the order of the paper."""
_CHUNK_PIXELS = 1 << 19  # images are corrupted this many pixels at a time


def corrupt(images: Tensor, kind: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupted images, a function of the images, the kind, the severity and the seed.

    Args:
        images: uint8 ``[N, H, W, C]`` on the CPU, C 1 or 3; not changed.
        kind: a key of :data:`KINDS`.
        severity: 1 to 5.
        seed: seed of the random numbers.

    Returns:
        uint8 of the same shape.

    Raises:
        ResfastError: an unknown kind or severity, or other images.
    """
    check_kinds((kind,))
    if severity not in SEVERITIES:
        raise ResfastError(f"severity {severity} is out of range: expected 1 to {SEVERITIES[-1]}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ResfastError(
            f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, 1 or 3]"
        )
    corrupted = torch.empty_like(images, memory_format=torch.contiguous_format)
    each = max(1, _CHUNK_PIXELS // max(images.shape[1] * images.shape[2], 1))
    number = list(KINDS).index(kind)
    pairs = zip(images.split(each), corrupted.split(each), strict=True)
    for chunk, (pixels, out) in enumerate(pairs):
        if not len(pixels):
            continue
        random = generator(seed, CORRUPTION, number, severity, chunk)
        values = pixels.permute(0, 3, 1, 2).float() / 255
        result = KINDS[kind](values, severity, random).clamp(0, 1)
        # Rounded down, as the images of CIFAR-10-C are; 1e-3 is for pixels that did not change.
        out.copy_((result * 255 + 1e-3).permute(0, 2, 3, 1))
    return corrupted


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises ``ResfastError`` for an unknown corruption."""
    for kind in kinds:
        if kind not in KINDS:
            raise ResfastError(
                f"corruption {kind!r} is unknown; choose {', '.join(KINDS)}{nearest(kind, KINDS)}"
            )


def corrupted_sets(
    name: str,
    images: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    *,
    kinds: Sequence[str] = (),
    seed: int = 0,
) -> CorruptedSets:
    """Test images under each corruption and severity, made when they are needed.

    Args:
        name: name of the data set.
        images: uint8 ``[N, H, W, C]`` on the CPU.
        labels: int64 ``[N]``.
        classes: class names, in the order of the labels.
        kinds: the corruptions (empty: all fifteen).
        seed: seed of the random numbers.

    Raises:
        ResfastError: an unknown corruption.
    """
    check_kinds(kinds)
    chosen = tuple(kind for kind in KINDS if not kinds or kind in kinds)

    def splits() -> Iterator[Corrupted]:
        for kind in chosen:
            for severity in SEVERITIES:
                made = corrupt(images, kind, severity, seed=seed)
                yield Corrupted(kind, severity, made, labels)

    return CorruptedSets(name, classes, chosen, splits)
