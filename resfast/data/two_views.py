"""Training batches of two differently augmented views of each image, for self-supervision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfast.data.batch import Batch
from resfast.data.device_batches import DeviceBatches

_SECOND_VIEW = 2**31 + 1
"""Added to the epoch for the random parameters of the second view. Odd, so that an alternating flip
mirrors one of the two."""


class TwoViews:
    """A :class:`~resfast.data.batch.BatchSource` of two views, the second after the first.

    A batch has images ``[2 B, C, H, W]``, and the labels and indices ``[B]`` of the B images. The
    first views are those of training without this class.

    Args:
        first: batches of the images.
    """

    capturable = False
    tensors: tuple[Tensor, ...] = ()

    def __init__(self, first: DeviceBatches) -> None:
        self.first = first
        self.second = DeviceBatches(first.loader, resize_by=first.resize_by)

    @property
    def count(self) -> int:
        """Number of images in the data set."""
        return self.first.count

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.first)

    def begin(self, epoch: int, *, first: int = 0, order: Tensor | None = None) -> None:
        """Begins an epoch; see :meth:`DeviceBatches.begin`."""
        order = self.first.loader.order(epoch) if order is None else order
        self.first.begin(epoch, first=first, order=order)
        self.second.begin(epoch + _SECOND_VIEW, first=first, order=order)

    def next(self, images: int, pixels: int) -> Batch:
        """The next batch of ``images`` images in two views."""
        one, two = (views.next(images, pixels) for views in (self.first, self.second))
        return one._replace(images=torch.cat([one.images, two.images]))

    def state_dict(self) -> dict[str, Any]:
        """Empty: epoch and step are enough to continue."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the state is empty."""
