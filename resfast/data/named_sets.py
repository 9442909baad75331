"""SVHN, Fashion-MNIST and STL-10, downloaded by torchvision if they are not on disk.

Sources: Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning"
(2011); Xiao et al., "Fashion-MNIST", arXiv:1708.07747; Coates et al., "An Analysis of Single-Layer
Networks in Unsupervised Feature Learning" (2011).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.data import download
from resfast.data.dataset import Dataset, DataUnavailableError, Request, make_dataset
from resfast.data.resize import sized_rgb


@dataclass(frozen=True)
class _Kind:
    """How torchvision reads a data set.

    Attributes:
        cls: name of its class.
        files: what it downloads, in messages.
        url: address of its first download.
        split: its argument for a split, by the name of the split.
        read: images ``[N, H, W]`` or ``[N, H, W, 3]``, labels ``[N]`` and class names of a split.
    """

    cls: str
    files: str
    url: Callable[[Any], str]
    split: Callable[[str], dict[str, Any]]
    read: Callable[[Any], tuple[Any, Any, Any]]


_NAMES = {
    "svhn": _Kind(
        "SVHN",
        "train_32x32.mat and test_32x32.mat",
        lambda cls: cls.split_list["train"][0],
        lambda split: {"split": split},
        lambda loaded: (loaded.data.transpose(0, 2, 3, 1), loaded.labels, map(str, range(10))),
    ),
    "fashion-mnist": _Kind(
        "FashionMNIST",
        "FashionMNIST/raw/*-ubyte.gz",
        lambda cls: cls.mirrors[0] + cls.resources[0][0],
        lambda split: {"train": split == "train"},
        lambda loaded: (loaded.data.numpy(), loaded.targets.numpy(), loaded.classes),
    ),
    "stl10": _Kind(
        "STL10",
        "stl10_binary/*.bin",
        lambda cls: cls.url,
        lambda split: {"split": split},
        lambda loaded: (loaded.data.transpose(0, 2, 3, 1), loaded.labels, loaded.classes),
    ),
}


def opener(name: str) -> Callable[[Request], Dataset]:
    """The function that opens a data set, ``svhn``, ``fashion-mnist`` or ``stl10``."""
    return lambda request: _open(name, request)


def _open(name: str, request: Request) -> Dataset:
    """The training and test images; grey ones as RGB, resized to the requested size.

    Raises:
        DataUnavailableError: the files are missing or damaged, and cannot be downloaded.
    """
    kind = _NAMES[name]
    tensors: dict[str, Tensor] = {}
    classes: tuple[str, ...] = ()
    for split in ("train", "test"):
        images, labels, names = kind.read(_split(name, kind, split, request))
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        if pixels.dim() == 3:
            pixels = pixels[..., None]
        tensors[f"{split}_images"] = sized_rgb(pixels, request.image_size)
        tensors[f"{split}_labels"] = torch.from_numpy(np.asarray(labels).astype(np.int64))
        classes = tuple(names)
    return make_dataset(name, tensors, classes)


def _split(name: str, kind: _Kind, split: str, request: Request) -> Any:
    """torchvision's data set of a split, downloaded first if it is missing."""
    from torchvision import datasets

    cls, where = getattr(datasets, kind.cls), request.data_dir
    options = kind.split(split)
    try:
        return cls(where, download=False, **options)
    except (OSError, RuntimeError, ValueError):  # missing or damaged: torchvision says no more
        pass
    url = kind.url(cls)
    if problem := download.unreachable(url):
        raise _unavailable(name, kind, request, f"they are missing or damaged, and {url} {problem}")
    request.report(f"downloading {name} ({split}) to {where}")
    try:
        where.mkdir(parents=True, exist_ok=True)
        with download.stall_limit(), contextlib.redirect_stdout(sys.stderr):
            return cls(where, download=True, **options)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise _unavailable(name, kind, request, f"downloading failed ({error})") from error


def _unavailable(name: str, kind: _Kind, request: Request, reason: str) -> DataUnavailableError:
    return DataUnavailableError(
        f"{name} was looked for as {kind.files} in {request.data_dir}, but {reason}",
        f"put intact files into {request.data_dir}, or use --data folder:PATH with your own images",
    )
