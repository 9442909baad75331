"""What every batch of a run is, computed before it: how many images, of how many pixels.

Progressive image sizes, a batch size that grows, easy images left out late, and a last epoch that
is cut short meet here, so that the training, its learning rates, its display and a resumed run
read one plan. Without them it is epochs of equal batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from resfast.config.schema import Config, Phases
from resfast.config.validate import check_sizes
from resfast.data.augment import order
from resfast.errors import ResfastError


@dataclass(frozen=True)
class PlannedBatch:
    """One step.

    Attributes:
        first: place of its first image in the epoch's order.
        images: how many there are.
        pixels: their height and width.
    """

    first: int
    images: int
    pixels: int


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images, or over those that are kept.

    Attributes:
        first_step: steps of the run before it.
        first_image: images trained on before it.
        kept: images in its order.
        batches: its steps; a ragged last batch is left out.
    """

    first_step: int
    first_image: int
    kept: int
    batches: tuple[PlannedBatch, ...]

    @property
    def images(self) -> int:
        """Images trained on in it."""
        return self.batches[-1].first + self.batches[-1].images

    def images_in(self, steps: int) -> int:
        """Images of its first ``steps`` batches."""
        return self.batches[steps].first if steps < len(self.batches) else self.images


@dataclass(frozen=True)
class Plan:
    """All steps of a run.

    Attributes:
        epochs: in order; those of one kind share their ``batches``.
    """

    epochs: tuple[Epoch, ...]

    @property
    def uniform(self) -> bool:
        """Whether every epoch is whole and all batches are alike, as without a curriculum."""
        same = all(epoch.batches is self.epochs[0].batches for epoch in self.epochs)
        return same and len(self.shapes()) == 1

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.epochs[-1].first_step + len(self.epochs[-1].batches)

    @property
    def images(self) -> int:
        """Images trained on, each time counted."""
        return self.epochs[-1].first_image + self.epochs[-1].images

    @property
    def most_steps(self) -> int:
        """Steps of the longest epoch."""
        return max(len(epoch.batches) for epoch in self.epochs)

    def images_before(self, epoch: int, step: int = 0) -> int:
        """Images trained on before step ``step`` of ``epoch``."""
        if epoch >= len(self.epochs):
            return self.images
        return self.epochs[epoch].first_image + self.epochs[epoch].images_in(step)

    def progress(self) -> list[float] | None:
        """For each step the part of all images that comes before it; None where uniform.

        Learning rates follow it, so that a schedule is spread over images whatever the batches.
        """
        if self.uniform:
            return None
        total = self.images
        return [
            (epoch.first_image + batch.first) / total
            for epoch in self.epochs
            for batch in epoch.batches
        ]

    def shapes(self) -> list[tuple[int, int]]:
        """The (images, pixels) of batches, each once, in the order of their first step."""
        found: dict[tuple[int, int], None] = {}
        kinds = {id(epoch.batches): epoch.batches for epoch in self.epochs}
        for batch in chain.from_iterable(kinds.values()):
            found[batch.images, batch.pixels] = None
        return list(found)

    def steps_of(self, images: int, pixels: int) -> list[int]:
        """The steps of the run whose batches have this shape."""
        return [
            epoch.first_step + step
            for epoch in self.epochs
            for step, batch in enumerate(epoch.batches)
            if (batch.images, batch.pixels) == (images, pixels)
        ]

    def images_by_pixels(self, epoch: int, step: int = 0) -> dict[int, int]:
        """How many images of each size come before step ``step`` of ``epoch``."""
        counts: dict[int, int] = {}
        trained = [part.batches for part in self.epochs[:epoch]]
        if step:
            trained.append(self.epochs[epoch].batches[:step])
        for batch in chain.from_iterable(trained):
            counts[batch.pixels] = counts.get(batch.pixels, 0) + batch.images
        return counts


