"""The plan of a run: number and size of the images of every batch, computed before training.

Progressive image sizes, growing batch sizes, filtering out easy images late in training, and a
partial last epoch are combined here, so that the training loop, the learning rates, the display and
resumed runs share one plan. Without them, all epochs consist of equal batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from resfast.config.options import Phases
from resfast.config.schema import Config
from resfast.config.validate import check_sizes
from resfast.data.augment import order
from resfast.errors import ResfastError


@dataclass(frozen=True)
class PlannedBatch:
    """One step.

    Attributes:
        first: position of its first image in the epoch's order.
        images: number of images.
        pixels: height and width of the images, in pixels.
    """

    first: int
    images: int
    pixels: int


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images, or over those that filtering keeps.

    Attributes:
        first_step: steps of the run before this epoch.
        first_image: images trained on before this epoch.
        kept: number of images in the epoch's order.
        batches: its steps; an incomplete last batch is left out or smaller than the others.
    """

    first_step: int
    first_image: int
    kept: int
    batches: tuple[PlannedBatch, ...]

    @property
    def images(self) -> int:
        """Images trained on in this epoch."""
        return self.batches[-1].first + self.batches[-1].images

    def images_in(self, steps: int) -> int:
        """Images in the first ``steps`` batches."""
        return self.batches[steps].first if steps < len(self.batches) else self.images


@dataclass(frozen=True)
class Plan:
    """All steps of a run.

    Attributes:
        epochs: in order; identical epochs share one ``batches`` tuple.
    """

    epochs: tuple[Epoch, ...]

    @property
    def uniform(self) -> bool:
        """Whether all epochs are complete and all their whole batches alike: no curriculum."""
        first = self.epochs[0].batches
        same = all(epoch.batches is first for epoch in self.epochs)
        whole = {(batch.images, batch.pixels) for batch in first[:-1]} or {first[-1]}
        return same and len(whole) == 1 and first[-1].pixels == first[0].pixels

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.epochs[-1].first_step + len(self.epochs[-1].batches)

    @property
    def images(self) -> int:
        """Images trained on, counting repetitions."""
        return self.epochs[-1].first_image + self.epochs[-1].images

    @property
    def max_steps(self) -> int:
        """Steps of the longest epoch."""
        return max(len(epoch.batches) for epoch in self.epochs)

    def steps_before(self, epoch: int, step: int = 0) -> int:
        """Steps of the run before step ``step`` of ``epoch``."""
        if epoch >= len(self.epochs):
            return self.steps
        return self.epochs[epoch].first_step + step

    def images_before(self, epoch: int, step: int = 0) -> int:
        """Images trained on before step ``step`` of ``epoch``."""
        if epoch >= len(self.epochs):
            return self.images
        return self.epochs[epoch].first_image + self.epochs[epoch].images_in(step)

    def progress(self) -> list[float] | None:
        """For each step, the fraction of all images trained on before it; None if uniform.

        Learning rates follow it, so that a schedule advances by images and not by steps.
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
        """The distinct (images, pixels) of batches, in the order of their first step."""
        shapes: dict[tuple[int, int], None] = {}
        distinct = {id(epoch.batches): epoch.batches for epoch in self.epochs}
        for batch in chain.from_iterable(distinct.values()):
            shapes[batch.images, batch.pixels] = None
        return list(shapes)

    def steps_of(self, images: int, pixels: int) -> list[int]:
        """The steps of the run whose batches have this shape."""
        return [
            epoch.first_step + step
            for epoch in self.epochs
            for step, batch in enumerate(epoch.batches)
            if (batch.images, batch.pixels) == (images, pixels)
        ]

    def images_by_pixels(self, epoch: int, step: int = 0) -> dict[int, int]:
        """Number of images of each size before step ``step`` of ``epoch``."""
        counts: dict[int, int] = {}
        done = [complete.batches for complete in self.epochs[:epoch]]
        if step:
            done.append(self.epochs[epoch].batches[:step])
        for batch in chain.from_iterable(done):
            counts[batch.pixels] = counts.get(batch.pixels, 0) + batch.images
        return counts


def make_plan(config: Config, images: int, image_size: int) -> Plan:
    """Computes the steps of a run.

    A batch has the batch size and image size of the phase that its first image falls into; phases
    are fractions of the run's epochs. The last of 5.5 epochs has the batches that start in its
    first half. Sources: for image sizes, Howard's fast.ai entry to DAWNBench (2018), Touvron et
    al., arXiv:1906.06423, and Tan and Le, arXiv:2104.00298; for batch sizes, Smith et al.,
    arXiv:1711.00489; for filtering images, see :func:`epoch_order`.

    Args:
        config: a resolved configuration, with epochs and batch size set.
        images: number of images in the training set.
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
    batches_by_key: dict[tuple, tuple[PlannedBatch, ...]] = {}
    first_step = first_image = 0
    for number in range(math.ceil(epochs)):
        kept = kept_late if number >= first_filtered else images
        fraction = min(1.0, epochs - number)
        changes = [
            end
            for _, end in (*optim.batch_sizes, *data.sizes)
            if number < end * epochs < number + 1
        ]
        is_constant = not changes and fraction == 1
        progress = number / epochs
        values = (
            _value_at(optim.batch_sizes, progress, optim.batch_size),
            _value_at(data.sizes, progress, image_size),
        )
        # A partial epoch, or one in which a size changes, does not share its batches.
        key = (kept, *values) if is_constant else (kept, number)
        if key not in batches_by_key:
            batches_by_key[key] = _batches(config, number, kept, fraction, image_size)
        batches = batches_by_key[key]
        if not batches:
            raise ResfastError(
                f"batch size {values[0]} does not fit the {kept} images that --filter-keep "
                f"{data.filter_keep:g} leaves; choose a smaller batch size or a larger fraction"
            )
        result.append(Epoch(first_step, first_image, kept, batches))
        first_step += len(batches)
        first_image += result[-1].images
    return Plan(tuple(result))


def _batches(
    config: Config, number: int, kept: int, fraction: float, image_size: int
) -> tuple[PlannedBatch, ...]:
    """The steps of epoch ``number``, of which only the first ``fraction`` is trained."""
    optim, data = config.optim, config.data
    batches = []
    first = 0
    while first < fraction * kept:
        progress = (number + first / kept) / optim.epochs
        size = _value_at(optim.batch_sizes, progress, optim.batch_size)
        if first + size > kept:
            if data.drop_last:
                break
            size = kept - first
            if size == 1:
                raise ResfastError(
                    f"--no-drop-last leaves a last batch of 1 of {kept} images, which batch norm "
                    "cannot train on; choose another batch size or --drop-last"
                )
        batches.append(PlannedBatch(first, size, _value_at(data.sizes, progress, image_size)))
        first += size
    return tuple(batches)


def _value_at(phases: Phases, progress: float, final: int) -> int:
    """The value of ``phases`` at a fraction of training; ``final`` after the last phase."""
    return next((value for value, end in phases if progress < end - 1e-9), final)


def epoch_order(kept: int, losses: Tensor, *, count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch over all images, or over those with the highest loss.

    Training on examples with high loss is from Jiang et al., "Accelerating Deep Learning by
    Focusing on the Biggest Losers", arXiv:1910.00762. Here the loss is not recomputed: it is the
    one recorded when the image was last trained on, with its augmentation (and mixing) at that
    time. Does not synchronize with the device.

    Args:
        kept: number of images in the epoch.
        losses: float32 ``[count]``, the latest loss of each image, infinite if there is none yet;
            ties go to the lower index.
        count: number of images in the training set.
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
    """Mean of per-step values, weighted by the number of images of each step.

    Args:
        values: float32 ``[steps]``.
        batches: the batch of each step.
    """
    sizes = [batch.images for batch in batches]
    if len(set(sizes)) == 1:
        return float(values.mean())
    weights = torch.tensor(sizes, dtype=torch.float64, device=values.device)
    return float((values.double() * weights).sum() / weights.sum())
