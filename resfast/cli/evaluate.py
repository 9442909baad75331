"""``resfast evaluate RUN``: scores a run and prints a table of its classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resfast import atomic
from resfast.cli import common as entry
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference.corruption import (
    PLOT,
    ROWS,
    corruption_table,
    evaluate_corrupted,
    is_cifar_c,
    refuse_seeds,
)
from resfast.inference.corruption import RESULT as CORRUPTIONS
from resfast.inference.evaluate import CONFUSION, RESULT, Result, evaluate
from resfast.inference.evaluate_seeds import SeedsResult, evaluate_seeds
from resfast.inference.load import TrainedRun, Which
from resfast.inference.noisy_labels import RESULT as NOISY
from resfast.inference.noisy_labels import evaluate_noisy, is_noisy, noisy_table
from resfast.inference.scoring import TTA
from resfast.runs.find import seeds_in
from resfast.runs.statistics import CONFIDENCE
from resfast.runtime import Precision

COMMAND = "evaluate"


@dataclass(frozen=True)
class Options:
    """Scores a trained network on the test images of a data set.

    Writes evaluation.json and evaluation-confusion.png; for corrupted images, corruptions.json,
    .csv and .png instead. Exit codes: 0 scored, 2 bad input.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of the run, runs/NAME, or a .safetensors file of one; or the folder of --runs, whose
    seeds are all scored."""
    data: str | None = None
    """Another data set with the same classes (as for train's --data), resized to the run's
    image size. None: the run's own. Also cifar10.1:PATH, cifar10-c:PATH and cifar100-c:PATH,
    which have test images only; and cifar10-n:PATH, whose noisy labels are compared with what the
    run says about the training images."""
    corrupt: tuple[str, ...] | None = None
    """Score under common corruptions, five severities each: their names, such as fog snow, or
    none for all fifteen. With cifar10-c:PATH, the ones to read."""
    corrupt_seed: int = 0
    """Seed of the corruptions."""
    data_dir: Path | None = None
    """Where data sets are looked for, downloaded to and cached (None: the run's own)."""
    tta: Literal["auto"] | TTA = "auto"
    """Test-time augmentation to score besides the plain images (auto: the run's own)."""
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
    out: Path | None = None
    """Folder for the two files (None: the run's). Those of several seeds are in folders below."""
    trust: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose code may run, since it makes the network of the run; may be repeated."""


def table(result: Result) -> str:
    """A line per class: images, correct, accuracy, and the class it is most often mistaken for."""
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


def seeds_table(result: SeedsResult) -> str:
    """A line per seed, then the mean of all, with its standard deviation and interval."""
    augmented = result.each[0].tta != "none"
    width = max(len("mean"), *(len(run.name) for run in result.runs))
    lines = [f"{'run':<{width}}  {'accuracy':>8}" + ("  with TTA" if augmented else "")]
    for run, one in zip(result.runs, result.each, strict=True):
        line = f"{run.name:<{width}}  {one.accuracy:>8.2%}"
        lines.append(line + (f"  {one.with_tta.accuracy:>8.2%}" if augmented else ""))
    mean = f"{'mean':<{width}}  {result.accuracy.mean:>8.2%}"
    lines.append(mean + (f"  {result.with_tta.mean:>8.2%}" if augmented else ""))
    found = result.with_tta if augmented else result.accuracy
    if found.sd is not None:
        lines.append(
            f"± {found.sd:.2%} (standard deviation), {CONFIDENCE:.0%} confidence interval of the "
            f"mean {found.low:.2%} to {found.high:.2%}" + (" (with TTA)" if augmented else "")
        )
    return "\n".join(lines)


def _evaluate_seeds(options: Options, runs: list[Path]) -> None:
    out = (options.run if options.out is None else options.out).expanduser()
    result = evaluate_seeds(
        runs,
        options.data,
        data_dir=options.data_dir,
        tta=options.tta,
        weights=options.weights,
        device=options.device,
        precision=options.precision,
        batch_size=options.batch_size,
        skip_corrupt=options.skip_corrupt,
        out=out,
    )
    record = result.record
    print(
        f"{len(result.runs)} runs in {options.run} on the {record['test_images']:,} test images of "
        f"{record['data']}\n"
    )
    print(seeds_table(result))
    if result.skipped:
        names = ", ".join(run.name for run in result.skipped)
        print(f"left out, without {inference.FILES[options.weights]}: {names}")
    print(out / RESULT)


def _evaluate_corrupted(options: Options, run: TrainedRun, out: Path) -> None:
    result = evaluate_corrupted(
        run,
        options.data,
        kinds=options.corrupt or (),
        seed=options.corrupt_seed,
        data_dir=options.data_dir,
        tta=options.tta,
        batch_size=options.batch_size,
        skip_corrupt=options.skip_corrupt,
        out=out,
    )
    record = result.record
    print(
        f"{run.file} on {record['test_images']:,} images of {record['data']} for each corruption "
        f"and severity ({record['device']}, {record['precision']}, {record['eval_seconds']:.1f} s)"
        "\n"
    )
    print(f"{corruption_table(result)}\n")
    augmented = result.tta != "none"
    if result.clean is not None:
        line = f"accuracy without corruption {1 - result.clean.error:.2%}"
        print(line + f", with TTA {1 - result.clean.tta_error:.2%}" * augmented)
    counted, found = len(record["mean_of"]), len(result.kinds)
    of = f"the {counted} of {found} corruptions in the paper" if counted < found else "all of them"
    line = f"mean accuracy under corruption {record['mean_accuracy']:.2%}"
    print(line + f", with TTA {record['mean_tta_accuracy']:.2%}" * augmented + f" ({of})")
    for name in (CORRUPTIONS, ROWS, PLOT):
        if (out / name).is_file():
            print(out / name)


def _evaluate_noisy(options: Options, run: TrainedRun, out: Path) -> None:
    assert options.data is not None
    result = evaluate_noisy(
        run,
        options.data,
        data_dir=options.data_dir,
        tta="none" if options.tta == "auto" else options.tta,
        batch_size=options.batch_size,
    )
    print(f"{run.file} on the {result.images:,} training images of {options.data}\n")
    print(f"{noisy_table(result)}\n")
    print(
        "repeated and corrected: of the images whose noisy label is not CIFAR's, the part that "
        "the run gives the noisy label, and CIFAR's"
    )
    atomic.make_folder(out, "--out")
    atomic.save(out / NOISY, (json.dumps(result.record, indent=2) + "\n").encode())
    print(out / NOISY)


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        options = entry.parse(Options, args, COMMAND)
        corrupted = options.corrupt is not None or is_cifar_c(options.data or "")
        noisy = is_noisy(options.data or "")
        if noisy and corrupted:
            raise ResfastError(
                f"--corrupt corrupts test images, and --data {options.data} has labels of training "
                "images: leave one of them out"
            )
        if runs := seeds_in(options.run.expanduser()):
            if corrupted or noisy:
                refuse_seeds(runs)
            _evaluate_seeds(options, runs)
            return
        run = inference.load(
            options.run,
            weights=options.weights,
            device=options.device,
            precision=options.precision,
        )
        inference.prepare(run)
        out = run.path if options.out is None else options.out.expanduser()
        if corrupted:
            _evaluate_corrupted(options, run, out)
            return
        if noisy:
            _evaluate_noisy(options, run, out)
            return
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
