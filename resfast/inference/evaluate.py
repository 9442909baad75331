"""``resfast.evaluate(run)``: scores a run on the test images of a data set."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from resfast import __version__, atomic, runtime
from resfast.data import batches as feed
from resfast.data.dataset import Dataset, Stream, print_to_stderr
from resfast.data.sources import open_data
from resfast.data.test_sets import CorruptedSets
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference import scoring as evaluation
from resfast.inference.load import TrainedRun, Which
from resfast.inference.scoring import TTA, Evaluation
from resfast.runs import folder as records
from resfast.runtime import Precision

RESULT, CONFUSION = "evaluation.json", "evaluation-confusion.png"


@dataclass(frozen=True)
class Result(Evaluation):
    """What :func:`evaluate` found. ``accuracy``, ``loss`` and ``confusion`` are without
    test-time augmentation.

    Attributes:
        classes: class names, in the order of ``confusion``.
        tta: the test-time augmentation.
        with_tta: the result with it.
        record: all of it as ``evaluation.json`` has it.
    """

    classes: tuple[str, ...]
    tta: TTA
    with_tta: Evaluation
    record: dict[str, Any]


def evaluate(
    run: str | Path | TrainedRun,
    data: str | None = None,
    *,
    data_dir: str | Path | None = None,
    tta: Literal["auto"] | TTA = "auto",
    weights: Which = "final",
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    skip_corrupt: bool = False,
    out: str | Path | None = None,
    report: Callable[[str], None] = print_to_stderr,
) -> Result:
    """Scores a trained network on the test images of a data set.

    Args:
        run: path of a run or its weights, see :func:`resfast.load`, or a loaded run (``weights``,
            ``device`` and ``precision`` are then ignored).
        data: a data set with the run's classes, see :func:`resfast.load_dataset`; its images are
            resized to the run's image size. None: the run's own.
        data_dir: where data sets are looked for (None: the run's own).
        tta: test-time augmentation (auto: the run's own).
        weights: ``final`` or ``best``.
        device: as in :func:`resfast.load`.
        precision: as in :func:`resfast.load`.
        batch_size: images a step (None: the run's own).
        skip_corrupt: leave out images that cannot be decoded; a run that did so always does.
        out: folder to write ``evaluation.json`` and ``evaluation-confusion.png`` to (None: do not
            write).
        report: called with a line of text for each notable step.

    Returns:
        Accuracy, loss and confusion matrix, plain and with test-time augmentation.

    Raises:
        ResfastError: no such run or data, other classes than the run's, or files that cannot be
            read or written.
    """
    inference.check_choice("tta", tta, ("auto", *get_args(TTA)))
    if not isinstance(run, TrainedRun):
        run = inference.load(run, weights=weights, device=device, precision=precision)
    batch_size = run.checked_batch_size(batch_size)
    tta = run.config.evaluation.tta if tta == "auto" else tta
    folder = None if out is None else atomic.make_folder(Path(out).expanduser(), "--out")
    dataset = open_data(
        run.config.data.data if data is None else data,
        data_dir=run.config.data.data_dir if data_dir is None else Path(data_dir),
        image_size=run.image_size,
        skip_corrupt=skip_corrupt or run.config.data.skip_corrupt,
        loader=run.config.data.loader if data is None else "auto",
        device=run.device,
        report=report,
        classes=None if run.config.data.classes is None else run.classes,
        test_only=True,
    )
    _note_changed_data(run, dataset, report)
    numbering = label_numbers(run, dataset)

    start = time.perf_counter()
    source = feed.split_sources(dataset, 0, 0)[-1]
    plain, augmented = score(run, source, tta, batch_size, numbering)
    seconds = time.perf_counter() - start
    record = {
        "run": run.path.resolve().name,
        "weights": run.file.name,
        "data": dataset.name,
        "data_digest": dataset.digest,
        "test_images": feed.count(source),
        "skipped_images": len(getattr(dataset, "skipped", ())),
        "test_accuracy": plain.accuracy,
        "test_loss": plain.loss,
        "tta": tta,
        "tta_select": run.config.evaluation.tta_select,
        "tta_mirror": run.config.evaluation.tta_mirror,
        "tta_accuracy": augmented.accuracy,
        "tta_loss": augmented.loss,
        "per_class_accuracy": {
            name: None if math.isnan(value) else value
            for name, value in zip(run.classes, plain.per_class, strict=True)
        },
        "confusion": plain.confusion.tolist(),
        "eval_seconds": seconds,
        "device": runtime.describe(run.device),
        "precision": {dtype: name for name, dtype in runtime.DTYPES.items()}[run.dtype],
        "batch_size": batch_size,
        "torch": torch.__version__,
        "resfast": __version__,
    }
    result = Result(
        accuracy=plain.accuracy,
        loss=plain.loss,
        confusion=plain.confusion,
        classes=run.classes,
        tta=tta,
        with_tta=augmented,
        record=record,
    )
    if folder is not None:
        _write(folder, result)
    return result


def score(
    run: TrainedRun,
    source: feed.Source,
    tta: TTA,
    batch_size: int,
    numbering: torch.Tensor | None,
) -> tuple[Evaluation, Evaluation]:
    """Results of a run on images, without and with test-time augmentation.

    Args:
        run: the run.
        source: the images, of the run's image size, and their labels.
        tta: test-time augmentation.
        batch_size: images per step.
        numbering: see :func:`label_numbers`.

    Raises:
        ResfastError: a batch does not fit into the GPU's memory.
    """
    with inference.out_of_memory(batch_size):
        batches = feed.EvaluationBatches(
            source,
            run.mean,
            run.std,
            image_size=run.image_size,
            batch_size=batch_size,
            device=run.device,
            dtype=run.dtype,
            classes=len(run.classes),
            numbering=numbering,
        )
        return evaluation.evaluate_both(
            run.model,
            batches,
            dtype=run.dtype,
            tta=tta,
            tta_select=run.config.evaluation.tta_select,
            tta_mirror=run.config.evaluation.tta_mirror,
        )


def label_numbers(
    run: TrainedRun, dataset: Dataset | Stream | CorruptedSets
) -> torch.Tensor | None:
    """The run's label for each of the data set's, int64 ``[classes]``; None where they agree."""
    if dataset.classes == run.classes:
        return None
    missing = [name for name in run.classes if name not in dataset.classes]
    extra = [name for name in dataset.classes if name not in run.classes]
    if missing or extra:
        raise ResfastError(
            f"the classes of {dataset.name} ({len(dataset.classes)}) differ from those that "
            f"{run.path} was trained on ({len(run.classes)}), missing: {_some(missing)}; extra: "
            f"{_some(extra)}; expected the same names: choose another --data or another run"
        )
    return torch.tensor([run.classes.index(name) for name in dataset.classes])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"


def _note_changed_data(
    run: TrainedRun, dataset: Dataset | Stream, report: Callable[[str], None]
) -> None:
    if run.summary is None:
        return
    # The path may be relative in the summary and absolute in the configuration.
    own = {run.summary.data, run.config.data.data}
    if dataset.name in own and run.summary.data_digest != dataset.digest:
        report(f"data {dataset.name} has changed since {run.path} was trained on it")


def _write(folder: Path, result: Result) -> None:
    from resfast.runs import plots  # matplotlib is slow to import

    records.write_text(folder / RESULT, json.dumps(result.record, indent=2) + "\n")
    plots.save_confusion(folder / CONFUSION, result.confusion, result.classes)
