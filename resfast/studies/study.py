"""Runs a study: trains what is not trained yet, then writes the results, summary and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resfast import atomic
from resfast.data.dataset import print_to_stderr
from resfast.inference.ensemble import EnsembleResult, ensemble
from resfast.runs.lock import lock
from resfast.studies.definition import Study
from resfast.studies.results import RESULTS, Row, row_of, save_results
from resfast.studies.runner import Progress, Runner, Settings, Unit

SUMMARY = "summary.md"


@dataclass(frozen=True)
class StudyResult:
    """A study whose runs are finished.

    Attributes:
        path: its folder.
        rows: one for each run.
        progress: what this process has trained.
    """

    path: Path
    rows: list[Row]
    progress: Progress


def run(
    study: Study, settings: Settings, say: Callable[[str], None] = print_to_stderr
) -> StudyResult:
    """Trains the runs of a study that are not finished, and writes what they show.

    ``results.csv`` is rewritten after each run; ``summary.md`` and the figures when all runs are
    finished, or the study is interrupted.

    Args:
        study: the study.
        settings: how it is run.
        say: called with a line of text for each notable step.

    Raises:
        ResfastError: bad input, or files that cannot be read or written.
        KeyboardInterrupt: SIGINT or SIGTERM came; the run was saved.
    """
    runner = Runner(study, settings, say)
    try:
        runner.train(lambda: write_rows(runner))
    except KeyboardInterrupt:
        if runner.finished():
            write(runner, combine=False)
        raise
    return StudyResult(runner.path, write(runner, say), runner.progress)


def write_rows(runner: Runner) -> list[Row]:
    """Writes ``results.csv`` of the runs of the study that are finished."""
    with lock(runner.path / "locks" / "results", wait=True):
        rows = [row_of(unit) for unit in runner.finished()]
        save_results(runner.path / RESULTS, rows)
    return rows


def write(
    runner: Runner, say: Callable[[str], None] = print_to_stderr, *, combine: bool = True
) -> list[Row]:
    """Writes results, figures and summary of the finished runs, at least one.

    Args:
        runner: has trained them.
        say: called with a line of text for each notable step.
        combine: whether to score the ensembles of a study that has any.
    """
    from resfast.studies.figures import save_figures  # matplotlib is slow to import
    from resfast.studies.summary import summary_text

    rows = write_rows(runner)
    study, finished = runner.study, runner.finished()
    ensembles = {}
    if combine and any(plot.kind == "ensemble" for plot in study.plots):
        ensembles = combined(finished, runner.settings, say)
    with lock(runner.path / "locks" / "results", wait=True):
        figures = save_figures(runner.path, study, finished, rows, ensembles)
        text = summary_text(
            study,
            rows,
            quick=runner.settings.quick,
            seeds=max(unit.seed for unit in runner.units) + 1,
            figures=figures,
            ensembles=ensembles,
        )
        atomic.save(runner.path / SUMMARY, text.encode())
    return rows


def combined(
    units: Sequence[Unit], settings: Settings, say: Callable[[str], None]
) -> dict[str, EnsembleResult]:
    """Result of each variant's finished runs together, if there are at least two."""
    runs: dict[str, list[Path]] = {}
    for unit in units:
        if not unit.is_diverged:
            runs.setdefault(unit.variant.name, []).append(unit.path)
    found = {}
    for name, paths in runs.items():
        if len(paths) > 1:
            say(f"scoring {len(paths)} runs of {name} together")
            device = "auto" if settings.device is None else settings.device
            found[name] = ensemble(paths, data_dir=settings.data_dir, device=device, report=say)
    return found
