"""WebDataset shards: tar archives of images with their classes.

They are read sequentially, which is far faster on disks and network file systems than opening
single files. Those written here have ``KEY.cls`` with the index of the class as text,
``classes.json`` with the names and counts, and an index ``NAME.idx`` (the format of DALI's
``wds2idx``) next to each shard, so that their samples can be listed quickly. Those of others are
found by their names: :mod:`resfast.data.shard_listing` says what is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from resfast import atomic
from resfast.data import shard_listing
from resfast.data.dataset import Request, Shards, Stream, print_to_stderr, refuse_skipping
from resfast.data.folder import (
    ARCHIVE_SUFFIXES,
    SPLITS,
    Directory,
    Key,
    check_listing,
    open_source,
    read_file,
    size_of,
)
from resfast.errors import ResfastError

LISTING = "classes.json"
_SHUFFLE_SEED = 0
_SPLIT = {
    "train": re.compile(r"(?i)(^|[^a-z])train(ing)?([^a-z]|$)"),
    "test": re.compile(r"(?i)(^|[^a-z])test(ing)?([^a-z]|$)"),
    "val": re.compile(r"(?i)(^|[^a-z])(val|valid|validation|eval)([^a-z]|$)"),
}
"""What the name of a shard, or of a folder that it is in, has in it."""
_MAX_DEPTH = 4
_COMPRESSED = tuple(suffix for suffix in ARCHIVE_SUFFIXES if suffix != ".tar")


def open_shards(request: Request) -> Stream:
    """Opens ``--data shards:PATH``, a folder of shards.

    Raises:
        ResfastError: see :func:`read_shards`; or a sample has no class, or another one.
    """
    if request.loader == "resident":
        raise ResfastError(
            f"--loader resident cannot read shards ({request.data}): use dali or auto, or --data "
            "folder:PATH with the images"
        )
    refuse_skipping(request)
    cache = request.data_dir / "cache"
    found = read_shards(
        Path(request.location).expanduser(), cache, request.classes, report=request.report
    )
    digest = hashlib.blake2b(repr(found.classes).encode(), digest_size=16)
    for shards in (found.train, found.test):
        for file in shards.paths:
            digest.update(f"{os.path.basename(file)}\0{size_of(file)}\0".encode())
            if shards.cache is not None:  # of others: a label may change and the size does not
                listing = shard_listing.list_shard(Path(file), shards.cache)
                for part, label in zip(listing.images, listing.labels, strict=True):
                    digest.update(f"{part.name}\0{part.size}\0{label}\0".encode())
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
        parts = list(shard_listing.members(temporary, shard))
    lines = [f"v1.2 {len(parts) // 2}\n"]
    for image, label in zip(parts[::2], parts[1::2], strict=True):
        lines.append(" ".join(" ".join(map(str, part)) for part in (image, label)) + "\n")
    atomic.write_bytes(shard.with_suffix(".idx"), "".join(lines).encode())


@dataclass(frozen=True)
class ShardFolder:
    """Contents of a folder of shards."""

    classes: tuple[str, ...]
    train: Shards
    test: Shards


def read_shards(
    folder: Path,
    cache: Path | None = None,
    classes: Path | Sequence[str] | None = None,
    report: Callable[[str], None] = print_to_stderr,
) -> ShardFolder:
    """The shards in a folder, written by :func:`write_shards` or by others.

    Without a ``classes.json``, shards belong to the training or the test set by their names:
    ``train-000.tar``, ``train/000.tar`` and ``val``, ``valid``, ``validation`` or ``test``.

    Args:
        folder: the folder.
        cache: folder in which listings of shards without ``classes.json`` are kept, if any.
        classes: file with the names of the classes, or the names, for shards without
            ``classes.json``.
        report: called with a line of text for each notable step.

    Raises:
        ResfastError: the folder, its ``classes.json`` or a shard is missing or unreadable; samples
            have no class; or there is nothing to train on or to test with.
    """
    if not folder.is_dir():
        raise ResfastError(
            f"{folder} is not a folder, expected a folder of shards: write shards with {_WRITE}"
        )
    if (folder / LISTING).exists():
        if isinstance(classes, Path):
            raise ResfastError(
                f"--classes {classes} is for shards without {LISTING}, and {folder} has one: leave "
                "one of them out"
            )
        return _listed_in_json(folder)
    splits = _by_name(folder, report)
    names = shard_listing.read_class_names(classes) if isinstance(classes, Path) else classes
    if names is None:
        report(f"listing the samples of {sum(map(len, splits.values())):,} shards in {folder}")
    listings = {
        split: [(str(path), shard_listing.list_shard(path, cache)) for path in paths]
        for split, paths in splits.items()
    }
    everything = [*listings["train"], *listings["test"]]
    if names is None:
        names = shard_listing.class_names(everything)
    else:
        for path, listing in everything:
            shard_listing.label_indices(path, listing, names, len(names))
    names = tuple(names)
    shards = []
    for found in listings.values():
        count = sum(len(listing.images) for _, listing in found)
        shards.append(Shards(tuple(path for path, _ in found), count, names, cache))
    report(f"{shards[0].count:,} and {shards[1].count:,} images of {len(names):,} classes")
    return ShardFolder(names, *shards)


_WRITE = "python -m resfast.data --shards DIR --data folder:PATH"


def _by_name(folder: Path, report: Callable[[str], None]) -> dict[str, list[Path]]:
    """The shards of the two splits by their names."""
    found: dict[str, list[Path]] = {split: [] for split in _SPLIT}
    others = []
    found_tars = [
        path for depth in range(_MAX_DEPTH) for path in folder.glob("*/" * depth + "*.tar")
    ]
    for path in sorted(found_tars):
        parents = path.relative_to(folder).parts[-2::-1]  # the nearest first
        matches = [
            split
            for name in (path.stem, *parents)
            for split, pattern in _SPLIT.items()
            if pattern.search(name)
        ]
        found[matches[0]].append(path) if matches else others.append(path)
    tests = found["test"] or found["val"]
    if not (found["train"] and tests):
        missing = "training" if not found["train"] else "test"
        unknown = f" (found {others[0].name} and {len(others) - 1:,} others)" if others else ""
        if not any(found.values()) and not others:
            for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
                if path.name.lower().endswith(_COMPRESSED):
                    raise ResfastError(
                        f"{path} is compressed, and shards are read in place: decompress them first"
                    )
            raise ResfastError(
                f"{folder} has neither {LISTING} nor any .tar: its shards are missing or "
                f"incomplete: write shards with {_WRITE}"
            )
        raise ResfastError(
            f"{folder} has no {missing} shards{unknown}: without {LISTING} their names or folders "
            "have to say what they are: train-*.tar, and test-*.tar or val-*.tar"
        )
    for paths, what in ((others, "whose name says no split"), (found["val"], "for validation")):
        if paths and paths is not tests:
            report(f"not used: {len(paths):,} shards {what}, such as {paths[0].name}")
    return {"train": found["train"], "test": tests}


def _listed_in_json(folder: Path) -> ShardFolder:
    """The shards that ``classes.json`` names."""
    listing = folder / LISTING
    try:
        content = json.loads(read_file(str(listing)))
        classes = tuple(content["classes"])
        train, test = (
            Shards(
                tuple(str(folder / name) for name in content[split]),
                int(content["counts"][split]),
                classes,
            )
            for split in SPLITS
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ResfastError(
            f"{listing} is damaged ({error!r}): write the shards again with {_WRITE}, or remove it "
            "if the names of the shards say train and test"
        ) from error
    for shard in (*train.paths, *test.paths):
        if not Path(shard).is_file():
            raise ResfastError(
                f"the shard {shard} is missing: copy it there again, or write shards with {_WRITE}"
            )
    return ShardFolder(classes, train, test)


def images_of(path: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each image of a shard, in order."""
    with open(path, "rb") as file:
        for part in shard_listing.list_shard(Path(path)).images:
            file.seek(part.offset)
            yield part.name, file.read(part.size)
