"""Chooses among several implementations of a convolution: measured once, then cached.

:mod:`resfast.ops.conv.cpu` and :mod:`resfast.ops.conv.cuda` provide the candidates and time them.
``RESFAST_CONV`` forces one wherever it applies. The variable is shared by both devices, so names
that belong to the other device are ignored.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ... import atomic
from .. import extension

logger = logging.getLogger("resfast")

NAMES = {
    "cpu": ("oneDNN", "gemm", "winograd", "direct"),
    "cuda": ("ours", "hopper", "cudnn", "torch"),
}
NUMBERED = re.compile(r"ours:\d+,\d+|hopper:\d+")
"""One of our CUDA kernels: ``ours:TILE,SPLITS``, ``hopper:CONFIGURATION``."""
MEASURE_SECONDS = 0.04
"""Time to measure each candidate for each shape on the CPU."""
MAX_SPREAD = 1.5
"""Largest ratio of median to shortest time at which a choice is cached for other processes."""
MAX_REPEATS = 5
"""On the CPU, candidates are measured for at most this many times as long if none is faster yet."""
TIE = 1.03
"""Ratio of median times up to which either of two candidates is a good choice."""
MAX_CHANCE = 0.01
"""Largest probability of an order of two candidates that were equally fast."""

Run = Callable[[Tensor, Tensor | None], Tensor]
Call = Callable[[], Tensor]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Plan:
    """How to compute convolutions of one shape: ``run(x, residual)``, which returns ``shape``.

    A plan that is not ``settled`` is a guess, because nothing could be measured; ask again later.
    """

    algorithm: str
    shape: torch.Size
    run: Run
    settled: bool = True


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def forced(device: str) -> str | None:
    """The candidate of this device that RESFAST_CONV names, if any."""
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
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    has_residual: bool,
    dilation: Sequence[int] = (1, 1),
) -> str:
    """The part of a cache key that describes the convolution."""
    sizes: list[Sequence[int]] = [x.shape, weight.shape, stride, padding]
    text = "-".join(",".join(map(str, part)) for part in sizes) + f"-{has_residual:d}"
    return text if max(dilation) == 1 else f"{text}-{','.join(map(str, dilation))}"


def versions() -> str:
    """The part of a cache key that describes the software."""
    from ... import __version__

    built = extension.fingerprint()
    return f"torch {torch.__version__}|resfast {__version__}, kernels {built}"


# -- measurement -----------------------------------------------------------------------------------


def near(exact: Tensor, max_error: float) -> Callable[[Tensor], bool]:
    """A predicate: the RMS error of a result, relative to the RMS of ``exact``, is small enough."""
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
    """The fastest candidate whose result is accurate.

    Args:
        calls: candidates by name, bound to their arguments.
        is_right: whether a result is accurate, such as :func:`near` returns.
        seconds: measures the candidates.
        trusted: name of the candidate that is the fallback if none works.
        what: description of the computation for messages.

    Returns:
        The name, and whether its times are consistent and the order certain, so that the choice can
        be cached; on a busy machine they are not.
    """
    accurate = {}
    for name, call in calls.items():
        try:
            if is_right(call()):
                accurate[name] = call
            else:
                warn_once(f"{name} is not accurate enough for {what} and is not used")
        except RuntimeError as error:  # from CUDA or a library, or out of memory
            if name == trusted:
                raise
            first_line = str(error).partition("\n")[0]
            warn_once(f"{name} failed and is not used for {what}: {first_line}")
    if not accurate:
        warn_once(f"using {trusted} for {what}: none of {', '.join(calls)} works")
        return trusted, False
    times = seconds(accurate)
    medians = {name: statistics.median(values) for name, values in times.items()}
    chosen = min(medians, key=medians.__getitem__)
    logger.debug("%s: %s of %s", what, chosen, medians)
    steady = medians[chosen] <= MAX_SPREAD * min(times[chosen])
    return chosen, steady and order_is_certain(times)


def order_is_certain(times: Times) -> bool:
    """Whether the candidate with the shortest median time is the fastest, or as good as that.

    Compares the times of each round, in which all candidates were measured one after the other: by
    a sign test, or because all times of one candidate are shorter than all of the other.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = min(medians, key=medians.__getitem__)
    for name, values in times.items():
        if (
            name == first
            or medians[name] <= TIE * medians[first]
            or max(times[first]) < min(values)
        ):
            continue
        wins = sum(one < other for one, other in zip(times[first], values, strict=True))
        rounds = len(values)
        if sum(math.comb(rounds, k) for k in range(wins, rounds + 1)) > MAX_CHANCE * 2**rounds:
            return False
    return True


def host_seconds(calls: Mapping[str, Call], seconds: float | None = None) -> Times:
    """Times on the CPU, measured in turns so that other load slows all candidates alike.

    Args:
        calls: candidates by name.
        seconds: to spend on each, by default :data:`MEASURE_SECONDS`; up to :data:`MAX_REPEATS`
            times as long while the order is not certain.
    """
    seconds = MEASURE_SECONDS if seconds is None else seconds
    times: Times = {name: [] for name in calls}
    for _ in range(MAX_REPEATS):
        end = time.perf_counter() + seconds * len(calls)
        rounds = 0
        while rounds < 3 or (time.perf_counter() < end and rounds < 100):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            rounds += 1
        if order_is_certain(times):
            break
    return times


# -- cache -----------------------------------------------------------------------------------------


class Choices:
    """Names of the chosen candidates by key, cached in a file between processes.

    The key contains everything that the choice depends on: machine, versions, dtype, sizes.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._known: dict[Path, dict[str, str]] = {}

    def path(self) -> Path:
        """``$XDG_CACHE_HOME/resfast/FILE``."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "resfast" / self.file

    def get(self, key: str, names: Iterable[str]) -> str | None:
        """The choice for a key, if there is one and it is among ``names``."""
        path = self.path()
        if path not in self._known:
            self._known[path] = _read(path)
        name = self._known[path].get(key)
        return name if name in names else None

    def put(self, key: str, name: str, *, keep: bool) -> None:
        """Stores a choice; with ``keep``, for other processes too."""
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
                f"{path} cannot be written ({error}); every process measures convolutions again"
            )

    def forget(self) -> None:
        """Clears the choices of this process; the file is kept."""
        self._known.clear()


def _read(path: Path) -> dict[str, str]:
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warn_once(f"{path} is ignored and will be rewritten: it cannot be read ({error})")
        return {}
    if not isinstance(choices, dict):
        warn_once(f"{path} is ignored and will be rewritten: it does not hold choices")
        return {}
    return {key: name for key, name in choices.items() if isinstance(name, str)}
