"""Training batches and the protocol of their sources, for resident and streamed data sets.

Implementations: :mod:`resfast.data.device_batches` and :mod:`resfast.data.stream_batches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """A batch to train on.

    Attributes:
        images: ``[B, C, H, W]`` in ``channels_last``, in the compute dtype.
        labels: int64 ``[B]``; for mixed images, the weight of each class, float32
            ``[B, classes]``.
        indices: int64 ``[B]``, indices of the images in the data set; for shards, a hash of each
            sample's name.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class BatchSource(Protocol):
    """Makes the batches of one epoch after another, on the training device."""

    @property
    def count(self) -> int:
        """Number of images in the data set."""

    @property
    def capturable(self) -> bool:
        """Whether :meth:`next` may be part of a captured CUDA graph."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Tensors that :meth:`begin` and :meth:`next` change in place."""

    def __len__(self) -> int:
        """Number of batches in an epoch, with the loader's batch size."""

    def begin(self, epoch: int, *, first: int = 0, order: Tensor | None = None) -> None:
        """Begins an epoch, without waiting for the device.

        Args:
            epoch: epoch, from 0.
            first: position of the first image in the epoch's order.
            order: int64 ``[M]``, indices of the images to train on, on the device (None: all of
                them, in an order that is a function of seed and epoch).

        Raises:
            ValueError: the source cannot start at ``first`` or use ``order``.
        """

    def next(self, images: int, pixels: int) -> Batch:
        """The next batch of the epoch.

        Args:
            images: B, the number of images.
            pixels: their height and width, at most that of the data set's images.

        Raises:
            ValueError: the source cannot make a batch of this shape.
            ResfastError: an image cannot be read.
        """

    def state_dict(self) -> dict[str, Any]:
        """What is needed to continue after the latest batch, in addition to epoch and step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ResfastError: the state is of another data set or other options.
        """
