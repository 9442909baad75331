"""Recognizes in a line of output that a trial started or ended, and with what result."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs.summary import read_run

Pattern = re.Pattern[str]


@dataclass(frozen=True)
class Event:
    """What a line says about a trial.

    Attributes:
        kind: ``start``: trials begin; ``label``: the trial that runs has this name; ``end``: it
            ended.
        label: the contender's own name of the trial, if it has one.
        warmup: whether the contender calls the trial a warm-up.
        accuracy: test accuracy of one view per image, 0 to 1.
        tta_accuracy: test accuracy with test-time augmentation, 0 to 1.
        seconds: by the contender's own clock.
    """

    kind: Literal["start", "label", "end"]
    label: str | None = None
    warmup: bool = False
    accuracy: float | None = None
    tta_accuracy: float | None = None
    seconds: float | None = None


class Format(Protocol):
    """How a contender reports its trials. One object per process: it may remember lines."""

    def read(self, line: str) -> Event | None:
        """What a line says; None if it says nothing about trials.

        Raises:
            ResfastError: the result that it announces cannot be used.
        """


class Table:
    """A table with a row per epoch and one whose epoch is ``eval`` at the end of each trial.

    Columns are found by their names in the head: ``run`` (only in the first row of a trial; no
    number for a warm-up), ``epoch``, one ending in ``seconds``, and accuracies (``val_acc`` or
    ``test_acc``, with ``tta_`` before it for test-time augmentation). This is what airbench
    (https://github.com/KellerJordan/cifar10-airbench) and its descendants print.
    """

    def __init__(self) -> None:
        self._columns: list[str] = []
        self._label: str | None = None

    def read(self, line: str) -> Event | None:
        """See :class:`Format`."""
        text = line.strip()
        if not (text.startswith("|") and text.endswith("|") and len(text) > 1):
            return None
        cells = [cell.strip() for cell in text[1:-1].split("|")]
        if "epoch" in cells and any(cell.endswith("seconds") for cell in cells):
            self._columns = cells
            return Event("start")
        if len(cells) != len(self._columns):
            return None
        row = dict(zip(self._columns, cells, strict=True))
        self._label = row.get("run") or self._label
        warmup = self._label is not None and not self._label.isdigit()
        if row["epoch"] != "eval":
            return Event("label", self._label, warmup) if row.get("run") else None
        label, self._label = self._label, None
        return Event(
            "end",
            label,
            warmup,
            accuracy(_first(row, "val_acc", "test_acc")),
            accuracy(_first(row, "tta_val_acc", "tta_test_acc")),
            _seconds(_first(row, *(name for name in row if name.endswith("seconds")))),
        )


def _first(row: dict[str, str], *names: str) -> str | None:
    return next((row[name] for name in names if row.get(name)), None)


@dataclass
class Patterns:
    """Lines described by regular expressions, which are searched anywhere in a line.

    Attributes:
        trial: a line that ends a trial; named groups ``accuracy``, ``tta_accuracy``, ``seconds``
            and ``label``, all optional.
        warmup: a line in a warm-up trial, or the one that ends it.
        start: the first line after the preparation.
    """

    trial: Pattern
    warmup: Pattern | None = None
    start: Pattern | None = None
    _warmup: bool = False

    def read(self, line: str) -> Event | None:
        """See :class:`Format`."""
        is_warmup = self.warmup is not None and self.warmup.search(line) is not None
        self._warmup = self._warmup or is_warmup
        if found := self.trial.search(line):
            values, warmup = found.groupdict(), self._warmup
            self._warmup = False
            return Event(
                "end",
                values.get("label"),
                warmup,
                accuracy(values.get("accuracy")),
                accuracy(values.get("tta_accuracy")),
                _seconds(values.get("seconds")),
            )
        if is_warmup:
            return Event("label", None, True)
        if self.start is not None and self.start.search(line):
            return Event("start")
        return None


@dataclass(frozen=True)
class Ours:
    """The output of ``resfast.train --runs``; results are those of each run's ``summary.json``.

    Attributes:
        folder: the common folder of the runs.
        digest: digest of the images that they should have been trained on.
    """

    folder: Path
    digest: str

    def read(self, line: str) -> Event | None:
        """See :class:`Format`."""
        if line.startswith(f"{self.folder}/seed"):  # the first line of each training
            return Event("start")
        found = re.match(r"seed (\d+) \(\d+ of \d+\): ", line)
        if found is None:
            return None
        summary = read_run(self.folder / f"seed{found[1]}" / records.SUMMARY)
        if summary.data_digest != self.digest:
            raise ResfastError(
                f"seed {found[1]} was not trained on the images of the race, but on "
                f"{summary.data} of another size or content: leave out options that change them"
            )
        return Event(
            "end",
            f"seed {found[1]}",
            False,
            summary.test_accuracy,
            summary.tta_accuracy,
            summary.seconds_by_kind().timed,
        )


def accuracy(text: str | None) -> float | None:
    """An accuracy from 0 to 1, or in percent above 1; None if it is missing or no such number."""
    value = _number(text)
    if value is None or not 0 <= value <= 100:
        return None
    return value / 100 if value > 1 else value


def _seconds(text: str | None) -> float | None:
    value = _number(text)
    return value if value is not None and value > 0 else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
