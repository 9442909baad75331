"""Opens the batches of training and evaluation, for resident and streamed data sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resfast.data.augment import Augment, ResizeBy
from resfast.data.augment.streams import LABEL_NOISE, generator
from resfast.data.batch import BatchSource
from resfast.data.dataset import Dataset, Files, Loader, Shards, Stream
from resfast.data.device_batches import DeviceBatches
from resfast.data.resident import ResidentLoader, resident_batches
from resfast.data.split import first_of_each_class, split_last, split_validation
from resfast.data.statistics import channel_mean_std
from resfast.errors import ResfastError
from resfast.runtime import free_memory

Resident = tuple[Tensor, Tensor]
"""uint8 images ``[N, H, W, C]`` and int64 labels ``[N]``."""
Source = Resident | Files | Shards


def choose_loader(asked: Loader, data: Dataset | Stream, device: torch.device) -> Loader:
    """The loader for an opened data set: ``resident`` or ``dali``."""
    if isinstance(data, Stream):
        return "dali"
    if asked == "auto":
        # On a CPU, the data set is already in memory.
        needed = data.train_images.numel() + data.test_images.numel()
        fits = device.type != "cuda" or needed <= free_memory(device) / 2
        return "resident" if fits else "dali"
    return asked


def split_sources(
    data: Dataset | Stream,
    val_fraction: float,
    seed: int,
    hold_out: int = 0,
    max_images: int = 0,
) -> tuple[Source, Source | None, Source]:
    """Training, validation (None without held-out images) and test images.

    Args:
        data: the data set.
        val_fraction: fraction of the training images of each class to hold out, chosen at random.
        seed: seed of that choice.
        hold_out: number of images to hold out instead, the last ones of each class.
        max_images: number of training images to use, the held-out ones included (0: all).

    Raises:
        ResfastError: a part would be empty, or the data set cannot be split.
    """
    if val_fraction and hold_out:
        raise ResfastError(
            f"--val-fraction {val_fraction:g} and --hold-out {hold_out} both hold out images; "
            "choose one"
        )
    if isinstance(data, Stream):
        train, test = data.train, data.test
    else:
        train = data.train_images, data.train_labels
        test = data.test_images, data.test_labels
    if max_images:
        train = first_images(train, max_images)
    if not (val_fraction or hold_out):
        return train, None, test
    if isinstance(train, Shards):
        raise ResfastError(
            f"{'--hold-out' if hold_out else '--val-fraction'} cannot split shards; write the "
            "held-out images as shards of their own, or use an image folder"
        )
    labels = train.labels if isinstance(train, Files) else train[1]
    if hold_out:
        parts = split_last(labels, hold_out)
    else:
        parts = split_validation(labels, val_fraction, seed)
    if isinstance(train, Files):
        kept, held_out = (train[part] for part in parts)
    else:
        kept, held_out = ((train[0][part], train[1][part]) for part in parts)
    return kept, held_out, test


def first_images(source: Source, count: int) -> Source:
    """The first images of each class, see :func:`first_of_each_class`.

    Args:
        source: the images; not changed.
        count: number of images.

    Raises:
        ResfastError: shards, whose labels are read during training, or too few images.
    """
    if isinstance(source, Shards):
        raise ResfastError(
            "--max-images cannot choose images from shards; use an image folder instead"
        )
    if isinstance(source, Files):
        return source[first_of_each_class(source.labels, count)]
    chosen = first_of_each_class(source[1], count)
    return source[0][chosen], source[1][chosen]


def with_label_noise(source: Source, fraction: float, classes: int, seed: int) -> Source:
    """The images with some labels replaced by another class.

    Args:
        source: the images; not changed.
        fraction: of the images, rounded down, whose label is replaced.
        classes: number of classes; each other class is equally likely.
        seed: seed of the choice.

    Raises:
        ResfastError: shards, whose labels are read during training.
    """
    if not fraction:
        return source
    if isinstance(source, Shards):
        raise ResfastError(
            "--label-noise cannot change the labels in shards; use an image folder instead"
        )
    labels = source.labels if isinstance(source, Files) else source[1]
    random = generator(seed, LABEL_NOISE)
    chosen = torch.randperm(len(labels), generator=random)[: int(fraction * len(labels))]
    shift = torch.randint(1, max(classes, 2), (len(chosen),), generator=random)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift.to(labels.device)) % classes
    return Files(source.paths, noisy) if isinstance(source, Files) else (source[0], noisy)


def count(source: Source) -> int:
    """Number of images."""
    return len(source[0]) if isinstance(source, tuple) else len(source)


def spread(source: Source, limit: int) -> Source:
    """At most ``limit`` evenly spaced images, so that all classes occur even if sorted by class.

    Shards, which hold training images in random order, are returned whole.
    """
    total = count(source)
    if isinstance(source, Shards) or total <= limit:
        return source
    indices = torch.arange(limit) * total // limit
    if isinstance(source, tuple):
        return source[0][indices], source[1][indices]
    return source[indices]


def mean_std(source: Source, image_size: int, **pipeline: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 ``[C]`` in units of pixel / 255.

    The standard deviation of a constant channel is set to 1.
    """
    if isinstance(source, tuple):
        mean, std = channel_mean_std(source[0])
    else:
        from resfast.data import dali

        mean, std = dali.mean_std(source, image_size=image_size, **pipeline)
    return mean, torch.where(std > 0, std, 1.0)


def training_batches(
    source: Source,
    mean: Tensor,
    std: Tensor,
    *,
    loader: Loader,
    image_size: int,
    batch_size: int,
    augment: Augment,
    classes: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    resize_by: ResizeBy,
    prefetch: int,
    threads: int,
    drop_last: bool = True,
    reuse: BatchSource | None = None,
) -> BatchSource:
    """Batches of the training images.

    Args:
        source: the images.
        mean: float32 ``[C]`` in units of pixel / 255.
        std: float32 ``[C]`` in the same units.
        loader: ``resident`` or ``dali``.
        image_size: height and width in pixels.
        batch_size: images per batch.
        augment: the augmentation.
        classes: number of classes.
        seed: seed of order and augmentation.
        device: device of the batches.
        dtype: dtype of the images of a batch.
        resize_by: how to make batches of smaller images.
        prefetch: number of batches that DALI prepares ahead.
        threads: DALI's CPU threads; 0 for as many as PyTorch uses.
        drop_last: whether an epoch has no incomplete last batch.
        reuse: batches of an earlier training that differed only in images and seed. Tensors that
            are part of captured steps are overwritten and used again.

    Raises:
        ResfastError: a value does not fit the images, or DALI is not installed.
    """
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "augment": augment,
        "classes": classes,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "drop_last": drop_last,
    }
    if loader == "resident":
        assert isinstance(source, tuple)
        resident = ResidentLoader(*source, mean, std, **common)
        if isinstance(reuse, DeviceBatches):
            reuse.loader.copy_from(resident)
            return reuse
        return DeviceBatches(resident, resize_by=resize_by)
    from resfast.data.dali import Arrays, DaliLoader
    from resfast.data.stream_batches import StreamBatches

    dali = DaliLoader(
        Arrays(*source) if isinstance(source, tuple) else source,
        image_size=image_size,
        mean=mean,
        std=std,
        prefetch=prefetch,
        threads=threads,
        **common,
    )
    return StreamBatches(dali, resize_by=resize_by)


class EvaluationBatches:
    """All images of a source once, normalized, each time it is iterated.

    Args:
        source: the images; resident ones are moved to ``device`` immediately.
        mean: float32 ``[C]`` in units of pixel / 255.
        std: float32 ``[C]`` in the same units.
        image_size: height and width in pixels.
        batch_size: images per batch; the last batch may be smaller.
        device: device of the batches.
        dtype: dtype of the images of a batch.
        classes: number of classes.
        numbering: int64 ``[classes]``, new label for each of the source's labels.
    """

    def __init__(
        self,
        source: Source,
        mean: Tensor,
        std: Tensor,
        *,
        image_size: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        classes: int,
        numbering: Tensor | None = None,
        prefetch: int = 2,
        threads: int = 0,
    ) -> None:
        self.count = count(source)
        self.mean, self.std = mean.to(device), std.to(device)
        self.batch_size, self.dtype = batch_size, dtype
        self.numbering = None if numbering is None else numbering.to(device)
        self.resident: Resident | None = None
        if isinstance(source, tuple):
            self.resident = source[0].to(device), source[1].to(device)
            return
        from resfast.data.dali import DaliLoader

        self.stream = DaliLoader(
            source,
            image_size=image_size,
            batch_size=batch_size,
            mean=mean,
            std=std,
            augment=Augment(),
            classes=classes,
            device=device,
            dtype=dtype,
            train=False,
            prefetch=prefetch,
            threads=threads,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.resident is not None:
            batches = resident_batches(
                *self.resident, self.mean, self.std, batch_size=self.batch_size, dtype=self.dtype
            )
        else:
            batches = ((batch.images, batch.labels) for batch in self.stream.epoch(0))
        for images, labels in batches:
            yield images, labels if self.numbering is None else self.numbering[labels]
