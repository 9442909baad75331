"""Batches of a data set that lives on the device as one uint8 tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resfast.data.augment import (
    ORDER_STREAM,
    Flip,
    Padding,
    augment,
    generator,
    sample,
)
from resfast.errors import ResfastError


class ResidentLoader:
    """Training batches, shuffled over the whole epoch, the ragged last batch dropped.

    A batch is a pure function of (seed, epoch, step): nothing has to be saved to resume.

    Args:
        images: uint8 ``[N, H, W, C]``, moved to ``device``.
        labels: int64 ``[N]``.
        mean: float32 ``[C]`` in units of pixel / 255.
        std: float32 ``[C]``, likewise.
        batch_size: images a batch, at most N.
        crop: largest shift in pixels, below the image's side.
        padding: see :func:`~resfast.data.augment.augment`.
        flip: see :func:`~resfast.data.augment.sample`.
        seed: seed of order and augmentation.
        device: where batches are made.
        dtype: of the images in a batch.

    Raises:
        ResfastError: a batch size or crop out of range.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        *,
        batch_size: int,
        crop: int = 4,
        padding: Padding = "reflect",
        flip: Flip = "random",
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise ResfastError(
                f"batch size {batch_size} does not fit {len(images)} training images; "
                f"choose --batch-size between 1 and {len(images)}"
            )
        side = min(images.shape[1:3])
        if not 0 <= crop < side:
            raise ResfastError(
                f"crop {crop} does not fit images of {side} pixels; choose --crop between 0 "
                f"and {side - 1}"
            )
        self.device = torch.device(device)
        self.images = images.to(self.device).contiguous()
        self.labels = labels.to(self.device)
        self.mean, self.std = mean.to(self.device), std.to(self.device)
        self.batch_size, self.seed, self.dtype = batch_size, seed, dtype
        self.crop, self.padding, self.flip = crop, padding, flip

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch.

        Args:
            epoch: epoch, from 0.
            first_step: batches to leave out at the start, to resume inside an epoch.

        Yields:
            images ``[B, C, H, W]`` in ``channels_last`` and the loader's dtype, labels ``[B]``.
        """
        count = len(self.images)
        order = torch.randperm(count, generator=generator(self.seed, ORDER_STREAM, epoch))
        params = sample(count, crop=self.crop, flip=self.flip, seed=self.seed, epoch=epoch)
        order, params = order.to(self.device), params.to(self.device)
        for step in range(first_step, len(self)):
            indices = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield (
                augment(
                    self.images,
                    indices,
                    params[indices],
                    self.mean,
                    self.std,
                    padding=self.padding,
                    dtype=self.dtype,
                ),
                self.labels[indices],
            )
