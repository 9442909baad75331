"""Scores every run of a folder of ``--runs``: each seed, and the mean with its interval."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from resfast import atomic
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference.evaluate import RESULT, Result, evaluate
from resfast.inference.load import FILES, Which
from resfast.inference.scoring import TTA
from resfast.runs import folder as records
from resfast.runs.statistics import CONFIDENCE, Statistics, statistics
from resfast.runtime import Precision


@dataclass(frozen=True)
class SeedsResult:
    """What :func:`evaluate_seeds` found.

    Attributes:
        runs: folders of the scored runs.
        each: their results, in the same order.
        accuracy: statistics of the accuracies without test-time augmentation.
        with_tta: the same with it.
        skipped: folders of runs without such weights.
    """

    runs: tuple[Path, ...]
    each: tuple[Result, ...]
    accuracy: Statistics
    with_tta: Statistics
    skipped: tuple[Path, ...]

    @property
    def record(self) -> dict[str, Any]:
        """All of it, as the common ``evaluation.json`` has it."""
        first = self.each[0].record
        return {
            "data": first["data"],
            "data_digest": first["data_digest"],
            "test_images": first["test_images"],
            "tta": first["tta"],
            "test_accuracy": _values(self.accuracy),
            "tta_accuracy": _values(self.with_tta),
            "each": [result.record for result in self.each],
        }


def _values(found: Statistics) -> dict[str, Any]:
    interval = None if found.low is None else [found.low, found.high]
    return {
        "mean": found.mean,
        "sd": found.sd,
        "confidence": CONFIDENCE,
        "confidence_interval": interval,
    }


def evaluate_seeds(
    runs: Sequence[Path],
    data: str | None = None,
    *,
    data_dir: Path | None = None,
    tta: Literal["auto"] | TTA = "auto",
    weights: Which = "final",
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    skip_corrupt: bool = False,
    out: Path,
) -> SeedsResult:
    """Scores runs that differ in their seed, one after another.

    Writes ``evaluation.json`` and ``evaluation-confusion.png`` of each run to the folder of its
    name in ``out``, and the statistics to ``evaluation.json`` in ``out``.

    Args:
        runs: folders of the runs; those without such weights are left out.
        data: as in :func:`resfast.evaluate`, like the arguments that follow.
        out: the common folder.

    Raises:
        ResfastError: as :func:`resfast.evaluate`, or no run has such weights.
    """
    usable = [run for run in runs if (run / FILES[weights]).is_file()]
    if not usable:
        raise ResfastError(
            f"none of the {len(runs)} runs in {runs[0].parent} has {FILES[weights]}; finish them "
            f"with python -m resfast.train --resume {runs[0].parent}"
        )
    results = []
    for path in usable:
        run = inference.load(path, weights=weights, device=device, precision=precision)
        inference.prepare(run)
        results.append(
            evaluate(
                run,
                data,
                data_dir=data_dir,
                tta=tta,
                batch_size=batch_size,
                skip_corrupt=skip_corrupt,
                out=out / path.name,
            )
        )
        del run
        gc.collect()  # one network is in memory at a time
    found = SeedsResult(
        runs=tuple(usable),
        each=tuple(results),
        accuracy=statistics([result.accuracy for result in results]),
        with_tta=statistics([result.with_tta.accuracy for result in results]),
        skipped=tuple(run for run in runs if run not in usable),
    )
    atomic.make_folder(out, "--out")
    records.write_text(out / RESULT, json.dumps(found.record, indent=2) + "\n")
    return found
