"""Atomic file writes: a file has either its old or its new content, never a part of it."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from resfast.errors import ResfastError

_SUFFIX = ".tmp"


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces ``path`` if the block succeeds.

    Temporary files for ``path`` that killed processes of this machine left are removed.

    The old file is renamed to ``keep``, if that is given; a process that is killed between the two
    renames leaves ``keep`` and no ``path``.

    The temporary file is in the same folder and is fsynced before ``os.replace``. On any error
    (``OSError`` of a full or read-only disk, or an exception of the block) it is removed, the old
    file is kept and the error propagates.
    """
    _remove_abandoned(path)
    process = f"{os.getpid()}@{_host()}"
    temporary = path.with_name(f".{path.name}.{process}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        yield temporary
        _fsync(temporary, os.O_RDWR)
        if keep is not None:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never created
            temporary.unlink()
    if os.name == "posix":
        _fsync_folder(path.parent)


@functools.cache
def _host() -> str:
    """The name of this machine, as a few characters."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def write_bytes(path: Path, data: bytes | memoryview, keep: Path | None = None) -> None:
    """Writes ``data`` to ``path`` atomically and durably; see :func:`replacing` for errors."""
    with replacing(path, keep) as temporary:
        temporary.write_bytes(data)


def save(path: Path, data: bytes | memoryview) -> None:
    """:func:`write_bytes` for entry points.

    Raises:
        ResfastError: the file cannot be written; the old file is intact.
    """
    try:
        write_bytes(path, data)
    except OSError as error:
        raise ResfastError(
            f"cannot write {path}: {error.strerror}; free disk space or fix the permissions"
        ) from None


def make_folder(path: Path, option: str) -> Path:
    """Creates a folder and its parents, and returns it.

    Args:
        path: the folder.
        option: the command-line option that named it, for the error message.

    Raises:
        ResfastError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResfastError(
            f"cannot create the folder {path}: {error.strerror}; choose another {option}"
        ) from None
    return path


def is_temporary(path: Path) -> bool:
    """Whether a file is one that :func:`replacing` writes, left by a killed process or in use."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def remove_stale(folder: Path, older_than_s: float = 24 * 3600) -> None:
    """Removes temporary files of killed processes from ``folder`` that are older than a day."""
    limit = time.time() - older_than_s
    with contextlib.suppress(OSError):  # an unreadable folder is skipped
        for leftover in folder.glob(f".*{_SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may have removed it
                if leftover.stat().st_mtime < limit:
                    leftover.unlink()


def _remove_abandoned(path: Path) -> None:
    """Removes temporary files for ``path`` of processes of this machine that have ended."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)@{_host()}\.[0-9a-f]+{_SUFFIX}")
    with contextlib.suppress(OSError):  # an unreadable folder is skipped
        for name in os.listdir(path.parent):
            found = pattern.fullmatch(name)
            if found and not _is_running(int(found[1])):
                with contextlib.suppress(OSError):
                    path.with_name(name).unlink()


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # only asks
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        pass
    return True


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
        # Some network file systems cannot sync a folder; the rename itself has succeeded.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
