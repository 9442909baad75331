"""Makes SIGINT and SIGTERM save and stop a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run stopped by a signal after saving; ``path`` is its folder."""

    def __init__(self, path: Path, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.path, self.signum = path, signum


class StopSignals:
    """Context manager that records SIGINT and SIGTERM; a second signal stops at once.

    Args:
        say: called with a line of text when the first signal arrives.

    Attributes:
        received: number of the first signal, or None.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signum
        self.say("stopping after this step; interrupt again to stop without saving")

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
