"""What a report needs data and weights for: sample images, class counts, confident mistakes."""

from __future__ import annotations

import base64
import gc
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from resfast.data import batches as feed
from resfast.data.dataset import Dataset
from resfast.data.sources import open_data
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference.evaluate import label_numbers
from resfast.reporting.collect import Group, ReportedRun
from resfast.runs.folder import BEST, WEIGHTS
from resfast.text import printable

MAX_CLASSES_SHOWN = 40
"""Classes of the image grid; a report of a data set with more says so."""
MAX_PREDICTED = 10_000
"""Images of which mistakes are looked for, spread evenly over the scored ones."""


@dataclass(frozen=True)
class Mistake:
    """An image that is classified wrongly.

    Attributes:
        image: PNG as a data URI.
        true: name of its class.
        predicted: name of the predicted class.
        probability: of the predicted class, 0 to 1.
    """

    image: str
    true: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Mistakes:
    """The most confident mistakes of a network.

    Attributes:
        run: name of the run whose weights they are of.
        images_of: the images they are among, in words.
        shown: the mistakes, most confident first.
        count: number of all mistakes.
        total: number of images classified.
        note: why there are none, or None.
    """

    run: str
    images_of: str
    shown: tuple[Mistake, ...] = ()
    count: int = 0
    total: int = 0
    note: str | None = None


@dataclass(frozen=True)
class DataView:
    """A data set as a report shows it.

    Attributes:
        name: of the data set.
        size: height and width of the images, in pixels.
        classes: class names.
        train: number of training images of each class, held-out ones included.
        test: number of test images of each class.
        rows: class name and its sample images side by side, PNG as a data URI.
        note: what is left out and why, or None.
        limits: values of ``--max-images`` of its runs, in increasing order; 0 is all.
    """

    name: str
    size: int
    classes: tuple[str, ...] = ()
    train: tuple[int, ...] = ()
    test: tuple[int, ...] = ()
    rows: tuple[tuple[str, str], ...] = ()
    note: str | None = None
    limits: tuple[int, ...] = (0,)


class DataSets:
    """Opens the data of runs, each once; data that cannot be had is remembered with the reason.

    Args:
        data: another place of the data (None: each run's own).
        data_dir: where data sets are looked for (None: each run's own).
        report: called with a line of text for each notable step.
    """

    def __init__(
        self, data: str | None, data_dir: Path | None, report: Callable[[str], None]
    ) -> None:
        self.data, self.data_dir, self.report = data, data_dir, report
        self._opened: dict[tuple[str, str, int, bool], Dataset | str] = {}

    def of(self, run: ReportedRun) -> Dataset | str:
        """The data set of a run, or why there is none."""
        own = run.config.data
        data = own.data if self.data is None else self.data
        where = own.data_dir if self.data_dir is None else self.data_dir
        key = (data, str(where), own.image_size, own.skip_corrupt)
        if key not in self._opened:
            try:
                found = open_data(
                    data,
                    data_dir=where,
                    image_size=own.image_size,
                    skip_corrupt=own.skip_corrupt,
                    report=self.report,
                    classes=own.classes if self.data is None else None,
                )
            except ResfastError as error:
                self._opened[key] = str(error)
            else:
                streamed = f"{data} is streamed, and a report reads only images in memory"
                self._opened[key] = found if isinstance(found, Dataset) else streamed
        return self._opened[key]


def data_views(
    runs: Sequence[ReportedRun], data_sets: DataSets, images_per_class: int
) -> list[DataView]:
    """Each data set of the runs once, in the order of the runs.

    Args:
        runs: the runs.
        data_sets: opens their data.
        images_per_class: length of a row of the image grid; 0 for no grid.
    """
    views: dict[int | str, DataView] = {}
    limits: dict[int | str, set[int]] = {}
    for run in runs:
        found = data_sets.of(run)
        if isinstance(found, str):
            name = run.config.data.data if data_sets.data is None else data_sets.data
            note = f"No images and no class distribution: {found}."
            views.setdefault(found, DataView(name, run.config.data.image_size, note=note))
            continue
        if id(found) not in views:
            views[id(found)] = _data_view(found, images_per_class)
        limits.setdefault(id(found), set()).add(run.config.data.max_images)
    return [
        replace(view, limits=tuple(sorted(limits.get(key, {0})))) for key, view in views.items()
    ]


