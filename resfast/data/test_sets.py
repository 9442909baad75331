"""Other test sets for networks trained on CIFAR: CIFAR-10.1, ciFAIR, CIFAR-10-C and CIFAR-100-C.

Sources of the formats:

- CIFAR-10.1: Recht et al., arXiv:1806.00451, and https://github.com/modestyachts/CIFAR-10.1;
- ciFAIR: Barz and Denzler, arXiv:1902.00423, and https://cvjena.github.io/cifair/;
- CIFAR-10-C: Hendrycks and Dietterich, arXiv:1903.12261, and
  https://zenodo.org/records/2535967.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.data import safe_pickle
from resfast.data.cifar_names import CLASSES
from resfast.data.dataset import Dataset, Request, make_dataset
from resfast.data.published import Published, published
from resfast.data.resize import sized_rgb
from resfast.errors import ResfastError, nearest

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 32
_PIXELS = (_SIDE, _SIDE, 3)


def located(request: Request, parts: Sequence[str] = ()) -> tuple[Path, str | None]:
    """The path of ``--data NAME:PATH#PART``, and the part or None.

    Args:
        request: what was asked for.
        parts: parts that may be asked for.

    Raises:
        ResfastError: no path, or an unknown part.
    """
    name, _, location = request.data.partition(":")
    if not location:
        raise ResfastError(
            f"--data {request.data} has no path, expected {name}:PATH of the published files: add "
            "the path after the colon"
        )
    before, mark, part = location.rpartition("#")
    if not (mark and parts) or os.path.exists(os.path.expanduser(location)):
        return Path(location).expanduser(), None
    if part not in parts:
        raise ResfastError(
            f"--data {request.data} asks for {part!r}, expected one of {', '.join(parts)} after "
            f"the #{nearest(part, parts)}"
        )
    return Path(before).expanduser(), part


def open_cifar10_1(request: Request) -> Dataset:
    """The test images of CIFAR-10.1, version 6 if there are both; no training images.

    ``#v4`` and ``#v6`` choose a version: ``cifar10.1_v6_data.npy``, uint8 ``[N, 32, 32, 3]``, and
    ``cifar10.1_v6_labels.npy``, whole numbers ``[N]``.

    Raises:
        ResfastError: a file is missing or damaged, or they do not fit each other.
    """
    path, version = located(request, ("v4", "v6"))
    if path.name.endswith(".npy"):
        version = next((v for v in ("v4", "v6") if v in path.name), version)
        path = path.parent
    with published(path, "cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy, or those of v4") as it:
        if version is None:
            has_v6 = "cifar10.1_v6_data.npy" in it.files
            version = "v4" if not has_v6 and "cifar10.1_v4_data.npy" in it.files else "v6"
        images = it.array(f"cifar10.1_{version}_data.npy", _PIXELS, "u")
        labels = it.array(f"cifar10.1_{version}_labels.npy", (), "iu")
    request.report(f"CIFAR-10.1 {version}: {len(images):,} test images")
    if len(labels) != len(images):
        raise ResfastError(
            f"{path} has {len(images):,} images and {len(labels):,} labels of CIFAR-10.1 "
            f"{version}; expected as many: download both files again"
        )
    return _test_only(request, images, _labels(labels, "cifar10", str(path)), CLASSES["cifar10"])


def _test_only(
    request: Request, images: np.ndarray, labels: Tensor, classes: tuple[str, ...]
) -> Dataset:
    size = request.image_size
    return make_dataset(
        request.data,
        {
            "train_images": torch.empty(0, size, size, 3, dtype=torch.uint8),
            "train_labels": torch.empty(0, dtype=torch.int64),
            "test_images": sized_rgb(torch.from_numpy(images), size),
            "test_labels": labels,
        },
        classes,
    )


def _labels(labels: np.ndarray, name: str, shown: str) -> Tensor:
    """int64 ``[N]``. Raises ``ResfastError`` for labels out of range."""
    most = len(CLASSES[name]) - 1
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= most:
        raise ResfastError(
            f"the labels in {shown} go from {labels.min()} to {labels.max()}; expected 0 to {most}"
        )
    return torch.from_numpy(labels.astype(np.int64))


# -- ciFAIR ----------------------------------------------------------------------------------------

_TEN = tuple(f"data_batch_{number}" for number in range(1, 6))
_BATCHES = {
    "cifair10": ("cifar10", _TEN, "test_batch", "labels"),
    "cifair100": ("cifar100", ("train",), "test", "fine_labels"),
}


def cifair_opener(name: str) -> Callable[[Request], Dataset]:
    """The function that opens ``cifair10`` or ``cifair100``: pickles like those of CIFAR.

    The training images are those of CIFAR; of the test images, near duplicates of these are
    replaced.
    """
    return lambda request: _open_cifair(name, request)


def _open_cifair(name: str, request: Request) -> Dataset:
    like, train, test, labels = _BATCHES[name]
    path, _ = located(request)
    tensors: dict[str, Tensor] = {}
    with published(path, f"the folder or zip of {name.replace('cifair', 'ciFAIR-')}") as found:
        for split, files in (("train", train), ("test", (test,))):
            batches = [_batch(found, file, labels) for file in files]
            pixels = np.concatenate([images for images, _ in batches]).reshape(-1, 3, 32, 32)
            images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)))
            tensors[f"{split}_images"] = sized_rgb(images, request.image_size)
            numbers = np.concatenate([numbers for _, numbers in batches])
            tensors[f"{split}_labels"] = _labels(numbers, like, f"{path}/{files[0]}")
    return make_dataset(request.data, tensors, CLASSES[like])


def _batch(found: Published, file: str, labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[N, 3072]`` and labels ``[N]`` of a pickle."""
    with found.open(file) as stream:
        try:
            content = safe_pickle.load(stream)
        except (safe_pickle.ForbiddenError, safe_pickle.BrokenError) as error:
            raise ResfastError(
                f"{found.shown(file)} is not a pickle in CIFAR's format ({error}): download it "
                "again"
            ) from None
    named = by_name(content)
    images = safe_pickle.array(named.get("data"))
    numbers = np.asarray(safe_pickle.array(named.get(labels)))
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 2
        or images.shape[1] != 3 * _SIDE * _SIDE
        or numbers.dtype.kind not in "iu"
        or numbers.shape != (len(images),)
    ):
        raise ResfastError(
            f"{found.shown(file)} holds {', '.join(map(repr, list(named)[:5])) or 'nothing'}; "
            f"expected 'data', uint8 [N, 3072], and {labels!r}, N whole numbers"
        )
    return images, numbers


