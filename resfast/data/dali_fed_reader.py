"""Reads arrays and image files with DALI; we choose the images of each batch.

``fn.readers.file`` would have its own position and order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.data import dali_pipeline
from resfast.data.augment import LOG_RATIO, WINDOW_STREAM, order
from resfast.data.dali_reader import Arrays, Reader, ReaderOptions, ReadImages
from resfast.data.dataset import Files
from resfast.data.decode import REPLACE_OR_SKIP
from resfast.data.folder import read_file
from resfast.errors import ResfastError
from resfast.ops.philox.op import philox, uniform


class FedReader(Reader):
    """Reads arrays or files: DALI is fed the images or the file names of each batch.

    Order and random parameters are functions of (seed, epoch, index), so an epoch can start at any
    step.

    Raises:
        ResfastError: a file is missing, or labels or images have a wrong shape, dtype or value.
    """

    def __init__(self, source: Arrays | Files, options: ReaderOptions) -> None:
        super().__init__(options, len(source))
        self.source = source
        self._steps: Iterator[tuple[Any, ...]] = iter(())
        if not self.count:
            raise ResfastError("the list of images is empty; expected at least one")
        if len(source.labels) != self.count:
            raise ResfastError(
                f"there are {len(source.labels)} labels for {self.count} images; expected one "
                "for each"
            )
        labels = _checked_labels(source.labels.cpu(), options.classes)
        self._labels = labels.to(options.device)
        if isinstance(source, Files):
            _check_exist(source.paths)
            self._names = np.array([os.fsencode(path) for path in source.paths])
            self._lengths = np.char.str_len(self._names).astype(np.int32)[:, None]
            return
        self._array = np.asarray(source.images)
        if self._array.dtype != np.uint8 or self._array.ndim != 4:
            raise ResfastError(
                f"images are {self._array.dtype} {list(self._array.shape)}; expected uint8 "
                "[N, H, W, C]"
            )
        self.channels = self._array.shape[3]
        self.resizes = self._array.shape[1:3] != (options.image_size, options.image_size)

    def epoch(self, epoch: int, first_step: int) -> Iterator[ReadImages]:
        """Batches of an epoch, from ``first_step`` on.

        Raises:
            ResfastError: an image cannot be decoded.
        """
        options = self.options
        if options.train:
            shuffled = order(self.count, seed=options.seed, epoch=epoch, device="cpu")
        else:
            shuffled = torch.arange(options.rank, self.count, options.world)
        on_device = shuffled.to(options.device)
        self._drain()
        self._feed(shuffled, epoch, first_step)
        for step in range(first_step, len(self)):
            try:
                (images,) = self._run()
            except RuntimeError as error:
                images = self._run_again(shuffled, epoch, step, error)
            indices = self._part(on_device, step)
            yield ReadImages(images, self._labels[indices], indices)
        self._pillow.say(self._part_size())

    def _feed(self, shuffled: Tensor, epoch: int, first_step: int) -> None:
        self._steps = (
            self._inputs(self._part(shuffled, step), epoch) for step in range(first_step, len(self))
        )

    def _run_again(self, shuffled: Tensor, epoch: int, step: int, error: RuntimeError) -> Tensor:
        """The images of a step at which DALI failed, all decoded by Pillow if it can."""
        while True:
            if isinstance(self.source, Arrays):
                raise error
            ahead = range(step, min(step + self.options.prefetch + 1, len(self)))
            rows = torch.cat([self._part(shuffled, other) for other in ahead]).tolist()
            paths = [self.source.paths[row] for row in rows]
            images = ((path, read_file(path)) for path in paths)
            self._pillow.raise_refused(images, REPLACE_OR_SKIP)
            if self._pillow.everything:
                raise error
            for path in paths:
                read_file(path)  # an error that names it, if that was what failed
            self._pillow.everything = True
            self._feed(shuffled, epoch, step)
            try:
                (again,) = self._run()
            except RuntimeError:
                continue
            self._pillow.say_taken_over(error)
            return again

    def _part_size(self) -> int:
        return len(range(self.options.rank, self.count, self.options.world))

    def _part(self, shuffled: Tensor, step: int) -> Tensor:
        """Indices of this rank's images in one step."""
        options = self.options
        if not options.train:
            return shuffled[step * options.batch_size : (step + 1) * options.batch_size]
        step_images = options.batch_size * options.world
        step_indices = shuffled[step * step_images : (step + 1) * step_images]  # of all ranks
        return step_indices.tensor_split(options.world)[options.rank]

    def _fed(self) -> list[str]:
        """Names of the values that :meth:`_inputs` returns."""
        names = ["data", *(["lengths"] if isinstance(self.source, Files) else [])]
        if self.window < 1:
            names.append("window")
        if self.options.finish == "dali":
            names += ["shift"] * bool(self.options.augment.crop)
            names += ["flip"] * (self.options.augment.flip != "none")
        return names

    def _inputs(self, indices: Tensor, epoch: int) -> tuple[Any, ...]:
        options, rows = self.options, indices.numpy()
        if isinstance(self.source, Files):
            names = self._names[rows]
            values = [names.view(np.uint8).reshape(len(rows), -1), self._lengths[rows]]
        else:
            values = [self._array[rows]]
        if self.window < 1:
            values.append(_window(indices, self.window, options.seed, epoch))
        if options.finish == "dali":
            params = self.sample(replace(options.augment, resize=1.0), indices, epoch)
            if params.shift is not None:
                values.append(params.shift.numpy())
            if params.flip is not None:
                values.append(params.flip.to(torch.int32).numpy())
        return tuple(values)

    def _drain(self) -> None:
        """Ends an epoch that was not read to its end."""
        if self._pipeline is not None:
            self._steps = iter(())
            with suppress(StopIteration):
                while True:
                    self._pipeline.run()
            self._pipeline.reset()

    def _build(self) -> Any:
        return dali_pipeline.build(
            feed=lambda: next(self._steps),
            fed=self._fed(),
            decoded=isinstance(self.source, Arrays),
            **self._pipeline_options(),
        )


def _window(indices: Tensor, min_area: float, seed: int, epoch: int) -> np.ndarray:
    """Windows of random-resized crop, as in :func:`dali_pipeline.build`, float32 ``[B, 4]``."""
    chances = uniform(philox(indices, seed=seed, epoch=epoch, stream=WINDOW_STREAM))
    half_area = 0.5 * (min_area + (1 - min_area) * chances[0]).log()
    half_ratio = 0.5 * LOG_RATIO * (2 * chances[1] - 1)
    sides = [(half_area - half_ratio).exp(), (half_area + half_ratio).exp()]
    return torch.stack([*sides, chances[2], chances[3]], 1).numpy()


def _checked_labels(labels: Tensor, classes: int) -> Tensor:
    low, high = (int(value) for value in torch.aminmax(labels))
    if labels.dtype != torch.int64 or low < 0 or high >= classes:
        raise ResfastError(
            f"labels are {labels.dtype} from {low} to {high}; expected int64 from 0 to "
            f"{classes - 1}"
        )
    return labels


def _check_exist(paths: Sequence[str]) -> None:
    """Checks files by listing their folders: much faster on a network than one call per file."""
    listings: dict[str, set[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set()
            with suppress(FileNotFoundError, NotADirectoryError):
                listings[folder] = set(os.listdir(folder or "."))
        if name not in listings[folder]:
            raise ResfastError(
                f"the image {path} does not exist: restore it or remove it from the list"
            )
