"""Images without labels: files, a folder, or an array in a .npy or pickle, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.data import decode, folder, safe_pickle
from resfast.data.resize import resize
from resfast.errors import ResfastError

PICKLE_SUFFIXES = (".pkl", ".pickle", "")  # CIFAR's own test_batch has none
ID_NAMES = ("ids", "id", "IDs", "filenames")
"""Of the IDs in a pickle; CIFAR's own batches have file names."""
_KINDS = (
    f"an image ({', '.join(folder.IMAGE_SUFFIXES)}), a folder of images, or an array in a .npy "
    "or .pkl file"
)
_SHAPES = "uint8 [N, H, W, 3], [N, 3, H, W] or [N, 3072] with H equal to W"

Batch = tuple[Sequence[str], Tensor, list[str]]
"""IDs, their images uint8 ``[B, H, W, C]``, and the IDs of corrupt images that were skipped."""


@dataclass(frozen=True)
class Files:
    """Image files, decoded in the same way as training images, one batch at a time.

    Attributes:
        ids: name of each image in the predictions.
        paths: path of each image.
        ignored: number of files in the folder that are not images.
    """

    ids: list[str]
    paths: list[str]
    ignored: int = 0

    def batches(self, size: int, batch_size: int, skip_corrupt: bool) -> Iterator[Batch]:
        """Images of ``size`` x ``size`` pixels.

        Raises:
            ResfastError: an image cannot be read, or is corrupt and ``skip_corrupt`` is false.
        """
        for start in range(0, len(self.ids), batch_size):
            rows = range(start, min(start + batch_size, len(self.ids)))
            images = np.empty((len(rows), size, size, 3), np.uint8)
            keys = {("", "", str(row)): image for row, image in zip(rows, images, strict=True)}
            blobs = ((key, folder.read_file(self.paths[int(key[2])])) for key in keys)
            corrupt: set[int] = set()
            for _, failures in decode.decode_all(blobs, keys, size):
                for (_, _, row), reason in failures:
                    if not skip_corrupt:
                        raise decode.unreadable(
                            self.paths[int(row)],
                            reason,
                            "replace it, or skip such images with --skip-corrupt",
                        )
                    corrupt.add(int(row))
            kept = [row for row in rows if row not in corrupt]
            yield (
                [self.ids[row] for row in kept],
                torch.from_numpy(images[[row - start for row in kept]]),
                [self.ids[row] for row in sorted(corrupt)],
            )


@dataclass(frozen=True)
class Rows:
    """Images of one array.

    Attributes:
        ids: name of each image in the predictions.
        array: uint8 ``[N, H, W, 3]``, H equal to W, any strides.
    """

    ids: Sequence[str]
    array: np.ndarray

    def batches(self, size: int, batch_size: int, skip_corrupt: bool) -> Iterator[Batch]:
        """Images of ``size`` x ``size`` pixels, resized if necessary."""
        for start in range(0, len(self.array), batch_size):
            rows = slice(start, start + batch_size)
            images = torch.from_numpy(np.array(self.array[rows], order="C"))
            yield self.ids[rows], resize(images, size) if images.shape[1] != size else images, []


def open_images(paths: Sequence[Path]) -> Files | Rows:
    """Opens image files, or one folder or array.

    Raises:
        ResfastError: there are no paths, several paths of which one is not an image file, a missing
            file, a file of unknown type, a folder without images, or a file that does not hold an
            array of images.
    """
    if not paths:
        raise ResfastError(f"no images were given; expected {_KINDS}")
    for path in paths:
        try:
            if not path.exists():
                raise ResfastError(f"{path} does not exist; expected {_KINDS}")
            is_folder = path.is_dir()
        except OSError as error:
            raise ResfastError(
                f"{path} cannot be read ({error.strerror}); expected {_KINDS}"
            ) from None
        if not is_folder and path.suffix.lower() in folder.IMAGE_SUFFIXES:
            continue
        if is_folder or path.suffix.lower() in (".npy", *PICKLE_SUFFIXES):
            if len(paths) > 1:
                raise ResfastError(
                    f"{path} is not an image file but was given with {len(paths) - 1} other paths; "
                    "expected image files, or a single folder, .npy or .pkl: run them one by one"
                )
        else:
            raise ResfastError(f"{path} has unknown type {path.suffix!r}; expected {_KINDS}")
    first = paths[0]
    if first.is_dir():
        return _open_folder(first)
    if first.suffix.lower() == ".npy":
        return Rows(*checked(_read_npy(first), None, str(first)))
    if first.suffix.lower() in PICKLE_SUFFIXES:
        return Rows(*checked(*_read_pickle(first), str(first)))
    return Files([str(path) for path in paths], [os.fspath(path) for path in paths])


