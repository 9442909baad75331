"""WebDataset shards: tar archives of ``KEY.jpg``, ``KEY.png`` or ``KEY.webp`` with ``KEY.cls``.

``KEY.cls`` is the index of the class as text. Shards are read sequentially, which is far faster on
disks and network file systems than opening single files. Each shard has an index ``NAME.idx`` (the
format of DALI's ``wds2idx``) next to it, so samples can be counted without reading the archive.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from resfast import atomic
from resfast.data.dataset import Request, Shards, Stream, print_to_stderr, refuse_skipping
from resfast.data.folder import (
    IMAGE_SUFFIXES,
    SPLITS,
    Directory,
    Key,
    check_listing,
    open_source,
    read_file,
    size_of,
)
from resfast.errors import ResfastError

IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
LISTING = "classes.json"
_MAX_LABEL_BYTES = 12
_SHUFFLE_SEED = 0


def open_shards(request: Request) -> Stream:
    """Opens ``--data shards:PATH``, a folder written by :func:`write_shards`."""
    if request.loader == "resident":
        raise ResfastError(
            f"--loader resident cannot read shards ({request.data}): use dali or auto, or --data "
            "folder:PATH with the images"
        )
    refuse_skipping(request)
    found = read_shards(Path(request.location).expanduser())
    digest = hashlib.blake2b(repr(found.classes).encode(), digest_size=16)
    for file in (*found.train.paths, *found.test.paths):
        digest.update(f"{os.path.basename(file)}\0{size_of(file)}\0".encode())
    return Stream(
        request.data,
        found.train,
        found.test,
        found.classes,
        request.image_size,
        digest.hexdigest(),
    )


def write_shards(
    path: Path,
    destination: Path,
    *,
    images_per_shard: int = 10_000,
    report: Callable[[str], None] = print_to_stderr,
) -> list[Path]:
    """Packs an image folder into shards ``{train,test}-NNNNN.tar``.

    Files are stored unchanged. Training images are shuffled, always in the same order, because a
    reader of shards only shuffles nearby samples; test images are sorted by class, then by path.
    ``classes.json`` is written last and marks the shards as complete.

    Args:
        path: ``train/<class>/*`` and ``test/<class>/*``, in a directory or a tar archive. The
            images of an archive are first copied to one temporary file in ``destination``.
        destination: folder for the shards, created if it does not exist.
        images_per_shard: images in every shard except the last of its split, at least 1.
        report: called with a line of text for each notable step.

    Returns:
        Paths of the shards.

    Raises:
        ResfastError: ``path`` is not such a tree, ``destination`` already has shards or cannot be
            written, or ``images_per_shard`` is out of range.
    """
    if images_per_shard < 1:
        raise ResfastError(
            f"--images-per-shard {images_per_shard} is out of range: expected at least 1"
        )
    if (destination / LISTING).exists():
        raise ResfastError(
            f"{destination} already has shards ({LISTING}): choose another folder, or remove them"
        )
    source = open_source(path)
    listing = source.scan()
    classes = check_listing(path, listing)
    label_of = {name: label for label, name in enumerate(classes)}
    report(f"packing {len(listing.images):,} images from {path} into {destination}")
    shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
    counts = {}
    try:
        destination.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            if isinstance(source, Directory):
                read: Callable[[Key], bytes] = lambda key: read_file(listing.images[key])  # noqa: E731
            else:
                spool = stack.enter_context(tempfile.TemporaryFile(dir=destination))
                read = _spooled(source.blobs(listing), spool)
            for split in SPLITS:
                keys = sorted(key for key in listing.images if key[0] == split)
                counts[split] = len(keys)
                rows = _shuffled(len(keys)) if split == "train" else range(len(keys))
                for first in range(0, len(keys), images_per_shard):
                    shard = destination / f"{split}-{first // images_per_shard:05d}.tar"
                    chosen = rows[first : first + images_per_shard]
                    samples = ((row, keys[row], read(keys[row])) for row in chosen)
                    _write_shard(shard, samples, label_of)
                    shards[split].append(shard)
        content = {
            "classes": classes,
            **{split: [shard.name for shard in shards[split]] for split in SPLITS},
            "counts": counts,
        }
        atomic.write_bytes(destination / LISTING, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise ResfastError(
            f"cannot write shards to {destination}: {error.strerror or error}; free some space or "
            "fix the permissions"
        ) from error
    return [shard for split in SPLITS for shard in shards[split]]


def _shuffled(count: int) -> list[int]:
    import torch

    from resfast.data.augment import generator

    return torch.randperm(count, generator=generator(_SHUFFLE_SEED)).tolist()


def _spooled(blobs: Iterator[tuple[Key, bytes]], spool: BinaryIO) -> Callable[[Key], bytes]:
    """Copies ``blobs`` to a file and returns a function that reads one of them back."""
    places = {}
    for key, data in blobs:
        places[key] = (spool.tell(), len(data))
        spool.write(data)

    def read(key: Key) -> bytes:
        offset, size = places[key]
        spool.seek(offset)
        return spool.read(size)

    return read


def _write_shard(
    shard: Path, samples: Iterator[tuple[int, Key, bytes]], label_of: dict[str, int]
) -> None:
    with atomic.replacing(shard) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, key, data in samples:
                extension = key[2].rpartition(".")[2].lower()
                label = str(label_of[key[1]]).encode()
                for suffix, content in ((extension, data), ("cls", label)):
                    member = tarfile.TarInfo(f"{row:08d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        lines = index_lines(temporary, shown=shard)
    # After the shard: an index older than its shard is not trusted.
    atomic.write_bytes(shard.with_suffix(".idx"), "".join(lines).encode())


@dataclass(frozen=True)
class ShardFolder:
    """Contents of a folder written by :func:`write_shards`."""

    classes: tuple[str, ...]
    train: Shards
    test: Shards


def read_shards(destination: Path) -> ShardFolder:
    """The shards in a folder written by :func:`write_shards`.

    Raises:
        ResfastError: the folder, its ``classes.json`` or a shard is missing or unreadable.
    """
    listing = destination / LISTING
    remedy = "write shards with python -m resfast.data --shards DIR --data folder:PATH"
    if not destination.is_dir():
        raise ResfastError(f"{destination} is not a folder, expected a folder of shards: {remedy}")
    if not listing.exists():
        raise ResfastError(
            f"{destination} has no {LISTING}: its shards are missing or incomplete: {remedy}"
        )
    try:
        content = json.loads(read_file(str(listing)))
        classes = tuple(content["classes"])
        train, test = (
            Shards(
                tuple(str(destination / name) for name in content[split]),
                int(content["counts"][split]),
            )
            for split in SPLITS
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ResfastError(f"{listing} is damaged ({error!r}): {remedy}") from error
    for shard in (*train.paths, *test.paths):
        if not Path(shard).is_file():
            raise ResfastError(f"the shard {shard} is missing: copy it there again, or {remedy}")
    return ShardFolder(classes, train, test)


def index_lines(path: Path, *, shown: Path | None = None) -> list[str]:
    """The index of one shard, in which each sample has an image and a ``.cls``.

    Args:
        path: the shard.
        shown: the shard's name in error messages (None: ``path``).

    Returns:
        The lines of an index in the format of DALI's ``wds2idx``, version 1.2.

    Raises:
        ResfastError: the shard cannot be read or is compressed, a sample lacks its image or its
            class, or there is no sample.
    """
    samples: dict[str, dict[str, tuple[int, int, str]]] = {}
    for member in _members(path, shown or path):
        folder, slash, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.isfile() and key:
            parts = samples.setdefault(f"{folder}{slash}{key}", {})
            parts[extension.lower()] = (member.offset_data, member.size, member.name)
    lines = []
    for key, parts in samples.items():
        image = next((extension for extension in IMAGE_EXTENSIONS if extension in parts), None)
        label = parts.get("cls")
        if image is None or label is None:
            missing = f"{key}.cls" if image else f"image {key}.{'|'.join(IMAGE_EXTENSIONS)}"
            raise ResfastError(
                f"{shown or path} has no {missing}: each sample needs an image and its class index "
                "as KEY.cls"
            )
        if not 0 < label[1] <= _MAX_LABEL_BYTES:
            raise ResfastError(
                f"{label[2]} in {shown or path} has {label[1]} bytes; expected a class index"
            )
        # The name is the last field of a component and ends at a space.
        components = [(image, *parts[image]), ("cls", *label)]
        lines.append(
            " ".join(f"{ext} {at} {size} {name}" for ext, at, size, name in components) + "\n"
        )
    if not lines:
        raise ResfastError(f"{shown or path} has no samples: expected KEY.jpg with KEY.cls")
    return [f"v1.2 {len(lines)}\n", *lines]


def _members(path: Path, shown: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield from tar
    except tarfile.TarError as error:
        raise ResfastError(
            f"{shown} is not an uncompressed tar archive ({error}): shards are read in place, so "
            "decompress it first"
        ) from error
    except OSError as error:
        raise ResfastError(f"{shown} cannot be read ({error.strerror or error})") from error


def indexed(paths: Sequence[str], folder: Path) -> tuple[list[str], int]:
    """Paths of the shards' indices, and the total number of samples.

    An index next to its shard is used unless it is older; other indices are created from the
    shard's headers and written to ``folder``.

    Raises:
        ResfastError: see :func:`index_lines`.
    """
    indices, count = [], 0
    for ordinal, path in enumerate(map(Path, paths)):
        index = path.with_suffix(".idx")
        if not path.is_file():
            raise ResfastError(f"the shard {path} does not exist: check its name")
        if not (index.exists() and index.stat().st_mtime_ns >= path.stat().st_mtime_ns):
            index = folder / f"{ordinal}.idx"
            index.write_text("".join(index_lines(path)))
        indices.append(str(index))
        with open(index) as lines:
            count += _declared(index, lines.readline())
    return indices, count


def _declared(index: Path, first_line: str) -> int:
    version, _, count = first_line.strip().partition(" ")
    if not (version.startswith("v1.") and count.isdecimal()):
        raise ResfastError(f"{index} is not an index of a shard (its first line is {first_line!r})")
    return int(count)


def images_of(path: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each image of a shard, in order."""
    with open(path, "rb") as file:
        for member in _members(Path(path), Path(path)):
            if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
                file.seek(member.offset_data)
                yield member.name, file.read(member.size)
