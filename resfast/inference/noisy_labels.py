"""Scores a run on the noisy training labels of CIFAR-10-N: does it repeat people's mistakes?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from resfast.data.dataset import Request, print_to_stderr
from resfast.data.noisy_labels import KINDS, read_noisy
from resfast.inference.evaluate import label_numbers
from resfast.inference.load import TrainedRun
from resfast.inference.scoring import TTA

RESULT = "noisy-labels.json"


@dataclass(frozen=True)
class NoisyScore:
    """Agreement with one set of noisy labels of the training images; all values are 0 to 1.

    Attributes:
        labels: name of the set.
        noise_rate: fraction of the images whose noisy label differs from CIFAR's.
        accuracy: fraction of the images classified as the noisy label says.
        repeated: of the images whose noisy label differs, the fraction classified as it says.
        corrected: of these, the fraction classified as CIFAR's label says.
    """

    labels: str
    noise_rate: float
    accuracy: float
    repeated: float
    corrected: float


@dataclass(frozen=True)
class NoisyResult:
    """What :func:`evaluate_noisy` found.

    Attributes:
        images: number of training images.
        accuracy: fraction of them classified as CIFAR's label says.
        scores: agreement with each set of noisy labels.
        record: all of it, as ``noisy-labels.json`` has it.
    """

    images: int
    accuracy: float
    scores: tuple[NoisyScore, ...]
    record: dict[str, Any]


def is_noisy(data: str) -> bool:
    """Whether ``--data`` names noisy labels of training images."""
    return data.partition(":")[0] in KINDS


def evaluate_noisy(
    run: TrainedRun,
    data: str,
    *,
    data_dir: Path | None = None,
    tta: TTA = "none",
    batch_size: int | None = None,
    report: Callable[[str], None] = print_to_stderr,
) -> NoisyResult:
    """Classifies the training images of CIFAR and compares the result with noisy labels.

    Args:
        run: the run.
        data: ``cifar10-n:PATH``, for all sets, or ``cifar10-n:PATH#SET``; also ``cifar100-n``.
        data_dir: where CIFAR is looked for (None: the run's own).
        tta: test-time augmentation.
        batch_size: images a step (None: the run's own).
        report: called with a line of text for each notable step.

    Raises:
        ResfastError: the labels or CIFAR are missing or damaged, or other classes than the run's.
    """
    found = read_noisy(
        Request(
            data=data,
            location=data.partition(":")[2],
            data_dir=(run.config.data.data_dir if data_dir is None else data_dir).expanduser(),
            image_size=run.image_size,
            skip_corrupt=False,
            loader="resident",
            device=torch.device("cpu"),
            report=report,
        )
    )
    dataset = found.dataset
    numbering = label_numbers(run, dataset)
    predicted = run.logits(dataset.train_images, tta, batch_size=batch_size).argmax(1)
    if numbering is not None:
        back = torch.empty_like(numbering)
        back[numbering] = torch.arange(len(numbering))
        predicted = back[predicted]
    clean = dataset.train_labels
    scores = []
    for name, labels in found.sets.items():
        wrong = labels != clean
        count = max(int(wrong.sum()), 1)
        scores.append(
            NoisyScore(
                labels=name,
                noise_rate=found.noise_rate(name),
                accuracy=_fraction(predicted == labels),
                repeated=int((predicted == labels)[wrong].sum()) / count,
                corrected=int((predicted == clean)[wrong].sum()) / count,
            )
        )
    accuracy = _fraction(predicted == clean)
    record = {
        "run": run.path.resolve().name,
        "weights": run.file.name,
        "data": data,
        "train_images": len(clean),
        "train_accuracy": accuracy,
        "tta": tta,
        "labels": [asdict(score) for score in scores],
    }
    return NoisyResult(len(clean), accuracy, tuple(scores), record)


def _fraction(matches: torch.Tensor) -> float:
    return float(matches.double().mean())


def noisy_table(result: NoisyResult) -> str:
    """A line per set of labels."""
    lines = [f"{'labels':<8}  {'noise':>7}  {'accuracy':>8}  {'repeated':>8}  {'corrected':>9}"]
    lines.append(f"{'clean':<8}  {0:>7.2%}  {result.accuracy:>8.2%}")
    for row in result.scores:
        lines.append(
            f"{row.labels:<8}  {row.noise_rate:>7.2%}  {row.accuracy:>8.2%}  {row.repeated:>8.2%}  "
            f"{row.corrected:>9.2%}"
        )
    return "\n".join(lines)
