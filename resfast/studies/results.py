"""The rows of a study, one for each run, and ``results.csv``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from resfast import atomic
from resfast.config.files import load
from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs.epoch_row import EpochRow, read_rows
from resfast.runs.summary import read_run
from resfast.studies.runner import DIVERGED, Unit

RESULTS = "results.csv"
DIVERGED_TEXT = "diverged"
"""Value of ``stopped`` of a run whose loss became infinite or NaN."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run of a study. Accuracies are fractions from 0 to 1, losses are in nats.

    Attributes:
        variant, group, seed: which run it is.
        parameters: trainable parameters of the network; None if the run diverged.
        macs: multiply-accumulates of a forward pass of one image.
        epochs: number of epochs trained.
        batch_size: images per step.
        train_images: number of training images.
        scored_on: ``test`` or ``val``: the images of ``accuracy``.
        scored_images: number of them.
        accuracy: of the trained network, without test-time augmentation; None if it diverged.
        tta_accuracy: the same with the run's test-time augmentation.
        loss: mean cross-entropy on the same images after the last epoch.
        best_accuracy: the highest after any epoch.
        best_epoch: number of epochs trained when it was reached.
        train_loss: mean loss of the last epoch, on augmented images.
        train_accuracy: of the last epoch, on augmented images.
        train_seconds: training, without evaluations.
        eval_seconds: all evaluations.
        compile_seconds: compilation and warm-up.
        epoch_seconds: mean of ``train_seconds`` over the epochs.
        stopped: why training ended early, ``diverged`` if its loss became infinite or NaN.
        data: name of the data set, without its folder.
        device, precision, torch, date: of the run.
    """

    variant: str
    group: str | None
    seed: int
    parameters: int | None = None
    macs: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    train_images: int | None = None
    scored_on: str | None = None
    scored_images: int | None = None
    accuracy: float | None = None
    tta_accuracy: float | None = None
    loss: float | None = None
    best_accuracy: float | None = None
    best_epoch: int | None = None
    train_loss: float | None = None
    train_accuracy: float | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    compile_seconds: float | None = None
    epoch_seconds: float | None = None
    stopped: str | None = None
    data: str | None = None
    device: str | None = None
    precision: str | None = None
    torch: str | None = None
    date: str | None = None


def row_of(unit: Unit) -> Row:
    """The row of a finished run.

    Raises:
        ResfastError: its files cannot be read.
    """
    variant = unit.variant
    named: dict[str, Any] = {
        "variant": variant.name,
        "group": variant.group,
        "seed": unit.seed,
    }
    if unit.is_diverged:
        config = load(unit.path / records.CONFIG)
        return Row(
            **named,
            epochs=len(curves(unit)),
            batch_size=config.optim.batch_size,
            stopped=DIVERGED_TEXT,
            data=short_data(config.data.data),
            precision=config.runtime.precision,
        )
    summary = read_run(unit.path / records.SUMMARY)
    last = curves(unit)[-1]
    tested = summary.test_accuracy is not None
    return Row(
        **named,
        parameters=summary.params,
        macs=summary.macs,
        epochs=summary.epochs,
        batch_size=summary.batch_size,
        train_images=summary.train_images,
        scored_on="test" if tested else "val",
        scored_images=summary.test_images if tested else summary.val_images,
        accuracy=summary.test_accuracy if tested else summary.val_accuracy,
        tta_accuracy=summary.tta_accuracy if tested else summary.val_tta_accuracy,
        loss=summary.test_loss if tested else last.eval_loss,
        best_accuracy=summary.best_accuracy,
        best_epoch=summary.best_epoch,
        train_loss=last.train_loss,
        train_accuracy=last.train_accuracy,
        train_seconds=summary.train_seconds,
        eval_seconds=summary.eval_seconds,
        compile_seconds=summary.compile_seconds,
        epoch_seconds=summary.train_seconds / max(summary.epochs, 1),
        stopped=summary.stopped,
        data=short_data(summary.data),
        device=summary.device,
        precision=summary.precision,
        torch=str(summary.torch),
        date=summary.date,
    )


def curves(unit: Unit) -> list[EpochRow]:
    """The epochs of a run; empty if it diverged in its first one."""
    path = unit.path / records.METRICS
    return read_rows(path) if path.exists() else []


def diverged_message(unit: Unit) -> str:
    """Why a diverged run ended."""
    return str(json.loads((unit.path / DIVERGED).read_text(encoding="utf-8"))["message"])


def short_data(data: str) -> str:
    """The name of a data set without the folder that it is in."""
    kind, colon, path = data.partition(":")
    return f"{kind}{colon}{Path(path).name}" if colon else data


def save_results(path: Path, rows: Sequence[Row]) -> None:
    """Writes ``results.csv`` atomically.

    Raises:
        ResfastError: it cannot be written; the old file is intact.
    """
    text = io.StringIO()
    names = [item.name for item in fields(Row)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in asdict(row).items()
            }
        )
    atomic.save(path, text.getvalue().encode())


def read_results(path: Path) -> list[Row]:
    """Reads ``results.csv``.

    Raises:
        ResfastError: it cannot be read, or a column is missing or has a value of the wrong type.
    """
    import pydantic

    try:
        with path.open(encoding="utf-8", newline="") as file:
            values = [
                {name: None if value == "" else value for name, value in row.items()}
                for row in csv.DictReader(file)
            ]
        return pydantic.TypeAdapter(list[Row]).validate_python(values)
    except (OSError, pydantic.ValidationError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ResfastError(
            f"cannot read {path} ({reason}); expected the results.csv of a study"
        ) from None
