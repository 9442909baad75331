"""Images in ``train/<class>/*`` and ``test/<class>/*``, in a directory or a tar archive.

Where there is no ``test``, ``val``, ``valid`` or ``validation`` takes its place.

Both kinds are read in two passes: first names, which determine the rows, then bytes, decoded
directly into one uint8 array per split. An archive is read as a stream; nothing is extracted to
disk.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from resfast.data.decode import REPLACE_OR_SKIP, Key, decode_all, unreadable
from resfast.errors import ResfastError

SPLITS = ("train", "test")
TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Folders of test images: the first that there is."""
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
)  # fmt: skip
"""Suffixes of image files; what is in them may be any of the formats."""
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_LAYOUT = "train/<class>/* and test/<class>/*"
_READ = 1 << 20


@dataclass
class Listing:
    """Contents of a tree: images by key (with the source's handle), classes, ignored files."""

    images: dict[Key, Any] = field(default_factory=dict)
    classes: dict[str, set[str]] = field(default_factory=dict)  # split to its class folders
    ignored: int = 0
    test_folder: str = "test"

    def shown(self, path: Path, split: str, *parts: str) -> str:
        """The path to a split's folder, or to something in it, in messages."""
        folder = self.test_folder if split == "test" else split
        return "/".join((os.fspath(path), folder, *parts))

    def add_file(self, parts: tuple[str, ...], handle: object) -> None:
        if len(parts) > 2:
            self.classes.setdefault(parts[0], set()).add(parts[1])
        if len(parts) > 2 and parts[-1].lower().endswith(IMAGE_SUFFIXES):
            self.images[(parts[0], parts[1], "/".join(parts[2:]))] = handle
        else:
            self.ignored += 1


