"""The rows of a race as statistics and comparisons, as ``race.json`` has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.race import comparison
from benchmarks.race.contenders import Contender
from benchmarks.race.rows import Row
from benchmarks.race.runner import Rules
from resfast.runs.statistics import statistics

Clock = Literal["outside", "own"]
CLOCK_TOLERANCE_S = 0.05
CLOCKS: dict[Clock, str] = {"outside": "seconds", "own": "own_seconds"}
"""Fields of a row that have the seconds of each clock."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figures(_Stored):
    """Statistics of one figure over trials; see :class:`resfast.runs.statistics.Statistics`."""

    count: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


class Result(_Stored):
    """A contender's result. Seconds are by the clock outside, without pauses, except its own.

    Attributes:
        name, kind, command, script_sha256: as in :class:`benchmarks.race.contenders.Contender`.
        seconds: of a trial.
        own_seconds: of a trial, by the contender's own clock.
        accuracy: of one view per image, 0 to 1.
        tta_accuracy: with test-time augmentation, 0 to 1.
        preparation_seconds: of each process, up to the first sign of a trial.
        warmup_seconds: of all warm-up trials of each process.
        first_result_seconds: from the start of each process to its first trial that counts.
        seconds_with_warmup: all seconds with preparation and warm-up, divided by the trials.
        sm_mhz, gpu_celsius, cpu_mhz, load: at the end of the trials, with everybody paused.
        problems: why it ended early, or why a figure of it is wrong.
    """

    name: str
    kind: Literal["resfast", "peer"]
    command: str
    script_sha256: str | None
    seconds: Figures | None
    own_seconds: Figures | None
    accuracy: Figures | None
    tta_accuracy: Figures | None
    preparation_seconds: Figures | None
    warmup_seconds: Figures | None
    first_result_seconds: Figures | None
    seconds_with_warmup: float | None
    sm_mhz: Figures | None
    gpu_celsius: Figures | None
    cpu_mhz: Figures | None
    load: Figures | None
    problems: list[str]


class Estimate(_Stored):
    """See :class:`benchmarks.race.comparison.Estimate`."""

    value: float
    low: float | None
    high: float | None


class Comparison(_Stored):
    """One of ours and one of the peers, by one clock.

    Attributes:
        ratio: our mean seconds of a trial divided by the peer's, with Fieller's interval.
        p_value: of the test that our mean is below the target ratio times the peer's.
        accuracy_difference: our mean accuracy of one view minus the peer's, 0 to 1.
        tta_accuracy_difference: the same with test-time augmentation.
    """

    ours: str
    peer: str
    clock: Clock
    ratio: Estimate
    p_value: float | None
    accuracy_difference: Estimate | None
    tta_accuracy_difference: Estimate | None


class Race(_Stored):
    """``race.json``.

    Attributes:
        command: the command that ran it, without folders of this machine.
        data, data_digest: the images, as in a run's summary.
        hardware: processor, GPU and versions of the software.
        trials, block, warmup: see :class:`benchmarks.race.runner.Rules`.
        target_ratio: what the p-values test.
        date: YYYY-MM-DD of the last row; today before the first.
    """

    command: str
    data: str
    data_digest: str
    hardware: dict[str, Any]
    trials: int
    block: int
    warmup: int
    target_ratio: float
    date: str
    contenders: list[Result]
    comparisons: list[Comparison]


def results(contenders: Sequence[Contender], rows: Sequence[Row]) -> list[Result]:
    """The result of each contender."""
    return [_result(one, [row for row in rows if row.contender == one.name]) for one in contenders]


