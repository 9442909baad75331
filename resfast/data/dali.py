"""Batches that NVIDIA DALI reads, decodes and resizes ahead of training.

DALI outputs uint8 images ``[B, S, S, C]`` on the training device; the fused operator of
:mod:`resfast.ops.augment.op` does the rest, as for a data set in memory. The decoded data set is
never in memory as a whole. DALI also works without a GPU.

Order and augmentation of :class:`Arrays` and :class:`Files` are functions of (seed, epoch, index),
the same as those of :class:`~resfast.data.resident.ResidentLoader`, so an epoch can start at any
step and no state has to be saved. Shards are read in DALI's order, whose state has to be saved.

DALI decodes the files that it decodes as Pillow does, and Pillow the others, and resizes
(:mod:`resfast.data.dali_formats`, :mod:`resfast.data.dali_pillow`). A file that is truncated,
empty, missing or of another type raises an error that names it. A JPEG with damaged bytes in the
middle may decode to a wrong image without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from resfast.data import dali_pipeline
from resfast.data.augment import Augment, check_augment, mixed_labels, sample_mix
from resfast.data.batch import Batch
from resfast.data.dali_fed_reader import FedReader
from resfast.data.dali_reader import Arrays, Finish, Reader, ReaderOptions, ReadImages
from resfast.data.dali_shard_reader import ShardReader
from resfast.data.dataset import Files, Shards
from resfast.data.resident import check_batch_size
from resfast.data.statistics import mean_std_of_sums
from resfast.errors import ResfastError
from resfast.ops.augment.op import DTYPES, augment_unchecked, normalization

Source = Arrays | Files | Shards

__all__ = ["Arrays", "DaliLoader", "Finish", "Source", "mean_std"]


class DaliLoader:
    """Batches of images that DALI reads; used like :class:`~resfast.data.resident.ResidentLoader`.

    Differences: an image is mixed with the next image of its batch instead of any other;
    and, except for :class:`Arrays` of the right size, DALI does random-resized crops, from the
    full-size image. Images that are not ``image_size`` on both sides are center-cropped to a square
    and resized with the same result as :func:`~resfast.data.decode.decode_image`.

    Args:
        source: the images.
        batch_size: images per batch.
        image_size: height and width S in pixels.
        mean: float32 ``[C]`` in units of pixel / 255.
        std: float32 ``[C]`` in the same units.
        augment: augmentation of training images.
        classes: number of classes; labels are less than it.
        seed: seed of order and augmentation.
        device: device of the batches.
        dtype: dtype of the images of a batch: float32, bfloat16 or float16.
        train: whether images are shuffled in each epoch and augmented; otherwise every image comes
            once, in order and not augmented.
        drop_last: in training, skip an incomplete last batch.
        rank: rank of this process, from 0; each rank gets a part of the images.
        world: number of ranks.
        prefetch: number of batches prepared ahead.
        threads: DALI's CPU threads; 0 for as many as PyTorch uses.
        finish: what augments and normalizes: our operator (``fused``) or only DALI (``dali``,
            which supports a crop padded with zeros, a random flip and random-resized crop). With
            ``uint8``, images are only decoded and resized.

    Raises:
        ResfastError: DALI is not installed, a file is missing, labels are out of range, or a value
            does not fit the images.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        image_size: int,
        mean: Tensor,
        std: Tensor,
        augment: Augment,
        classes: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        train: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        threads: int = 0,
        finish: Finish = "fused",
    ) -> None:
        dali_pipeline.import_dali()
        if not 0 <= rank < world:
            raise ResfastError(f"rank {rank} is out of range: expected 0 to {world - 1}")
        if prefetch < 1:
            raise ResfastError(f"--prefetch {prefetch} is out of range: expected at least 1")
        if dtype not in DTYPES:
            raise TypeError(f"dtype is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
        self.classes, self.image_size, self.batch_size = classes, image_size, batch_size
        self.seed, self.dtype, self.device = seed, dtype, torch.device(device)
        self.augment, self.drop_last = augment if train else Augment(), drop_last
        self.finish: Finish = "dali" if not train and finish == "fused" else finish
        normalize = None
        if self.finish == "dali":
            scaled = [(255 * value.cpu().double()).tolist() for value in (mean, std)]
            normalize = (*scaled, dtype == torch.float16)
        self._normalization = normalization(mean.to(self.device), std.to(self.device))
        options = ReaderOptions(
            batch_size, image_size, classes, seed, self.device, train, drop_last, rank, world,
            prefetch, threads or torch.get_num_threads(), self.augment, self.finish, normalize,
        )  # fmt: skip
        self._reader: Reader
        if isinstance(source, Shards):
            self._reader = ShardReader(source, options)
        else:
            self._reader = FedReader(source, options)
        self.count = self._reader.count
        if len(mean) != self._reader.channels:
            raise ResfastError(
                f"the mean has {len(mean)} channels and the images have {self._reader.channels}; "
                "expected the same"
            )
        if train:
            check_batch_size(batch_size, self.count, world)
            check_augment(augment, image_size, image_size)
        elif batch_size < 1:
            raise ResfastError(f"batch size {batch_size} is out of range: expected at least 1")
        if finish == "dali":
            _check_dali_alone(self.augment)
        self._rows = torch.arange(min(batch_size, self.count), device=self.device)
        self._running: object = None

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._reader)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch; a later call ends an epoch that is still running.

        Args:
            epoch: epoch, from 0.
            first_step: number of batches to skip at the start, to resume within an epoch. With
                shards, they are read again unless :meth:`load_state_dict` restored exactly this
                position.

        Yields:
            batches with images ``[B, C, S, S]`` in the loader's dtype.

        Raises:
            ResfastError: an image cannot be decoded, or a shard has a label that is out of range.
            RuntimeError: a later epoch of this loader was started.
        """
        self._running = token = object()
        for read in self._reader.epoch(epoch, first_step):
            yield self._finished(read, epoch)
            if self._running is not token:
                raise RuntimeError("a later epoch of this loader was started; run one at a time")

    def state_dict(self) -> dict[str, Any]:
        """The position in the shards after the last yielded batch; empty for other sources.

        It has only tensors and numbers, so that ``torch.load(weights_only=True)`` reads it.
        """
        return self._reader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; ``epoch(e, first_step)`` continues from there.

        Raises:
            ResfastError: the state is of other shards, another batch size, seed or rank.
        """
        self._reader.load_state_dict(state)

    def _finished(self, read: ReadImages, epoch: int) -> Batch:
        images, labels, indices = read
        if self.finish != "fused":
            images = images.permute(0, 3, 1, 2)
            images = images if self.finish == "uint8" else images.to(self.dtype)
            return Batch(images, labels, indices)
        augment = self.augment
        if self._reader.window < 1:  # the reader has done it
            augment = replace(augment, resize=1.0)
        params = self._reader.sample(augment, indices, epoch, images)
        size = (self.image_size, self.image_size)
        mix = sample_mix(augment, indices, count=self.count, size=size, seed=self.seed, epoch=epoch)
        rows = self._rows[: len(images)]
        if mix is not None:
            mix = replace(mix, partner=rows.roll(-1))
            label_weights = mix.label_weights(*size)
            labels = mixed_labels(labels, labels.roll(-1), label_weights, self.classes)
        images = augment_unchecked(
            images,
            rows,
            params,
            self._normalization,
            mix=mix,
            padding=augment.padding,
            dtype=self.dtype,
            noise=augment.noise,
        )
        return Batch(images, labels, indices)