def make_plan(config: Config, images: int, image_size: int) -> Plan:
    """The steps of a run.

    A batch has the size and pixels of the phase that its first image lies in; phases are parts of
    the run's epochs. The last of 5.5 epochs has the batches that begin in its first half.
    Sources of the parts: image sizes, Howard's fast.ai entry to DAWNBench (2018), Touvron et al.,
    arXiv:1906.06423, and Tan and Le, arXiv:2104.00298; batch sizes, Smith et al.,
    arXiv:1711.00489; images left out, see :func:`epoch_order`.

    Args:
        config: of which epochs and batch size are definite.
        images: in the training set.
        image_size: their height and width, in pixels.

    Raises:
        ResfastError: a batch size or image size that does not fit the images.
    """
    optim, data = config.optim, config.data
    epochs = optim.epochs
    for size in (optim.batch_size, *(size for size, _ in optim.batch_sizes)):
        if not 1 <= size <= images:
            raise ResfastError(
                f"batch size {size} does not fit {images} training images; choose "
                f"{'--batch-sizes' if size != optim.batch_size else '--batch-size'} between 1 and "
                f"{images}"
            )
    check_sizes(data.sizes, image_size)
    first_filtered = max(1, math.ceil(round(data.filter_start * epochs, 9)))
    kept_late = round(data.filter_keep * images)
    result: list[Epoch] = []
    known: dict[tuple, tuple[PlannedBatch, ...]] = {}
    first_step = first_image = 0
    for number in range(math.ceil(epochs)):
        kept = kept_late if number >= first_filtered else images
        part = min(1.0, epochs - number)
        changes = [
            end
            for _, end in (*optim.batch_sizes, *data.sizes)
            if number < end * epochs < number + 1
        ]
        constant = not changes and part == 1
        here = number / epochs
        values = _at(optim.batch_sizes, here, optim.batch_size), _at(data.sizes, here, image_size)
        # A cut or mixed epoch has batches of its own.
        key = (kept, *values) if constant else (kept, number)
        if key not in known:
            known[key] = _batches(config, number, kept, part, image_size)
        batches = known[key]
        if not batches:
            raise ResfastError(
                f"batch size {values[0]} does not fit the {kept} images that --filter-keep "
                f"{data.filter_keep:g} leaves; choose a smaller batch or a larger part"
            )
        result.append(Epoch(first_step, first_image, kept, batches))
        first_step += len(batches)
        first_image += result[-1].images
    return Plan(tuple(result))


def _batches(
    config: Config, number: int, kept: int, part: float, image_size: int
) -> tuple[PlannedBatch, ...]:
    """The steps of epoch ``number``, of which the first ``part`` is trained."""
    optim, data = config.optim, config.data
    batches = []
    first = 0
    while first < part * kept:
        here = (number + first / kept) / optim.epochs
        size = _at(optim.batch_sizes, here, optim.batch_size)
        if first + size > kept:
            break
        batches.append(PlannedBatch(first, size, _at(data.sizes, here, image_size)))
        first += size
    return tuple(batches)


def _at(phases: Phases, place: float, after: int) -> int:
    """The value of phases at a part of the training; ``after`` the last phase, that."""
    return next((value for value, end in phases if place < end - 1e-9), after)


def epoch_order(kept: int, losses: Tensor, *, count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, of all images or of those with the highest loss.

    Training on the examples with a high loss: Jiang et al., "Accelerating Deep Learning by
    Focusing on the Biggest Losers", arXiv:1910.00762; here the loss is the one recorded when an
    image was last trained on, as it was augmented (and mixed) then, and is not computed anew.
    Nothing waits for the device.

    Args:
        kept: how many images the epoch has.
        losses: float32 ``[count]``, the latest loss of each image, infinite where there is none
            yet; of equal ones the first count as higher.
        count: images in the training set.
        seed: seed of the run.
        epoch: epoch, from 0.

    Returns:
        int64 ``[kept]`` on the device of ``losses``, in the order of
        :func:`resfast.data.augment.order`.
    """
    shuffled = order(count, seed=seed, epoch=epoch, device=losses.device)
    if kept == count:
        return shuffled
    chosen = torch.sort(losses, descending=True, stable=True).indices[:kept]
    place = torch.empty_like(shuffled)
    place[shuffled] = torch.arange(count, device=losses.device)
    return chosen[torch.argsort(place[chosen])]


def weighted_mean(values: Tensor, batches: Iterable[PlannedBatch]) -> float:
    """Mean of a value of each step over images; of equal batches that of the steps.

    Args:
        values: float32 ``[steps]``.
        batches: as many.
    """
    sizes = [batch.images for batch in batches]
    if len(set(sizes)) == 1:
        return float(values.mean())
    weights = torch.tensor(sizes, dtype=torch.float64, device=values.device)
    return float((values.double() * weights).sum() / weights.sum())