class Directory:
    """A tree in a directory. Links are followed; hidden files and folders are skipped."""

    def __init__(self, path: Path):
        self.path = path

    def scan(self) -> Listing:
        with _readable(self.path):
            listing = Listing(test_folder=_test_folder(os.listdir(self.path)))
            for split in SPLITS:
                top = Path(listing.shown(self.path, split))
                if top.is_dir():
                    listing.classes.setdefault(split, set())
                    self.walk(os.fspath(top), (split,), frozenset(), listing)
        if not listing.classes:
            nested = sorted(p.parent for p in self.path.glob("*/train") if p.is_dir())
            if nested:
                raise ResfastError(
                    f"{self.path} has no train or test folder but {nested[0]} does: "
                    f"use --data folder:{nested[0]}"
                )
        return listing

    def walk(
        self, folder: str, parts: tuple[str, ...], ancestors: frozenset[object], listing: Listing
    ) -> None:
        with _readable(folder):
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in ancestors:
                return  # a link to a folder that contains it
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = (*parts, entry.name)
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        if len(path) == 2:
                            listing.classes[parts[0]].add(entry.name)
                        self.walk(entry.path, path, ancestors | {identity}, listing)
                    elif entry.is_file() or entry.is_symlink():  # a broken link fails when read
                        listing.add_file(path, entry.path)
                    else:
                        listing.ignored += 1

    def update_hash(self, listing: Listing, update: Callable[[bytes], Any]) -> None:
        for key in sorted(listing.images):
            data = read_file(listing.images[key])
            update(f"{'/'.join(key)}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
            update(data)

    def blobs(self, listing: Listing) -> Iterator[tuple[Key, bytes]]:
        for key in sorted(listing.images):
            yield key, read_file(listing.images[key])


class Archive:
    """A tree in a tar archive, plain or compressed; it may be inside one top-level folder."""

    def __init__(self, path: Path):
        self.path = path

    def scan(self) -> Listing:
        files: dict[tuple[str, ...], int] = {}  # of members with the same name, the last counts
        folders: set[tuple[str, ...]] = set()
        for ordinal, member, parts, _ in self._members():
            if member.isdir():
                folders.add(parts)
            elif member.islnk():  # another name of a file that came before
                target = tuple(part for part in member.linkname.split("/") if part not in ("", "."))
                if target not in files:
                    raise ResfastError(
                        f"{self.path} has the member {member.name!r}, a link to "
                        f"{member.linkname!r}, which is no file before it: pack the tree again"
                    )
                files[parts] = files[target]
            else:
                files[parts] = ordinal
        names = files.keys() | folders
        top = self._top(names)
        inside = {p[len(top)] for p in names if p[: len(top)] == top and len(p) > len(top)}
        listing = Listing(test_folder=_test_folder(inside))
        split_of = {"train": "train", listing.test_folder: "test"}
        for parts in folders:
            path = parts[len(top) :]
            if parts[: len(top)] == top and len(path) in (1, 2) and path[0] in split_of:
                listing.classes.setdefault(split_of[path[0]], set()).update(path[1:])
        for parts, ordinal in files.items():
            path = parts[len(top) :]
            if parts[: len(top)] == top and len(path) > 1 and path[0] in split_of:
                split = split_of[path[0]]
                listing.classes.setdefault(split, set())
                listing.add_file((split, *path[1:]), ordinal)
        return listing

    def _top(self, names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
        known = {"train", *TEST_FOLDERS}
        tops = {(() if p[0] in known else p[:1]) for p in names if {*p[:2]} & known}
        if () in tops or not tops:
            return ()
        if len(tops) > 1:
            raise ResfastError(
                f"{self.path} holds several trees ({', '.join(sorted(t for (t,) in tops))}) but "
                f"one of {_LAYOUT} was expected: pack only the one you want"
            )
        return tops.pop()

    def update_hash(self, listing: Listing | None, update: Callable[[bytes], Any]) -> None:
        with _readable(self.path), open(self.path, "rb") as file:
            while data := file.read(_READ):
                update(data)

    def blobs(self, listing: Listing) -> Iterator[tuple[Key, bytes]]:
        keys: dict[int, list[Key]] = {}
        for key, ordinal in listing.images.items():
            keys.setdefault(ordinal, []).append(key)
        for ordinal, member, _, tar in self._members():
            if ordinal in keys and (file := tar.extractfile(member)) is not None:
                data = self._guarded(file.read)
                for key in keys[ordinal]:
                    yield key, data

    def _guarded(self, step: Callable[[], Any]) -> Any:
        """``step()``, with any exception that a broken archive causes raised as ResfastError."""
        try:
            return step()
        except (
            tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError, IndexError
        ) as error:  # fmt: skip
            raise ResfastError(
                f"{self.path} is truncated or is not a valid archive ({error}): "
                "copy or download it again"
            ) from error

    def _members(
        self,
    ) -> Iterator[tuple[int, tarfile.TarInfo, tuple[str, ...], tarfile.TarFile]]:
        """Each visible file and folder: ordinal, member, parts of its name, and the archive."""
        with _readable(self.path), _decompressed(self.path) as stream:
            opened = partial(
                tarfile.open, fileobj=stream, mode="r|", bufsize=1 << 18, tarinfo=StrictTarInfo
            )
            with self._guarded(opened) as tar:
                ordinal = 0
                while (member := self._guarded(tar.next)) is not None:
                    tar.members.clear()  # otherwise it keeps every header in memory
                    parts = self._parts(member)
                    if parts and not any(part.startswith(".") for part in parts):
                        yield ordinal, member, parts, tar
                    ordinal += 1
            while self._guarded(lambda: stream.read(_READ)):  # verifies the checksum at the end
                pass

    def _parts(self, member: tarfile.TarInfo) -> tuple[str, ...]:
        parts = member.name.split("/")
        if member.name.startswith("/") or ".." in parts:
            raise ResfastError(
                f"{self.path} has the member {member.name!r}, whose path points outside the "
                "archive, but only relative paths inside it are read: pack the tree again"
            )
        if not (member.isfile() or member.isdir() or member.islnk()):
            raise ResfastError(
                f"{self.path} has {member.name!r}, a symbolic link or a device; expected "
                "files and folders: pack the tree again with links followed (tar -h)"
            )
        return tuple(part for part in parts if part not in ("", "."))


class StrictTarInfo(tarfile.TarInfo):
    """Raises an error for a truncated or broken header, which tarfile treats as the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error or 'header'} at byte {tar.offset}") from error


def _test_folder(names: Iterable[str]) -> str:
    names = set(names)
    return next((name for name in TEST_FOLDERS if name in names), "test")


def open_source(path: Path) -> Directory | Archive:
    """The tree at ``path``. Raises ``ResfastError`` if it is not a directory or a tar archive."""
    expected = f"expected a directory or a tar archive ({', '.join(ARCHIVE_SUFFIXES)}) of {_LAYOUT}"
    with _readable(path):
        if path.is_dir():
            return Directory(path)
        if not path.exists():
            raise ResfastError(f"{path} does not exist, {expected}: check --data folder:PATH")
        if path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES):
            return Archive(path)
    raise ResfastError(
        f"{path} is neither a directory nor a known archive, {expected}: "
        "unpack it or pack it as one of these"
    )


def read(
    source: Directory | Archive,
    listing: Listing,
    image_size: int,
    skip_corrupt: bool,
    report: Callable[[str], None],
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Decodes every image of ``source``.

    Returns:
        The tensors ``{split}_images`` (uint8 ``[N, image_size, image_size, 3]``, RGB) and
        ``{split}_labels`` (int64 ``[N]``) by name, the sorted class names, and the paths of corrupt
        images that were skipped. Rows are sorted by class, then by path.

    Raises:
        ResfastError: the layout is wrong, an image is corrupt and ``skip_corrupt`` is false, a
            class has no intact image, the source changes while it is read, or memory runs out.
    """
    classes = check_listing(source.path, listing)
    rows = {split: sorted(k for k in listing.images if k[0] == split) for split in SPLITS}
    report(f"reading {len(listing.images):,} images from {source.path}")
    if listing.ignored:
        report(
            f"ignored {listing.ignored:,} files in {source.path} that are not "
            f"{', '.join(IMAGE_SUFFIXES)} images in a class folder"
        )
    try:
        images = {s: np.empty((len(rows[s]), image_size, image_size, 3), np.uint8) for s in SPLITS}
    except MemoryError as error:
        gib = len(listing.images) * image_size**2 * 3 / 2**30
        raise ResfastError(
            f"{len(listing.images):,} images of {image_size}x{image_size} need {gib:.1f} GiB of "
            "memory, more than is available: choose a smaller image size or fewer images"
        ) from error

    places = {key: images[split][row] for split in SPLITS for row, key in enumerate(rows[split])}
    corrupt: dict[Key, str] = {}
    count = 0
    for batch_count, failures in decode_all(source.blobs(listing), places, image_size):
        count += batch_count
        corrupt.update(failures)
        if failures and not skip_corrupt:
            key, reason = failures[0]
            raise unreadable(listing.shown(source.path, *key), reason, REPLACE_OR_SKIP)
    if count != len(places):
        raise ResfastError(
            f"{source.path} changed while it was read ({count:,} of {len(places):,} images read): "
            "run again when nothing writes to it"
        )

    tensors: dict[str, Tensor] = {}
    label_of = {name: label for label, name in enumerate(classes)}
    for split in SPLITS:
        kept = [row for row, key in enumerate(rows[split]) if key not in corrupt]
        if len(kept) < len(rows[split]):
            for new, old in enumerate(kept):  # in place: a second array would double the memory
                if new != old:
                    images[split][new] = images[split][old]
        tensors[f"{split}_images"] = torch.from_numpy(images[split][: len(kept)])
        labels = torch.tensor([label_of[rows[split][row][1]] for row in kept], dtype=torch.int64)
        tensors[f"{split}_labels"] = labels
        present = {rows[split][row][1] for row in kept}
        for name in classes:
            if name not in present:
                raise ResfastError(
                    f"the class {name!r} in {listing.shown(source.path, split, name)} has only "
                    "corrupt images, at least one intact image per class was expected: replace them"
                )
    return tensors, classes, tuple("/".join(key) for key in sorted(corrupt))


def check_listing(path: Path, listing: Listing) -> tuple[str, ...]:
    """The sorted class names. Raises ``ResfastError`` for a tree that cannot be trained on."""
    for split in SPLITS:
        if split not in listing.classes:
            raise ResfastError(
                f"{path} has no {split} folder, expected {_LAYOUT}: "
                f"add {split}/ or point --data folder:PATH at the folder above train/ and test/"
            )
    train, test = (listing.classes[split] for split in SPLITS)
    if not train:
        raise ResfastError(
            f"{listing.shown(path, 'train')} has no class folders, expected {_LAYOUT}: "
            "put the images of each class in a folder with its name"
        )
    for names in (train, test):
        _check_names(path, names)
    if train != test:
        _check_names(path, train | test)
        missing, extra = (", ".join(sorted(s)) or "none" for s in (train - test, test - train))
        raise ResfastError(
            f"the classes in {listing.shown(path, 'test')} differ from the training classes "
            f"(missing: {missing}; extra: {extra}): add, remove or rename folders until they match"
        )
    filled = {key[:2] for key in listing.images}
    for split in SPLITS:
        for name in sorted(train):
            if (split, name) not in filled:
                raise ResfastError(
                    f"the class {name!r} in {listing.shown(path, split, name)} is empty, at least "
                    f"one image ({', '.join(IMAGE_SUFFIXES)}) was expected: add images or remove "
                    "the class from train and test"
                )
    return tuple(sorted(train))


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Raises ``ResfastError`` for names that look the same: in another Unicode form or case."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        plain = unicodedata.normalize("NFC", name).casefold()
        other = seen.setdefault(unicodedata.normalize("NFC", plain), name)
        if other != name:
            same = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
            how = "Unicode form (NFC and NFD)" if same else "case"
            raise ResfastError(
                f"{path} has the class folders {other!a} and {name!a}, which differ only "
                f"in their {how}: give each class one name, in train and in test"
            )


def read_file(path: str) -> bytes:
    with _readable(path), open(path, "rb", buffering=0) as file:
        return file.readall()


def size_of(file: str) -> int:
    """Size of a file in bytes. Raises ``ResfastError`` if it cannot be read."""
    try:
        return os.stat(file).st_size
    except OSError as error:
        raise ResfastError(
            f"{file} cannot be read: {error.strerror}; restore or remove it"
        ) from None


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResfastError(
            f"{error.filename or path} cannot be read ({error.strerror or error}): check that it "
            "still exists, and its permissions"
        ) from error


@contextlib.contextmanager
def _decompressed(path: Path) -> Iterator[BinaryIO]:
    """``path`` opened for reading, decompressed according to its magic number."""
    openers = {b"\x1f\x8b": gzip.GzipFile, b"\xfd7zXZ\0": lzma.LZMAFile, b"BZh": bz2.BZ2File}
    with open(path, "rb") as file:
        magic = file.read(6)
        file.seek(0)
        for start, opener in openers.items():
            if magic.startswith(start):
                keyword = "fileobj" if opener is gzip.GzipFile else "filename"
                with opener(**{keyword: file}, mode="rb") as stream:
                    yield stream
                return
        yield file
