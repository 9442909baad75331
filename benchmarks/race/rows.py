"""The raw rows of a race: one for each preparation, warm-up, trial and failure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.race.sample import Sample
from resfast import atomic
from resfast.errors import ResfastError

ROWS = "trials.jsonl"
Phase = Literal["preparation", "warmup", "trial", "ended"]


class Row(BaseModel):
    """What a contender did between two lines of its output.

    Attributes:
        contender: its name.
        phase: ``preparation``: from the start of its process to the first sign of a trial;
            ``warmup``: a trial that does not count; ``trial``: one that does; ``ended``: it ended
            or was ended before it had all trials.
        session: number of its process, from 0; ``--resume`` starts a new one.
        number: index within its contender, session and phase, from 0.
        label: its own name of the trial.
        block: number of the turn in which the row was measured, over all contenders; None before
            the first.
        seconds: by the clock outside, from the end of the row before, without pauses.
        paused_seconds: pauses within it.
        own_seconds: by the contender's own clock.
        accuracy: test accuracy of one view per image, 0 to 1.
        tta_accuracy: test accuracy with test-time augmentation, 0 to 1.
        sample: the machine at the end of it, with every contender paused.
        date: local time at the end of it, ISO 8601 with the offset.
        reason: why it ended.
        tail: the last lines of its output then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    contender: str
    phase: Phase
    session: int = Field(ge=0)
    number: int = Field(ge=0)
    label: str | None = None
    block: int | None = None
    seconds: float = Field(ge=0)
    paused_seconds: float = Field(default=0.0, ge=0)
    own_seconds: float | None = None
    accuracy: float | None = Field(default=None, ge=0, le=1)
    tta_accuracy: float | None = Field(default=None, ge=0, le=1)
    sample: Sample = Sample()
    date: str
    reason: str | None = None
    tail: tuple[str, ...] = ()


def read(folder: Path) -> list[Row]:
    """The rows of a race; none if it has not begun.

    Raises:
        ResfastError: the file cannot be read, or has another line than rows.
    """
    path = folder / ROWS
    if not path.exists():
        return []
    try:
        return [Row.model_validate(json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ResfastError(f"{path} cannot be read as the rows of a race: {reason}") from None


def write(folder: Path, rows: Iterable[Row]) -> None:
    """Writes all rows, atomically.

    Raises:
        ResfastError: the file cannot be written; the old one is intact.
    """
    text = "".join(f"{json.dumps(row.model_dump(mode='json'))}\n" for row in rows)
    atomic.save(folder / ROWS, text.encode())
