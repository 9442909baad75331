"""``resfast predict RUN IMAGE…``: classifies images; prints the result or writes a CSV file."""

from __future__ import annotations

import csv
import functools
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import track

from resfast import atomic
from resfast.cli import common as entry
from resfast.data.folder import IMAGE_SUFFIXES
from resfast.data.unlabelled import Batch, Files, Rows, open_images
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference.ensemble import classify as classify_together
from resfast.inference.load import TrainedRun, Which
from resfast.inference.predict import Predictions, check_options, classify, named_pairs
from resfast.inference.scoring import TTA
from resfast.runs.find import seeds_in
from resfast.runtime import Precision

COMMAND = "predict"
HEADER = ("ID", "Labels")
DEFAULT_CSV, SUBMISSION = Path("predictions.csv"), Path("submission.csv")


@dataclass(frozen=True)
class Options:
    """Classifies images with a trained network.

    Predictions for image files are printed; those for a folder, a .npy or a pickle go to a CSV file
    with the columns ID and Labels. Exit codes: 0 done, 2 bad input.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of the run, runs/NAME, or a .safetensors file of one; or the folder of --runs, whose
    seeds predict together: the probabilities are the mean of theirs."""
    images: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="IMAGE…")]]
    """Image files; or one folder of images, .npy file, or pickle in CIFAR's format."""
    top: int = 5
    """Classes shown for each image."""
    tta: TTA = "none"
    """Test-time augmentation."""
    weights: Which = "final"
    """Weights of the last epoch, or of the best evaluation."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: CUDA if available."""
    precision: Precision = "auto"
    """Compute dtype; auto: the run's own, or the hardware's default on another kind of device."""
    batch_size: int | None = None
    """Images per step (None: the run's own)."""
    skip_corrupt: bool = False
    """Skip images that cannot be decoded instead of stopping."""
    csv: Path | None = None
    """CSV file to write (None: predictions.csv or submission.csv; no file if image files are
    given)."""
    submission: bool = False
    """Write submission.csv with the columns id and label instead, as Kaggle's CIFAR-10 competition
    expects it: file names without their suffix, in numeric order, and class names."""
    names: bool = False
    """Write class names to the CSV instead of class indices."""
    overwrite: bool = False
    """Replace an existing CSV file."""
    trust: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose code may run, since it makes the network of the run; may be repeated."""


def listing(run: TrainedRun, predictions: Predictions) -> str:
    """Each image with its classes below it, most probable first."""
    pairs = named_pairs(run, predictions)
    width = max(len(name) for row in pairs for name, _ in row)
    lines = []
    for name, row in zip(predictions.ids, pairs, strict=True):
        lines.append(name)
        lines += [f"  {label:<{width}}  {probability:>7.2%}" for label, probability in row]
    return "\n".join(lines)


def check_csv(path: Path, overwrite: bool) -> None:
    """Rejects a CSV path that cannot be written, before any work is done.

    Raises:
        ResfastError: the file exists and ``overwrite`` is false, the path is a folder, or its
            folder does not exist.
    """
    if path.is_dir():
        raise ResfastError(f"--csv {path} is a folder; expected the name of a file")
    if path.exists() and not overwrite:
        raise ResfastError(
            f"{path} already exists; choose another file with --csv, or replace it with --overwrite"
        )
    if not path.parent.is_dir():
        raise ResfastError(f"the folder of --csv {path} does not exist; create {path.parent} first")


def write_csv(path: Path, run: TrainedRun, predictions: Predictions, names: bool) -> None:
    """Writes the most probable class of every image, atomically.

    Args:
        path: UTF-8 file with the header ``ID,Labels``.
        run: names the classes.
        predictions: what to write.
        names: write class names instead of class indices.

    Raises:
        ResfastError: the file cannot be written; an existing file is left intact.
    """
    labels: list[Any] = predictions.labels[:, 0].tolist()
    if names:
        labels = [run.classes[label] for label in labels]
    _save_csv(path, HEADER, list(zip(predictions.ids, labels, strict=True)))


def write_submission(path: Path, run: TrainedRun, predictions: Predictions) -> None:
    """Writes the name of the most probable class of every image, atomically.

    Args:
        path: UTF-8 file with the header ``id,label``; an id is a file name without its suffix, and
            ids that are numbers are in numeric order.
        run: names the classes.
        predictions: what to write.

    Raises:
        ResfastError: two images have the same id, or the file cannot be written.
    """
    ids = [PurePath(name).stem for name in predictions.ids]
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ResfastError(
            f"several images have the same id, for example {repeated[0]!r}; "
            "expected file names that differ without their suffix and folder"
        )
    labels = [run.classes[label] for label in predictions.labels[:, 0].tolist()]
    numbers = all(name.isascii() and name.isdigit() for name in ids)
    rows = sorted(zip(ids, labels, strict=True), key=lambda row: int(row[0]) if numbers else row)
    _save_csv(path, ("id", "label"), rows)


def _save_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    try:
        atomic.write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise ResfastError(
            f"cannot write {path}: {error.strerror or error}; choose another path with --csv"
        ) from None


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        options = entry.parse(Options, args, COMMAND)
        check_options(options.top, options.tta)
        source = open_images([path.expanduser() for path in options.images])
        printed = isinstance(source, Files) and not options.images[0].expanduser().is_dir()
        default = SUBMISSION if options.submission else None if printed else DEFAULT_CSV
        target = options.csv or default
        if target is not None:
            target = target.expanduser()
            check_csv(target, options.overwrite)
        run, predictions = _predictions(options, source)
        if skipped := predictions.skipped:
            examples = ", ".join(skipped[:3]) + (", …" if len(skipped) > 3 else "")
            print(
                f"skipped {len(skipped):,} corrupt images ({examples})",
                file=sys.stderr,
                flush=True,
            )
        if printed:
            print(listing(run, predictions))
        if target is not None and options.submission:
            write_submission(target, run, predictions)
            print(f"wrote {len(predictions.ids):,} predictions to {target} (id and class name)")
        elif target is not None:
            write_csv(target, run, predictions, options.names)
            last = len(run.classes) - 1
            kind = (
                "class names"
                if options.names
                else f"class indices, 0 ({run.classes[0]}) to {last} ({run.classes[last]})"
            )
            print(f"wrote {len(predictions.ids):,} predictions to {target} ({kind})")

    return entry.run(command)


def _predictions(options: Options, source: Files | Rows) -> tuple[TrainedRun, Predictions]:
    """The run, or the first of several, and what it or they predict."""
    common: dict[str, Any] = {
        "top": options.top,
        "tta": options.tta,
        "batch_size": options.batch_size,
        "skip_corrupt": options.skip_corrupt,
        "progress": _progress,
    }
    loading: dict[str, Any] = {
        "weights": options.weights,
        "device": options.device,
        "precision": options.precision,
    }
    file = inference.FILES[options.weights]
    if seeds := seeds_in(options.run.expanduser()):
        usable = [run for run in seeds if (run / file).is_file()]
        if not usable:
            raise ResfastError(
                f"none of the {len(seeds)} runs in {options.run} has {file}; finish them with "
                f"python -m resfast.train --resume {options.run}"
            )
        names = ", ".join(run.name for run in usable)
        _note(f"the mean of the probabilities of {len(usable)} of {len(seeds)} runs: {names}")
        _note_all(source, inference.load(usable[0], **loading))
        return classify_together(usable, source, method="probabilities", **common, **loading)
    run = inference.load(options.run, **loading)
    inference.prepare(run)
    _note_all(source, run)
    return run, classify(run, source, **common)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _note_all(source: Files | Rows, run: TrainedRun) -> None:
    for line in _notes(source, run.image_size):
        _note(line)


def _notes(source: Files | Rows, size: int) -> Iterator[str]:
    if isinstance(source, Files) and source.ignored:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        yield f"ignored {source.ignored:,} files that are not {suffixes} images"
    if isinstance(source, Rows) and source.array.shape[1] != size:
        side = source.array.shape[1]
        yield f"resizing images of {side}x{side} to the run's {size}x{size}"


def _progress(batches: Iterator[Batch], count: int) -> Any:
    console = Console(stderr=True)
    bar = functools.partial(track, description="predicting", total=count, console=console)
    return bar(batches, transient=True) if console.is_terminal and count > 1 else batches
