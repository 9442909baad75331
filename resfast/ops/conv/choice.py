"""The choice among several ways to compute a convolution: measured once, then kept.

:mod:`resfast.ops.conv.cpu` and :mod:`resfast.ops.conv.cuda` offer the ways and time them.
``RESFAST_CONV`` names one to be taken wherever it applies: one variable for both devices, so the
names of the other device are passed over.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resfast import atomic
from resfast.ops import extension

logger = logging.getLogger("resfast")

NAMES = {
    "cpu": ("oneDNN", "gemm", "winograd", "direct"),
    "cuda": ("ours", "hopper", "cudnn", "torch"),
}
NUMBERED = re.compile(r"ours:\d+,\d+|hopper:\d+")
"""One kernel of ours on CUDA: ``ours:TILE,SPLITS``, ``hopper:CONFIGURATION``."""
MEASURE_SECONDS = 0.04
"""Spent on each way of each shape on the CPU."""
MAX_SPREAD = 1.5
"""Median over shortest time up to which a measurement is kept for other processes."""

Run = Callable[[Tensor, Tensor | None], Tensor]
Call = Callable[[], Tensor]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Plan:
    """How convolutions of one shape are computed: ``run(x, residual)``, to a given ``shape``.

    One that is not ``settled`` is a guess where nothing could be measured: ask again next time.
    """

    algorithm: str
    shape: torch.Size
    run: Run
    settled: bool = True


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def forced(device: str) -> str | None:
    """What RESFAST_CONV names of a device's ways, if anything."""
    named = os.environ.get("RESFAST_CONV")
    if not named:
        return None
    if named in NAMES[device] or (device == "cuda" and NUMBERED.fullmatch(named)):
        return named
    known = [name for names in NAMES.values() for name in names]
    if named not in known and not NUMBERED.fullmatch(named):
        known += ["ours:TILE,SPLITS", "hopper:CONFIGURATION"]
        warn_once(f"RESFAST_CONV={named} is unknown; expected one of {', '.join(known)}")
    return None


def describe_sizes(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], has_residual: bool
) -> str:
    """The part of a key that says what is convolved."""
    sizes = (x.shape, weight.shape, stride, padding)
    return "-".join(",".join(map(str, part)) for part in sizes) + f"-{has_residual:d}"


def versions() -> str:
    """The part of a key that says by which software."""
    from resfast import __version__

    built = extension.fingerprint()
    return f"torch {torch.__version__}|resfast {__version__}, kernels {built}"


# -- measurement -----------------------------------------------------------------------------------


def near(exact: Tensor, max_error: float) -> Callable[[Tensor], bool]:
    """Whether a result is right: by root mean square, relative to that of the exact one."""
    limit = max_error * exact.square().mean().sqrt()
    return lambda out: bool((out.to(exact.dtype) - exact).square().mean().sqrt() <= limit)


def fastest(
    calls: Mapping[str, Call],
    *,
    is_right: Callable[[Tensor], bool],
    seconds: Callable[[Mapping[str, Call]], Times],
    trusted: str,
    what: str,
) -> tuple[str, bool]:
    """The fastest of the ways whose result is right.

    Args:
        calls: each way by its name, on given arguments.
        is_right: says so of a result, as :func:`near` does.
        seconds: times of each.
        trusted: the name of the way that needs no check, and is taken where no other works.
        what: is computed, for messages.

    Returns:
        Its name, and whether its times agree, so that the choice is worth keeping: they do not on a
        busy machine.
    """
    good = {}
    for name, call in calls.items():
        try:
            if name == trusted or is_right(call()):
                good[name] = call
            else:
                warn_once(f"{name} is not accurate enough for {what}, and is left out")
        except RuntimeError as error:  # of CUDA, of a library, or out of memory
            if name == trusted:
                raise
            first = str(error).partition("\n")[0]
            warn_once(f"{name} is left out of the choice for a convolution: {first} ({what})")
    if not good:
        warn_once(f"{trusted} computes {what}: none of {', '.join(calls)} works")
        return trusted, False
    times = seconds(good)
    chosen = min(times, key=lambda name: min(times[name]))
    shortest = {name: min(values) for name, values in times.items()}
    logger.debug("%s: %s of %s", what, chosen, shortest)
    steady = statistics.median(times[chosen]) <= MAX_SPREAD * shortest[chosen]
    return chosen, steady


def host_seconds(calls: Mapping[str, Call]) -> Times:
    """Times on the CPU, measured in turns, so that a busy machine slows all of them alike."""
    times: Times = {name: [] for name in calls}
    end, rounds = time.perf_counter() + MEASURE_SECONDS * len(calls), 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 100):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


# -- memory ----------------------------------------------------------------------------------------


class Choices:
    """Names of ways by a key, kept in a file between processes.

    The key holds all that the choice depends on: machine, versions, dtype, sizes.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._known: dict[Path, dict[str, str]] = {}

    def path(self) -> Path:
        """``$XDG_CACHE_HOME/resfast/FILE``."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "resfast" / self.file

    def get(self, key: str, names: Iterable[str]) -> str | None:
        """The choice for a key, where it is one of ``names``."""
        path = self.path()
        if path not in self._known:
            self._known[path] = _read(path)
        name = self._known[path].get(key)
        return name if name in names else None

    def put(self, key: str, name: str, *, keep: bool) -> None:
        """Remembers a choice, and with ``keep`` for other processes too."""
        path = self.path()
        self._known.setdefault(path, {})[key] = name
        if not keep:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            merged = {**_read(path), key: name}  # another process may have written meanwhile
            atomic.write_bytes(path, json.dumps(merged, indent=0, sort_keys=True).encode())
        except OSError as error:
            warn_once(
                f"{path} cannot be written ({error}); convolutions are measured in each process"
            )

    def forget(self) -> None:
        """What is remembered in this process; the file stays."""
        self._known.clear()


def _read(path: Path) -> dict[str, str]:
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warn_once(f"{path} is ignored: it cannot be read ({error}); it is written anew")
        return {}
    if not isinstance(choices, dict):
        warn_once(f"{path} is ignored: it does not hold choices of algorithms; it is written anew")
        return {}
    return {key: name for key, name in choices.items() if isinstance(name, str)}
