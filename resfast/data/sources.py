"""Opens the data set that ``--data`` names.

A new source is one module with a function from Request to Dataset or Stream, and one entry of
SOURCES.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from resfast.data.cifar import open_cifar10, open_cifar100
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
from resfast.data.shards import open_shards
from resfast.errors import ResfastError, nearest


def _open_auto(request: Request) -> Dataset:
    try:
        return open_cifar10(request)
    except DataUnavailableError as error:
        request.report(
            f"NOT CIFAR-10: --data auto wanted it, but {error.reason}; using the small digits "
            "data set of scikit-learn instead; choose with --data "
            f"{' | '.join(CHOICES[1:])}"
        )
        return open_digits(request)


@dataclass(frozen=True)
class Source:
    """A kind of data set.

    Attributes:
        open: opens it.
        classes: number of classes, where it is known before the data set is opened.
    """

    open: Callable[[Request], Dataset | Stream]
    classes: int | None = None


SOURCES: dict[str, Source] = {
    "auto": Source(_open_auto, classes=10),
    "cifar10": Source(open_cifar10, classes=10),
    "cifar100": Source(open_cifar100, classes=100),
    "digits": Source(open_digits, classes=10),
    "folder:": Source(open_folder),
    "shards:": Source(open_shards),
}
"""Sources by the start of ``--data``, which includes the colon where a path follows."""
CHOICES = tuple(f"{key}PATH" if key.endswith(":") else key for key in SOURCES)


def known_classes(data: str) -> int | None:
    """Number of classes of ``data``, or None where it is not known before ``data`` is opened."""
    kind, colon, _ = data.partition(":")
    source = SOURCES.get(kind + colon)
    return None if source is None else source.classes


def open_data(
    data: str = "auto",
    *,
    data_dir: Path,
    image_size: int = 32,
    skip_corrupt: bool = False,
    loader: Loader = "auto",
    device: torch.device | str = "cpu",
    report: Callable[[str], None] = print_to_stderr,
) -> Dataset | Stream:
    """Opens a data set; takes the arguments of :func:`load_dataset` and:

    Args:
        data: also ``shards:PATH``, a folder that ``python -m resfast.data --shards`` wrote.
        loader: ``resident`` decodes all of it into memory; ``dali`` leaves an image folder or
            shards encoded; ``auto`` is ``resident`` where the decoded set fits half of the free
            memory of the host and of ``device``.
        device: where batches will be made.

    Raises:
        ResfastError: see :func:`load_dataset`; or the loader cannot read this kind of data.
    """
    check_image_size(image_size)
    kind, colon, location = data.partition(":")
    source = SOURCES.get(kind + colon)
    if source is None:
        hint = (
            f"; did you mean 'folder:{data}'?" if os.path.exists(data) else nearest(data, CHOICES)
        )
        raise ResfastError(f"unknown data {data!r}, expected one of {', '.join(CHOICES)}{hint}")
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
        )
    )


def load_dataset(
    data: str = "auto",
    *,
    data_dir: Path,
    image_size: int = 32,
    skip_corrupt: bool = False,
    report: Callable[[str], None] = print_to_stderr,
) -> Dataset:
    """Load ``data``: ``cifar10``, ``cifar100``, ``digits``, ``folder:PATH`` or ``auto``.

    ``folder:PATH`` is a directory or a tar archive of ``train/<class>/*`` and ``test/<class>/*``;
    its decoded images are kept under ``data_dir/cache``. ``auto`` is CIFAR-10 where it is on disk
    or can be downloaded, otherwise digits, which is reported. ``image_size`` is the height and
    width in pixels of every image returned. ``report`` is called with one line for each step worth
    knowing.

    Raises ``ResfastError`` for a bad value, and for data that is missing, damaged or laid out
    differently.
    """
    opened = open_data(
        data,
        data_dir=data_dir,
        image_size=image_size,
        skip_corrupt=skip_corrupt,
        loader="resident",
        report=report,
    )
    assert isinstance(opened, Dataset)  # what loader="resident" makes every source return
    return opened
