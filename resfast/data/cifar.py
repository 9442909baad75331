"""CIFAR-10 and CIFAR-100, downloaded and unpacked by torchvision if no version is on disk."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.data import cifar_files, download
from resfast.data.dataset import Dataset, DataUnavailableError, Request, make_dataset
from resfast.data.resize import sized_rgb


def open_cifar10(request: Request) -> Dataset:
    """CIFAR-10 as torchvision stores it in ``data_dir``, downloaded if it is missing."""
    return _open("cifar10", request)


def open_cifar100(request: Request) -> Dataset:
    """CIFAR-100; see :func:`open_cifar10`."""
    return _open("cifar100", request)


def _open(name: str, request: Request) -> Dataset:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    found = None
    if not (request.data_dir / kind.base_folder).exists():
        found = cifar_files.find(name, request.data_dir, request.report)
    tensors, classes = found or _of_torchvision(name, kind, request)
    for split in ("train", "test"):
        images = tensors[f"{split}_images"]
        tensors[f"{split}_images"] = sized_rgb(images, request.image_size)
    return make_dataset(name, tensors, classes)


def _of_torchvision(name: str, kind: Any, request: Request) -> cifar_files.Found:
    """The Python version, downloaded if it is missing."""
    _prepare(name, kind, request.data_dir, request.report)
    tensors: dict[str, Tensor] = {}
    classes: tuple[str, ...] = ()
    for split in ("train", "test"):
        try:
            loaded = kind(request.data_dir, train=split == "train", download=False)
        except (OSError, RuntimeError) as error:
            reason = f"it cannot be read ({error})"
            raise _unavailable(name, kind, request.data_dir, reason) from error
        tensors[f"{split}_images"] = torch.from_numpy(np.ascontiguousarray(loaded.data))
        tensors[f"{split}_labels"] = torch.tensor(loaded.targets, dtype=torch.int64)
        classes = tuple(loaded.classes)
    return tensors, classes


def _prepare(name: str, kind: Any, data_dir: Path, report: Callable[[str], None]) -> None:
    """Makes sure ``data_dir`` has an intact, unpacked CIFAR or raises ``DataUnavailableError``."""
    from torchvision.datasets.utils import check_integrity, download_url

    unpacked, archive = data_dir / kind.base_folder, data_dir / kind.filename
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    try:
        damaged = [file for file, md5 in files if not check_integrity(unpacked / file, md5)]
        if not damaged:
            return
        if archive.exists():
            if not check_integrity(archive, kind.tgz_md5):
                raise _unavailable(
                    name, kind, data_dir, f"{archive} is truncated or damaged (MD5 differs)"
                )
        elif unpacked.exists():
            raise _unavailable(
                name, kind, data_dir, f"{unpacked / damaged[0]} is missing or damaged"
            )
        else:
            if problem := download.unreachable(kind.url):
                raise _unavailable(
                    name, kind, data_dir, f"it does not exist and {kind.url} {problem}"
                )
            report(f"downloading {kind.url} to {data_dir}")
            data_dir.mkdir(parents=True, exist_ok=True)
            # Into a separate folder: a partial download must not be taken for the archive.
            with (
                tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as temporary,
                download.stall_limit(),
                contextlib.redirect_stdout(sys.stderr),
            ):
                download_url(kind.url, temporary, kind.filename, kind.tgz_md5)
                shutil.move(Path(temporary) / kind.filename, archive)
        report(f"unpacking {archive}")
        with contextlib.redirect_stdout(sys.stderr):
            kind(data_dir, train=False, download=True)  # finds the archive, so downloads nothing
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:  # URLError is an OSError
        raise _unavailable(name, kind, data_dir, f"preparing it failed ({error})") from error


def _unavailable(name: str, kind: Any, data_dir: Path, reason: str) -> DataUnavailableError:
    return DataUnavailableError(
        f"{name} was looked for in {data_dir} but {reason}",
        f"put an intact {kind.filename} into {data_dir} (replacing a damaged one), or use "
        "--data folder:PATH with your own images, or --data digits, which needs no download",
    )
