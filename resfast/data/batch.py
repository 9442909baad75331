"""What a training step is given, and where from, however the data set is held.

Implementations: :mod:`resfast.data.device_batches` and :mod:`resfast.data.stream_batches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """Images to train on.

    Attributes:
        images: ``[B, C, H, W]`` in ``channels_last``, in the compute dtype.
        labels: int64 ``[B]``, or where images are mixed the parts of the classes, float32
            ``[B, classes]``.
        indices: int64 ``[B]``, the images' places in the data set; of shards, a hash of each
            sample's name.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class BatchSource(Protocol):
    """Makes the batches of one epoch after the other, on the training's device."""

    @property
    def count(self) -> int:
        """Images in the data set."""

    @property
    def capturable(self) -> bool:
        """Whether :meth:`next` may be a part of a captured CUDA graph."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Tensors that :meth:`begin` and :meth:`next` change in place."""

    def __len__(self) -> int:
        """Batches in an epoch of the loader's batch size."""

    def begin(self, epoch: int, *, first: int = 0, order: Tensor | None = None) -> None:
        """Begins an epoch, without waiting for the device.

        Args:
            epoch: epoch, from 0.
            first: place in the epoch's order of the image to begin at.
            order: int64 ``[M]``, the images to go through, on the device (None: all of them, in an
                order that is a function of seed and epoch).

        Raises:
            ValueError: the source cannot begin there, or not in that order.
        """

    def next(self, images: int, pixels: int) -> Batch:
        """The next batch of the epoch.

        Args:
            images: B, how many images it has.
            pixels: their height and width, at most that of the data set's images.

        Raises:
            ValueError: the source cannot make a batch of this shape.
            ResfastError: an image cannot be read.
        """

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after the latest batch, beside epoch and step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ResfastError: it belongs to another data set or other options.
        """