def _open_folder(path: Path) -> Files:
    # The same walk as for training, so that links and hidden files are treated alike; it sees an
    # unlabelled folder as one class without a name.
    listing = folder.Listing()
    folder.Directory(path).walk(os.fspath(path), ("", ""), frozenset(), listing)
    if not listing.images:
        raise ResfastError(
            f"{path} holds no images; expected {', '.join(folder.IMAGE_SUFFIXES)} files in it or "
            f"below it, found {listing.ignored:,} others: choose another folder"
        )
    found = sorted((key[2], handle) for key, handle in listing.images.items())
    return Files([name for name, _ in found], [file for _, file in found], listing.ignored)


def _read_npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ResfastError(
            f"{path} is not a readable .npy file of numbers ({error}); expected {_SHAPES}, "
            "written by numpy.save"
        ) from None
    return array


def checked(array: Any, ids: Any, source: str) -> tuple[Sequence[str], np.ndarray]:
    """IDs and a view ``[N, H, W, 3]`` of an array in any of the accepted shapes.

    Raises:
        ResfastError: wrong type, dtype or shape, no images, or IDs that do not fit; ``source``
            names the array in the message.
    """
    if not isinstance(array, np.ndarray):
        raise ResfastError(f"{source} holds a {type(array).__name__}; expected an array {_SHAPES}")
    shape = array.shape
    if array.dtype != np.uint8:
        raise ResfastError(
            f"{source} holds {array.dtype} {list(shape)}; expected {_SHAPES}, raw pixels of 0 to "
            "255: convert it with .astype(numpy.uint8) if it holds such pixels"
        )
    if len(shape) == 2 and shape[1] == 3072:
        array = array.reshape(-1, 3, 32, 32)
    if array.ndim == 4 and array.shape[3] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] != 3 or not array.shape[1] == array.shape[2] > 0:
        raise ResfastError(f"{source} holds uint8 {list(shape)}; expected {_SHAPES}")
    if not len(array):
        raise ResfastError(f"{source} holds no images (uint8 {list(shape)}); expected at least one")
    return _ids(ids, len(array), source), array


def _ids(ids: Any, count: int, source: str) -> Sequence[str]:
    if ids is None:
        return [str(row) for row in range(count)]
    values = ids.reshape(-1).tolist() if isinstance(ids, np.ndarray) else ids
    if isinstance(values, range) and len(values) == count:
        values = list(values)
    if not isinstance(values, list | tuple) or len(values) != count:
        found = f"{len(values):,} ids" if isinstance(values, list | tuple) else repr(type(values))
        raise ResfastError(f"{source} has {found} for {count:,} images; expected one id per image")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | str | bytes):
            raise ResfastError(
                f"{source} has the id {value!r}; expected whole numbers or text, one for each image"
            )
    return [
        value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
        for value in values
    ]


def _read_pickle(path: Path) -> tuple[Any, Any]:
    """The images and the IDs (or None) of a pickle, without running any code in it."""
    expected = (
        "expected a pickle of an array, or of a dict with the images under 'data' and, optionally, "
        "their IDs under 'ids', 'id', 'IDs' or 'filenames'"
    )
    try:
        with open(path, "rb") as file:
            content = safe_pickle.load(file)
    except safe_pickle.ForbiddenError as error:
        raise ResfastError(
            f"{path} was rejected: it asks for {error}, but only arrays of numbers are read from a "
            "pickle, since anything else could run code; save the images as .npy with numpy.save"
        ) from None
    except (OSError, safe_pickle.BrokenError) as error:
        raise ResfastError(f"{path} is not a readable pickle ({error}); {expected}") from None
    ids = None
    if isinstance(content, dict):
        named = {
            key.decode("latin1") if isinstance(key, bytes) else key: value
            for key, value in content.items()
        }
        if "data" not in named:
            found = ", ".join(map(repr, list(named)[:5])) or "nothing"
            raise ResfastError(f"{path} holds a dict of {found}; {expected}")
        content = named["data"]
        ids = next((named[name] for name in ID_NAMES if named.get(name) is not None), None)
    return safe_pickle.array(content), safe_pickle.array(ids)
