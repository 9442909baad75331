"""Locks between processes that the operating system releases when a process ends, killed or not."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from resfast.errors import ResfastError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FOLDER_LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
logger = logging.getLogger("resfast")


@contextlib.contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds an exclusive lock of a file while the block runs.

    Args:
        path: the file, which is created and stays; it is empty.
        wait: whether to wait for another process that holds the lock.

    Yields:
        Whether the lock is held: False if another process holds it and ``wait`` is False.

    Raises:
        ResfastError: the file cannot be created or locked.
    """
    with _opened(path) as file:
        if fcntl is None:
            logger.warning("this system has no file locks: let one process at a time run a study")
            yield True
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise ResfastError(
                f"cannot lock {path}: {error.strerror}; choose another --out"
            ) from None
        yield True


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lets this process alone write a folder while the block runs.

    The folder has a file ``.lock`` meanwhile, which says who holds it. One that a killed process
    left does no harm. Where the file system has no locks, a warning is logged.

    Raises:
        ResfastError: another process holds the lock, or the file cannot be created.
    """
    path = folder / FOLDER_LOCK
    file = _acquired(path)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):  # while it is locked, so that no other can be lost
                path.unlink()
            file.close()


def remove_left_lock(folder: Path) -> None:
    """Removes the lock that a killed process left in a folder; one that is held stays."""
    if (folder / FOLDER_LOCK).exists():
        with contextlib.suppress(ResfastError), locked_folder(folder):
            pass


def _acquired(path: Path) -> IO[str] | None:
    """The locked file, or None where there are no locks."""
    while True:
        file = _opened(path)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no file locks")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            file.close()
            raise ResfastError(
                f"{path.parent} is being written by {holder}; wait for it to end, or stop it"
            ) from None
        except OSError as error:
            file.close()
            if error.errno not in _WITHOUT_LOCKS:
                raise ResfastError(
                    f"cannot lock {path}: {error.strerror}; choose another --out"
                ) from None
            logger.warning("%s is not locked against other processes: %s", path.parent, error)
            return None
        if _is_still(file, path):
            break
        file.close()  # its last holder has removed it since
    with contextlib.suppress(OSError):  # a full disk: the lock holds without it
        file.truncate(0)
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        file.write(json.dumps(who))
        file.flush()
    return file


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise ResfastError(
            f"cannot write {path}: {error.strerror}; free disk space or fix the permissions"
        ) from None


def _is_still(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """The process that wrote a lock, in words."""
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(who["since"])))
        return f"process {int(who['pid'])} on {who['host']} since {since}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another process"
