"""CIFAR's binary and MATLAB versions, unpacked in the data folder.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009), and the formats
on its page: a record of the binary version is one label (CIFAR-100: a coarse and a fine one) and
3,072 bytes, channel by channel.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.errors import ResfastError

_VALUES = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    """A folder of one version of a data set.

    Attributes:
        folder: its name.
        train: files of the training images.
        test: files of the test images.
        names: file with the names of the classes.
        labels: bytes before an image, or the name of the labels in a MATLAB file.
        classes: name of the names in a MATLAB file.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    labels: int | str
    classes: str = ""


_TEN = tuple(f"data_batch_{number}" for number in range(1, 6))
VERSIONS = {
    "cifar10": (
        _Version(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in _TEN),
            ("test_batch.bin",),
            "batches.meta.txt",
            1,
        ),
        _Version(
            "cifar-10-batches-mat",
            tuple(f"{name}.mat" for name in _TEN),
            ("test_batch.mat",),
            "batches.meta.mat",
            "labels",
            "label_names",
        ),
    ),
    "cifar100": (
        _Version("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 2),
        _Version(
            "cifar-100-matlab",
            ("train.mat",),
            ("test.mat",),
            "meta.mat",
            "fine_labels",
            "fine_label_names",
        ),
    ),
}

Found = tuple[dict[str, Tensor], tuple[str, ...]]
"""Images uint8 ``[N, 32, 32, 3]`` and labels int64 ``[N]`` by name, and names of the classes."""


def find(name: str, data_dir: Path, report: Callable[[str], None]) -> Found | None:
    """The tensors of ``cifar10`` or ``cifar100`` in another version than Python's, if there is one.

    Raises:
        ResfastError: a file of the version is missing or damaged.
    """
    for version in VERSIONS[name]:
        folder = data_dir / version.folder
        if folder.is_dir():
            report(f"reading {folder}")
            return _read(folder, version)
    return None


def _read(folder: Path, version: _Version) -> Found:
    if isinstance(version.labels, int):
        lines = _checked(folder / version.names, lambda path: path.read_text().splitlines())
        classes = tuple(line.strip() for line in lines if line.strip())
    else:
        names = _checked(folder / version.names, lambda path: _matlab(path, [version.classes]))
        classes = tuple(str(np.ravel(name)[0]) for name in np.ravel(names[0]))
    tensors = {}
    for split, files in (("train", version.train), ("test", version.test)):
        images, labels = _batches([folder / file for file in files], version)
        if labels.max() >= len(classes):
            raise _damaged(folder / files[0], f"a label {labels.max()} of {len(classes)} classes")
        pixels = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        tensors[f"{split}_images"] = torch.from_numpy(np.ascontiguousarray(pixels))
        tensors[f"{split}_labels"] = torch.from_numpy(labels.astype(np.int64))
    return tensors, classes


def _batches(paths: Sequence[Path], version: _Version) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[N, 3072]`` and labels ``[N]`` of some files."""
    images, labels = [], []
    for path in paths:
        if isinstance(version.labels, int):
            head = version.labels
            values = _checked(path, lambda path: np.fromfile(path, np.uint8))
            if not len(values) or len(values) % (head + _VALUES):
                raise _damaged(path, f"{len(values):,} bytes are no whole images")
            records = values.reshape(-1, head + _VALUES)
            images.append(records[:, head:])
            labels.append(records[:, head - 1])
        else:
            name = version.labels
            found = _checked(path, lambda path, name=name: _matlab(path, ["data", name]))
            data, targets = found[0], np.ravel(found[1])
            if data.dtype != np.uint8 or data.shape != (len(targets), _VALUES) or not len(targets):
                raise _damaged(path, f"data are {data.dtype} {list(data.shape)}")
            images.append(data)
            labels.append(targets)
    return np.concatenate(images), np.concatenate(labels)


def _matlab(path: Path, names: Sequence[str]) -> list[Any]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        with open(path, "rb") as file:  # given a name, it tries others and says less
            content = loadmat(file)
    except (MatReadError, zlib.error) as error:
        raise ValueError(str(error)) from error
    return [content[name] for name in names]


def _checked(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except FileNotFoundError:
        raise _damaged(path, "it does not exist") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> ResfastError:
    return ResfastError(
        f"{path} cannot be read ({reason}): unpack the archive of {path.parent.name} again, or "
        "remove the folder"
    )
