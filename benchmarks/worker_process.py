"""Processes that answer lines of JSON, for ``benchmarks.peers`` and ``benchmarks.optimize``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TextIO


class WorkerProcess:
    """A process of a module, which answers once when it is ready and then each line that it reads.

    Args:
        module: name of the module, run with ``python -m``.
        arguments: of its command line.
    """

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, seconds: float) -> dict[str, Any]:
        """Its answer to a number of seconds."""
        assert self.process.stdin is not None
        print(seconds, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next answer, or why there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"missing": f"its process ended with code {self.process.wait()}"}
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def open_answers() -> TextIO:
    """In the process: a file for answers; what libraries print no longer gets between them."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers
