"""Locks between processes that the operating system releases when a process ends, killed or not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from resfast.errors import ResfastError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

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
    try:
        file = path.open("a")
    except OSError as error:
        raise ResfastError(
            f"cannot write {path}: {error.strerror}; free disk space or fix the permissions"
        ) from None
    with file:
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
