"""Base class of the readers of :mod:`resfast.data.dali`, which run DALI's pipeline per batch.

Readers yield uint8 images with labels and indices; :mod:`resfast.data.dali` augments and normalizes
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resfast.data import dali_pipeline
from resfast.data.augment import Augment, needs_statistics, sample, statistics
from resfast.data.dali_pillow import Pillow
from resfast.ops.augment.op import AugmentParams

Finish = Literal["fused", "dali", "uint8"]


@dataclass(frozen=True)
class Arrays:
    """Decoded images.

    Attributes:
        images: uint8 ``[N, H, W, C]``, a tensor on the CPU or an array such as a ``np.memmap``.
        labels: int64 ``[N]``.
    """

    images: Tensor | np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)


@dataclass(frozen=True)
class ReaderOptions:
    """How images are read; the fields are arguments of :class:`resfast.data.dali.DaliLoader`.

    Attributes:
        augment: the augmentation; none in evaluation.
        normalize: argument of :func:`resfast.data.dali_pipeline.build`.
    """

    batch_size: int
    image_size: int
    classes: int
    seed: int
    device: torch.device
    train: bool
    drop_last: bool
    rank: int
    world: int
    prefetch: int
    threads: int
    augment: Augment
    finish: Finish
    normalize: tuple[list[float], list[float], bool] | None


class ReadImages(NamedTuple):
    """A batch as read by DALI.

    Attributes:
        images: uint8 ``[B, S, S, C]``; normalized if only DALI finishes them.
        labels: int64 ``[B]``.
        indices: int64 ``[B]``, as in :class:`resfast.data.batch.Batch`.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class Reader(ABC):
    """Reads the images of one rank.

    Args:
        options: how to read them.
        count: number of images of all ranks.

    Attributes:
        channels: channels of the images.
        resizes: whether images may have to be resized to ``image_size``.
    """

    def __init__(self, options: ReaderOptions, count: int) -> None:
        self.options, self.count = options, count
        self.channels, self.resizes = 3, True
        self._pipeline: Any = None
        self._pillow = Pillow(options.image_size, options.threads)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        options = self.options
        if not options.train:
            return -(-self._part_size() // options.batch_size)
        whole, rest = divmod(self.count, options.batch_size * options.world)
        return whole + (rest >= options.world and not options.drop_last)

    @property
    def window(self) -> float:
        """Minimum area of DALI's random-resized crop, as a fraction of the image; 1 for none."""
        options = self.options
        return options.augment.resize if self.resizes or options.finish == "dali" else 1.0

    @abstractmethod
    def epoch(self, epoch: int, first_step: int) -> Iterator[ReadImages]:
        """Batches of an epoch from ``first_step`` on, both counted from 0."""

    def state_dict(self) -> dict[str, Any]:
        """What is needed to continue quickly after the latest batch; may be empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; an empty state changes nothing."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} has no state; expected an empty one")

    def sample(
        self, augment: Augment, indices: Tensor, epoch: int, images: Tensor | None = None
    ) -> AugmentParams:
        """Random parameters of images; ``images`` is for augmentations that need statistics."""
        options, measured = self.options, None
        if images is not None and needs_statistics(augment):
            measured = statistics(images)
        return sample(
            augment,
            indices,
            size=(options.image_size, options.image_size),
            channels=self.channels,
            seed=options.seed,
            epoch=epoch,
            statistics=measured,
        )

    @abstractmethod
    def _part_size(self) -> int:
        """Number of images of this rank in an epoch, if none are skipped."""

    @abstractmethod
    def _build(self) -> Any:
        """Builds the pipeline, at its first position."""

    def _pipeline_options(self) -> dict[str, Any]:
        options, device_id = self.options, None
        if options.device.type == "cuda":
            index = options.device.index
            device_id = torch.cuda.current_device() if index is None else index
        return {
            "batch_size": options.batch_size,
            "threads": options.threads,
            "device_id": device_id,
            "prefetch": options.prefetch,
            "seed": (options.seed * 1_000_003 + options.rank) % 2**31,
            "image_size": options.image_size,
            "resized": self.resizes or self.window < 1,
            "normalize": options.normalize,
            "pillow": self._pillow,
        }

    def _run(self) -> tuple[Tensor, ...]:
        """Outputs of the next run of the pipeline, as tensors that keep their memory alive."""
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            if self.options.device.type == "cuda":
                outputs = self._pipeline.run(torch.cuda.current_stream(self.options.device))
            else:
                outputs = self._pipeline.run()
        except RuntimeError:
            failed, self._pipeline = self._pipeline, None
            dali_pipeline.shut_down(failed)
            raise
        return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
