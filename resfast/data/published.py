"""Reads the files of a published data set: in a folder, a tar archive or a zip, or one file alone.

Nothing is unpacked to disk, and an array is read a few rows at a time.
"""

from __future__ import annotations

import contextlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from lzma import LZMAError
from math import prod
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from resfast.data.folder import ARCHIVE_SUFFIXES
from resfast.errors import ResfastError

_DAMAGE = (
    OSError, ValueError, EOFError, LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile,
    RuntimeError, NotImplementedError, MemoryError, OverflowError,
)  # fmt: skip


@dataclass
class Published:
    """Files of a data set by their name, without folders.

    Attributes:
        path: the folder, the archive or the file.
        files: a function that opens each file, by its name, in the order of the archive.
    """

    path: Path
    files: dict[str, Callable[[], IO[bytes]]] = field(default_factory=dict)
    _depths: dict[str, int] = field(default_factory=dict)

    def add(self, parts: tuple[str, ...], opened: Callable[[], IO[bytes]]) -> None:
        """Adds a file; of files with the same name in several folders, the outermost counts."""
        if any(part.startswith((".", "__MACOSX")) for part in parts):
            return
        name, depth = parts[-1], len(parts)
        if depth == self._depths.get(name):
            raise ResfastError(
                f"{self.path} has {name} in several folders, one was expected: name the folder of "
                "one data set"
            )
        if depth < self._depths.get(name, depth + 1):
            self.files[name], self._depths[name] = opened, depth

    def shown(self, name: str) -> str:
        """The path to a file, in messages."""
        return str(self.path) if self.path.name == name else f"{self.path}/{name}"

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file, opened for reading.

        Raises:
            ResfastError: there is no such file, or it is damaged.
        """
        if name not in self.files:
            held = ", ".join(sorted(self.files)[:6]) or "no files"
            raise ResfastError(
                f"{self.path} has no {name}: it holds {held}; expected the files as published"
            )
        try:
            with self.files[name]() as file:
                yield file
        except _DAMAGE as error:
            raise ResfastError(
                f"{self.shown(name)} cannot be read ({error}): download or unpack it again"
            ) from error

    def rows(
        self, name: str, shape: tuple[int, ...], dtype: str, each: int
    ) -> Iterator[np.ndarray]:
        """The rows of a .npy file in turn, ``each`` of them at a time, in memory of their own.

        Args:
            name: the file.
            shape: expected shape of a row.
            dtype: expected kinds of its dtype, such as ``u`` or ``iu``.
            each: rows to read at a time.

        Raises:
            ResfastError: it is missing or damaged, or holds something else.
        """
        with self.open(name) as file:
            count, found = self._header(file, name, shape, dtype)
            for start in range(0, count, each):
                rows = min(each, count - start)
                size = rows * prod(shape) * found.itemsize
                data = file.read(size)
                if len(data) < size:
                    raise ResfastError(
                        f"{self.shown(name)} is cut off after {start:,} of {count:,} rows: "
                        "download or unpack it again"
                    )
                yield np.frombuffer(bytearray(data), found).reshape(rows, *shape)

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """All rows of a .npy file; see :meth:`rows`."""
        parts = list(self.rows(name, shape, dtype, 1 << 40))
        if not parts:
            raise ResfastError(f"{self.shown(name)} has no rows; expected at least one")
        return parts[0]

    def count(self, name: str, shape: tuple[int, ...], dtype: str) -> int:
        """Number of rows in a .npy file, from its header; see :meth:`rows`."""
        with self.open(name) as file:
            return self._header(file, name, shape, dtype)[0]

    def _header(
        self, file: IO[bytes], name: str, shape: tuple[int, ...], dtype: str
    ) -> tuple[int, np.dtype]:
        found, fortran, kind = read_header(file)
        if kind.kind not in dtype or found[1:] != shape or not found or (fortran and shape):
            rows = ", ".join(["N", *map(str, shape)])
            expected = "uint8" if dtype == "u" else "whole numbers"
            raise ResfastError(
                f"{self.shown(name)} is {kind} {list(found)}{' in Fortran order' * fortran}; "
                f"expected {expected} [{rows}]"
            )
        return found[0], kind


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype of a .npy file, which is left at its first row.

    Raises:
        ValueError: it is no .npy file.
    """
    version = np.lib.format.read_magic(file)
    readers: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    return readers[version](file)


@contextlib.contextmanager
def published(path: Path, what: str) -> Iterator[Published]:
    """The files at ``path``: a folder, a tar archive, a zip file, or a single file.

    Args:
        path: the path.
        what: what was expected, for messages.

    Raises:
        ResfastError: there is nothing, or the archive is damaged.
    """
    found = Published(path)
    with contextlib.ExitStack() as stack:
        try:
            if path.is_dir():
                for file in (*sorted(path.glob("*")), *sorted(path.glob("*/*"))):
                    if file.is_file():
                        found.add(file.relative_to(path).parts, _opener(file))
            elif zipfile.is_zipfile(path) and path.suffix.lower() not in (".pt", ".npz"):
                archive = stack.enter_context(zipfile.ZipFile(path))
                for entry in archive.infolist():
                    if not entry.is_dir():
                        found.add(_parts(entry.filename), lambda entry=entry: archive.open(entry))
            elif tarfile.is_tarfile(path):
                tar = stack.enter_context(tarfile.open(path))
                for member in tar:
                    if member.isfile():
                        found.add(
                            _parts(member.name), lambda member=member: tar.extractfile(member)
                        )
            elif path.name.lower().endswith((".zip", *ARCHIVE_SUFFIXES)):
                raise ValueError("it is cut off or no archive")
            else:
                found.add((path.name,), _opener(path))
        except _DAMAGE as error:
            reason = getattr(error, "strerror", None) or error
            raise ResfastError(f"{path} cannot be read ({reason}); expected {what}") from error
        yield found


def _opener(file: Path) -> Callable[[], IO[bytes]]:
    return lambda: open(file, "rb")


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts
