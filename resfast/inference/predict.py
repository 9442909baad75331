"""``resfast.predict(run, images)``: classifies unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from resfast.data.unlabelled import Batch, Files, Rows, checked, open_images
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference.load import TrainedRun, Which
from resfast.inference.scoring import TTA
from resfast.runtime import Precision


@dataclass
class Predictions:
    """The most probable classes of every image.

    Attributes:
        ids: name of each image.
        labels: int64 ``[N, top]``, most probable first.
        probabilities: float32 ``[N, top]``.
        skipped: IDs of corrupt images that were skipped.
    """

    ids: list[str] = field(default_factory=list)
    labels: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    probabilities: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    skipped: list[str] = field(default_factory=list)


def classify(
    run: TrainedRun,
    source: Files | Rows,
    *,
    top: int,
    tta: TTA,
    batch_size: int | None = None,
    skip_corrupt: bool = False,
    progress: Callable[[Iterator[Batch], int], Any] = lambda batches, count: batches,
) -> Predictions:
    """Classifies images batch by batch; see :func:`predict` for the other arguments.

    Args:
        progress: called with the iterator of batches and their number; returns the iterator that is
            used instead.
    """
    check_options(top, tta)
    batch_size = run.checked_batch_size(batch_size)
    top = min(top, len(run.classes))
    predictions = Predictions()
    labels, probabilities = [], []
    batches = source.batches(run.image_size, batch_size, skip_corrupt)
    for ids, images, skipped in progress(batches, -(-len(source.ids) // batch_size)):
        best = run.probabilities(images, tta, batch_size=batch_size).topk(top)
        labels.append(best.indices)
        probabilities.append(best.values)
        predictions.ids += ids
        predictions.skipped += skipped
    if not predictions.ids:
        raise ResfastError(
            f"all {len(predictions.skipped):,} images are corrupt, for example "
            f"{predictions.skipped[0]}; expected at least one that can be decoded"
        )
    predictions.labels, predictions.probabilities = torch.cat(labels), torch.cat(probabilities)
    return predictions


def check_options(top: int, tta: str) -> None:
    """Checks the options of :func:`predict`.

    Raises:
        ResfastError: ``top`` is below 1, or ``tta`` is unknown.
    """
    if top < 1:
        raise ResfastError(f"--top {top} is out of range: expected at least 1")
    inference.check_choice("tta", tta, get_args(TTA))


def predict(
    run: str | Path | TrainedRun,
    images: str | Path | Sequence[str | Path] | np.ndarray | Tensor,
    *,
    top: int = 5,
    tta: TTA = "none",
    weights: Which = "final",
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
) -> list[list[tuple[str, float]]]:
    """Classifies images.

    Args:
        run: path of a run or its weights, see :func:`resfast.load`, or a loaded run (``weights``,
            ``device`` and ``precision`` are then ignored).
        images: image files; a folder of them, a ``.npy`` or a pickle; or uint8 ``[N, H, W, 3]``,
            ``[N, 3, H, W]`` or ``[N, 3072]``. They are resized to the run's image size.
        top: number of classes to return for each image.
        tta: test-time augmentation.
        weights: ``final`` or ``best``.
        device: see :func:`resfast.load`.
        precision: see :func:`resfast.load`.
        batch_size: images per step (None: the run's own).

    Returns:
        For each image, up to ``top`` pairs of class name and probability (0 to 1), most probable
        first. Images of a folder are sorted by path.

    Raises:
        ResfastError: the run does not exist, or the images cannot be read or have the wrong dtype
            or shape.
    """
    check_options(top, tta)
    source: Files | Rows
    if isinstance(images, np.ndarray | Tensor):
        array = images.cpu().numpy() if isinstance(images, Tensor) else images
        source = Rows(*checked(array, None, "the array"))
    else:
        paths = [images] if isinstance(images, str | Path) else images
        source = open_images([Path(path).expanduser() for path in paths])
    if not isinstance(run, TrainedRun):
        run = inference.load(run, weights=weights, device=device, precision=precision)
    return named_pairs(run, classify(run, source, top=top, tta=tta, batch_size=batch_size))


def named_pairs(run: TrainedRun, predictions: Predictions) -> list[list[tuple[str, float]]]:
    """For each image, pairs of class name and probability, most probable first."""
    labels, probabilities = predictions.labels.tolist(), predictions.probabilities.tolist()
    return [
        [(run.classes[label], value) for label, value in zip(row, values, strict=True)]
        for row, values in zip(labels, probabilities, strict=True)
    ]
