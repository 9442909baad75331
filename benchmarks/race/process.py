"""A process that can be paused, whose output lines carry the time of a clock outside it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

logger = logging.getLogger("resfast")

LAUNCH = Path(__file__).with_name("launch.py")
MARK = "RESFAST_RACE_PROCESS"
"""Environment variable by which all processes that a process started are found."""
STOP_SECONDS, KILL_SECONDS = 10.0, 10.0
TAIL_LINES = 20
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Line:
    """A line of output.

    Attributes:
        seconds: when it was read, in seconds since the process started, without its pauses.
        text: the line without its end; ``\\r`` ends a line too.
    """

    seconds: float
    text: str


class Process:
    """A command in a session of its own, with the lines of its standard output and error.

    Args:
        command: program and arguments.
        folder: working directory.
        log: file for its output; each line begins with its seconds.
        environment: variables to add.

    Attributes:
        tail: the last lines of its output.
        ended: whether it has ended and all of its lines were taken.
        paused_seconds: seconds it was paused.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._mark = uuid.uuid4().hex
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.ended = False
        self.paused_seconds = 0.0
        self._paused_at: float | None = None
        self._lines: deque[Line] = deque()
        self._log = log.open("w", encoding="utf-8")
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(LAUNCH), str(os.getpid()), *command],
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {}), MARK: self._mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._partial: dict[IO[bytes], bytes] = {
            self._process.stdout: b"",
            self._process.stderr: b"",
        }

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def seconds(self) -> float:
        """Seconds since it started, without its pauses."""
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        return now - self._started - self.paused_seconds

    def next_line(self, timeout: float) -> Line | None:
        """The next line; None if it ended or printed none for ``timeout`` seconds."""
        deadline = time.perf_counter() + timeout
        while not self._lines and not self.ended:
            left = deadline - time.perf_counter()
            if left <= 0:
                break
            self._read(min(left, _POLL_SECONDS))
        return self._lines.popleft() if self._lines else None

    def pause(self) -> None:
        """Stops it and everything it started, until :meth:`resume`."""
        if self._paused_at is not None:
            return
        at = time.perf_counter()
        self._signal_group(signal.SIGSTOP)
        self._wait_until_stopped()
        for pid in self._others():
            _send(pid, signal.SIGSTOP)
        self._paused_at = at
        self._read(0.0)  # printed before it stopped

    def resume(self) -> None:
        """Continues after a pause."""
        if self._paused_at is None:
            return
        others = list(self._others())
        self.paused_seconds += time.perf_counter() - self._paused_at
        self._paused_at = None
        for pid in others:
            _send(pid, signal.SIGCONT)
        self._signal_group(signal.SIGCONT)

    def kill(self) -> None:
        """Ends it and everything it started, at once; a process that ended is no error."""
        self._signal_group(signal.SIGKILL)
        deadline = time.perf_counter() + KILL_SECONDS
        while others := list(self._others()):
            for pid in others:
                _send(pid, signal.SIGKILL)
            if time.perf_counter() > deadline:
                logger.warning("processes %s do not end", ", ".join(map(str, others)))
                break
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        for pipe in list(self._partial):
            self._close(pipe)
        self._log.close()
        self.ended = True

    # -- output ------------------------------------------------------------------------------------

    def _read(self, timeout: float) -> None:
        """Takes what it has printed, after at most ``timeout`` seconds."""
        if not self._partial:  # it closed its output
            if self.code is None:
                time.sleep(timeout)
            else:
                self.ended = True
            return
        ready, _, _ = select.select(list(self._partial), [], [], timeout)
        seconds = self.seconds()
        if not ready and self.code is not None:  # something it started may keep the pipes open
            ready, _, _ = select.select(list(self._partial), [], [], 0.0)
            if not ready:
                for pipe in list(self._partial):
                    self._close(pipe)
                self.ended = True
        for pipe in ready:
            chunk = os.read(pipe.fileno(), 1 << 16)
            if not chunk:
                self._close(pipe)
                continue
            *whole, self._partial[pipe] = (
                (self._partial[pipe] + chunk).replace(b"\r", b"\n").split(b"\n")
            )
            for line in whole:
                self._add(seconds, line)

    def _close(self, pipe: IO[bytes]) -> None:
        self._add(self.seconds(), self._partial.pop(pipe))
        pipe.close()

    def _add(self, seconds: float, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if not text:
            return
        self._lines.append(Line(seconds, text))
        self.tail.append(text)
        if not self._log.closed:
            print(f"{seconds:.4f}\t{text}", file=self._log, flush=True)

    # -- signals -----------------------------------------------------------------------------------

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _wait_until_stopped(self) -> None:
        """Waits until all threads of the process have stopped, or it has ended."""
        if not hasattr(os, "waitid"):
            return
        flags = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
        deadline = time.perf_counter() + STOP_SECONDS
        while time.perf_counter() < deadline:
            with contextlib.suppress(ChildProcessError):
                stopped = os.waitid(os.P_PID, self._process.pid, flags) is not None
                if not stopped and not self._waits_for_stopped_child():
                    time.sleep(0.0005)
                    continue
            return
        logger.warning("process %d does not stop", self._process.pid)

    def _waits_for_stopped_child(self) -> bool:
        """Whether no thread runs because one waits in vfork for a child that stopped (Linux only).

        The child is stopped before it runs another program, and the wait cannot be interrupted.
        """
        states = ""
        with contextlib.suppress(OSError, IndexError):  # it ended meanwhile, or there is no /proc
            for task in Path(f"/proc/{self._process.pid}/task").iterdir():
                states += _state(task)
                if states[-1] == "D":
                    children = (task / "children").read_text().split()
                    states += "c" * any(_state(Path("/proc") / pid) == "T" for pid in children)
        return "c" in states and set(states) <= set("cDT")

    def _others(self) -> Iterator[int]:
        """Living processes that it started, in groups of their own too (Linux only)."""
        wanted = f"{MARK}={self._mark}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            pid = int(entry.name)
            if pid == self._process.pid:
                continue
            # Gone meanwhile, or another user's. That of a process that ended is empty.
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    yield pid


def _state(process: Path) -> str:
    """State of a process or thread by its folder in /proc: T if it is stopped."""
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
