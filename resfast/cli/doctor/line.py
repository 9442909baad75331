"""Input and output of the doctor's probes, and functions that several probes use.

Standard library only: any other import belongs inside a probe, where a crash is contained.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import resfast

PACKAGE = Path(resfast.__file__).resolve().parent

State = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Line:
    """What one probe found."""

    name: str
    state: State
    text: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.name:<13} {self.text}{' → ' if self.todo else ''}{self.todo}"


@dataclass(frozen=True)
class Options:
    """Arguments of the probes."""

    data: str = "auto"
    data_dir: str = "data"


def dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if the text is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(unknown version)"


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def driver() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text):
            return match[1]
    return "(unknown version)"


def output_of(*command: str) -> str:
    """Output of a program; empty if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
