"""Decodes encoded images with labels, from wherever they come, into a data set that is cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.data import cache
from resfast.data.dataset import Dataset, Request, make_dataset
from resfast.data.decode import decode_all
from resfast.errors import ResfastError

SPLITS = ("train", "test")
LABELS = ("label", "labels", "fine_label", "class", "class_name", "category", "target")
"""Names of the column with the labels."""


@dataclass(frozen=True)
class Labelled:
    """Encoded images of both splits.

    Attributes:
        source: what the images are from, in messages.
        names: for each split, the name of each image, in messages.
        labels: for each split, the label of each image.
        classes: class names, in the order of the labels.
        blobs: gives the split, the index and the bytes of each image, in any order.
        update_hash: passes everything that decides the images and labels to its argument.
    """

    source: str
    names: dict[str, Sequence[str]]
    labels: dict[str, list[int]]
    classes: tuple[str, ...]
    blobs: Callable[[], Iterable[tuple[str, int, bytes]]]
    update_hash: Callable[[Callable[[bytes], Any]], None]


def load(request: Request, images: Labelled) -> Dataset:
    """The decoded images, from the cache if they are in it.

    Raises:
        ResfastError: an image is corrupt and ``skip_corrupt`` is false, or a split is empty.
    """
    if request.loader == "dali":
        raise ResfastError(
            f"--loader dali cannot read --data {request.data}: leave it out, or use an image folder"
        )
    for split in SPLITS:
        if not images.labels[split]:
            raise ResfastError(f"{images.source} has no {split} images; expected at least one")
    key = cache.content_key(
        images.update_hash, image_size=request.image_size, skip_corrupt=request.skip_corrupt
    )
    path = request.data_dir / "cache" / f"{key}.safetensors"
    fields = cache.load(path, request.image_size, request.report)
    if fields is not None:
        return Dataset(name=request.data, **fields)
    total = sum(map(len, images.labels.values()))
    request.report(f"reading {total:,} images from {images.source}")
    size = request.image_size
    pixels = {split: np.empty((len(images.labels[split]), size, size, 3), np.uint8)
              for split in SPLITS}  # fmt: skip
    places = {
        (split, "", str(row)): image for split in SPLITS for row, image in enumerate(pixels[split])
    }
    blobs = (((split, "", str(row)), data) for split, row, data in images.blobs())
    corrupt: set[tuple[str, int]] = set()
    for _, failures in decode_all(blobs, places, size):
        for (split, _, row), reason in failures:
            if not request.skip_corrupt:
                raise ResfastError(
                    f"{images.names[split][int(row)]} is not a readable JPEG, PNG or WebP image "
                    f"({reason}): replace it, or skip such images with --skip-corrupt"
                )
            corrupt.add((split, int(row)))
    tensors: dict[str, Tensor] = {}
    for split in SPLITS:
        rows = [row for row in range(len(pixels[split])) if (split, row) not in corrupt]
        if not rows:
            raise ResfastError(f"all {split} images of {images.source} are corrupt: replace them")
        labels = torch.tensor(images.labels[split], dtype=torch.int64)
        whole = torch.from_numpy(pixels[split])
        everything = len(rows) == len(whole)
        tensors[f"{split}_images"] = whole if everything else whole[rows]
        tensors[f"{split}_labels"] = labels if everything else labels[rows]
    skipped = tuple(images.names[split][row] for split, row in sorted(corrupt))
    dataset = make_dataset(request.data, tensors, images.classes, skipped)
    cache.store(path, dataset, request.report)
    if skipped:
        request.report(f"skipped {len(skipped):,} corrupt images ({', '.join(skipped[:3])})")
    return dataset


def numbered(names: Iterable[str]) -> tuple[str, ...]:
    """The different names in order: numbers by their value, other names alphabetically."""
    different = set(names)
    numbers = all(name.isascii() and name.isdigit() for name in different)
    return tuple(sorted(different, key=(lambda name: (int(name), name)) if numbers else None))
