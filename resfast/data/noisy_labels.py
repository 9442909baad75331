"""CIFAR-10-N and CIFAR-100-N: labels that people gave to the training images of CIFAR.

Source: Wei et al., "Learning with Noisy Labels Revisited", arXiv:2110.12088, and
https://github.com/UCSC-REAL/cifar-10-100n: ``CIFAR-10_human.pt``, a dict of labels ``[50000]`` in
the order of CIFAR's own files, or the same dict as a ``.npy``.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from resfast.data import safe_pickle
from resfast.data.cifar import open_cifar10, open_cifar100
from resfast.data.dataset import TENSORS, Dataset, Request, make_dataset
from resfast.data.published import published, read_header
from resfast.data.test_sets import by_name, located
from resfast.errors import ResfastError

CLEAN = "clean_label"


@dataclass(frozen=True)
class _Kind:
    """Names of a data set with noisy labels.

    Attributes:
        file: its file, without the suffix.
        sets: names of the labels in the file, by the name that a user gives.
    """

    file: str
    sets: Mapping[str, tuple[str, ...]]


_TEN = {
    "aggre": ("aggre_label",),
    "worse": ("worse_label",),
    "random1": ("random_label1",),
    "random2": ("random_label2",),
    "random3": ("random_label3",),
}
KINDS = {
    "cifar10-n": _Kind("CIFAR-10_human", _TEN),
    "cifar100-n": _Kind("CIFAR-100_human", {"noisy": ("noisy_label", "noise_label")}),
}


@dataclass(frozen=True)
class NoisyLabels:
    """A data set of CIFAR and the noisy labels of its training images.

    Attributes:
        dataset: images and the labels of CIFAR.
        sets: int64 ``[N]``, the noisy labels by name.
    """

    dataset: Dataset
    sets: Mapping[str, Tensor]

    def noise_rate(self, name: str) -> float:
        """Fraction of the training images whose noisy label differs from CIFAR's."""
        return float((self.sets[name] != self.dataset.train_labels).double().mean())


def open_noisy(request: Request) -> Dataset:
    """CIFAR from ``data_dir`` with one set of noisy training labels; the test labels are CIFAR's.

    The set is named after ``#``: ``cifar10-n:PATH#worse``. The noise rate is reported.

    Raises:
        ResfastError: no set is named, CIFAR is not on disk, or the labels are those of others.
    """
    kind = KINDS[request.data.partition(":")[0]]
    _, name = located(request, tuple(kind.sets))
    found = read_noisy(request)
    rates = ", ".join(f"{name} ({found.noise_rate(name):.1%} noise)" for name in found.sets)
    if name is None:
        if len(found.sets) > 1:
            raise ResfastError(
                f"--data {request.data} has several sets of labels, {rates}: name one after a #, "
                f"such as {request.data}#{next(iter(found.sets))}"
            )
        [name] = found.sets
    request.report(
        f"{request.data}: {found.noise_rate(name):.2%} of {len(found.sets[name]):,} training "
        "labels differ from those of CIFAR"
    )
    tensors = {tensor: getattr(found.dataset, tensor) for tensor in TENSORS}
    tensors["train_labels"] = found.sets[name]
    return make_dataset(request.data, tensors, found.dataset.classes)


def read_noisy(request: Request) -> NoisyLabels:
    """CIFAR from ``data_dir`` and the noisy labels of the requested set, or of all sets.

    Raises:
        ResfastError: as for :func:`open_noisy`.
    """
    name = request.data.partition(":")[0]
    kind = KINDS[name]
    path, chosen = located(request, tuple(kind.sets))
    with published(path, f"{kind.file}.pt or {kind.file}.npy") as found:
        wanted = (f"{kind.file}.pt", f"{kind.file}.npy", path.name)
        file = next((file for file in wanted if file in found.files), wanted[0])
        with found.open(file) as stream:
            content = _read_npy(stream, path) if file.endswith(".npy") else _read_pt(stream, path)
    is_ten = name == "cifar10-n"
    opened = (open_cifar10 if is_ten else open_cifar100)(
        replace(request, data="cifar10" if is_ten else "cifar100", location="")
    )
    count, classes = len(opened.train_labels), len(opened.classes)
    used = {CLEAN, *(stored for names in kind.sets.values() for stored in names)}
    labels = {
        key: _labels(value, key, path, count, classes)
        for key, value in content.items()
        if key in used
    }
    if CLEAN not in labels:
        raise ResfastError(
            f"{path} has no {CLEAN}: it holds {', '.join(content) or 'nothing'}; expected "
            f"{kind.file} as published"
        )
    differ = int((labels[CLEAN] != opened.train_labels).sum())
    if differ:
        raise ResfastError(
            f"{differ:,} of the {count:,} clean labels in {path} differ from those of the training "
            "images: the file must be in the order of CIFAR's own files; use the .pt, and not the "
            "_ordered.npy for TensorFlow"
        )
    sets = {}
    for given, names in kind.sets.items():
        stored = next((stored for stored in names if stored in labels), None)
        if stored is None:
            if chosen in (None, given):
                raise ResfastError(
                    f"{path} has no {names[0]}: it holds {', '.join(labels)}; download it again"
                )
        elif chosen in (None, given):
            sets[given] = labels[stored]
    return NoisyLabels(opened, sets)


def _labels(value: Any, key: str, path: Path, count: int, classes: int) -> Tensor:
    if isinstance(value, Tensor):
        value = value.numpy()
    labels = np.asarray(value)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ResfastError(
            f"{key} in {path} is {labels.dtype} {list(labels.shape)}; expected {count:,} whole "
            "numbers, a label for each training image"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ResfastError(
            f"{key} in {path} has labels from {labels.min()} to {labels.max()}; expected 0 to "
            f"{classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _read_pt(stream: IO[bytes], path: Path) -> dict[str, Any]:
    """A dict of labels that torch.save wrote; nothing but arrays and tensors is loaded."""
    try:
        with torch.serialization.safe_globals(_array_globals()):
            return by_name(torch.load(stream, map_location="cpu", weights_only=True))
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ResfastError(
            f"{path} cannot be read ({reason}); expected a dict of arrays of labels, and nothing "
            "that could run code: download it again"
        ) from None


def _array_globals() -> list[Any]:
    """What a pickled array of whole numbers names, by the names in NumPy 1 and 2."""
    reconstruct = np.empty(0).__reduce__()[0]
    numbers = [np.dtype(kind) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
    return [
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *{type(number) for number in numbers},
    ]


def _read_npy(stream: IO[bytes], path: Path) -> dict[str, Any]:
    """A dict of labels that numpy.save wrote as an array of one object; no code in it runs."""
    try:
        shape, _, dtype = read_header(stream)
        if shape != () or dtype != np.dtype(object):
            raise ValueError(f"it is {dtype} {list(shape)}")
        content = safe_pickle.array(safe_pickle.load(stream, objects=True))
    except (safe_pickle.ForbiddenError, safe_pickle.BrokenError, ValueError, EOFError) as error:
        raise ResfastError(
            f"{path} cannot be read ({error}); expected a dict of arrays of labels, as published: "
            "download it again, or use the .pt"
        ) from None
    named = by_name(content[0]) if isinstance(content, list) and len(content) == 1 else {}
    return {name: safe_pickle.array(value) for name, value in named.items()}
