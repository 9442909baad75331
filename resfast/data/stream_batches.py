"""Training batches of a data set that is read while the network is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from resfast.data.augment import ResizeBy, smaller
from resfast.data.batch import Batch
from resfast.data.dali import DaliLoader


class StreamBatches:
    """A :class:`~resfast.data.batch.BatchSource` of images that are read ahead.

    So the number of images in a batch and their order cannot be changed.

    Args:
        loader: of the images, of one rank.
        resize_by: how batches of fewer pixels are made.
    """

    capturable = False
    tensors: tuple[Tensor, ...] = ()

    def __init__(self, loader: DaliLoader, *, resize_by: ResizeBy = "resize") -> None:
        self.loader, self.resize_by = loader, resize_by
        self._epoch, self._first = 0, 0
        self._batches: Iterator[Batch] = iter(())

    @property
    def count(self) -> int:
        """Images in the data set."""
        return self.loader.count

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def begin(self, epoch: int, *, first: int = 0, order: Tensor | None = None) -> None:
        """Begins an epoch; reading starts with the first batch.

        Args:
            epoch: epoch, from 0.
            first: place in the epoch's order of the image to begin at, the first of a batch.
            order: None, as the loader has an order of its own.

        Raises:
            ValueError: an order is given, or ``first`` lies within a batch.
        """
        if order is not None:
            raise ValueError("order is given; images that are read ahead have the loader's order")
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
            images: the loader's batch size.
            pixels: height and width, at most that of the loader's images.

        Raises:
            ValueError: another number of images, or more pixels than there are.
            RuntimeError: the epoch has no more batches.
            ResfastError: an image cannot be read.
        """
        size = self.loader.batch_size
        if images != size:
            raise ValueError(f"images is {images}; expected {size}, the size that is read ahead")
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
        """Where the loader reads, after the latest batch."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ResfastError: it belongs to another data set or other options.
        """
        self.loader.load_state_dict(state)