def _result(contender: Contender, rows: Sequence[Row]) -> Result:
    trials = [row for row in rows if row.phase == "trial"]
    by_session = [
        [row for row in rows if row.session == session]
        for session in sorted({row.session for row in rows})
    ]
    first_results = []
    for session in by_session:
        if (first := _index_of_first_trial(session)) is not None:
            first_results.append(math.fsum(row.seconds for row in session[: first + 1]))
    all_seconds = math.fsum(row.seconds for row in rows if row.phase != "ended")
    return Result(
        name=contender.name,
        kind=contender.kind,
        command=contender.shown,
        script_sha256=contender.digest,
        seconds=_figures(row.seconds for row in trials),
        own_seconds=_figures(row.own_seconds for row in trials),
        accuracy=_figures(row.accuracy for row in trials),
        tta_accuracy=_figures(row.tta_accuracy for row in trials),
        preparation_seconds=_figures(row.seconds for row in rows if row.phase == "preparation"),
        warmup_seconds=_figures(
            math.fsum(row.seconds for row in session if row.phase == "warmup") or None
            for session in by_session
        ),
        first_result_seconds=_figures(first_results),
        seconds_with_warmup=all_seconds / len(trials) if trials else None,
        sm_mhz=_figures(row.sample.sm_mhz for row in trials),
        gpu_celsius=_figures(row.sample.gpu_celsius for row in trials),
        cpu_mhz=_figures(row.sample.cpu_mhz for row in trials),
        load=_figures(row.sample.load for row in trials),
        problems=_problems(rows),
    )


def _problems(rows: Sequence[Row]) -> list[str]:
    found = [row.reason or "" for row in rows if row.phase == "ended"]
    # A trial that took longer than the time from the end of the one before.
    late = sum((row.own_seconds or 0) > row.seconds + CLOCK_TOLERANCE_S for row in rows)
    if late:
        found.append(
            f"own seconds of {late} trials are more than the seconds outside: its clock runs on "
            "while it is paused, so measure it with --block as high as --trials"
        )
    return found


def _index_of_first_trial(rows: Sequence[Row]) -> int | None:
    return next((index for index, row in enumerate(rows) if row.phase == "trial"), None)


def _figures(values: Iterable[float | None]) -> Figures | None:
    known = [value for value in values if value is not None]
    return Figures(**asdict(statistics(known))) if known else None


def comparisons(found: Sequence[Result], rows: Sequence[Row], target: float) -> list[Comparison]:
    """Each of ours with each peer, by both clocks, where both have trials with a time."""
    done = []
    for ours in (one for one in found if one.kind == "resfast"):
        for peer in (one for one in found if one.kind == "peer"):
            for clock, field in CLOCKS.items():
                first, second = _values(rows, ours.name, field), _values(rows, peer.name, field)
                if first and second:
                    done.append(
                        Comparison(
                            ours=ours.name,
                            peer=peer.name,
                            clock=clock,
                            ratio=Estimate(**asdict(comparison.ratio(first, second))),
                            p_value=comparison.p_faster(first, second, target),
                            accuracy_difference=_difference(rows, ours, peer, "accuracy"),
                            tta_accuracy_difference=_difference(rows, ours, peer, "tta_accuracy"),
                        )
                    )
    return done


def _values(rows: Sequence[Row], name: str, field: str) -> list[float]:
    values = [getattr(row, field) for row in rows if row.contender == name and row.phase == "trial"]
    return [value for value in values if value is not None]


def _difference(rows: Sequence[Row], ours: Result, peer: Result, field: str) -> Estimate | None:
    first, second = _values(rows, ours.name, field), _values(rows, peer.name, field)
    if not (first and second):
        return None
    return Estimate(**asdict(comparison.difference(first, second)))


def race(
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    rules: Rules,
    *,
    target_ratio: float,
    command: str,
    data: str,
    data_digest: str,
    hardware: dict[str, Any],
) -> Race:
    """All results of a race so far."""
    found = results(contenders, rows)
    return Race(
        command=command,
        data=data,
        data_digest=data_digest,
        hardware=hardware,
        trials=rules.trials,
        block=rules.block,
        warmup=rules.warmup,
        target_ratio=target_ratio,
        date=max((row.date for row in rows), default=f"{datetime.now():%Y-%m-%d}")[:10],
        contenders=found,
        comparisons=comparisons(found, rows, target_ratio),
    )
