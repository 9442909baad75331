"""Reads tar shards with DALI sequentially.

DALI determines the order within an epoch; to continue quickly, its state has to be saved.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.data import dali_pipeline, shard_listing, shards
from resfast.data.dali_reader import Reader, ReaderOptions, ReadImages
from resfast.data.dataset import Shards
from resfast.data.decode import REPLACE
from resfast.errors import ResfastError

# Any odd number will do: a hash only has to be the same in every run.
_HASH_FACTOR = 0x9E3779B97F4A7C15
# Version of the pipeline, which DALI's state is for; one more where Pillow decodes everything.
_GRAPH = 2


class ShardReader(Reader):
    """Reads shards sequentially; an epoch of DALI is a fixed number of runs of the pipeline.

    Raises:
        ResfastError: there are no shards, one cannot be listed, a class is out of range, or the
            number of samples is not the expected one.
    """

    def __init__(self, source: Shards, options: ReaderOptions) -> None:
        if not source.paths:
            raise ResfastError("the list of shards is empty; expected at least one")
        self._index_folder = tempfile.TemporaryDirectory(prefix="resfast-index-")
        self._indices, labels, names = [], [], []
        for ordinal, path in enumerate(source.paths):
            listing = shard_listing.list_shard(Path(path), source.cache)
            index = Path(self._index_folder.name, f"{ordinal}.idx")
            index.write_text("".join(listing.index_lines()))
            self._indices.append(str(index))
            labels.append(
                shard_listing.label_indices(path, listing, source.classes, options.classes)
            )
            names += [shard_listing.source_name(path, part) for part in listing.images]
        count = len(names)
        if count != source.count:
            raise ResfastError(
                f"the shards of {source.paths[0]} have {count:,} samples; expected "
                f"{source.count:,}, as {shards.LISTING} says: write them again"
            )
        super().__init__(options, count)
        self.source = source
        common = os.path.commonpath([os.path.dirname(path) or "." for path in source.paths])
        self._prefix = len(os.fsencode(common))
        indices = self._indices_of(_padded(names)).cpu()
        self._known, order = indices.sort()
        self._labels = torch.cat(labels)[order]
        self._position = (0, 0)  # epoch and step of the pipeline
        largest_part = math.ceil(count / options.world)
        self._runs = math.ceil(largest_part / options.batch_size)  # of the pipeline per epoch

    def epoch(self, epoch: int, first_step: int) -> Iterator[ReadImages]:
        """Batches of an epoch, from ``first_step`` on; the ones before are read again.

        Raises:
            ResfastError: an image cannot be decoded.
        """
        if not self.options.train:
            epoch = self._position[0] + bool(
                self._position[1] > first_step
            )  # all epochs are the same
        self._go_to(epoch * self._runs + first_step)
        size = self._part_size()
        for step in range(first_step, len(self)):
            images, names = self._advance()
            images = images[: size - step * self.options.batch_size]
            indices = self._indices_of(names[: len(images)].numpy())
            labels = self._labels[torch.searchsorted(self._known, indices)]
            device = self.options.device
            yield ReadImages(images, labels.to(device), indices.to(device))
        self._pillow.say(size)

    def state_dict(self) -> dict[str, Any]:
        """The position in the shards after the last batch that was yielded.

        It has only tensors and numbers, so that ``torch.load(weights_only=True)`` reads it.
        """
        if self._pipeline is None:
            return {}
        state = np.frombuffer(self._pipeline.checkpoint(), np.uint8).copy()
        epoch, step = self._position
        return {
            "pipeline": torch.from_numpy(state),
            "graph": _GRAPH + self._pillow.everything,
            "epoch": epoch,
            "step": step,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a position, from which ``epoch(e, first_step)`` continues.

        Raises:
            ResfastError: the state is of other shards, another batch size, seed or rank.
        """
        if not state:
            return
        for name, value in self._identity().items():
            if state[name] != value:
                raise ResfastError(
                    f"the saved position in the shards is of {name} {state[name]}, but this run "
                    f"has {name} {value}: use the same shards and options to continue"
                )
        if state.get("graph") not in (_GRAPH, _GRAPH + 1):  # of another version: read them again
            self._pipeline, self._position = None, (0, 0)
            return
        self._pillow.everything = state["graph"] > _GRAPH
        self._pipeline = self._build(checkpoint=state["pipeline"].numpy().tobytes())
        self._position = (state["epoch"], state["step"])

    def _identity(self) -> dict[str, int]:
        options = self.options
        return {
            "count": self.count,
            "batch_size": options.batch_size,
            "seed": options.seed,
            "rank": options.rank,
            "world": options.world,
        }

    def _part_size(self) -> int:
        first, end = (  # as DALI divides shards among ranks
            self.count * rank // self.options.world
            for rank in (self.options.rank, self.options.rank + 1)
        )
        return end - first

    def _go_to(self, target: int) -> None:
        reached = self._position[0] * self._runs + self._position[1]
        if reached > target:
            self._pipeline, self._position, reached = None, (0, 0), 0
        for _ in range(target - reached):
            self._advance()

    def _advance(self) -> tuple[Tensor, ...]:
        epoch, step = self._position
        try:
            outputs = self._run()
        except RuntimeError as error:
            return self._advance_again(epoch * self._runs + step, error)
        self._position = (epoch, step + 1) if step + 1 < self._runs else (epoch + 1, 0)
        return outputs

    def _advance_again(self, target: int, error: RuntimeError) -> tuple[Tensor, ...]:
        """The run at which DALI failed, all of whose images Pillow decodes, if it can."""
        self._position = (0, 0)
        images = (
            (f"{name} in {path}", data)
            for path in self.source.paths
            for name, data in shards.images_of(path)
        )
        self._pillow.raise_refused(images, REPLACE)
        if self._pillow.everything:
            raise error
        self._pillow.everything = True
        self._go_to(target)
        outputs = self._advance()
        self._pillow.say_taken_over(error)
        return outputs

    def _indices_of(self, names: np.ndarray) -> Tensor:
        """A hash of each sample's shard (relative to the common folder), position and name."""
        names = names[:, self._prefix :].astype(np.uint64)
        powers = np.cumprod(np.full(names.shape[1], _HASH_FACTOR, np.uint64))
        indices = (names * powers).sum(1, dtype=np.uint64).astype(np.int64)
        return torch.from_numpy(indices)

    def _build(self, checkpoint: bytes | None = None) -> Any:
        options = self.options
        reader: dict[str, Any] = {
            "paths": list(self.source.paths),
            "index_paths": self._indices,
            "shard_id": options.rank,
            "num_shards": options.world,
        }
        if options.train:
            reader |= {
                "random_shuffle": True,
                "shuffle_after_epoch": True,
                "shuffle_after_epoch_seed": options.seed % 2**31,
            }
        else:
            reader["stick_to_shard"] = True
        alone = options.finish == "dali"
        return dali_pipeline.build(
            reader=reader,
            window=self.window,
            crop=options.augment.crop if alone else 0,
            flip=alone and options.augment.flip != "none",
            checkpoint=checkpoint,
            **self._pipeline_options(),
        )


def _padded(names: list[str]) -> np.ndarray:
    """Names as uint8 ``[N, L]``, with zeros after the shorter ones."""
    encoded = np.array([os.fsencode(name) for name in names])
    return encoded.view(np.uint8).reshape(len(names), -1)
