"""Scores a run on corrupted test images: CIFAR-10-C, or corruptions of any data set."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from resfast import __version__, atomic, runtime
from resfast.data.corruptions.apply import KINDS, corrupted_sets
from resfast.data.dataset import Request, check_image_size, print_to_stderr
from resfast.data.sources import load_dataset
from resfast.data.test_sets import SEVERITIES, CorruptedSets, open_cifar_c
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference.evaluate import label_numbers
from resfast.inference.evaluate import score as score_images
from resfast.inference.load import TrainedRun
from resfast.inference.scoring import TTA, Evaluation
from resfast.runs import folder as records

RESULT, ROWS, PLOT = "corruptions.json", "corruptions.csv", "corruptions.png"
CLEAN = "none"
"""Kind of the row of the images without corruption, at severity 0."""


@dataclass(frozen=True)
class Row:
    """Result on the test images of one corruption at one severity.

    Attributes:
        kind: name of the corruption, or :data:`CLEAN`.
        severity: from 1; 0 without corruption.
        images: number of images.
        error: fraction of the images classified wrongly, 0 to 1.
        loss: mean cross-entropy, in nats.
        tta_error: the error with test-time augmentation.
    """

    kind: str
    severity: int
    images: int
    error: float
    loss: float
    tta_error: float


@dataclass(frozen=True)
class CorruptionResult:
    """What :func:`evaluate_corrupted` found.

    Attributes:
        rows: a row per kind and severity, in the order of the paper.
        clean: the row of the images without corruption, or None for CIFAR-10-C, which has none.
        tta: the test-time augmentation.
        record: all of it, as ``corruptions.json`` has it.
    """

    rows: tuple[Row, ...]
    clean: Row | None
    tta: TTA
    record: dict[str, Any]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the corruptions, in the order of the rows."""
        return tuple(dict.fromkeys(row.kind for row in self.rows))

    def errors(self, kind: str) -> list[float]:
        """The error of a corruption at each severity."""
        return [row.error for row in self.rows if row.kind == kind]


def evaluate_corrupted(
    run: TrainedRun,
    data: str | None = None,
    *,
    kinds: Sequence[str] = (),
    seed: int = 0,
    data_dir: Path | None = None,
    tta: Literal["auto"] | TTA = "auto",
    batch_size: int | None = None,
    skip_corrupt: bool = False,
    out: Path | None = None,
    report: Callable[[str], None] = print_to_stderr,
) -> CorruptionResult:
    """Scores a trained network on corrupted test images, one kind and severity at a time.

    Args:
        run: the run.
        data: ``cifar10-c:PATH`` or ``cifar100-c:PATH``, whose images are corrupted already, or any
            other data set, whose test images are (None: the run's own).
        kinds: the corruptions (empty: all fifteen, or all in the files).
        seed: seed of the corruptions.
        data_dir: where data sets are looked for (None: the run's own).
        tta: test-time augmentation to score besides the plain images (auto: the run's own).
        batch_size: images a step (None: the run's own).
        skip_corrupt: leave out files that cannot be decoded.
        out: folder to write the three files to (None: do not write).
        report: called with a line of text for each notable step.

    Raises:
        ResfastError: no such data, other classes than the run's, an unknown corruption, or files
            that cannot be read or written.
    """
    inference.check_choice("tta", tta, ("auto", *get_args(TTA)))
    batch_size = run.checked_batch_size(batch_size)
    tta = run.config.evaluation.tta if tta == "auto" else tta
    if out is not None:
        atomic.make_folder(out, "--out")
    where = run.config.data.data_dir if data_dir is None else data_dir
    name = run.config.data.data if data is None else data
    own = None
    if is_cifar_c(name):
        check_image_size(run.image_size)
        sets = open_cifar_c(_request(name, where, run.image_size, report), kinds)
    else:
        own = load_dataset(
            name,
            data_dir=where,
            image_size=run.image_size,
            skip_corrupt=skip_corrupt or run.config.data.skip_corrupt,
            report=report,
            test_only=True,
        )
        sets = corrupted_sets(
            own.name, own.test_images, own.test_labels, own.classes, kinds=kinds, seed=seed
        )
    numbering = label_numbers(run, sets)
    start = time.perf_counter()

    def score(images: torch.Tensor, labels: torch.Tensor) -> tuple[Evaluation, Evaluation]:
        assert batch_size is not None
        return score_images(run, (images, labels), tta, batch_size, numbering)

    clean = None
    if own is not None:
        clean = _row(CLEAN, 0, len(own.test_labels), score(own.test_images, own.test_labels))
    digest = hashlib.blake2b(repr(sets.classes).encode(), digest_size=16)
    scored = list(_scores(sets, score, digest.update, report))
    order = [*KINDS, *sorted(set(sets.kinds) - set(KINDS))]
    rows = tuple(sorted(scored, key=lambda row: (order.index(row.kind), row.severity)))
    record = {
        "run": run.path.resolve().name,
        "weights": run.file.name,
        "data": sets.name,
        "data_digest": digest.hexdigest(),
        "seed": None if own is None else seed,
        "test_images": rows[0].images,
        "clean_accuracy": None if clean is None else 1 - clean.error,
        "clean_tta_accuracy": None if clean is None else 1 - clean.tta_error,
        "mean_accuracy": 1 - mean_error(rows),
        "mean_tta_accuracy": 1 - mean_error(rows, tta=True),
        "mean_of": [kind for kind in KINDS if any(row.kind == kind for row in rows)],
        "error": {kind: [r.error for r in rows if r.kind == kind] for kind in _kinds_of(rows)},
        "tta": tta,
        "eval_seconds": time.perf_counter() - start,
        "device": runtime.describe(run.device),
        "precision": {dtype: key for key, dtype in runtime.DTYPES.items()}[run.dtype],
        "batch_size": batch_size,
        "torch": torch.__version__,
        "resfast": __version__,
    }
    result = CorruptionResult(rows, clean, tta, record)
    if out is not None:
        _write(out, result)
    return result


