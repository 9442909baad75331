"""Writes ``steps.csv``, a row for each step, for ``--record``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from resfast.runs import folder as records
from resfast.training.gradient_probe import COLUMNS

_COMMON = ("step", "epoch", "learning_rate", "loss")


class StepRecords:
    """The rows of ``steps.csv``: step and epoch from 1, learning rate, loss, and what is measured.

    The file is replaced at the end of each epoch. After a resume, rows of steps that are trained
    again are replaced.

    Args:
        folder: folder of the run.
        record: names of :data:`~resfast.training.gradient_probe.COLUMNS`.
    """

    def __init__(self, folder: Path, record: Iterable[str]) -> None:
        self.path = folder / records.STEPS
        self.header = [*_COMMON, *(column for name in record for column in COLUMNS[name])]
        self.rows: list[list[str]] = []
        if self.path.exists():
            header, *rows = csv.reader(self.path.read_text(encoding="utf-8").splitlines()) or [[]]
            self.rows = rows if header == self.header else []

    def add(self, first: int, epoch: int, rows: Iterable[Iterable[float]]) -> None:
        """Writes the rows of an epoch, or of its first part.

        Args:
            first: steps of the run before it.
            epoch: its index, from 0.
            rows: for each step the values of the header after the epoch.

        Raises:
            ResfastError: the file cannot be written; the old one is intact.
        """
        self.rows = [row for row in self.rows if int(row[0]) <= first]
        for step, values in enumerate(rows, first + 1):
            self.rows.append([str(step), str(epoch + 1), *(f"{value:.9g}" for value in values)])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        records.write_text(self.path, text.getvalue())
