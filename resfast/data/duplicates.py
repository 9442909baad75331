"""Finds images that a data set has twice: the same pixels, or nearly the same picture.

Candidates are pairs whose small versions are alike in whitened coordinates (principal components
divided by their standard deviation, so that what all images have in common counts little); block by
block, every image is compared with every other. A candidate is a near duplicate if the middle
frequencies of the two images agree, by normalized cross-correlation at the best of some shifts.

Barz and Denzler, "Do We Train on Test Data? Purging CIFAR of Near-Duplicates", arXiv:1902.00423,
found candidates with a trained network instead, and judged them by eye.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.data.corruptions.filters import gaussian
from resfast.data.dataset import Dataset
from resfast.errors import ResfastError

SIMILARITY = 0.86
"""Correlation from which a pair is a near duplicate."""
_CANDIDATE, _MIRRORED_CANDIDATE = 0.6, 0.75  # cosines in whitened coordinates
_SIDE, _CHROMA_SIDE, _COMPONENTS = 8, 4, 100
_NOISE = 1e-2  # of the largest variance: components with less are noise
_SAMPLE = 20_000  # images that the components are computed from
_DETAIL_SIDE, _SHIFT = 32, 2
_FLAT = 1e-2  # length of middle frequencies below which an image is flat
_LUMA = (0.299, 0.587, 0.114)
_ROWS = 500  # images per block


@dataclass(frozen=True)
class Pair:
    """Two images of a data set that are alike.

    Attributes:
        first: split (``train`` or ``test``) and index of an image.
        second: the same of the other; the training image comes first.
        similarity: correlation, at most 1; 1 for the same pixels.
        exact: whether the pixels are the same.
        mirrored: whether one is the mirror image of the other.
        labels: the labels of the two.
    """

    first: tuple[str, int]
    second: tuple[str, int]
    similarity: float
    exact: bool
    mirrored: bool
    labels: tuple[int, int]

    @property
    def across(self) -> bool:
        """Whether one is a training and the other a test image."""
        return self.first[0] != self.second[0]


def find_duplicates(dataset: Dataset, similarity: float = SIMILARITY) -> list[Pair]:
    """Pairs of images that are alike, within and across the splits.

    Args:
        dataset: the data set.
        similarity: least correlation of near duplicates, 0.6 to 1. At 1 only the same pixels count,
            mirrored ones too.

    Returns:
        The pairs: those across the splits first, then by falling similarity.

    Raises:
        ResfastError: the similarity is out of range.
    """
    if not 0.6 <= similarity <= 1:
        raise ResfastError(
            f"--similarity {similarity:g} is out of range: expected 0.6 to 1 (1: only images with "
            "the same pixels)"
        )
    count = len(dataset.train_images)
    images = _Images(dataset.train_images, dataset.test_images)
    found: dict[tuple[int, int], tuple[float, bool, bool]] = {}
    for mirrored in (False, True):
        for pair in images.equal(mirrored):
            found.setdefault(pair, (1.0, True, mirrored))
    if similarity < 1:
        for mirrored in (False, True):
            for first, second in images.candidates(mirrored):
                values = images.correlation(first, second, mirrored)
                for row in (values >= similarity).nonzero().flatten().tolist():
                    key, value = (int(first[row]), int(second[row])), float(values[row])
                    if key not in found or (not found[key][1] and value > found[key][0]):
                        found[key] = (value, False, mirrored)
    labels = torch.cat([dataset.train_labels, dataset.test_labels]).tolist()

    def place(row: int) -> tuple[str, int]:
        return ("train", row) if row < count else ("test", row - count)

    pairs = [
        Pair(place(a), place(b), min(value, 1.0), exact, mirrored, (labels[a], labels[b]))
        for (a, b), (value, exact, mirrored) in found.items()
    ]
    return sorted(pairs, key=lambda p: (not p.across, -p.similarity, p.first, p.second))


class _Images:
    """All images of a data set, by one index: training images first."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        self.count = sum(map(len, parts))

    def blocks(self) -> Iterator[Tensor]:
        """uint8 ``[B, H, W, C]``, in turn."""
        for part in self.parts:
            yield from part.split(_ROWS)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 ``[n, H, W, C]`` at int64 ``[n]``."""
        split = len(self.parts[0])
        out = self.parts[0].new_empty(len(rows), *self.parts[0].shape[1:])
        for part, mask, offset in (
            (self.parts[0], rows < split, 0),
            (self.parts[1], rows >= split, split),
        ):
            out[mask] = part[rows[mask] - offset]
        return out

    def equal(self, mirrored: bool) -> Iterator[tuple[int, int]]:
        """Pairs with the same pixels; of many equal images, each with the first."""
        first: dict[bytes, int] = {}
        if mirrored:
            for row, digest in enumerate(self._digests(mirrored=True)):
                first.setdefault(digest, row)
        for row, digest in enumerate(self._digests()):
            earlier = first.setdefault(digest, row)
            if earlier < row:
                yield earlier, row

    def _digests(self, mirrored: bool = False) -> Iterator[bytes]:
        for block in self.blocks():
            for image in (block.flip(2) if mirrored else block).contiguous().numpy():
                yield hashlib.blake2b(image.data, digest_size=16).digest()

    def candidates(self, mirrored: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs that may be alike, int64 ``[n]`` each, the first index below the second."""
        features = self._features()
        others = self._features(mirrored=True) if mirrored else features
        for start in range(0, self.count, _ROWS):
            rows = others[start : start + _ROWS]
            # Only later images: each pair once.
            cosines = rows @ features[start:].T
            least = _MIRRORED_CANDIDATE if mirrored else _CANDIDATE
            first, second = (cosines >= least).nonzero(as_tuple=True)
            later = second > first
            for part in torch.stack([first[later], second[later]]).add_(start).split(50_000, 1):
                yield part[0], part[1]

    def _features(self, mirrored: bool = False) -> Tensor:
        """Whitened small images of length 1, float32 ``[N, components]``."""
        small = torch.cat([_small(block.flip(2) if mirrored else block) for block in self.blocks()])
        step = max(1, self.count // _SAMPLE)
        chosen = small[::step]
        mean = chosen.mean(0)
        covariance = torch.cov(chosen.T)
        variances, directions = torch.linalg.eigh(covariance)
        variances, directions = variances[-_COMPONENTS:], directions[:, -_COMPONENTS:]
        scale = (variances.clamp(min=0) + _NOISE * variances[-1].clamp(min=1e-12)).rsqrt()
        return F.normalize((small - mean) @ (directions * scale))

    def correlation(self, first: Tensor, second: Tensor, mirrored: bool) -> Tensor:
        """Correlation of the middle frequencies at the best shift, float32 ``[n]``."""
        values = torch.empty(len(first))
        for rows in torch.arange(len(first)).split(1000):
            a, b = self[first[rows]], self[second[rows]]
            values[rows] = _best_correlation(_detail(a.flip(2) if mirrored else a), _detail(b))
        return values


def _luma(images: Tensor) -> Tensor:
    """float32 ``[B, 1, H, W]`` in 0..1."""
    weights = torch.tensor(_LUMA) / 255
    return (images.float() @ weights)[:, None]


def _small(images: Tensor) -> Tensor:
    """Small versions of uint8 ``[B, H, W, 3]``: brightness, and colour at half its weight."""
    grey = _luma(images)
    luma = F.adaptive_avg_pool2d(grey, _SIDE).flatten(1)
    luma = luma - luma.mean(1, keepdim=True)
    colour = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255 - grey, _CHROMA_SIDE)
    return torch.cat([_unit(luma, 1e-3), 0.5 * _unit(colour.flatten(1), 0.3)], 1)


def _detail(images: Tensor) -> Tensor:
    """Middle frequencies of the brightness, float32 ``[B, 1, 32, 32]``."""
    grey = _luma(images)
    if grey.shape[2:] != (_DETAIL_SIDE, _DETAIL_SIDE):
        grey = F.interpolate(
            grey, (_DETAIL_SIDE, _DETAIL_SIDE), mode="bilinear", antialias=True, align_corners=False
        )
    fine, coarse = _blur_matrix(1.0), _blur_matrix(3.0)
    return fine @ grey @ fine.T - coarse @ grey @ coarse.T


@functools.cache
def _blur_matrix(sigma: float) -> Tensor:
    """A Gaussian over the rows of an image, the edge repeated, float32 ``[32, 32]``."""
    half = math.ceil(4 * sigma)
    rows = torch.arange(_DETAIL_SIDE)[:, None]
    sources = (rows + torch.arange(-half, half + 1)).clamp(0, _DETAIL_SIDE - 1)
    weights = gaussian(sigma, half).expand(_DETAIL_SIDE, -1)
    return torch.zeros(_DETAIL_SIDE, _DETAIL_SIDE).scatter_add_(1, sources, weights)


def _best_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Normalized cross-correlation at the best shift by up to ``_SHIFT`` pixels, ``[B]``."""
    end = _DETAIL_SIDE - _SHIFT
    core = b[:, 0, _SHIFT:end, _SHIFT:end]
    core = core - core.mean((1, 2), keepdim=True)
    core = core / core.norm(dim=(1, 2), keepdim=True).clamp(min=_FLAT)
    padded = F.pad(core, (0, 2 * _SHIFT, 0, 2 * _SHIFT))
    products = torch.fft.irfft2(torch.fft.rfft2(a[:, 0]) * torch.fft.rfft2(padded).conj(), (
        _DETAIL_SIDE, _DETAIL_SIDE
    ))[:, : 2 * _SHIFT + 1, : 2 * _SHIFT + 1]  # fmt: skip
    window = end - _SHIFT
    means = F.avg_pool2d(a, window, stride=1)[:, 0]
    squares = F.avg_pool2d(a * a, window, stride=1)[:, 0]
    lengths = ((squares - means * means).clamp(min=0) * window**2).sqrt()
    return (products / lengths.clamp(min=_FLAT)).amax((1, 2))


def _unit(values: Tensor, least: float) -> Tensor:
    """Rows divided by their length, or by ``least`` if they are shorter: noise is not enlarged."""
    return values / values.norm(dim=1, keepdim=True).clamp(min=least)