def is_cifar_c(data: str) -> bool:
    """Whether ``--data`` names images that are corrupted already."""
    return data.partition(":")[0] in ("cifar10-c", "cifar100-c")


def _request(data: str, where: Path, size: int, report: Callable[[str], None]) -> Request:
    return Request(
        data=data,
        location=data.partition(":")[2],
        data_dir=where,
        image_size=size,
        skip_corrupt=False,
        loader="resident",
        device=torch.device("cpu"),
        report=report,
    )


def mean_error(rows: Sequence[Row], *, tta: bool = False) -> float:
    """Mean error over the paper's fifteen corruptions and all severities.

    CIFAR-10-C has four more for validation, which do not count; where there are only others, they
    do.
    """
    counted = [row for row in rows if row.kind in KINDS] or list(rows)
    return sum(row.tta_error if tta else row.error for row in counted) / len(counted)


def _scores(
    sets: CorruptedSets,
    score: Callable[[torch.Tensor, torch.Tensor], tuple[Evaluation, Evaluation]],
    update: Callable[[Any], None],
    report: Callable[[str], None],
) -> Iterator[Row]:
    errors: list[float] = []
    for part in sets.splits():
        update(f"{part.kind} {part.severity}\n".encode())
        update(part.images.numpy().reshape(-1).data)
        update(part.labels.numpy().view("uint8").data)
        row = _row(part.kind, part.severity, len(part.labels), score(part.images, part.labels))
        yield row
        errors.append(row.error)
        if part.severity == SEVERITIES[-1]:
            report(f"{part.kind}: {sum(errors) / len(errors):.2%} error")
            errors = []


def _row(kind: str, severity: int, images: int, scores: tuple[Evaluation, Evaluation]) -> Row:
    plain, augmented = scores
    return Row(kind, severity, images, 1 - plain.accuracy, plain.loss, 1 - augmented.accuracy)


def _kinds_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.kind for row in rows))


def _write(folder: Path, result: CorruptionResult) -> None:
    from resfast.runs import plots  # matplotlib is slow to import

    records.write_text(folder / RESULT, json.dumps(result.record, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    for row in (*([] if result.clean is None else [result.clean]), *result.rows):
        writer.writerow([getattr(row, name) for name in Row.__dataclass_fields__])
    atomic.save(folder / ROWS, text.getvalue().encode())
    title = f"{result.record['run']} on {result.record['data']}"
    if result.clean is not None:
        title += f", {result.clean.error:.1%} without corruption"
    errors = {kind: result.errors(kind) for kind in result.kinds}
    plots.save_corruptions(folder / PLOT, errors, mean_error(result.rows), title)


def corruption_table(result: CorruptionResult) -> str:
    """A line per corruption with the error at each severity and their mean, in percent."""
    width = max(len("corruption"), *(len(kind) for kind in result.kinds))
    head = "  ".join(f"{severity:>5}" for severity in SEVERITIES)
    lines = [f"{'error in %':<{width}}  {head}   mean"]
    for kind in result.kinds:
        errors = result.errors(kind)
        values = "  ".join(f"{100 * error:>5.1f}" for error in errors)
        lines.append(f"{kind:<{width}}  {values}  {100 * sum(errors) / len(errors):>5.1f}")
    return "\n".join(lines)


def refuse_seeds(runs: Sequence[Path]) -> None:
    """Raises ``ResfastError``: corruptions are scored for one run at a time."""
    raise ResfastError(
        f"corrupted images are scored for one run at a time, and {runs[0].parent} has "
        f"{len(runs)}: choose one, for example {runs[0]}"
    )
