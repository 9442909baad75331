"""``resfast ensemble RUN…``: scores several runs as one classifier, or writes its predictions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from resfast import atomic
from resfast.cli import common as entry
from resfast.cli.predict import DEFAULT_CSV, check_csv, write_csv
from resfast.data.unlabelled import open_images
from resfast.inference.ensemble import METHODS, NAMES, EnsembleResult, Method, classify, ensemble
from resfast.inference.load import Which
from resfast.inference.scoring import TTA
from resfast.runtime import Precision

COMMAND = "ensemble"


@dataclass(frozen=True)
class Options:
    """Scores several trained networks as one classifier on the test images of a data set.

    With --images it classifies these instead and writes a CSV file with the columns ID and Labels.
    Exit codes: 0 done, 2 bad input.
    """

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN…")]]
    """Folders of runs, runs/NAME, or of several runs that differ in their seed; .safetensors
    files."""
    data: str | None = None
    """A data set with the runs' classes (None: that of the first run)."""
    data_dir: Path | None = None
    """Where data sets are looked for, downloaded to and cached (None: the first run's own)."""
    tta: Literal["auto"] | TTA = "auto"
    """Test-time augmentation of each member (auto: its own; none with --images)."""
    method: Method = "probabilities"
    """How --images are classified: by the mean of the softmax, the mean of the logits, or majority
    vote, whose ties the mean softmax breaks. All three are scored."""
    param_budget: int = 0
    """Reject ensembles with more parameters in all than this (0: no budget)."""
    weights: Which = "final"
    """Weights of the last epoch, or of the best evaluation."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: CUDA if available."""
    precision: Precision = "auto"
    """Compute dtype; auto: each run's own, or the hardware's default on another kind of device."""
    batch_size: int | None = None
    """Images per step (None: each run's own)."""
    out: Path | None = None
    """JSON file for the accuracies (None: not written)."""
    images: Path | None = None
    """A folder of images, .npy file, or pickle in CIFAR's format, to classify."""
    csv: Path = DEFAULT_CSV
    """CSV file for the classes of --images."""
    names: bool = False
    """Write class names to the CSV instead of class indices."""
    skip_corrupt: bool = False
    """Skip images that cannot be decoded instead of stopping."""
    overwrite: bool = False
    """Replace an existing CSV file."""
    trust: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose code may run, since it makes the network of the run; may be repeated."""


def table(result: EnsembleResult) -> str:
    """A line per member and per method."""
    width = max(len(str(member.run)) for member in result.members)
    width = max(width, *(len(name) for name in NAMES.values()))
    lines = [f"{'':<{width}}  {'parameters':>11}  {'accuracy':>8}  95 % interval"]
    for member in result.members:
        lines.append(f"{member.run!s:<{width}}  {member.parameters:>11,}  {member.accuracy:>8.2%}")
    for method in METHODS:
        low, high = result.interval[method]
        lines.append(
            f"{NAMES[method]:<{width}}  {result.parameters:>11,}  {result.accuracy[method]:>8.2%}  "
            f"{low:.2%} to {high:.2%}"
        )
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        options = entry.parse(Options, args, COMMAND)
        common: dict[str, Any] = {
            "weights": options.weights,
            "device": options.device,
            "precision": options.precision,
            "batch_size": options.batch_size,
            "param_budget": options.param_budget,
        }
        if options.images is not None:
            target = options.csv.expanduser()
            check_csv(target, options.overwrite)
            first, predictions = classify(
                options.runs,
                open_images([options.images.expanduser()]),
                method=options.method,
                tta="none" if options.tta == "auto" else options.tta,
                skip_corrupt=options.skip_corrupt,
                **common,
            )
            write_csv(target, first, predictions, options.names)
            print(f"wrote {len(predictions.ids):,} predictions to {target}")
            return
        result = ensemble(
            options.runs, options.data, data_dir=options.data_dir, tta=options.tta, **common
        )
        print(f"{len(result.members)} members on {result.images:,} test images of {result.data}\n")
        print(table(result))
        if options.out is not None:
            out = options.out.expanduser()
            atomic.save(out, (json.dumps(result.record, indent=2) + "\n").encode())
            print(out)

    return entry.run(command)
