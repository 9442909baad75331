"""Data sets too large to hold: lists of files or shards, decoded as they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from resfast.data import folder
from resfast.data.dataset import Dataset, check_image_size, load_dataset, print_to_stderr
from resfast.errors import ResfastError

Loader = Literal["auto", "resident", "dali"]
CHANNELS = 3


@dataclass(frozen=True)
class Files:
    """Encoded images by path.

    Attributes:
        paths: JPEG, PNG or WebP files.
        labels: int64 ``[N]``.
    """

    paths: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        """Images."""
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Files:
        """Some of them."""
        return Files(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])


@dataclass(frozen=True)
class Shards:
    """Encoded images in WebDataset archives: members ``KEY.jpg|png|webp`` and ``KEY.cls``.

    Attributes:
        paths: tar archives.
        count: images in all of them.
    """

    paths: tuple[str, ...]
    count: int

    def __len__(self) -> int:
        """Images."""
        return self.count


@dataclass(frozen=True)
class Stream:
    """A data set that stays encoded on disk.

    Attributes:
        name: ``folder:PATH`` or ``shards:PATH``.
        train: training images.
        test: test images.
        classes: class names, in the order of the labels.
        image_size: height and width that images are given, in pixels.
        digest: hex digest of names, sizes and classes.
    """

    name: str
    train: Files | Shards
    test: Files | Shards
    classes: tuple[str, ...]
    image_size: int
    digest: str


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
    listing = None
    kind, _, location = data.partition(":")
    path = Path(location).expanduser()
    if kind == "shards":
        if loader == "resident":
            raise ResfastError("--loader resident cannot read shards; use dali or auto")
        _refuse_skipping(skip_corrupt)
        return _open_shards(data, path, image_size)
    if kind == "folder" and loader != "resident":
        if path.is_dir():
            listing = folder.Directory(path).scan()
            needed = len(listing.images) * image_size**2 * CHANNELS
            if loader == "dali" or needed > free_memory(torch.device(device)) / 2:
                if loader == "auto":
                    report(
                        f"{data} takes {needed / 2**30:.1f} GiB decoded, more than half of the "
                        "free memory: streaming it through DALI (--loader resident to hold it)"
                    )
                _refuse_skipping(skip_corrupt)
                return _open_folder(data, path, listing, image_size)
        elif loader == "dali" and path.exists():
            raise ResfastError(
                f"--loader dali cannot read inside the archive {path}; unpack it, or turn it into "
                f"shards with python -m resfast.data --shards DIR --data {data}"
            )
    return load_dataset(
        data,
        data_dir=data_dir,
        image_size=image_size,
        skip_corrupt=skip_corrupt,
        report=report,
        listing=listing,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the host, or on ``device`` if it is a GPU with fewer."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = {
                name: rest.split()[0] for name, _, rest in (line.partition(":") for line in file)
            }
        host = int(values["MemAvailable"]) * 1024
    except (OSError, KeyError):  # not Linux
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if device.type == "cuda":
        return min(host, torch.cuda.mem_get_info(device)[0])
    return host


def _refuse_skipping(skip_corrupt: bool) -> None:
    if skip_corrupt:
        raise ResfastError(
            "--skip-corrupt needs --loader resident: DALI stops at a corrupt image and names it; "
            "remove or replace those images"
        )


def _open_folder(data: str, path: Path, listing: folder.Listing, image_size: int) -> Stream:
    classes = folder.check_listing(path, listing)
    number = {name: label for label, name in enumerate(classes)}
    digest = hashlib.blake2b(repr(classes).encode(), digest_size=16)
    parts = {}
    for split in folder.SPLITS:
        keys = sorted(key for key in listing.images if key[0] == split)
        paths = [os.fspath(listing.images[key]) for key in keys]
        for key, file in zip(keys, paths, strict=True):
            digest.update(f"{'/'.join(key)}\0{_size(file)}\0".encode("utf-8", "surrogateescape"))
        labels = torch.tensor([number[key[1]] for key in keys], dtype=torch.int64)
        parts[split] = Files(tuple(paths), labels)
    return Stream(data, parts["train"], parts["test"], classes, image_size, digest.hexdigest())


def _open_shards(data: str, path: Path, image_size: int) -> Stream:
    from resfast.data.shards import read_shards

    found = read_shards(path)
    digest = hashlib.blake2b(repr(found.classes).encode(), digest_size=16)
    for file in (*found.train.paths, *found.test.paths):
        digest.update(f"{os.path.basename(file)}\0{_size(file)}\0".encode())
    return Stream(data, found.train, found.test, found.classes, image_size, digest.hexdigest())


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError as error:
        raise ResfastError(
            f"{file} cannot be read: {error.strerror}; restore or remove it"
        ) from None
