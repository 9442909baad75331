"""Batches of a data set that is one uint8 tensor in device memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from resfast.data.augment import (
    Augment,
    check_augment,
    mixed_labels,
    needs_statistics,
    sample,
    sample_mixes,
    statistics,
)
from resfast.data.augment import order as shuffle
from resfast.data.batch import Batch
from resfast.errors import ResfastError
from resfast.ops.augment.op import (
    AugmentParams,
    MixParams,
    augment,
    augment_unchecked,
    normalization,
)


@dataclass(frozen=True)
class RandomParams:
    """Random parameters of all images in one epoch.

    Attributes:
        augment: one row per image.
        mix: from :func:`~resfast.data.augment.sample_mixes`; None without mixing.
    """

    augment: AugmentParams
    mix: MixParams | None


class ResidentLoader:
    """Training batches, shuffled over the whole epoch.

    A batch is a function of (seed, epoch, step) only: resuming needs no saved state.

    Args:
        images: uint8 ``[N, H, W, C]``, moved to ``device``.
        labels: int64 ``[N]``.
        mean: float32 ``[C]`` in units of pixel / 255.
        std: float32 ``[C]`` in the same units.
        batch_size: images per batch, at most N.
        augment: the augmentation.
        classes: number of classes; labels are less than it.
        seed: seed of order and augmentation.
        device: device of the batches.
        dtype: dtype of the images of a batch.
        drop_last: skip an incomplete last batch.
        rank: rank of this process, from 0; it gets one part of every ``world * batch_size`` images.
        world: number of ranks. In an incomplete last step, their numbers of images differ by at
            most one; the step is skipped if there is not at least one image per rank.

    Raises:
        ResfastError: the batch size or the augmentation does not fit the images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        *,
        batch_size: int,
        augment: Augment,
        classes: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_batch_size(batch_size, len(images), world)
        if not 0 <= rank < world:
            raise ResfastError(f"rank {rank} is out of range: expected 0 to {world - 1}")
        check_augment(augment, *images.shape[1:3])
        self.device = torch.device(device)
        self.images = images.to(self.device).contiguous()
        self.labels = labels.to(self.device)
        self.mean, self.std = mean.to(self.device), std.to(self.device)
        self.count, self.image_size = len(images), images.shape[1]
        self.batch_size, self.augment, self.classes = batch_size, augment, classes
        self.seed, self.dtype, self.drop_last = seed, dtype, drop_last
        self.rank, self.world = rank, world
        self._normalization = normalization(self.mean, self.std)
        self._statistics = statistics(self.images) if needs_statistics(augment) else None
        self._all = torch.arange(self.count, device=self.device)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        whole, rest = divmod(self.count, self.batch_size * self.world)
        return whole + (rest >= self.world and not self.drop_last)

    def random_params(self, epoch: int) -> RandomParams:
        """Random parameters of all images in epoch ``epoch`` (from 0), on the loader's device."""
        size, channels = tuple(self.images.shape[1:3]), self.images.shape[3]
        values = {"size": size, "seed": self.seed, "epoch": epoch}
        params = sample(
            self.augment, self._all, channels=channels, statistics=self._statistics, **values
        )
        mix = sample_mixes(self.augment, self._all, **values)
        return RandomParams(params, mix)

    def make(self, indices: Tensor, params: RandomParams, labels: Tensor | None = None) -> Batch:
        """The batch of the given images, made without waiting for the device.

        Args:
            indices: int64 ``[B]``, on the loader's device.
            params: random parameters of the epoch.
            labels: int64 ``[B]``, labels of these images, if they are already known.

        Returns:
            The batch, with images in the loader's dtype.
        """
        labels = self.labels[indices] if labels is None else labels
        mix = None if params.mix is None else params.mix.of_batch(indices)
        images = augment_unchecked(
            self.images,
            indices,
            params.augment,
            self._normalization,
            mix=mix,
            padding=self.augment.padding,
            dtype=self.dtype,
            noise=self.augment.noise,
        )
        if mix is not None:
            label_weights = mix.label_weights(*self.images.shape[1:3])
            labels = mixed_labels(labels, self.labels[mix.partner], label_weights, self.classes)
        return Batch(images, labels, indices)

    def order(self, epoch: int) -> Tensor:
        """The order of the images in epoch ``epoch`` (from 0), int64 ``[N]``."""
        return shuffle(self.count, seed=self.seed, epoch=epoch, device=self.device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch, made by :meth:`make`.

        Args:
            epoch: epoch, from 0.
            first_step: number of batches to skip at the start, to resume within an epoch.
        """
        params, order = self.random_params(epoch), self.order(epoch)
        size = self.batch_size * self.world
        for step in range(first_step, len(self)):
            step_indices = order[step * size : (step + 1) * size]  # of all ranks
            yield self.make(step_indices.tensor_split(self.world)[self.rank], params)

    def copy_from(self, other: ResidentLoader) -> None:
        """Copies ``other``, which differs only in images and seed, into the same tensors."""
        for kept, value in zip(self._tensors(), other._tensors(), strict=True):
            kept.copy_(value)
        self.seed = other.seed

    def _tensors(self) -> list[Tensor]:
        tensors = [self.images, self.labels, self.mean, self.std, *self._normalization]
        return tensors if self._statistics is None else [*tensors, self._statistics]


def check_batch_size(batch_size: int, count: int, world: int = 1) -> None:
    """Checks that a training set has at least one whole batch.

    Raises:
        ResfastError: it does not.
    """
    if not 1 <= batch_size <= count // world:
        raise ResfastError(
            f"batch size {batch_size} does not fit {count} training images; "
            f"choose --batch-size between 1 and {count // world}"
        )


def resident_batches(
    images: Tensor,
    labels: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in order, normalized and not augmented.

    Args:
        images: uint8 ``[N, H, W, C]``.
        labels: int64 ``[N]``.
        mean: float32 ``[C]`` in units of pixel / 255.
        std: float32 ``[C]`` in the same units.
        batch_size: images per batch; the last batch may be smaller.
        dtype: dtype of the images of a batch.

    Yields:
        images ``[B, C, H, W]`` in ``channels_last`` on the device of ``images``, labels ``[B]``.
    """
    mean, std = mean.to(images.device), std.to(images.device)
    for start in range(0, len(images), batch_size):
        indices = torch.arange(start, min(start + batch_size, len(images)), device=images.device)
        batch = augment(images, indices, None, mean, std, dtype=dtype, check=False)
        yield batch, labels[start : start + batch_size]
