"""Training batches of a data set in device memory, made from tensors at fixed addresses."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from resfast import runtime
from resfast.data.augment import ResizeBy, crop_words, cropped, resized
from resfast.data.batch import Batch
from resfast.data.resident import RandomParams, ResidentLoader
from resfast.ops.augment.op import AugmentParams, MixParams


class DeviceBatches:
    """A :class:`~resfast.data.batch.BatchSource` of resident images.

    The host decides only the shape of a batch; the device knows which images come next. So a
    captured step can make its own batch.

    Args:
        loader: loader of the images, for a single rank.
        resize_by: how to make batches of smaller images.

    Attributes:
        loader: the loader of the images.
        tensors: the tensors that change from step to step or from epoch to epoch.
    """

    capturable = True

    def __init__(self, loader: ResidentLoader, *, resize_by: ResizeBy = "resize") -> None:
        self.loader, self.resize_by = loader, resize_by
        self._params = loader.random_params(0)
        self._order = loader.order(0)
        self._all_positions = torch.arange(loader.count, device=loader.device)
        self._words = None
        if resize_by == "crop":
            self._words = crop_words(self._all_positions, seed=loader.seed, epoch=0)
        self._position = torch.zeros(1, dtype=torch.int64, device=loader.device)
        words = [] if self._words is None else [self._words]
        self.tensors = [self._order, self._position, *words, *_tensors(self._params)]

    @property
    def count(self) -> int:
        """Number of images in the data set."""
        return self.loader.count

    def __len__(self) -> int:
        """Number of batches in an epoch, with the loader's batch size."""
        return len(self.loader)

    def begin(self, epoch: int, *, first: int = 0, order: Tensor | None = None) -> None:
        """Begins an epoch, without waiting for the device.

        Args:
            epoch: epoch, from 0.
            first: position of the first image in the order.
            order: int64 ``[M]``, indices of the images to train on, on the device (None: all of
                them, in the loader's order).
        """
        loader = self.loader
        params = _tensors(loader.random_params(epoch))
        for kept, value in zip(_tensors(self._params), params, strict=True):
            kept.copy_(value)
        order = loader.order(epoch) if order is None else order
        self._order[: len(order)].copy_(order)
        if self._words is not None:
            self._words.copy_(crop_words(self._all_positions, seed=loader.seed, epoch=epoch))
        self._position.fill_(first)

    def next(self, images: int, pixels: int) -> Batch:
        """The next batch; the last image of the order is followed by the first one.

        Args:
            images: number of images.
            pixels: their height and width, at most that of the data set's images.

        Returns:
            Images ``[B, C, pixels, pixels]``, with labels as in :meth:`ResidentLoader.make`.
        """
        loader = self.loader
        if self._position.is_cuda and runtime.has_triton():
            from resfast.ops.batching import triton as batching

            indices, labels, positions = batching.next_batch(
                self._order, loader.labels, self._position, images, loader.count
            )
        else:
            positions = (self._position + self._all_positions[:images]) % loader.count
            indices = self._order[positions]
            labels = loader.labels[indices]
            self._position += images
        batch = loader.make(indices, self._params, labels)
        if batch.images.shape[2:] == (pixels, pixels):
            return batch
        if self._words is None:
            smaller = resized(batch.images, pixels)
        else:
            smaller = cropped(batch.images, pixels, self._words[:, positions])
        return batch._replace(images=smaller)

    def state_dict(self) -> dict[str, Any]:
        """Empty: epoch and step are enough to continue."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the state is empty."""


def _tensors(params: RandomParams) -> list[Tensor]:
    parts: list[AugmentParams | MixParams | None] = [params.augment, params.mix]
    values = [getattr(part, f.name) for part in parts if part is not None for f in fields(part)]
    return [value for value in values if value is not None]
