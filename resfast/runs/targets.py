"""Chooses the recipe that reaches an accuracy fastest, from a table of measurements."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic
import torch

from resfast import runtime
from resfast.errors import ResfastError

TABLE = Path(__file__).with_name("targets.json")


@dataclass(frozen=True)
class Row:
    """Several runs of a recipe on one machine, as ``benchmarks.time_to_accuracy --add`` wrote it.

    Attributes:
        recipe: name of the recipe.
        options: those that choose one of the lengths and networks of the recipe, as on the command
            line; empty if it has one.
        device: kind of device.
        hardware: name of the device.
        threads: CPU threads; None for CUDA.
        data: data set; for a folder, the last part of its path.
        data_digest: digest of the data set's content.
        accuracy: mean over the runs, 0 to 1, with test-time augmentation if the recipe uses it.
        sd: sample standard deviation over the runs, None for a single run.
        runs: number of runs, with different seeds.
        timed_seconds: mean over the runs, by ``resfast.runs.folder.TIMING_RULE``.
        compile_seconds: compilation time of the first run.
        date: date of the measurement, YYYY-MM-DD.
        versions: versions of resfast and torch.
        source: file of the raw result, relative to the repository.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    recipe: str
    device: Literal["cpu", "cuda"]
    hardware: str
    threads: int | None
    data: str
    data_digest: str
    accuracy: float
    sd: float | None
    runs: int
    timed_seconds: float
    compile_seconds: float
    date: str
    versions: str
    source: str
    options: str = ""

    @property
    def name(self) -> str:
        """The recipe with its options."""
        return f"{self.recipe} {self.options}".rstrip()

    def __str__(self) -> str:
        spread = "" if self.sd is None else f" ± {self.sd:.2%}"
        threads = "" if self.threads is None else f", {self.threads} threads"
        return (
            f"{self.name}: {self.accuracy:.2%}{spread} ({self.runs} "
            f"{'run' if self.runs == 1 else 'runs'}) in {self.timed_seconds:.4g} s on "
            f"{self.hardware}{threads}, {self.data}, {self.date}"
        )


_ADAPTER = pydantic.TypeAdapter(tuple[Row, ...])


def read(path: Path) -> tuple[Row, ...]:
    """The rows of a table, such as :data:`TABLE`.

    Raises:
        ResfastError: it cannot be read or a row is not one.
    """
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except OSError as error:
        raise ResfastError(f"cannot read {path}: {error.strerror}; reinstall resfast") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ResfastError(f"{path}: {where}: {first['msg']}; expected a list of rows") from None


def to_json(rows: Sequence[Row]) -> str:
    """A table as text, best accuracy last."""
    rows = sorted(rows, key=lambda row: (row.device, row.hardware, row.data, row.accuracy))
    return json.dumps(_ADAPTER.dump_python(tuple(rows)), indent=2, ensure_ascii=False) + "\n"


def data_name(data: str) -> str:
    """``--data`` as in the rows: the last part of a path, and ``auto`` resolved to a data set."""
    kind, colon, path = data.partition(":")
    if colon:
        return f"{kind}:{Path(path).name}"
    return "cifar10" if data == "auto" else data


def here(device: torch.device) -> tuple[str, int | None]:
    """Name of the processor and CPU threads (None for CUDA), as in the rows."""
    name = runtime.describe(device)
    if device.type == "cuda":
        return name, None
    return name.rpartition(",")[0], torch.get_num_threads()


def pick(
    target: float,
    max_seconds: float,
    *,
    device: torch.device,
    data: str,
    threads: int = 0,
    rows: Sequence[Row] | None = None,
) -> tuple[Row, str]:
    """The recipe that reached an accuracy soonest on hardware like this.

    Of each recipe the row counts that was measured on the nearest machine: the same kind of device,
    then the most similar name, the same data, the nearest number of threads, the latest date.

    Args:
        target: accuracy, 0 to 1, that the mean over the runs has to reach.
        max_seconds: most timed seconds of a run.
        device: to train on.
        data: ``--data``.
        threads: ``--threads`` (0: torch's default).
        rows: the table (None: the one that comes with resfast).

    Returns:
        The row, and a sentence that says why.

    Raises:
        ResfastError: no row fits; the message lists what is known.
    """
    if not 0 < target <= 1:
        raise ResfastError(
            f"--target {target} is out of range: expected an accuracy, 0.94 for 94 %"
        )
    rows = [row for row in (read(TABLE) if rows is None else rows) if row.device == device.type]
    name, cores = here(device)
    cores = cores and (threads or cores)
    data = data_name(data)

    def nearness(row: Row) -> tuple[float, bool, float, str]:
        alike = difflib.SequenceMatcher(None, row.hardware.lower(), name.lower()).ratio()
        apart = abs(math.log((row.threads or 1) / (cores or 1)))
        return alike, row.data == data, -apart, row.date

    by_recipe: dict[str, Row] = {}
    for row in rows:
        by_recipe[row.name] = max(row, by_recipe.get(row.name, row), key=nearness)
    request = f"--target {target:g} --max-seconds {max_seconds:g}"
    if not by_recipe:
        raise ResfastError(
            f"{request}: no recipe has been measured on {device.type} yet; name one with --recipe "
            "(--list shows them)"
        )
    reaching = [row for row in by_recipe.values() if row.accuracy >= target]
    if not reaching:
        best = max(by_recipe.values(), key=lambda row: row.accuracy)
        raise ResfastError(
            f"{request}: no known recipe reaches {target:.2%}; the most accurate is {best}; ask "
            "for less, or name a recipe with --recipe"
        )
    fastest = min(reaching, key=lambda row: row.timed_seconds)
    if fastest.timed_seconds > max_seconds:
        raise ResfastError(
            f"{request}: the fastest known recipe that reaches {target:.2%} takes longer; "
            f"{fastest}; allow more seconds or ask for less"
        )
    reason = [f"recipe {fastest.name}: the fastest known that reaches {target:.2%}; {fastest}"]
    if (fastest.hardware, fastest.threads) != (name, cores):
        machine = name if cores is None else f"{name}, {cores} threads"
        reason.append(f"this is {machine}, so the seconds will differ")
    if fastest.data != data:
        reason.append(f"it was not measured on {data}, so the accuracy will differ")
    return fastest, "; ".join(reason)
