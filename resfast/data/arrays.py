"""``--data arrays:PATH``: images and labels as arrays, in a ``.npz`` or a folder of ``.npy``."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.data.dataset import MAX_CLASSES, Dataset, Request, make_dataset
from resfast.data.resize import sized_rgb
from resfast.errors import ResfastError

_TRAIN_IMAGES = ("train_images", "x_train", "X_train")
_TRAIN_LABELS = ("train_labels", "y_train")
_TEST_IMAGES = ("test_images", "x_test", "X_test")
_TEST_LABELS = ("test_labels", "y_test")
_VAL_IMAGES = ("val_images", "x_val", "X_val")
_VAL_LABELS = ("val_labels", "y_val")
CLASSES = ("classes", "class_names", "label_names")
_EXPECTED = (
    "train_images, train_labels, test_images and test_labels (or x_train, y_train, x_test, y_test)"
)


def open_arrays(request: Request) -> Dataset:
    """Opens arrays of images, uint8 ``[N, H, W, 3]``, ``[N, 3, H, W]`` or, grey, ``[N, H, W]``.

    Labels are integers ``[N]`` or ``[N, 1]`` from 0. ``classes`` may have the names of the classes.

    Raises:
        ResfastError: the file cannot be read, an array is missing or has a wrong shape or dtype, or
            labels and images do not fit each other.
    """
    if not request.location:
        raise ResfastError(
            "--data arrays: has no path, expected arrays:PATH of a .npz file or a folder of .npy "
            "files: add the path after the colon"
        )
    path = Path(request.location).expanduser()
    tensors: dict[str, Tensor] = {}
    with _opened(path) as arrays:
        for name, others in _names(arrays).items():
            found = next((other for other in others if other in arrays), None)
            if found is None:
                held = ", ".join(sorted(arrays)[:6]) or "nothing"
                raise ResfastError(f"{path} has no {name}: it holds {held}; expected {_EXPECTED}")
            array, shown = _read(arrays, found, path), f"{found} in {path}"
            is_images = name.endswith("images")
            tensors[name] = _images(array, request, shown) if is_images else _labels(array, shown)
        named = next((other for other in CLASSES if other in arrays), None)
        names = None if named is None else _read(arrays, named, path)
    for split in ("train", "test"):
        counts = len(tensors[f"{split}_images"]), len(tensors[f"{split}_labels"])
        if counts[0] != counts[1] or not counts[0]:
            raise ResfastError(
                f"{path} has {counts[0]:,} {split} images and {counts[1]:,} {split} labels; "
                "expected as many, and at least one"
            )
    most = max(int(tensors[f"{split}_labels"].max()) for split in ("train", "test"))
    classes = tuple(map(str, range(most + 1))) if names is None else _class_names(names, path)
    if most >= len(classes):
        raise ResfastError(
            f"{path} has labels up to {most} and {len(classes)} names of classes; expected a name "
            "for each label from 0"
        )
    return make_dataset(request.data, tensors, classes)


def _names(arrays: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Possible names of the four arrays: ours, those of Keras and others'.

    Images and labels of validation are taken together: those of two splits would not fit.
    """
    has_test = any(name in arrays for name in (*_TEST_IMAGES, *_TEST_LABELS))
    return {
        "train_images": _TRAIN_IMAGES,
        "train_labels": _TRAIN_LABELS,
        "test_images": _TEST_IMAGES if has_test else _VAL_IMAGES,
        "test_labels": _TEST_LABELS if has_test else _VAL_LABELS,
    }


def _class_names(array: np.ndarray, path: Path) -> tuple[str, ...]:
    """The names of the classes, from text or bytes in UTF-8."""
    if array.dtype.kind not in "USiu":
        raise ResfastError(
            f"classes in {path} is {array.dtype} {list(array.shape)}; expected an array of names"
        )
    try:
        names = [
            name.decode() if isinstance(name, bytes) else str(name)
            for name in np.ravel(array).tolist()
        ]
    except UnicodeDecodeError as error:
        raise ResfastError(
            f"classes in {path} cannot be read ({error}); expected names in UTF-8"
        ) from error
    for name, count in Counter(names).items():
        if not name.strip() or count > 1:
            what = f"the name {name!r} {count} times" if name.strip() else "a class without a name"
            raise ResfastError(f"classes in {path} has {what}; expected a name for each class")
    return tuple(names)


class _Folder(Mapping[str, Any]):
    """Arrays by the names of ``.npy`` files."""

    def __init__(self, path: Path) -> None:
        self._files = {file.stem: file for file in path.glob("*.npy")}

    def __contains__(self, name: object) -> bool:
        return name in self._files  # Mapping would read the file

    def __getitem__(self, name: str) -> Any:
        return np.load(self._files[name], allow_pickle=False)

    def __iter__(self) -> Any:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _opened(path: Path) -> Any:
    if path.is_dir():
        return _Folder(path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
        if is_zip:
            return np.load(path, allow_pickle=False)
        reason = "it is no .npz file"
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        reason = str(getattr(error, "strerror", None) or error)
    raise ResfastError(
        f"{path} cannot be read ({reason}); expected a .npz file, as numpy.savez writes it, or a "
        "folder of .npy files"
    )


def _read(arrays: Mapping[str, Any], name: str, path: Path) -> np.ndarray:
    try:
        return np.asarray(arrays[name])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise ResfastError(
            f"{name} in {path} cannot be read ({error}): write it again with numpy.savez or "
            "numpy.save, as an array of numbers or, for classes, of text"
        ) from error


def _images(array: np.ndarray, request: Request, shown: str) -> Tensor:
    """uint8 ``[N, S, S, 3]``."""
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        raise ResfastError(
            f"{shown} is {array.dtype} {list(array.shape)}; expected uint8 [N, H, W, 3], "
            "[N, 3, H, W] or [N, H, W], pixels from 0 to 255"
        )
    if array.shape[1] != array.shape[2] or not array.shape[1]:
        raise ResfastError(
            f"{shown} has images of {array.shape[1]}x{array.shape[2]}; expected squares: crop or "
            "pad them first"
        )
    return sized_rgb(torch.from_numpy(np.ascontiguousarray(array)), request.image_size)


def _labels(array: np.ndarray, shown: str) -> Tensor:
    """int64 ``[N]``."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ResfastError(
            f"{shown} is {array.dtype} {list(array.shape)}; expected whole numbers [N], not one-hot"
        )
    labels = torch.from_numpy(array.astype(np.int64))
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < MAX_CLASSES:
        raise ResfastError(
            f"{shown} has labels from {int(labels.min())} to {int(labels.max())}; expected them to "
            "count from 0"
        )
    return labels
