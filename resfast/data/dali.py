"""Batches that NVIDIA DALI reads, decodes and resizes ahead of the training.

DALI brings images to uint8 ``[B, S, S, C]`` on the training's device; the fused operator of
:mod:`resfast.ops.augment.op` does the rest, as it does for a data set in memory. The decoded set
is never held. DALI works without a GPU too.

Order and augmentation of :class:`Arrays` and :class:`Files` are functions of (seed, epoch, index),
those of :class:`ResidentLoader`, and DALI is told which images to read; so any epoch can be begun
at any step, and nothing has to be saved. ``fn.readers.file`` would keep a position and an order of
its own. Shards are read from front to back, which is their point: there the order is DALI's, and
its state has to be saved to go on quickly.

A file that is cut short, empty, absent or of another kind ends the epoch with its name. A JPEG
whose bytes are damaged in the middle may decode to a wrong picture without any decoder noticing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from resfast.data import dali_pipeline, shards
from resfast.data.augment import (
    LOG_RATIO,
    WINDOW_STREAM,
    Augment,
    check_augment,
    mixed_labels,
    needs_statistics,
    order,
    sample,
    sample_mix,
    statistics,
)
from resfast.data.dataset import Files, Shards
from resfast.data.folder import read_file
from resfast.data.resident import check_batch_size
from resfast.data.statistics import mean_std_of_sums
from resfast.errors import ResfastError
from resfast.ops.augment.op import DTYPES, augment_drawn, normalization
from resfast.ops.philox.op import philox, uniform

Finish = Literal["fused", "dali", "uint8"]

# Odd and otherwise arbitrary; a hash only has to be the same in every run.
_HASH_FACTOR = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Arrays:
    """Decoded images.

    Attributes:
        images: uint8 ``[N, H, W, C]``, a tensor on the CPU or an array, such as a ``np.memmap``.
        labels: int64 ``[N]``.
    """

    images: Tensor | np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        """Images."""
        return len(self.images)


Source = Arrays | Files | Shards


class DaliLoader:
    """Batches of images that DALI reads; used as :class:`~resfast.data.resident.ResidentLoader` is.

    Differences to it: an image is mixed with the next one of its batch instead of any; images
    that are not ``image_size`` on both sides are cut to a centred square and resized, antialiased
    bicubic (as :func:`~resfast.data.folder.decode_image`); and unless :class:`Arrays` of
    the right size are given, random-resized crop is DALI's, on the image at its full size.

    Args:
        source: the images.
        batch_size: images a batch.
        image_size: height and width S in pixels.
        mean: float32 ``[C]`` in units of pixel / 255.
        std: float32 ``[C]``, likewise.
        augment: what is done to training images.
        classes: number of classes; labels are below it.
        seed: seed of order and augmentation.
        device: where batches are made.
        dtype: of the images in a batch: float32, bfloat16 or float16.
        train: shuffled in each epoch and augmented; or else every image once, in order, plain.
        drop_last: of a training epoch: leave out a ragged last batch.
        rank: which part of the images is ours, from 0.
        world: how many parts there are.
        prefetch: batches prepared ahead.
        threads: of DALI; 0 for as many as PyTorch uses.
        finish: who augments and normalizes: our operator (``fused``), or DALI alone (``dali``; a
            crop with zeros outside, a random flip and random-resized crop are all it can). With
            ``uint8`` images stay as they are decoded and resized.

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
            raise ResfastError(f"--prefetch {prefetch} is out of range: expected 1 up")
        if dtype not in DTYPES:
            raise TypeError(f"dtype is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
        self.source, self.classes, self.image_size = source, classes, image_size
        self.batch_size, self.seed, self.dtype = batch_size, seed, dtype
        self.device = torch.device(device)
        self.train, self.drop_last, self.rank, self.world = train, drop_last, rank, world
        self.augment = augment if train else Augment()
        self.finish: Finish = "dali" if not train and finish == "fused" else finish
        self._prefetch, self._threads = prefetch, threads or torch.get_num_threads()
        self._mean, self._std = mean.cpu(), std.cpu()
        self._normalization = normalization(mean.to(self.device), std.to(self.device))
        self._open()
        if train:
            check_batch_size(batch_size, self.count, world)
            check_augment(augment, image_size, image_size)
        elif batch_size < 1:
            raise ResfastError(f"batch size {batch_size} is out of range: expected 1 up")
        if finish == "dali":
            asked = self.augment
            rest = replace(asked, crop=0, padding="reflect", flip="none", resize=1.0)
            reflects = asked.crop and asked.padding != "zero"
            if rest != Augment() or reflects or asked.flip == "alternating":
                raise ResfastError(
                    f"--augment {asked} is more than DALI alone does (crop with padding=zero, "
                    "flip=random, resize): use finish='fused'"
                )
        self._rows = torch.arange(min(batch_size, self.count), device=self.device)
        self._pipeline: Any = None
        self._steps: Iterator[tuple[Any, ...]] = iter(())
        self._running: object = None
        self._position = (0, 0)  # of the pipeline of shards: epoch, step

    def _open(self) -> None:
        """Checks the source and finds out how many images it has."""
        source = self.source
        self._resized, channels = True, 3
        if isinstance(source, Shards):
            if not source.paths:
                raise ResfastError("the list of shards is empty, at least one was expected")
            self._index_folder = tempfile.TemporaryDirectory(prefix="resfast-index-")
            self._indices, self.count = shards.indexed(source.paths, Path(self._index_folder.name))
            common = os.path.commonpath([os.path.dirname(path) or "." for path in source.paths])
            self._prefix = len(os.fsencode(common))
        else:
            self.count = len(source)
            if not self.count:
                raise ResfastError("the list of images is empty, at least one was expected")
            if len(source.labels) != self.count:
                raise ResfastError(
                    f"there are {len(source.labels)} labels for {self.count} images; expected one "
                    "for each"
                )
            self._labels = _checked_labels(source.labels.cpu(), self.classes).to(self.device)
        if isinstance(source, Files):
            _check_exist(source.paths)
            self._names = np.array([os.fsencode(path) for path in source.paths])
            self._lengths = np.char.str_len(self._names).astype(np.int32)[:, None]
        elif isinstance(source, Arrays):
            self._array = np.asarray(source.images)
            if self._array.dtype != np.uint8 or self._array.ndim != 4:
                raise ResfastError(
                    f"images are {self._array.dtype} {list(self._array.shape)}; expected uint8 "
                    "[N, H, W, C]"
                )
            channels = self._array.shape[3]
            self._resized = self._array.shape[1:3] != (self.image_size, self.image_size)
        if len(self._mean) != channels:
            raise ResfastError(
                f"the mean has {len(self._mean)} channels and the images have {channels}; expected "
                "the same"
            )
        self._channels = channels

    def __len__(self) -> int:
        """Batches in an epoch."""
        if not self.train:
            return -(-self._part_size() // self.batch_size)
        whole, rest = divmod(self.count, self.batch_size * self.world)
        return whole + (rest >= self.world and not self.drop_last)

    def _part_size(self) -> int:
        """Images of this rank in an epoch of which nothing is left out."""
        if isinstance(self.source, Shards):  # as DALI parts them
            first, end = (self.count * (self.rank + more) // self.world for more in (0, 1))
            return end - first
        return len(range(self.rank, self.count, self.world))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch; a later call ends an epoch that still runs.

        Args:
            epoch: epoch, from 0.
            first_step: batches to leave out at the start, to resume inside an epoch. Of shards,
                they are read again unless :meth:`load_state_dict` was given that very place.

        Yields:
            images ``[B, C, S, S]`` in ``channels_last`` and the loader's dtype, and labels: int64
            ``[B]``, or where images are mixed the parts of the classes, float32 ``[B, classes]``.

        Raises:
            ResfastError: an image cannot be decoded, or a shard has a label that is out of range.
            RuntimeError: a later epoch of this loader was begun.
        """
        self._running = token = object()
        one = self._shard_batches if isinstance(self.source, Shards) else self._fed_batches
        for images, labels, indices in one(epoch, first_step):
            yield self._finished(images, labels, indices, epoch)
            if self._running is not token:
                raise RuntimeError("a later epoch of this loader was begun; run one at a time")

    def state_dict(self) -> dict[str, Any]:
        """Where shards are read, after the last batch that was yielded; of other sources, empty.

        Tensors and numbers only, so that ``torch.load(weights_only=True)`` reads it.
        """
        if not isinstance(self.source, Shards) or self._pipeline is None:
            return {}
        state = np.frombuffer(self._pipeline.checkpoint(), np.uint8).copy()
        epoch, step = self._position
        return {
            "pipeline": torch.from_numpy(state),
            "epoch": epoch,
            "step": step,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state of :meth:`state_dict`; ``epoch(e, first_step)`` goes on from there.

        Raises:
            ResfastError: it is of other shards, another batch size, seed or rank.
        """
        if not state or not isinstance(self.source, Shards):
            return
        for name, value in self._identity().items():
            if state[name] != value:
                raise ResfastError(
                    f"the saved position in the shards is of {name} {state[name]}, but this run "
                    f"has {name} {value}: use the same shards and options to go on"
                )
        self._pipeline = self._build(checkpoint=state["pipeline"].numpy().tobytes())
        self._position = (state["epoch"], state["step"])

    def _identity(self) -> dict[str, int]:
        names = ("count", "batch_size", "seed", "rank", "world")
        return {name: int(getattr(self, name)) for name in names}

    # Arrays and files: DALI is fed with what each batch is made of.

    def _fed_batches(self, epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.train:
            shuffled = order(self.count, seed=self.seed, epoch=epoch, device="cpu")
        else:
            shuffled = torch.arange(self.rank, self.count, self.world)
        on_device = shuffled.to(self.device)
        self._drain()
        self._steps = (
            self._inputs(self._part(shuffled, step), epoch) for step in range(first_step, len(self))
        )
        for step in range(first_step, len(self)):
            try:
                (images,) = self._run()
            except RuntimeError:
                self._pipeline = None
                ahead = range(step, min(step + self._prefetch + 1, len(self)))
                rows = torch.cat([self._part(shuffled, other) for other in ahead]).tolist()
                if isinstance(self.source, Files):
                    paths = (self.source.paths[row] for row in rows)
                    _name_culprit((path, read_file(path)) for path in paths)
                raise
            indices = self._part(on_device, step)
            yield images, self._labels[indices], indices

    def _part(self, shuffled: Tensor, step: int) -> Tensor:
        """Which images one step takes."""
        if not self.train:
            return shuffled[step * self.batch_size : (step + 1) * self.batch_size]
        step_images = self.batch_size * self.world
        everyone = shuffled[step * step_images : (step + 1) * step_images]
        return everyone.tensor_split(self.world)[self.rank]

    def _fed(self) -> list[str]:
        """Names of what :meth:`_inputs` gives."""
        names = ["data", *(["lengths"] if isinstance(self.source, Files) else [])]
        if self._window < 1:
            names.append("window")
        if self.finish == "dali":
            names += ["shift"] * bool(self.augment.crop)
            names += ["flip"] * (self.augment.flip != "none")
        return names

    @property
    def _window(self) -> float:
        """Smallest part of the area that DALI's random-resized crop takes; 1 for none."""
        return self.augment.resize if self._resized or self.finish == "dali" else 1.0

    def _inputs(self, indices: Tensor, epoch: int) -> tuple[Any, ...]:
        rows = indices.numpy()
        if isinstance(self.source, Files):
            names = self._names[rows]
            values = [names.view(np.uint8).reshape(len(rows), -1), self._lengths[rows]]
        else:
            values = [self._array[rows]]
        if self._window < 1:
            values.append(_window(indices, self._window, self.seed, epoch))
        if self.finish == "dali":
            params = self._sample(replace(self.augment, resize=1.0), indices, None, epoch)
            values += [drawn.numpy() for drawn in (params.shift,) if drawn is not None]
            values += [d.to(torch.int32).numpy() for d in (params.flip,) if d is not None]
        return tuple(values)

    def _drain(self) -> None:
        """Ends an epoch that was left in the middle."""
        if self._pipeline is not None:
            self._steps = iter(())
            with suppress(StopIteration):
                while True:
                    self._pipeline.run()
            self._pipeline.reset()

    # Shards: DALI reads on and on; one epoch of it is a fixed number of runs.

    def _shard_batches(
        self, epoch: int, first_step: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        runs = -(-self.count // self.world)
        runs = -(-runs // self.batch_size)
        if not self.train:
            epoch = self._position[0] + bool(self._position[1] > first_step)  # all are the same
        self._go_to(epoch * runs + first_step, runs)
        size = self._part_size()
        for step in range(first_step, len(self)):
            images, texts, sources = self._advance(runs)
            images = images[: size - step * self.batch_size]
            labels, indices = self._read(texts, sources, len(images))
            yield images, labels, indices

    def _go_to(self, wanted: int, runs: int) -> None:
        reached = self._position[0] * runs + self._position[1]
        if reached > wanted:
            self._pipeline, self._position, reached = None, (0, 0), 0
        for _ in range(wanted - reached):
            self._advance(runs)

    def _advance(self, runs: int) -> tuple[Tensor, ...]:
        try:
            outputs = self._run()
        except RuntimeError:
            self._pipeline, self._position = None, (0, 0)
            _name_culprit(
                (f"{name} in {path}", data)
                for path in self.source.paths
                for name, data in shards.images_of(path)
            )
            raise
        epoch, step = self._position
        self._position = (epoch, step + 1) if step + 1 < runs else (epoch + 1, 0)
        return outputs

    def _read(self, texts: Tensor, sources: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Labels from the text of the ``.cls`` files, and indices from where samples come from."""
        characters, names = texts[:count].numpy(), sources[:count].numpy()
        labels = np.zeros(count, np.int64)
        wrong = np.zeros(count, bool)
        for column in characters.T:
            digit = (column >= 48) & (column <= 57)
            labels = np.where(digit, 10 * labels + (column - 48), labels)
            wrong |= ~digit & ~np.isin(column, np.frombuffer(b"\0\t\n\r ", np.uint8))
        wrong |= (labels >= self.classes) | ~((characters >= 48) & (characters <= 57)).any(1)
        if wrong.any():
            row = int(wrong.argmax())
            raise ResfastError(
                f"the sample {_text(names[row])} has the class {_text(characters[row])!r}; "
                f"expected a number from 0 to {self.classes - 1}"
            )
        # The index of a sample is a hash of its shard, place and name, below the shards' folder.
        names = names[:, self._prefix :].astype(np.uint64)
        powers = np.cumprod(np.full(names.shape[1], _HASH_FACTOR, np.uint64))
        indices = (names * powers).sum(1, dtype=np.uint64).astype(np.int64)
        device = self.device
        return torch.from_numpy(labels).to(device), torch.from_numpy(indices).to(device)

    # Both.

    def _build(self, checkpoint: bytes | None = None) -> Any:
        on_gpu = self.device.type == "cuda"
        device_id = None
        if on_gpu:
            index = self.device.index
            device_id = torch.cuda.current_device() if index is None else index
        normalize = None
        if self.finish == "dali":
            half = self.dtype == torch.float16
            scaled = [(255 * value.double()).tolist() for value in (self._mean, self._std)]
            normalize = (*scaled, half)
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "threads": self._threads,
            "device_id": device_id,
            "prefetch": self._prefetch,
            "seed": (self.seed * 1_000_003 + self.rank) % 2**31,
            "image_size": self.image_size,
            "resized": self._resized or self._window < 1,
            "normalize": normalize,
        }
        if not isinstance(self.source, Shards):
            return dali_pipeline.build(
                feed=lambda: next(self._steps),
                fed=self._fed(),
                decoded=isinstance(self.source, Arrays),
                **common,
            )
        reader: dict[str, Any] = {
            "paths": list(self.source.paths),
            "index_paths": self._indices,
            "shard_id": self.rank,
            "num_shards": self.world,
        }
        if self.train:
            reader |= {
                "random_shuffle": True,
                "shuffle_after_epoch": True,
                "shuffle_after_epoch_seed": self.seed % 2**31,
            }
        else:
            reader["stick_to_shard"] = True
        alone = self.finish == "dali"
        return dali_pipeline.build(
            reader=reader,
            window=self._window,
            crop=self.augment.crop if alone else 0,
            flip=alone and self.augment.flip != "none",
            checkpoint=checkpoint,
            **common,
        )

    def _run(self) -> tuple[Tensor, ...]:
        """Outputs of the next run as tensors; their memory is theirs as long as they live."""
        if self._pipeline is None:
            self._pipeline = self._build()
        if self.device.type == "cuda":
            outputs = self._pipeline.run(torch.cuda.current_stream(self.device))
        else:
            outputs = self._pipeline.run()
        return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)

    def _sample(self, augment: Augment, indices: Tensor, images: Tensor | None, epoch: int) -> Any:
        measured = None
        if images is not None and needs_statistics(augment):
            measured = statistics(images)
        return sample(
            augment,
            indices,
            size=(self.image_size, self.image_size),
            channels=self._channels,
            seed=self.seed,
            epoch=epoch,
            statistics=measured,
        )

    def _finished(
        self, images: Tensor, labels: Tensor, indices: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        if self.finish != "fused":
            images = images.permute(0, 3, 1, 2)
            return images if self.finish == "uint8" else images.to(self.dtype), labels
        augment = replace(self.augment, resize=1.0) if self._window < 1 else self.augment
        params = self._sample(augment, indices, images, epoch)
        size = (self.image_size, self.image_size)
        mix = sample_mix(augment, indices, count=self.count, size=size, seed=self.seed, epoch=epoch)
        rows = self._rows[: len(images)]
        if mix is not None:
            mix = replace(mix, partner=rows.roll(-1))
            own_part = mix.own_part(*size)
            labels = mixed_labels(labels, labels.roll(-1), own_part, self.classes)
        result = augment_drawn(
            images,
            rows,
            params,
            self._normalization,
            mix=mix,
            padding=augment.padding,
            dtype=self.dtype,
        )
        return result, labels


def mean_std(
    source: Source,
    image_size: int,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    prefetch: int = 2,
    threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each channel, in one pass that holds one batch.

    The arguments are those of :class:`DaliLoader`.

    Returns:
        float32 ``[C]`` each, on the CPU, in units of pixel / 255; sums are integers and so exact.
        Raises what :class:`DaliLoader` and its epochs raise.
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
    for images, _ in loader.epoch(0):
        values = images.to(torch.int32)
        sums[0] += values.sum((0, 2, 3), dtype=torch.int64)
        sums[1] += values.square().sum((0, 2, 3), dtype=torch.int64)
    return mean_std_of_sums(*sums.tolist(), loader.count * image_size**2)


def _window(indices: Tensor, least: float, seed: int, epoch: int) -> np.ndarray:
    """Windows of random-resized crop as :func:`dali_pipeline.build` takes them, ``[B, 4]``."""
    drawn = uniform(philox(indices, seed=seed, epoch=epoch, stream=WINDOW_STREAM))
    half_area = 0.5 * (least + (1 - least) * drawn[0]).log()
    half_ratio = 0.5 * LOG_RATIO * (2 * drawn[1] - 1)
    sides = [(half_area - half_ratio).exp(), (half_area + half_ratio).exp()]
    return torch.stack([*sides, drawn[2], drawn[3]], 1).numpy()


def _checked_labels(labels: Tensor, classes: int) -> Tensor:
    least, most = (int(value) for value in torch.aminmax(labels))
    if labels.dtype != torch.int64 or least < 0 or most >= classes:
        raise ResfastError(
            f"labels are {labels.dtype} from {least} to {most}; expected int64 from 0 to "
            f"{classes - 1}"
        )
    return labels


def _check_exist(paths: Sequence[str]) -> None:
    """A listing of each folder is far quicker than asking for each file on a network."""
    listings: dict[str, set[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set()
            with suppress(FileNotFoundError, NotADirectoryError):
                listings[folder] = set(os.listdir(folder or "."))
        if name not in listings[folder]:
            raise ResfastError(f"the image {path} does not exist: restore it or list it no more")


def _name_culprit(images: Iterator[tuple[str, bytes]]) -> None:
    """Raises for the first of ``images`` that DALI cannot decode."""
    culprit = dali_pipeline.first_undecodable(images)
    if culprit is not None:
        raise ResfastError(
            f"{culprit} is not a readable JPEG, PNG or WebP image: replace or remove it"
        )


def _text(values: np.ndarray) -> str:
    return values.tobytes().rstrip(b"\0 \r\n\t").decode("utf-8", "backslashreplace")
