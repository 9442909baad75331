"""Training batches of a data set that is read during training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from resfast.data.augment import ResizeBy, smaller
from resfast.data.batch import Batch
from resfast.data.dali import DaliLoader


class StreamBatches:
    """A :class:`~resfast.data.batch.BatchSource` of images that are read ahead.

    Therefore, the number of images per batch and their order are fixed.

    Args:
        loader: loader of the images, for a single rank.
        resize_by: how to make batches of smaller images.
    """

    capturable = False
    tensors: tuple[Tensor, ...] = ()

    def __init__(self, loader: DaliLoader, *, resize_by: ResizeBy = "resize") -> None:
        self.loader, self.resize_by = loader, resize_by
        self._epoch, self._first = 0, 0
        self._batches: Iterator[Batch] = iter(())

    @property
    def count(self) -> int:
        """Number of images in the data set."""
        return self.loader.count

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.loader)

    def begin(self, epoch: int, *, first: int = 0, order: Tensor | None = None) -> None:
        """Begins an epoch; reading starts with the first batch.

        Args:
            epoch: epoch, from 0.
            first: position of the first image in the epoch's order; a multiple of the batch size.
            order: None: the loader determines the order.

        Raises:
            ValueError: an order is given, or ``first`` is not a multiple of the batch size.
        """
        if order is not None:
            raise ValueError(
                "order is given, but images that are read ahead are in the loader's order"
            )
        step, within = divmod(first, self.loader.batch_size)
        if within:
            raise ValueError(
                f"first is {first}; expected a multiple of the batch size {self.loader.batch_size}"
            )
        self._epoch, self._first = epoch, first
        self._batches = self.loader.epoch(epoch, step)

    def next(self, images: int, pixels: int) -> Batch:
        """The next batch of the epoch.

        Args:
            images: the loader's batch size, or what is left for the last batch.
            pixels: height and width, at most that of the loader's images.

        Raises:
            ValueError: another number of images, or more pixels than the images have.
            RuntimeError: the epoch has no more batches.
            ResfastError: an image cannot be read.
        """
        size, left = self.loader.batch_size, self.loader.count - self._first
        if not self.loader.drop_last and 0 < left < size:
            size = left
        if images != size:
            raise ValueError(f"images is {images}; expected {size}, the number read ahead")
        batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError("the epoch has no more batches; begin another one")
        first, self._first = self._first, self._first + images
        return batch._replace(
            images=smaller(
                batch.images,
                pixels,
                by=self.resize_by,
                seed=self.loader.seed,
                epoch=self._epoch,
                first=first,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """The position of the loader after the latest batch."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ResfastError: the state is of another data set or other options.
        """
        self.loader.load_state_dict(state)
