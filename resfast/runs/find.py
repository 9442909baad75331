"""Finds the runs in a folder of several: of ``--runs``, of a study, or of both nested."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs.summary import RunSummary, read_run

logger = logging.getLogger("resfast")

OWN_FILES = (records.METRICS, records.WEIGHTS, records.BEST, records.CHECKPOINT)
"""Files that the folder of one run has, and that of several runs has not."""
_SEED = re.compile(r"seed\d+")
MAX_DEPTH = 4
"""Levels of folders that are searched for runs."""


def is_one_run(path: Path) -> bool:
    """Whether a folder is that of one run that has begun to train."""
    return any((path / name).is_file() for name in OWN_FILES)


def natural(path: Path) -> list[tuple[int, int, str]]:
    """Key that sorts ``seed2`` before ``seed10``."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def runs_in(path: Path) -> list[Path]:
    """The runs of a folder of several, sorted by path with numbers in order.

    A run in a run, as in the folder of a run that others were added to, is not looked for.

    Args:
        path: a folder.

    Returns:
        Folders of single runs below it; empty if ``path`` is one run itself, or has none.

    Raises:
        ResfastError: it cannot be read.
    """
    if is_one_run(path) or not path.is_dir():
        return []
    return sorted(_below(path, MAX_DEPTH), key=natural)


def _below(path: Path, depth: int) -> list[Path]:
    try:
        inside = [child for child in path.iterdir() if child.is_dir()]
    except OSError as error:
        raise ResfastError(
            f"cannot read {path}: {error.strerror}; expected the folder of a run or of several"
        ) from None
    found: list[Path] = []
    for child in inside:
        if is_one_run(child):
            found.append(child)
            continue
        below = _below(child, depth - 1) if depth > 1 else []
        if not below and (child / records.CONFIG).is_file():
            below = [child]  # stopped before its first epoch
        found += below
    return found


def seeds_in(path: Path) -> list[Path]:
    """The runs of a folder of ``--runs``, which differ in their seed; empty for any other path.

    A folder in which all runs are named ``seed0`` and so on, as a study has, is one too.
    """
    found = runs_in(path)
    named = all(run.parent == path and _SEED.fullmatch(run.name) for run in found)
    return found if named or (path / records.CONFIG).is_file() else []


def expanded(paths: Sequence[str | Path], purpose: str) -> list[Path]:
    """Paths of runs, with the runs of a folder of several in its place.

    Args:
        paths: folders of runs, of several runs, or files of weights.
        purpose: what needs them, such as ``an ensemble``, for the error message.

    Raises:
        ResfastError: no run, or the same one twice.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        found += runs_in(path) or [path]
    if not found:
        raise ResfastError(f"{purpose} needs at least one run; pass folders such as runs/NAME")
    resolved = [path.resolve() for path in found]
    for path, whole in zip(found, resolved, strict=True):
        if resolved.count(whole) > 1:
            raise ResfastError(f"run {path} is given twice; {purpose} has each run once")
    return found


def one_of(path: Path, weights: str, say: Callable[[str], None]) -> Path:
    """The run that stands for a folder of ``--runs``, where one network is needed.

    It is the one with the highest accuracy on its held-out images. Where runs have none, it is the
    first that is trained: a choice by the test images would make their accuracy too high.

    Args:
        path: any path; one that is not a folder of ``--runs`` is returned as it is.
        weights: name of the file of weights that is needed.
        say: called with a line about the choice.

    Raises:
        ResfastError: none of the runs has such weights.
    """
    runs = seeds_in(path)
    if not runs:
        return path
    usable = [run for run in runs if (run / weights).is_file()]
    if not usable:
        raise ResfastError(
            f"none of the {len(runs)} runs in {path} has {weights}; finish one with "
            f"python -m resfast.train --resume {path}"
        )
    scores = [_held_out_accuracy(run) for run in usable]
    known = [score for score in scores if score is not None]
    if len(known) == len(usable):
        best = max(known)
        chosen = usable[scores.index(best)]
        say(f"of the {len(runs)} runs in {path}: {chosen.name}, the best on held-out images")
        return chosen
    say(f"of the {len(runs)} runs in {path}: {usable[0].name}, the first, as none were held out")
    return usable[0]


def with_single_runs(config: Config, say: Callable[[str], None]) -> Config:
    """The configuration with one run for each folder of ``--runs`` to learn from.

    The run that :func:`one_of` chooses is what ``config.json`` will name, so that a resumed
    training learns from the same one.

    Args:
        config: names them with ``--init-from``, ``--teacher`` and ``--pseudo-from``.
        say: called with a line about each choice.

    Raises:
        ResfastError: none of the runs in such a folder has final weights.
    """
    transfer = config.transfer
    chosen: dict[str, Any] = {
        name: one_of(path.expanduser(), records.WEIGHTS, say)
        for name in ("init_from", "teacher", "pseudo_from")
        if (path := getattr(transfer, name)) is not None and seeds_in(path.expanduser())
    }
    return replace(config, transfer=replace(transfer, **chosen)) if chosen else config


def _held_out_accuracy(run: Path) -> float | None:
    summary = summary_of(run)
    if summary is None:
        return None
    augmented = summary.val_tta_accuracy if summary.tta != "none" else None
    return summary.val_accuracy if augmented is None else augmented


def summary_of(run: Path) -> RunSummary | None:
    """The result of a run; None if it is unfinished or its ``summary.json`` is damaged."""
    path = run / records.SUMMARY
    if not path.is_file():
        return None
    try:
        return read_run(path)
    except ResfastError as error:
        logger.warning("continuing without a damaged summary: %s", error)
        return None
