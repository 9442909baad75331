"""Opens the data set that ``--data`` names.

To add a source, write a module with a function from Request to Dataset or Stream, and add an entry
to SOURCES.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from resfast.data.arrays import open_arrays
from resfast.data.cifar import open_cifar10, open_cifar100
from resfast.data.csv_labels import open_csv
from resfast.data.dataset import (
    Dataset,
    DataUnavailableError,
    Loader,
    Request,
    Stream,
    check_image_size,
    print_to_stderr,
)
from resfast.data.digits import open_digits
from resfast.data.image_folder import open_folder
from resfast.data.named_sets import opener
from resfast.data.noisy_labels import open_noisy
from resfast.data.parquet import open_parquet
from resfast.data.shards import open_shards
from resfast.data.test_sets import cifair_opener, open_cifar10_1, refuse_corrupted
from resfast.errors import ResfastError, nearest


def _open_auto(request: Request) -> Dataset:
    try:
        return open_cifar10(request)
    except DataUnavailableError as error:
        request.report(
            f"NOT CIFAR-10: --data auto looked for it, but {error.reason}; using scikit-learn's "
            "small digits data set instead; choose with --data "
            f"{' | '.join(CHOICES[1:])}"
        )
        return open_digits(request)


@dataclass(frozen=True)
class Source:
    """A kind of data set.

    Attributes:
        open: opens the data set.
        classes: number of classes, if it is known before the data set is opened.
        test_only: whether it has no training images.
    """

    open: Callable[[Request], Dataset | Stream]
    classes: int | None = None
    test_only: bool = False


SOURCES: dict[str, Source] = {
    "auto": Source(_open_auto, classes=10),
    "cifar10": Source(open_cifar10, classes=10),
    "cifar100": Source(open_cifar100, classes=100),
    "digits": Source(open_digits, classes=10),
    "svhn": Source(opener("svhn"), classes=10),
    "fashion-mnist": Source(opener("fashion-mnist"), classes=10),
    "stl10": Source(opener("stl10"), classes=10),
    "folder:": Source(open_folder),
    "arrays:": Source(open_arrays),
    "csv:": Source(open_csv),
    "parquet:": Source(open_parquet),
    "shards:": Source(open_shards),
    "cifair10:": Source(cifair_opener("cifair10"), classes=10),
    "cifair100:": Source(cifair_opener("cifair100"), classes=100),
    "cifar10-n:": Source(open_noisy, classes=10),
    "cifar100-n:": Source(open_noisy, classes=100),
    "cifar10.1:": Source(open_cifar10_1, classes=10, test_only=True),
    "cifar10-c:": Source(refuse_corrupted, classes=10, test_only=True),
    "cifar100-c:": Source(refuse_corrupted, classes=100, test_only=True),
}
"""Sources by the start of ``--data``, including the colon if a path follows."""
CHOICES = tuple(f"{key}PATH" if key.endswith(":") else key for key in SOURCES)


def known_classes(data: str) -> int | None:
    """Number of classes of ``data``, or None if it is unknown until ``data`` is opened."""
    kind, colon, _ = data.partition(":")
    source = SOURCES.get(kind + colon)
    return source.classes if source else None


def open_data(
    data: str = "auto",
    *,
    data_dir: Path,
    image_size: int = 32,
    skip_corrupt: bool = False,
    loader: Loader = "auto",
    device: torch.device | str = "cpu",
    report: Callable[[str], None] = print_to_stderr,
    classes: Path | Sequence[str] | None = None,
    test_only: bool = False,
) -> Dataset | Stream:
    """Opens a data set. Arguments not listed are those of :func:`load_dataset`.

    Args:
        data: also ``shards:PATH``, a folder of WebDataset shards.
        loader: ``resident`` decodes everything into memory; ``dali`` leaves an image folder or
            shards encoded; ``auto`` is ``resident`` if the decoded images fit in half of the free
            memory of the host and of ``device``.
        device: where batches will be produced.
        classes: file with the names of the classes, for shards without ``classes.json``; or the
            names themselves, which other data have no use for.
        test_only: whether data without training images are opened too.

    Raises:
        ResfastError: as for :func:`load_dataset`, or the loader cannot read this kind of data.
    """
    check_image_size(image_size)
    kind, colon, location = data.partition(":")
    source = SOURCES.get(kind + colon)
    if source is None:
        hint = (
            f"; did you mean 'folder:{data}'?" if os.path.exists(data) else nearest(data, CHOICES)
        )
        raise ResfastError(f"unknown data {data!r}, expected one of {', '.join(CHOICES)}{hint}")
    if source.test_only and not test_only:
        raise ResfastError(
            f"--data {data} has test images only: train on other data, and score the run on it "
            f"with resfast evaluate RUN --data {data}"
        )
    is_file = isinstance(classes, (str, Path))
    if is_file and kind != "shards":
        raise ResfastError(
            f"--classes {classes} names the classes of shards:PATH, and --data is {data}: "
            "leave it out"
        )
    return source.open(
        Request(
            data=data,
            location=location,
            data_dir=Path(data_dir).expanduser(),
            image_size=image_size,
            skip_corrupt=skip_corrupt,
            loader=loader,
            device=torch.device(device),
            report=report,
            classes=Path(classes).expanduser() if is_file else classes,
        )
    )


def load_dataset(
    data: str = "auto",
    *,
    data_dir: Path,
    image_size: int = 32,
    skip_corrupt: bool = False,
    report: Callable[[str], None] = print_to_stderr,
    test_only: bool = False,
) -> Dataset:
    """Loads a data set into memory.

    Args:
        data: ``cifar10``, ``cifar100``, ``svhn``, ``fashion-mnist``, ``stl10``, ``digits``,
            ``folder:PATH``, ``arrays:PATH``, ``csv:PATH``, ``parquet:PATH``, ``cifair10:PATH``,
            ``cifair100:PATH``, ``cifar10-n:PATH#SET``, ``cifar100-n:PATH`` or ``auto``; with
            ``test_only`` also ``cifar10.1:PATH``. ``arrays:PATH`` is a ``.npz`` file or a
            folder of ``.npy`` files (:func:`resfast.data.arrays.open_arrays`). ``folder:PATH`` is a
            directory or a tar archive of ``train/<class>/*`` and ``test/<class>/*``; its decoded
            images are cached under ``data_dir/cache``. ``auto`` is CIFAR-10 if it is on disk or can
            be downloaded, otherwise digits, which is reported.
        data_dir: where data sets are looked for, downloaded to and cached.
        image_size: height and width of the returned images, in pixels.
        skip_corrupt: skip images that cannot be decoded.
        report: called with a line of text for each notable step.
        test_only: whether data without training images are loaded too.

    Raises:
        ResfastError: a bad value, or data that is missing, damaged or laid out differently.
    """
    opened = open_data(
        data,
        data_dir=data_dir,
        image_size=image_size,
        skip_corrupt=skip_corrupt,
        loader="resident",
        report=report,
        test_only=test_only,
    )
    assert isinstance(opened, Dataset)  # what loader="resident" makes every source return
    return opened