def by_name(content: Any) -> dict[str, Any]:
    """A dict of a pickle with keys as text; an empty one for anything else."""
    if not isinstance(content, dict):
        return {}
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value
        for key, value in content.items()
    }


# -- CIFAR-10-C and CIFAR-100-C --------------------------------------------------------------------


@dataclass(frozen=True)
class Corrupted:
    """Test images of one corruption at one severity.

    Attributes:
        kind: name of the corruption, ``fog`` for example.
        severity: from 1.
        images: uint8 ``[N, H, W, 3]``.
        labels: int64 ``[N]``.
    """

    kind: str
    severity: int
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class CorruptedSets:
    """Corrupted test sets, made or read one after another.

    Attributes:
        name: the value of ``--data``.
        classes: class names, in the order of the labels.
        kinds: names of the corruptions.
        splits: makes or reads the sets of all kinds and severities, one at a time.
    """

    name: str
    classes: tuple[str, ...]
    kinds: tuple[str, ...]
    splits: Callable[[], Iterator[Corrupted]]


def open_cifar_c(request: Request, kinds: Sequence[str] = ()) -> CorruptedSets:
    """Opens CIFAR-10-C or CIFAR-100-C, a folder or tar of ``KIND.npy`` and ``labels.npy``.

    A kind is uint8 ``[50000, 32, 32, 3]``, the test images at the severities 1 to 5 in turn. One
    severity is in memory at a time.

    Args:
        request: the data is ``cifar10-c:PATH`` or ``cifar100-c:PATH``.
        kinds: the corruptions to read (empty: all that are there).

    Raises:
        ResfastError: a file is missing or damaged, or files do not fit each other. What is wrong
            with the images of a kind is raised when they are read.
    """
    like = request.data.partition("-")[0]
    path, _ = located(request)
    expected = "a folder or tar of KIND.npy and labels.npy"
    with published(path, expected) as found:
        names = tuple(
            name.removesuffix(".npy")
            for name in found.files
            if name.endswith(".npy") and name != "labels.npy"
        )
        if not names:
            raise ResfastError(f"{path} has no .npy file of a corruption; expected {expected}")
        for kind in kinds:
            if kind not in names:
                raise ResfastError(
                    f"{path} has no corruption {kind!r}; it has {', '.join(sorted(names))}"
                    f"{nearest(kind, names)}"
                )
        labels = _labels(found.array("labels.npy", (), "iu"), like, f"{path}/labels.npy")
    chosen = tuple(name for name in names if not kinds or name in kinds)
    return CorruptedSets(
        request.data,
        CLASSES[like],
        chosen,
        lambda: _read_corrupted(path, expected, chosen, labels, request.image_size),
    )


def _read_corrupted(
    path: Path, expected: str, kinds: Sequence[str], labels: Tensor, size: int
) -> Iterator[Corrupted]:
    with ExitStack() as stack:
        found = stack.enter_context(published(path, expected))
        for kind in kinds:
            file = f"{kind}.npy"
            count = found.count(file, _PIXELS, "u")
            each, rest = divmod(count, len(SEVERITIES))
            if rest or not each or len(labels) not in (each, count):
                raise ResfastError(
                    f"{found.shown(file)} has {count:,} images and labels.npy {len(labels):,} "
                    f"labels; expected as many, the test images at {len(SEVERITIES)} severities"
                )
            parts = found.rows(file, _PIXELS, "u", each)
            for severity, part in zip(SEVERITIES, parts, strict=True):
                start = 0 if len(labels) == each else (severity - 1) * each
                images = sized_rgb(torch.from_numpy(part), size)
                yield Corrupted(kind, severity, images, labels[start : start + each])


def refuse_corrupted(request: Request) -> Dataset:
    """Raises ``ResfastError``: these are many test sets, for ``resfast evaluate`` alone."""
    raise ResfastError(
        f"--data {request.data} is a test set for each corruption and severity: score it with "
        "resfast evaluate RUN, and choose one data set here"
    )