def mean_std(
    source: Source,
    image_size: int,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    prefetch: int = 2,
    threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each channel, in one pass over the batches.

    The arguments are those of :class:`DaliLoader`.

    Returns:
        float32 ``[C]`` each, on the CPU, in units of pixel / 255; exact, since sums are integers.

    Raises:
        ResfastError: as in :class:`DaliLoader` and its epochs.
    """
    channels = source.images.shape[3] if isinstance(source, Arrays) else 3
    loader = DaliLoader(
        source,
        batch_size=batch_size,
        image_size=image_size,
        mean=torch.zeros(channels),
        std=torch.ones(channels),
        augment=Augment(),
        classes=2**62,
        device=device,
        train=False,
        prefetch=prefetch,
        threads=threads,
        finish="uint8",
    )
    sums = torch.zeros(2, channels, dtype=torch.int64, device=loader.device)
    for batch in loader.epoch(0):
        values = batch.images.to(torch.int32)
        sums[0] += values.sum((0, 2, 3), dtype=torch.int64)
        sums[1] += values.square().sum((0, 2, 3), dtype=torch.int64)
    return mean_std_of_sums(*sums.tolist(), loader.count * image_size**2)


def _check_dali_alone(augment: Augment) -> None:
    """Raises ResfastError for an augmentation that DALI cannot do without our operator."""
    rest = replace(augment, crop=0, padding="reflect", flip="none", resize=1.0)
    reflects = augment.crop and augment.padding != "zero"
    if rest != Augment() or reflects or augment.flip == "alternating":
        raise ResfastError(
            f"--augment {augment} is more than DALI alone does (crop with padding=zero, "
            "flip=random, resize): use finish='fused'"
        )
