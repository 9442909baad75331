"""``python -m resfast.evaluate``: scores a run. In Python, ``resfast.evaluate(run)``."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro

from resfast import __version__, atomic, runtime
from resfast.cli import common as entry
from resfast.data import batches as feed
from resfast.data.dataset import Dataset, Stream, print_to_stderr
from resfast.data.sources import open_data
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference import scoring as evaluation
from resfast.inference.load import TrainedRun, Which
from resfast.inference.scoring import TTA, Evaluation
from resfast.runs import folder as records
from resfast.runtime import Precision

PROG = "python -m resfast.evaluate"
RESULT, CONFUSION = "evaluation.json", "evaluation-confusion.png"


@dataclass(frozen=True)
class Options:
    """Scores a trained network on the test images of a data set.

    Writes evaluation.json and evaluation-confusion.png. Exit codes: 0 scored, 2 bad input.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of the run, runs/NAME, or a .safetensors file of one."""
    data: str | None = None
    """Another data set with the same classes (cifar10, cifar100, digits, folder:PATH,
    shards:PATH), resized to the run's image size. None: the run's own."""
    data_dir: Path | None = None
    """Where data sets are looked for, downloaded to and cached (None: the run's own)."""
    tta: Literal["auto"] | TTA = "auto"
    """Test-time augmentation scored beside the plain images (auto: the run's own)."""
    weights: Which = "final"
    """Weights of the last epoch, or of the best evaluation."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: CUDA if there is one."""
    precision: Precision = "auto"
    """Compute dtype; auto: the run's own, or on another kind of device the hardware's choice."""
    batch_size: int | None = None
    """Images a step (None: the run's own)."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded instead of stopping."""
    out: Path | None = None
    """Folder for the two files (None: the run's)."""


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
        run: a run or its weights, see :func:`resfast.load`, or what that returned (then
            ``weights``, ``device`` and ``precision`` are not looked at).
        data: a data set with the run's classes, see :func:`resfast.load_dataset`; its images are
            resized to the run's image size. None: the run's own.
        data_dir: where data sets are looked for (None: the run's own).
        tta: test-time augmentation (auto: the run's own).
        weights: ``final`` or ``best``.
        device: as of :func:`resfast.load`.
        precision: likewise.
        batch_size: images a step (None: the run's own).
        skip_corrupt: leave out images that cannot be decoded; a run that did so always does.
        out: folder to write ``evaluation.json`` and ``evaluation-confusion.png`` to (None: do not
            write).
        report: is given one line for each step worth knowing.

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
    )
    _note_changed_data(run, dataset, report)
    numbering = _numbering(run, dataset)

    start = time.perf_counter()
    with inference.out_of_memory(batch_size):
        batches = feed.EvaluationBatches(
            feed.split_sources(dataset, 0, 0)[-1],
            run.mean,
            run.std,
            image_size=run.image_size,
            batch_size=batch_size,
            device=run.device,
            dtype=run.dtype,
            classes=len(run.classes),
            numbering=numbering,
        )
        parts = {
            name: getattr(run.config.evaluation, name) for name in ("tta_select", "tta_mirror")
        }
        plain, augmented = evaluation.evaluate_both(
            run.model, batches, dtype=run.dtype, tta=tta, **parts
        )
    seconds = time.perf_counter() - start
    record = {
        "run": run.path.resolve().name,
        "weights": run.file.name,
        "data": dataset.name,
        "data_digest": dataset.digest,
        "test_images": batches.count,
        "skipped_images": len(getattr(dataset, "skipped", ())),
        "test_accuracy": plain.accuracy,
        "test_loss": plain.loss,
        "tta": tta,
        **parts,
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


def _numbering(run: TrainedRun, dataset: Dataset | Stream) -> torch.Tensor | None:
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
    summary = run.summary or {}
    digest = summary.get("data_digest")
    # The summary may say a relative path, and the configuration the absolute one.
    own = {summary.get("data"), run.config.data.data}
    if dataset.name in own and digest not in (None, dataset.digest):
        report(f"data {dataset.name} has changed since {run.path} was trained on it")


def _write(folder: Path, result: Result) -> None:
    from resfast.runs import plots  # matplotlib is slow to import

    records.write_text(folder / RESULT, json.dumps(result.record, indent=2) + "\n")
    plots.save_confusion(folder / CONFUSION, result.confusion, result.classes)


def table(result: Result) -> str:
    """The classes line by line: images, how many were right, and what they are taken for most."""
    width = max(len("class"), *(len(name) for name in result.classes))
    lines = [f"{'class':<{width}}  {'images':>7}  {'correct':>7}  {'accuracy':>8}  mistaken for"]
    for index, name in enumerate(result.classes):
        row = result.confusion[index]
        images, correct = int(row.sum()), int(row[index])
        accuracy = f"{correct / images:>8.2%}" if images else f"{'-':>8}"
        line = f"{name:<{width}}  {images:>7,}  {correct:>7,}  {accuracy}"
        others = row.clone()
        others[index] = 0
        if int(others.sum()):
            worst = int(others.argmax())
            line += f"  {result.classes[worst]} ({int(others[worst]) / images:.1%})"
        lines.append(line)
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        options = entry.parse(Options, args, PROG)
        run = inference.load(
            options.run,
            weights=options.weights,
            device=options.device,
            precision=options.precision,
        )
        inference.prepare(run)
        out = run.path if options.out is None else options.out.expanduser()
        result = evaluate(
            run,
            options.data,
            data_dir=options.data_dir,
            tta=options.tta,
            batch_size=options.batch_size,
            skip_corrupt=options.skip_corrupt,
            out=out,
        )
        record = result.record
        print(
            f"{run.file} on the {record['test_images']:,} test images of {record['data']} "
            f"({record['device']}, {record['precision']}, {record['eval_seconds']:.1f} s)\n"
        )
        print(f"{table(result)}\n")
        print(f"test accuracy {result.accuracy:.2%}, loss {result.loss:.4f}")
        if result.tta != "none":
            print(
                f"with test-time augmentation ({result.tta}) {result.with_tta.accuracy:.2%}, "
                f"loss {result.with_tta.loss:.4f}"
            )
        print(out / RESULT)
        if (out / CONFUSION).is_file():
            print(out / CONFUSION)

    return entry.run(command)


if __name__ == "__main__":
    sys.exit(main())
else:
    entry.make_callable(__name__, evaluate)
