"""Opens the data set that ``--data`` names.

A new source is one module with a function from Request to Dataset or Stream, and one line in
SOURCES.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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


SOURCES: dict[str, Callable[[Request], Dataset | Stream]] = {
    "auto": _open_auto,
    "cifar10": open_cifar10,
    "cifar100": open_cifar100,
    "digits": open_digits,
    "folder:": open_folder,
    "shards:": open_shards,
}
"""What ``--data`` begins with (with the colon of those that a path follows) -> what opens it."""
CHOICES = tuple(f"{key}PATH" if key.endswith(":") else key for key in SOURCES)


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
    """Opens a data set as ``loader`` wants it; arguments as of :func:`load_dataset` and:

    Args:
        data: also ``shards:PATH``, a folder that ``python -m resfast.data --shards`` wrote.
        loader: ``resident`` decodes all of it into memory; ``dali`` leaves an image folder or
            shards encoded; ``auto`` is ``resident`` where the decoded set fits half of the free
            memory of the host and of ``device``.
        device: where batches will be made.

    Raises:
        ResfastError: as :func:`load_dataset`, or a kind of data that the loader cannot read.
    """
    check_image_size(image_size)
    kind, colon, location = data.partition(":")
    opener = SOURCES.get(kind + colon)
    if opener is None:
        hint = (
            f"; did you mean 'folder:{data}'?" if os.path.exists(data) else nearest(data, CHOICES)
        )
        raise ResfastError(f"unknown data {data!r}, expected one of {', '.join(CHOICES)}{hint}")
    return opener(
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
    or can be fetched, and otherwise digits, which is said. ``image_size`` is the height and width
    in pixels of every image returned. ``report`` is given one line for each step worth knowing.

    Raises ``ResfastError`` for a bad value, and for data that is absent, damaged or of another
    layout.
    """
    opened = open_data(
        data,
        data_dir=data_dir,
        image_size=image_size,
        skip_corrupt=skip_corrupt,
        loader="resident",
        report=report,
    )
    assert isinstance(opened, Dataset)  # as asked of every source by loader="resident"
    return opened
