"""Reads the folders of runs for a report, whatever of them exists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from resfast.config.compare import differences
from resfast.config.files import load
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs.epoch_row import EpochRow, read_rows
from resfast.runs.find import expanded
from resfast.runs.stored import EvaluatedOn
from resfast.runs.summary import RunSummary, read_run
from resfast.text import printable


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run as a report shows it.

    Attributes:
        path: its folder.
        name: short and unique in the report.
        config: its configuration.
        rows: its epochs so far.
        summary: its result; None if it is unfinished or the file is damaged.
        notes: sentences about files that are missing or damaged.
    """

    path: Path
    name: str
    config: Config
    rows: tuple[EpochRow, ...]
    summary: RunSummary | None
    notes: tuple[str, ...] = ()

    @property
    def scored_on(self) -> EvaluatedOn:
        """Images that the run is judged by; not the test images if it did not use them."""
        if self.summary is not None and self.summary.scored_on is not None:
            return self.summary.scored_on
        return "test" if self.config.evaluation.score_test else "val"

    @property
    def accuracy(self) -> float | None:
        """The headline accuracy of a finished run, 0 to 1."""
        if self.summary is None:
            return None
        try:
            return self.summary.headline_accuracy()[1]
        except ResfastError:
            return None


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed alone; most often one.

    Attributes:
        name: of the run, or of the folder that all runs are in.
        number: from 0, which chooses its colour.
        runs: at least one.
    """

    name: str
    number: int
    runs: tuple[ReportedRun, ...]

    @property
    def summaries(self) -> list[RunSummary]:
        """Results of the finished runs."""
        return [run.summary for run in self.runs if run.summary is not None]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits; empty without a finished run."""
        found = self.summaries
        return tuple(found[0].per_class_accuracy) if found else ()

    def confusion(self) -> Tensor | None:
        """Sum over the finished runs, int64 ``[classes, classes]``; None without one."""
        found = [torch.tensor(summary.confusion) for summary in self.summaries]
        alike = [matrix for matrix in found if matrix.shape == found[0].shape and matrix.numel()]
        return torch.stack(alike).sum(0) if alike else None


def collect(paths: Sequence[str | Path]) -> list[ReportedRun]:
    """Reads runs, those in folders of several too.

    Args:
        paths: folders of runs, of ``--runs``, or of a study.

    Raises:
        ResfastError: a folder that is no run and has none, a ``config.json`` that cannot be read,
            or the same run twice.
    """
    found = expanded(paths, "a report")
    for path in found:
        if not (path / records.CONFIG).is_file():
            what = (
                "is not a folder" if not path.is_dir() else f"has no {records.CONFIG} and no runs"
            )
            raise ResfastError(
                f"{path} {what}; expected the folder of a run (runs/NAME) or of several"
            )
    names = short_names(found)
    return [_read(path, name) for path, name in zip(found, names, strict=True)]


def _read(path: Path, name: str) -> ReportedRun:
    notes = []
    rows: tuple[EpochRow, ...] = ()
    summary = None
    if (path / records.METRICS).is_file():
        try:
            rows = tuple(read_rows(path / records.METRICS))
        except ResfastError as error:
            notes.append(f"The curves are left out: {error}.")
    if (path / records.SUMMARY).is_file():
        try:
            summary = read_run(path / records.SUMMARY)
        except ResfastError as error:
            notes.append(f"The result is left out: {error}.")
    return ReportedRun(path, name, load(path / records.CONFIG), rows, summary, tuple(notes))


def short_names(paths: Sequence[Path]) -> list[str]:
    """Unique names of runs: their paths below the folder that all of them are in."""
    whole = [Path(os.path.abspath(path)) for path in paths]
    if len(whole) == 1:
        return [printable(whole[0].name)]
    common = Path(os.path.commonpath([path.parent for path in whole]))
    return [printable(path.relative_to(common).as_posix()) for path in whole]


def groups_of(runs: Sequence[ReportedRun]) -> list[Group]:
    """Runs by folder and configuration, seeds aside, in the order of their first runs."""
    together: list[list[ReportedRun]] = []
    for run in runs:
        for others in together:
            first = others[0]
            beside = first.path.absolute().parent == run.path.absolute().parent
            if beside and not differences(_without_seed(first.config), _without_seed(run.config)):
                others.append(run)
                break
        else:
            together.append([run])
    return [
        Group(_group_name(members, len(together)), number, tuple(members))
        for number, members in enumerate(together)
    ]


def _group_name(members: Sequence[ReportedRun], groups: int) -> str:
    if len(members) == 1:
        return members[0].name
    parents = {os.path.abspath(run.path.parent) for run in members}
    if len(parents) == 1 and (groups == 1 or "/" in members[0].name):
        shown = members[0].name.rpartition("/")[0] or Path(next(iter(parents))).name
        return f"{printable(shown)} ({len(members)} runs)"
    return f"{members[0].name} and {len(members) - 1} more"


def _without_seed(config: Config) -> Config:
    return replace(config, runtime=replace(config.runtime, seed=0))
