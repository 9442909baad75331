"""``resfast.ensemble(runs)``: several trained networks as one classifier."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from resfast.config.schema import DataConfig
from resfast.data.dataset import Dataset, print_to_stderr
from resfast.data.sources import load_dataset
from resfast.data.unlabelled import Files, Rows
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference.load import TrainedRun, Which
from resfast.inference.predict import Predictions
from resfast.inference.scoring import TTA
from resfast.models.resnet import count_parameters
from resfast.runs.find import expanded
from resfast.runs.statistics import CONFIDENCE
from resfast.runtime import Precision

Method = Literal["probabilities", "logits", "vote"]
"""Mean of the softmax, mean of the logits, or majority vote, whose ties the mean softmax breaks."""
METHODS: tuple[Method, ...] = get_args(Method)
NAMES: dict[Method, str] = {
    "probabilities": "mean of softmax",
    "logits": "mean of logits",
    "vote": "majority vote",
}
"""Of the methods, in tables."""


@dataclass(frozen=True)
class Member:
    """A network of an ensemble.

    Attributes:
        run: path of the run.
        parameters: number of its parameters.
        accuracy: fraction of the test images that it classifies correctly by itself.
    """

    run: Path
    parameters: int
    accuracy: float


@dataclass(frozen=True)
class EnsembleResult:
    """What :func:`ensemble` found.

    Attributes:
        members: the networks.
        accuracy: fraction of the test images classified correctly by each :data:`Method`.
        interval: of each accuracy, the 95 % confidence interval for other images of the same kind
            (Wilson's score interval).
        parameters: of all members together.
        images: number of test images.
        classes: class names.
        data: name of the data set.
        tta: test-time augmentation of each member.
        scores: by method, float32 ``[images, classes]``; the largest is the prediction.
    """

    members: tuple[Member, ...]
    accuracy: dict[Method, float]
    interval: dict[Method, tuple[float, float]]
    parameters: int
    images: int
    classes: tuple[str, ...]
    data: str
    tta: str
    scores: dict[Method, Tensor]

    @property
    def record(self) -> dict[str, Any]:
        """All but the scores, as ``ensemble.json`` has it."""
        return {
            "members": [
                {"run": str(m.run), "parameters": m.parameters, "test_accuracy": m.accuracy}
                for m in self.members
            ],
            "parameters": self.parameters,
            "data": self.data,
            "test_images": self.images,
            "tta": self.tta,
            "test_accuracy": self.accuracy,
            "confidence_interval": self.interval,
        }


class Combination:
    """Sums over the members, from which each method's scores follow.

    Args:
        images: number of images.
        classes: number of classes.
    """

    def __init__(self, images: int, classes: int) -> None:
        self.count = 0
        self.sums = {name: torch.zeros(images, classes) for name in METHODS}

    def add(self, logits: Tensor) -> None:
        """Adds a member's logits, float32 ``[images, classes]``."""
        self.count += 1
        self.sums["logits"] += logits
        self.sums["probabilities"] += logits.softmax(1)
        self.sums["vote"][torch.arange(len(logits)), logits.argmax(1)] += 1

    def scores(self, method: Method) -> Tensor:
        """float32 ``[images, classes]``: means, or votes plus at most a half to break ties."""
        means = {name: value / self.count for name, value in self.sums.items()}
        if method == "vote":
            return self.sums["vote"] + means["probabilities"] / 2
        return means[method]


def ensemble(
    runs: Sequence[str | Path],
    data: str | None = None,
    *,
    data_dir: str | Path | None = None,
    tta: Literal["auto"] | TTA = "auto",
    weights: Which = "final",
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    param_budget: int = 0,
    report: Callable[[str], None] = print_to_stderr,
) -> EnsembleResult:
    """Scores several trained networks together on the test images of a data set.

    One network is in memory at a time.

    Args:
        runs: paths of runs or their weights, see :func:`resfast.load`, or folders of several runs.
        data: a data set with the runs' classes (None: that of the first run). Each member gets the
            images in its own size.
        data_dir: where data sets are looked for (None: the first run's own).
        tta: test-time augmentation (auto: each run's own).
        weights: ``final`` or ``best``.
        device: as in :func:`resfast.load`.
        precision: as in :func:`resfast.load`.
        batch_size: images per step (None: each run's own).
        param_budget: largest number of parameters of all members together (0: none).
        report: called with a line of text for each notable step.

    Returns:
        Accuracy of each method, of each member, and the scores.

    Raises:
        ResfastError: no such run or data, runs with different classes, or too many parameters.
    """
    inference.check_choice("tta", tta, ("auto", *get_args(TTA)))
    paths = expanded(runs, "an ensemble")
    data_sets: dict[int, Dataset] = {}
    own_data: DataConfig | None = None
    combination: Combination | None = None
    members: list[Member] = []
    classes: tuple[str, ...] = ()
    labels = torch.empty(0, dtype=torch.int64)
    for path in paths:
        run = inference.load(path, weights=weights, device=device, precision=precision)
        if own_data is None:
            own_data, classes = run.config.data, run.classes
        size = run.image_size
        if size not in data_sets:
            data_sets[size] = load_dataset(
                own_data.data if data is None else data,
                data_dir=own_data.data_dir if data_dir is None else Path(data_dir),
                image_size=size,
                report=report,
                test_only=True,
            )
        found = data_sets[size]
        order = _order(run.classes, classes, path, paths[0])
        if combination is None:
            numbers = _order(classes, found.classes, paths[0], Path(found.name))
            labels = numbers[found.test_labels]
            combination = Combination(len(found.test_images), len(classes))
        own_tta = run.config.evaluation.tta if tta == "auto" else tta
        logits = run.logits(found.test_images, own_tta, batch_size=batch_size)[:, order]
        combination.add(logits)
        correct = (logits.argmax(1) == labels).float().mean().item()
        members.append(Member(run.path, count_parameters(run.model), correct))
        check_budget(members, param_budget)
        del run, logits
        gc.collect()
    assert combination is not None
    scores = {name: combination.scores(name) for name in METHODS}
    right = {name: int((value.argmax(1) == labels).sum()) for name, value in scores.items()}
    count = len(labels)
    return EnsembleResult(
        members=tuple(members),
        accuracy={name: value / count for name, value in right.items()},
        interval={name: wilson_interval(value, count) for name, value in right.items()},
        parameters=sum(member.parameters for member in members),
        images=count,
        classes=classes,
        data=found.name,
        tta=tta,
        scores=scores,
    )


def classify(
    runs: Sequence[str | Path],
    source: Files | Rows,
    *,
    method: Method,
    tta: TTA,
    top: int = 1,
    weights: Which = "final",
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    skip_corrupt: bool = False,
    param_budget: int = 0,
    progress: Callable[[Iterator[Any], int], Any] = lambda batches, count: batches,
) -> tuple[TrainedRun, Predictions]:
    """Classifies unlabelled images by an ensemble.

    Args:
        runs: as in :func:`ensemble`.
        source: the images.
        method: how the members are combined.
        tta: test-time augmentation.
        weights: ``final`` or ``best``.
        device: as in :func:`resfast.load`.
        precision: as in :func:`resfast.load`.
        batch_size: images per step (None: each run's own).
        skip_corrupt: leave out images that cannot be decoded.
        param_budget: as in :func:`ensemble`.

    Returns:
        The first member, whose classes the labels are in, and the most probable class of each
        image.

    Raises:
        ResfastError: as :func:`ensemble`, or images that cannot be read.
    """
    paths = expanded(runs, "an ensemble")
    loaded = [inference.load(p, weights=weights, device=device, precision=precision) for p in paths]
    first = loaded[0]
    check_budget(
        [Member(run.path, count_parameters(run.model), math.nan) for run in loaded], param_budget
    )
    orders = [_order(run.classes, first.classes, run.path, first.path) for run in loaded]
    sizes = {run.image_size for run in loaded}
    step = first.checked_batch_size(batch_size)
    predictions = Predictions()
    best: list[Tensor] = []
    values: list[Tensor] = []
    streams = {size: source.batches(size, step, skip_corrupt) for size in sizes}
    top = min(top, len(first.classes))
    for parts in progress(_together(streams), -(-len(source.ids) // step)):
        ids, images, skipped = parts[first.image_size]
        combination = Combination(len(images), len(first.classes))
        for run, order in zip(loaded, orders, strict=True):
            logits = run.logits(parts[run.image_size][1], tta, batch_size=batch_size)
            combination.add(logits[:, order])
        labels = combination.scores(method).topk(top).indices
        best.append(labels)
        values.append(combination.scores("probabilities").gather(1, labels))
        predictions.ids += ids
        predictions.skipped += skipped
    if not predictions.ids:
        raise ResfastError(
            f"all {len(predictions.skipped):,} images are corrupt; expected at least one that can "
            "be decoded"
        )
    predictions.labels, predictions.probabilities = torch.cat(best), torch.cat(values)
    return first, predictions


def _together(streams: Mapping[int, Iterable[Any]]) -> Iterator[dict[int, Any]]:
    """The same batch in every size."""
    for parts in zip(*streams.values(), strict=True):
        yield dict(zip(streams, parts, strict=True))


def check_budget(members: Sequence[Member], budget: int) -> None:
    """Checks the parameters of all members together.

    Raises:
        ResfastError: there are more than the budget allows.
    """
    total = sum(member.parameters for member in members)
    if budget and total > budget:
        raise ResfastError(
            f"{len(members)} members have {total:,} parameters, above the budget of {budget:,}; "
            "leave some out, or use --param-budget 0 for none"
        )


def _order(names: Sequence[str], wanted: Sequence[str], what: Path, like: Path) -> Tensor:
    """For each wanted class, its index among ``names``, int64 ``[classes]``."""
    if sorted(names) != sorted(wanted):
        raise ResfastError(
            f"the classes of {what} ({len(names)}) differ from those of {like} ({len(wanted)}); "
            "all members and the data need the same ones"
        )
    return torch.tensor([names.index(name) for name in wanted])


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a probability, by Wilson's score.

    Args:
        right: number of successes.
        count: number of trials.
    """
    from scipy.stats import binomtest  # slow to import

    found = binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)
