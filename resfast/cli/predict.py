"""``resfast predict RUN IMAGE…``: classifies images, on the screen or into a CSV file."""

from __future__ import annotations

import csv
import functools
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from resfast.inference.load import TrainedRun, Which
from resfast.inference.predict import Answers, answer, check_options, named_pairs
from resfast.inference.scoring import TTA
from resfast.runtime import Precision

COMMAND = "predict"
HEADER = ("ID", "Labels")
DEFAULT_CSV = Path("predictions.csv")


@dataclass(frozen=True)
class Options:
    """Classifies images with a trained network.

    Image files are answered on the screen; a folder, a .npy or a pickle in a CSV file with the
    columns ID and Labels. Exit codes: 0 done, 2 bad input.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of the run, runs/NAME, or a .safetensors file of one."""
    images: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="IMAGE…")]]
    """Image files; or one folder of images, .npy file or pickle of the classic CIFAR kind."""
    top: int = 5
    """Classes shown for each image."""
    tta: TTA = "none"
    """Test-time augmentation."""
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
    csv: Path | None = None
    """CSV file to write (None: predictions.csv, or none at all for image files)."""
    names: bool = False
    """Write class names to the CSV instead of class indices."""
    overwrite: bool = False
    """Replace a CSV file that exists."""


def listing(run: TrainedRun, answers: Answers) -> str:
    """Each image with its classes below it, most probable first."""
    pairs = named_pairs(run, answers)
    width = max(len(name) for row in pairs for name, _ in row)
    lines = []
    for name, row in zip(answers.ids, pairs, strict=True):
        lines.append(name)
        lines += [f"  {label:<{width}}  {probability:>7.2%}" for label, probability in row]
    return "\n".join(lines)


def check_csv(path: Path, overwrite: bool) -> None:
    """Refuses a CSV path that could not be written, before the work is done.

    Raises:
        ResfastError: it exists and is not to be replaced, is a folder, or its folder is missing.
    """
    if path.is_dir():
        raise ResfastError(f"--csv {path} is a folder; expected the name of a file")
    if path.exists() and not overwrite:
        raise ResfastError(
            f"{path} exists; choose another file with --csv, or replace it with --overwrite"
        )
    if not path.parent.is_dir():
        raise ResfastError(f"the folder of --csv {path} does not exist; create {path.parent} first")


def write_csv(path: Path, run: TrainedRun, answers: Answers, names: bool) -> None:
    """Writes the most probable class of every image, atomically.

    Args:
        path: UTF-8 file with the header ``ID,Labels``.
        run: whose classes they are.
        answers: what to write.
        names: class names instead of class indices.

    Raises:
        ResfastError: it could not be written; an old file is intact.
    """
    labels: list[Any] = answers.labels[:, 0].tolist()
    if names:
        labels = [run.classes[label] for label in labels]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(zip(answers.ids, labels, strict=True))
    try:
        atomic.write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise ResfastError(
            f"cannot write {path}: {error.strerror or error}; choose another place with --csv"
        ) from None


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        options = entry.parse(Options, args, COMMAND)
        check_options(options.top, options.tta)
        source = open_images([path.expanduser() for path in options.images])
        shown = isinstance(source, Files) and not options.images[0].expanduser().is_dir()
        target = options.csv if shown else options.csv or DEFAULT_CSV
        if target is not None:
            target = target.expanduser()
            check_csv(target, options.overwrite)
        run = inference.load(
            options.run,
            weights=options.weights,
            device=options.device,
            precision=options.precision,
        )
        inference.prepare(run)
        for note in _notes(source, run.image_size):
            print(note, file=sys.stderr, flush=True)
        answers = answer(
            run,
            source,
            top=options.top,
            tta=options.tta,
            batch_size=options.batch_size,
            skip_corrupt=options.skip_corrupt,
            progress=_progress,
        )
        if answers.left_out:
            some = ", ".join(answers.left_out[:3]) + (", …" if len(answers.left_out) > 3 else "")
            print(
                f"left out {len(answers.left_out):,} corrupt images ({some})",
                file=sys.stderr,
                flush=True,
            )
        if shown:
            print(listing(run, answers))
        if target is not None:
            write_csv(target, run, answers, options.names)
            last = len(run.classes) - 1
            kind = (
                "class names"
                if options.names
                else f"class indices, 0 ({run.classes[0]}) to {last} ({run.classes[last]})"
            )
            print(f"wrote {len(answers.ids):,} predictions to {target} ({kind})")

    return entry.run(command)


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
