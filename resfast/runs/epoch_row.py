"""A row of ``metrics.jsonl`` as a type, and that file from and to it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from resfast.runs.stored import STORED, EvaluatedOn, Finite, parsed, text_of, valid


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """An epoch of a run, or the first part of one that a limit of time cut short.

    Attributes:
        epoch: its number, from 1.
        lr: learning rate of its last step.
        train_loss: mean loss of the training images, in nats.
        train_accuracy: fraction of the augmented training images classified correctly, 0 to 1.
        eval_set: images of the evaluation after it.
        eval_loss: mean cross-entropy of those, in nats; None where there was no evaluation or it is
            not finite.
        eval_accuracy: fraction of those classified correctly, 0 to 1; None without an evaluation.
        images_per_second: training images per second of ``train_seconds``.
        train_seconds: of training, without the evaluation.
        eval_seconds: of the evaluation; 0 without one.
    """

    __pydantic_config__ = STORED

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    eval_set: EvaluatedOn
    eval_loss: Finite
    eval_accuracy: float | None
    images_per_second: float
    train_seconds: float
    eval_seconds: float


_ROW = pydantic.TypeAdapter(EpochRow)


def row_values(row: EpochRow) -> dict[str, Any]:
    """Values of an epoch by name, as in ``metrics.jsonl``."""
    return _ROW.dump_python(row)


def row_of_values(values: Any, source: str) -> EpochRow:
    """The row that :func:`row_values` gave the values of.

    Args:
        values: as read from JSON.
        source: where they come from, for the error message.

    Raises:
        ResfastError: a field is missing or of the wrong type.
    """
    return valid(_ROW, values, source, "a row of metrics.jsonl")


def rows_to_lines(rows: Iterable[EpochRow]) -> str:
    """The text of ``metrics.jsonl``: one row a line."""
    return "".join(json.dumps(row_values(row)) + "\n" for row in rows)


def read_rows(path: Path) -> list[EpochRow]:
    """Reads ``metrics.jsonl``.

    Raises:
        ResfastError: it cannot be read, or a line is not a row, with its number and the field.
    """
    rows = []
    for number, line in enumerate(text_of(path, "the metrics.jsonl of a run").splitlines(), 1):
        source = f"{path}, line {number}"
        rows.append(row_of_values(parsed(line, source, "a row of metrics.jsonl"), source))
    return rows
