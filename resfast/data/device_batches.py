"""The epoch at hand of a data set that lives on the device, in tensors that never move."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from resfast import runtime
from resfast.data.augment import ResizeBy, crop_words, cropped, resized
from resfast.data.resident import Draws, ResidentLoader
from resfast.ops.augment.op import AugmentParams, MixParams


class Supply:
    """Makes the batches of an epoch one after the other.

    The host decides no more than the shape of a batch; which images come next stands on the device.
    So a captured step can make its own batch.

    Args:
        loader: of the images, of one rank.
        resize_by: how batches of fewer pixels are made.

    Attributes:
        loader: as given.
        tensors: all that changes from step to step or from epoch to epoch.
    """

    def __init__(self, loader: ResidentLoader, *, resize_by: ResizeBy = "resize") -> None:
        self.loader, self.resize_by = loader, resize_by
        self._draws = loader.draw(0)
        self._order = loader.order(0)
        self._places = torch.arange(loader.count, device=loader.device)
        self._words = None
        if resize_by == "crop":
            self._words = crop_words(self._places, seed=loader.seed, epoch=0)
        self._place = torch.zeros(1, dtype=torch.int64, device=loader.device)
        drawn = _tensors(self._draws)
        words = [] if self._words is None else [self._words]
        self.tensors = [self._order, self._place, *words, *drawn]

    def begin(self, epoch: int, *, order: Tensor | None = None, first: int = 0) -> None:
        """Begins an epoch, without waiting for the device.

        Args:
            epoch: epoch, from 0.
            order: int64 ``[M]``, the images to go through, on the device (None: all of them in the
                loader's order).
            first: place in the order to begin at.
        """
        loader = self.loader
        drawn = _tensors(loader.draw(epoch))
        for mine, value in zip(_tensors(self._draws), drawn, strict=True):
            mine.copy_(value)
        order = loader.order(epoch) if order is None else order
        self._order[: len(order)].copy_(order)
        if self._words is not None:
            self._words.copy_(crop_words(self._places, seed=loader.seed, epoch=epoch))
        self._place.fill_(first)

    def take(self, images: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
        """The next batch; behind the last image comes the first.

        Args:
            images: how many.
            pixels: their height and width, at most that of the data set's images.

        Returns:
            images ``[B, C, pixels, pixels]`` and labels as of :meth:`ResidentLoader.make`, and the
            images' places in the data set, int64 ``[B]``.
        """
        loader = self.loader
        if self._place.is_cuda and runtime.has_triton():
            from resfast.ops.batching import triton as triton_supply

            indices, labels, places = triton_supply.next_batch(
                self._order, loader.labels, self._place, images, loader.count
            )
        else:
            places = (self._place + self._places[:images]) % loader.count
            indices = self._order[places]
            labels = loader.labels[indices]
            self._place += images
        batch, labels = loader.make(indices, self._draws, labels)
        if batch.shape[2:] == (pixels, pixels):
            return batch, labels, indices
        if self._words is None:
            batch = resized(batch, pixels)
        else:
            batch = cropped(batch, pixels, self._words[:, places])
        return batch, labels, indices


def _tensors(draws: Draws) -> list[Tensor]:
    parts: list[AugmentParams | MixParams | None] = [draws.params, draws.mix]
    values = [getattr(part, f.name) for part in parts if part is not None for f in fields(part)]
    return [value for value in values if value is not None]