def _data_view(data: Dataset, images_per_class: int) -> DataView:
    count = len(data.classes)
    train, test = (
        tuple(torch.bincount(labels, minlength=count).tolist())
        for labels in (data.train_labels, data.test_labels)
    )
    rows = []
    for label in range(min(count, MAX_CLASSES_SHOWN) if images_per_class else 0):
        indices = (data.train_labels == label).nonzero()[:, 0]
        if len(indices):
            shown = min(images_per_class, len(indices))
            chosen = indices[torch.arange(shown) * len(indices) // shown]
            rows.append((data.classes[label], data_uri(side_by_side(data.train_images[chosen]))))
    note = None
    if count > MAX_CLASSES_SHOWN and images_per_class:
        note = f"Images of the first {MAX_CLASSES_SHOWN} of {count} classes."
    return DataView(data.name, data.image_size, data.classes, train, test, tuple(rows), note)


def side_by_side(images: Tensor) -> Tensor:
    """Images in one row without gaps: uint8 ``[N, H, W, C]`` to ``[H, N * W, C]``."""
    count, height, width, channels = images.shape
    return images.permute(1, 0, 2, 3).reshape(height, count * width, channels)


def data_uri(image: Tensor) -> str:
    """An image, uint8 ``[H, W, 3]``, as a PNG in a ``data:`` URI."""
    buffer = io.BytesIO()
    Image.fromarray(image.contiguous().cpu().numpy()).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def mistakes_of(group: Group, data_sets: DataSets, most: int, device: str) -> Mistakes:
    """The most confident mistakes of the first run of a group that has weights.

    They are among the images that the run is judged by: the held-out ones of a run that did not
    score the test images.

    Args:
        group: the runs.
        data_sets: opens their data.
        most: number of mistakes to show.
        device: as in :func:`resfast.load`.
    """
    for run in group.runs:
        weights = next((name for name in (WEIGHTS, BEST) if (run.path / name).is_file()), None)
        if weights is not None:
            break
    else:
        return Mistakes(group.runs[0].name, "", note="No run of it has weights.")
    on_test = run.scored_on == "test"
    images_of = "test images" if on_test else "held-out images"
    data = data_sets.of(run)
    if isinstance(data, str):
        return Mistakes(run.name, images_of, note=f"The images are not at hand: {data}.")
    try:
        return _mistakes(run, data, weights, images_of, most, device)
    except ResfastError as error:
        return Mistakes(run.name, images_of, note=f"{error}.")


def _mistakes(
    run: ReportedRun, data: Dataset, weights: str, images_of: str, most: int, device: str
) -> Mistakes:
    config = run.config
    trained = inference.load(run.path / weights, device=device)
    name = run.name if weights == WEIGHTS else f"{run.name} (best weights so far)"
    inference.prepare(trained)
    numbers = label_numbers(trained, data)
    _, held_out, test = feed.split_sources(
        data,
        config.data.val_fraction,
        config.runtime.seed,
        config.data.hold_out,
        config.data.max_images,
    )
    source = test if images_of == "test images" else held_out
    if not isinstance(source, tuple):
        return Mistakes(run.name, images_of, note="The run has no held-out images.")
    spread = feed.spread(source, MAX_PREDICTED)
    assert isinstance(spread, tuple)
    images, labels = spread
    labels = labels if numbers is None else numbers[labels]
    probabilities, predicted = trained.probabilities(images).max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    ranked = wrong[probabilities[wrong].argsort(descending=True, stable=True)]
    shown = tuple(
        Mistake(
            data_uri(images[index]),
            printable(trained.classes[int(labels[index])]),
            printable(trained.classes[int(predicted[index])]),
            float(probabilities[index]),
        )
        for index in ranked[:most].tolist()
    )
    del trained
    gc.collect()  # one network is in memory at a time
    return Mistakes(name, images_of, shown, len(wrong), len(images))
