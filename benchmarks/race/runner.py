"""Runs contenders in turns: one continues while all others are paused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.race.contenders import Contender
from benchmarks.race.formats import Event, Format
from benchmarks.race.process import Line, Process
from benchmarks.race.rows import Phase, Row
from benchmarks.race.sample import Sampler
from benchmarks.report import slug
from resfast.errors import ResfastError

COMPILER_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Rules:
    """The same for all contenders.

    Attributes:
        trials: trials to measure, over all sessions.
        block: trials of a turn.
        warmup: trials at the start of each process that do not count, whatever their name is.
        patience: seconds without a sign of a trial after which a contender is ended.
    """

    trials: int
    block: int
    warmup: int
    patience: float


class Runner:
    """One contender: its process and the rows that come from it.

    Args:
        contender: whom to run.
        rules: of the race.
        rows: its rows from earlier sessions.
        record: takes each new row.
        sampler: reads the machine's state.
        logs: folder for its output.

    Attributes:
        trials: trials measured so far, over all sessions.
        over: whether it ended before it had all trials.
    """

    def __init__(
        self,
        contender: Contender,
        rules: Rules,
        rows: Sequence[Row],
        record: Callable[[Row], None],
        sampler: Sampler,
        logs: Path,
    ) -> None:
        self.contender, self.rules = contender, rules
        self.over = False
        self.trials = sum(row.phase == "trial" for row in rows)
        self._finished = sum(row.phase in ("trial", "warmup") for row in rows)
        self._session = max((row.session + 1 for row in rows), default=0)
        self._record, self._sampler, self._logs = record, sampler, logs
        self._process: Process | None = None
        self._caches: tempfile.TemporaryDirectory[str] | None = None
        self._format: Format
        self._block: int | None = None
        self._counts: dict[Phase, int] = {"preparation": 0, "warmup": 0, "trial": 0, "ended": 0}
        self._row_start = self._row_pauses = self._last_sign = 0.0

    @property
    def done(self) -> bool:
        """Whether it needs no further turn."""
        return self.over or self.trials >= self.rules.trials

    def prepare(self) -> None:
        """Starts it with empty caches of compilers; leaves it paused after its warm-up trials."""
        needed = self.rules.trials - self.trials + self.rules.warmup
        launch = self.contender.launch(needed, self._finished)
        name = f"{slug(self.contender.name)}-{self._session}"
        self._format = launch.format
        self._caches = tempfile.TemporaryDirectory(
            prefix=f"race-{name}-", ignore_cleanup_errors=True
        )
        variables = dict.fromkeys(COMPILER_CACHES, self._caches.name)
        log = self._logs / f"{name}.log"
        self._process = Process(launch.command, launch.folder, log, variables)
        self._advance(
            lambda: (
                self._counts["warmup"] >= self.rules.warmup
                and (self._counts["preparation"] > 0 or self._counts["trial"] > 0)
            )
        )

    def turn(self, block: int) -> None:
        """Runs it for a block of trials, and leaves it paused; ends it after its last trial."""
        self._block = block
        until = min(self.trials + self.rules.block, self.rules.trials)
        self._advance(lambda: self.trials >= until)
        if self.done:
            self.close()

    def close(self) -> None:
        """Ends its process."""
        if self._process is not None:
            self._process.kill()
        if self._caches is not None:
            self._caches.cleanup()

    def _advance(self, is_enough: Callable[[], bool]) -> None:
        process = self._process
        assert process is not None
        while not is_enough():
            process.resume()
            left = self._last_sign + self.rules.patience - process.seconds()
            line = process.next_line(left)
            try:
                if line is None:
                    raise ResfastError(self._why_it_ended(process))
                event = self._format.read(line.text)
                if event is not None:
                    self._take(event, line, process)
            except ResfastError as error:
                self._fail(str(error), process)
                return
        process.pause()

    def _take(self, event: Event, line: Line, process: Process) -> None:
        self._last_sign = line.seconds
        if event.kind != "end":
            if not any(self._counts.values()):
                self._add("preparation", line.seconds, process)
            return
        process.pause()
        count = self._counts["warmup"] + self._counts["trial"]
        is_warmup = event.warmup or count < self.rules.warmup
        self._add(
            "warmup" if is_warmup else "trial",
            line.seconds,
            process,
            label=event.label,
            own_seconds=event.seconds,
            accuracy=event.accuracy,
            tta_accuracy=event.tta_accuracy,
            sample=self._sampler.sample(),
        )

    def _fail(self, reason: str, process: Process) -> None:
        """Ends it early."""
        seconds = process.seconds()
        self.close()
        self.over = True
        self._add("ended", seconds, process, reason=reason, tail=tuple(process.tail))

    def _add(self, phase: Phase, seconds: float, process: Process, **values: Any) -> None:
        """Records a row that ends at ``seconds`` of the process."""
        row = Row(
            **values,
            contender=self.contender.name,
            phase=phase,
            session=self._session,
            number=self._counts[phase],
            block=self._block,
            seconds=max(0.0, seconds - self._row_start),
            paused_seconds=process.paused_seconds - self._row_pauses,
            date=datetime.now().astimezone().isoformat(timespec="milliseconds"),
        )
        self._counts[phase] += 1
        self._row_start, self._row_pauses = seconds, process.paused_seconds
        self.trials += phase == "trial"
        self._record(row)

    def _why_it_ended(self, process: Process) -> str:
        so_far = f"after {self.trials} of {self.rules.trials} trials"
        if not any(self._counts.values()):
            so_far = "and printed nothing that looks like a trial"
        if process.ended:
            return f"it ended with code {process.code} {so_far}"
        return f"it showed no sign of a trial for {self.rules.patience:g} s, {so_far}"


def run(runners: Sequence[Runner], sampler: Sampler, first_block: int) -> None:
    """Runs all contenders until each has its trials or has ended.

    All are started and warmed up first. Their turns then alternate, in the opposite order every
    other time, so that a slow drift of the machine affects all equally.

    Args:
        runners: the contenders.
        sampler: waits for the GPU between turns.
        first_block: number of the first turn.
    """
    try:
        for runner in runners:
            if not runner.done:
                sampler.wait_until_idle()
                runner.prepare()
        block, forwards = first_block, True
        while racing := [runner for runner in runners if not runner.done]:
            for runner in racing if forwards else racing[::-1]:
                sampler.wait_until_idle()
                runner.turn(block)
                block += 1
            forwards = not forwards
    finally:
        for runner in runners:
            runner.close()
