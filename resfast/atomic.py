"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from resfast.errors import ResfastError

_SUFFIX = ".tmp"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file to write; it becomes ``path`` when the block ends well.

    The temporary file lies in the same folder and is fsynced before ``os.replace``. On any error
    it is removed, the old file stays and the error (``OSError`` of a full or read-only disk, or
    whatever the block raised) propagates.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        yield temporary
        _fsync(temporary, os.O_RDWR)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never created
            temporary.unlink()
    if os.name == "posix":
        _fsync_folder(path.parent)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` to ``path`` atomically and durably; see :func:`replacing` for errors."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def save(path: Path, data: bytes | memoryview) -> None:
    """:func:`write_bytes` for entry points.

    Raises:
        ResfastError: it could not be written, with what to do; the old file is intact.
    """
    try:
        write_bytes(path, data)
    except OSError as error:
        raise ResfastError(
            f"cannot write {path}: {error.strerror}; free space or mend the permissions"
        ) from None


def make_folder(path: Path, option: str) -> Path:
    """Makes a folder that a command's ``option`` named, and those above it.

    Raises:
        ResfastError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResfastError(
            f"cannot create the folder {path}: {error.strerror}; choose another {option}"
        ) from None
    return path


def remove_stale(folder: Path, older_than_s: float = 24 * 3600) -> None:
    """Remove temporary files that a killed process left in ``folder`` more than a day ago."""
    limit = time.time() - older_than_s
    with contextlib.suppress(OSError):  # an unreadable folder has nothing to tidy
        for leftover in folder.glob(f".*{_SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may have removed it
                if leftover.stat().st_mtime < limit:
                    leftover.unlink()


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    try:
        _fsync(folder, os.O_RDONLY)
    except OSError as error:
        # Some network file systems cannot sync a folder; the rename itself has happened.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
