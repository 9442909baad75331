"""Opened data sets: images in memory, or lists of files on disk.

This module does not know the sources of data; those are in resfast.data.sources.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from resfast.errors import ResfastError

Loader = Literal["auto", "resident", "dali"]
CHANNELS = 3
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 1024
MAX_CLASSES = 100_000
"""A class with a higher number is taken for something else, such as an ID."""
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, on the CPU."""

    name: str  # "cifar10", "cifar100", "digits", "folder:PATH"
    train_images: Tensor  # uint8 [N, H, W, C] contiguous, C = 3
    train_labels: Tensor  # int64 [N]
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    digest: str  # hex digest of the four tensors and the class names
    skipped: tuple[str, ...] = ()  # corrupt files omitted because of skip_corrupt

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.train_images.shape[1]


@dataclass(frozen=True)
class Files:
    """Encoded images by path.

    Attributes:
        paths: image files, of the formats of :data:`resfast.data.decode.FORMATS`.
        labels: int64 ``[N]``.
    """

    paths: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Files:
        """The images at ``indices``, int64 ``[n]``."""
        return Files(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])


@dataclass(frozen=True)
class Shards:
    """Encoded images in WebDataset archives, as :mod:`resfast.data.shard_listing` reads them.

    Attributes:
        paths: tar archives.
        count: total number of images.
        classes: names of the classes that samples may have instead of an index.
        cache: folder in which listings of the samples are kept, if any.
    """

    paths: tuple[str, ...]
    count: int
    classes: tuple[str, ...] = ()
    cache: Path | None = None

    def __len__(self) -> int:
        """Number of images."""
        return self.count


@dataclass(frozen=True)
class Stream:
    """A data set that stays encoded on disk.

    Attributes:
        name: ``folder:PATH`` or ``shards:PATH``.
        train: training images.
        test: test images.
        classes: class names, in the order of the labels.
        image_size: height and width that images are resized to, in pixels.
        digest: hex digest of names, sizes and classes.
    """

    name: str
    train: Files | Shards
    test: Files | Shards
    classes: tuple[str, ...]
    image_size: int
    digest: str


@dataclass(frozen=True)
class Request:
    """A request to a source of data.

    Attributes:
        data: the value of ``--data``.
        location: the part of ``data`` after the colon, or "".
        data_dir: where data sets are looked for, downloaded to and cached.
        image_size: height and width of the images, in pixels.
        skip_corrupt: skip images that cannot be decoded.
        loader: how the data set is held, see :func:`resfast.data.sources.open_data`.
        device: where batches will be produced.
        report: called with a line of text for each notable step.
        classes: file with the names of the classes, or the names, for shards.
    """

    data: str
    location: str
    data_dir: Path
    image_size: int
    skip_corrupt: bool
    loader: Loader
    device: torch.device
    report: Callable[[str], None]
    classes: Path | Sequence[str] | None = None


class DataUnavailableError(ResfastError):
    """A data set that is not on disk and cannot be fetched; ``reason`` excludes the remedy."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}: {remedy}")
        self.reason = reason


def print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check_image_size(image_size: int) -> None:
    """Raises ``ResfastError`` for an unsupported height and width, in pixels."""
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ResfastError(
            f"image size {image_size} is out of range, expected {MIN_IMAGE_SIZE} to "
            f"{MAX_IMAGE_SIZE} pixels: choose 32 for CIFAR"
        )


def refuse_skipping(request: Request) -> None:
    """Raises ``ResfastError`` if skipping corrupt images is requested of a stream."""
    if request.skip_corrupt:
        raise ResfastError(
            "--skip-corrupt needs --loader resident: DALI stops at a corrupt image and names it; "
            "remove or replace such images"
        )


def make_dataset(
    name: str, tensors: dict[str, Tensor], classes: tuple[str, ...], skipped: tuple[str, ...] = ()
) -> Dataset:
    """A data set from its four CPU tensors by name, with its digest."""
    digest = tensor_digest(tensors, classes)
    return Dataset(name=name, **tensors, classes=classes, digest=digest, skipped=skipped)


def tensor_digest(tensors: Mapping[str, Tensor], classes: tuple[str, ...]) -> str:
    """Digest, 32 hex digits, of the four CPU tensors of a data set and its class names."""
    digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for name in TENSORS:
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().reshape(-1).view("uint8").data)
    return digest.hexdigest()
