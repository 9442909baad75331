"""Plans a network as steps of one call, ``resfast::network_run``, for one shape of its input.

``csrc/cpu/network/plan.h`` describes maps, steps and tables, and runs them. Two ways to share the
work among threads:

- many images: each thread takes items of a few images through all layers, so that maps stay in
  its cache. The first layers, whose maps are large, take a part of an item at a time (a pass);
- few images: threads share the steps of one item.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resfast.ops.network import winograd
from resfast.ops.network.layers import (
    BFLOAT16,
    LINE,
    NETWORK_ACTIVATIONS,
    PANEL,
    Concat,
    Conv,
    Head,
    Layer,
    Layout,
    MaxPool,
    shapes,
    sources,
)
from resfast.ops.network.maps import OUTSIDE, Map, Tables, group_size, margin
from resfast.ops.network.memory import Memory, Value, place_parts
from resfast.ops.network.packing import Packed
from resfast.ops.network.steps import Split, from_block, segments, words_of_step

MAGIC = 0x7265736E65740004
CONV, PATCHES, ENTER, MAX_POOL, MEAN, HEAD, WINOGRAD, DEPTHWISE = range(8)
CACHE_BYTES = 512 * 1024
"""Of a core's cache, for the tiles that share one pass over the weights."""
WINOGRAD_BYTES = 4608 * 1024
"""Of the transformed inputs of Winograd tiles that share one pass over the weights."""
MOST_TILES = 96
"""That share it."""
MOST_IMAGES = {torch.bfloat16: 16, torch.float32: 32}
"""Of an item, by dtype of the maps."""


@dataclass(frozen=True)
class Plan:
    """What ``resfast::network_run`` takes besides the input, the constants and the arena.

    Attributes:
        program: int64.
        tables: int32.
        arena_bytes: size of the arena, which must be zeros before the first call.
    """

    program: Tensor
    tables: Tensor
    arena_bytes: int


def item_sizes(images: int, threads: int, layout: Layout = BFLOAT16) -> list[int]:
    """Numbers of images that may go through a network together, the most promising first.

    Args:
        images: of the batch.
        threads: that share it.
        layout: what the maps are kept in.
    """
    if images < 2 * threads:
        return [images]
    largest = min(MOST_IMAGES[layout.dtype], 2 ** int(math.log2(images // threads)))
    found = [largest, largest // 2] if largest > 1 else [1]
    return [*found, images] if images <= 4 * threads else found


def plan(
    layers: Sequence[Layer], packed: Packed, shape: Sequence[int], threads: int, images: int
) -> Plan:
    """Plans a network for one shape of its input.

    Args:
        layers: the network; the value of the last layer is its result.
        packed: its constants.
        shape: ``[N, C, H, W]`` of the input.
        threads: that share the work.
        images: that go through the network together, one of :func:`item_sizes`.

    Raises:
        Unplannable: the kernels cannot run this network for this shape.
    """
    return _Planner(layers, packed, shape, threads, images).plan()


def tiles_at_once(side: int, channels: int, count: int) -> int:
    """Winograd tiles that share one pass over the weights.

    Args:
        side: results of a tile in each direction.
        channels: of the input.
        count: tiles that there are.
    """
    fitting = WINOGRAD_BYTES // (winograd.points(side) * 4 * channels)
    most = max(24, min(MOST_TILES, fitting))
    return -(-count // -(-count // most))


class _Planner:
    """The state of :func:`plan`."""

    def __init__(
        self,
        layers: Sequence[Layer],
        packed: Packed,
        shape: Sequence[int],
        threads: int,
        images: int,
    ) -> None:
        self.layers, self.packed, self.threads = layers, packed, threads
        self.layout = packed.layout
        self.shape, self.images = tuple(shape), images
        self.values = [Value(*sizes, self.layout) for sizes in shapes(layers, shape)]
        self.together = images >= shape[0]
        self.split = Split(self.layout, threads, self.together)
        self.parts: dict[int, tuple[int, int]] = {}  # of a concatenation: its value, the block
        self.steps: list[list[int]] = []
        self.tasks = 0
        self.tables, self.memory = Tables(), Memory()
        self.pass_images, self.first_image = images, 0  # of the pass that is planned

    def plan(self) -> Plan:
        parts = segments(self.layers, self.values, self.images, self.together)
        for number, (indices, _) in enumerate(parts):
            for index in indices:
                layer = self.layers[index]
                if isinstance(layer, Conv) and not layer.reads_patches(self.layout):
                    self.values[layer.source].readers.append(layer)
                for source in sources(layer):
                    self.values[source].last_use = index
                    self.values[source].last_segment = number
                self.values[index + 1].segment = number
        self.parts = place_parts(self.layers, self.values)
        for number, (indices, images) in enumerate(parts):
            self.pass_images = images
            for first in range(0, self.images, images):
                self.first_image = first
                for index in indices:
                    self._layer(index)
                    self._release(index)
            for value, found in enumerate(self.values):
                if found.last_segment == number:
                    self.memory.release(value)
        last, arenas = self.values[-1], 1 if self.together else self.threads
        words = [MAGIC, len(self.steps), int(self.together), self.tasks, self.images]
        words += [self.memory.lines, *self.shape[1:], last.channels, last.height, last.width]
        end = self.layers[-1]
        words.append(self.values[end.source].channels if isinstance(end, Head) else 0)
        words += [int(kind == torch.float32) for kind in (self.layout.dtype, self.layout.result)]
        for step in self.steps:
            words += step
        return Plan(
            torch.tensor(words, dtype=torch.int64),
            torch.from_numpy(self.tables.all()),
            arenas * self.memory.lines * LINE,
        )

    def _layer(self, index: int) -> None:
        layer = self.layers[index]
        if isinstance(layer, Concat):
            return
        if isinstance(layer, Conv):
            if 0 in sources(layer) and not layer.reads_patches(self.layout):
                self._enter()
            self._conv(index, layer)
            return
        kind, window = HEAD if isinstance(layer, Head) else MEAN, (1, 1, 1, 0, 0)
        if isinstance(layer, MaxPool):
            kind = MAX_POOL
            window = (layer.kernel, layer.kernel, layer.stride, layer.padding, layer.padding)
        if layer.source == 0:
            self._enter()
        read, written = self.values[layer.source], self.values[index + 1]
        _, words = self._map(layer.source)
        for _, target in self._targets(index):
            self._pool(kind, words, target, read, written, window)

    # -- maps ----------------------------------------------------------------------------------

    def _map(self, value: int, stride: int = 1) -> tuple[Map, list[int]]:
        """The map of a value as it is read with a stride, and its words for this pass."""
        found = self.values[value]
        stride = stride if stride in found.strides else found.strides[0]
        held = self.memory.find(value, stride)
        if held is None:
            width = found.width
            for reader in found.readers:
                if reader.stride == stride:
                    columns = width + 2 * reader.padding[1] - reader.kernel[1]
                    width = columns // stride + 1
                    break
            form = Map(
                found.channels,
                found.height,
                found.width,
                self.pass_images if found.is_local else self.images,
                self.layout,
                group_size(width, self.pass_images, self.layout),
                stride,
                margin(found.readers, stride, found.height, found.width),
            )
            held = self.memory.hold(value, stride, form)
        form, line = held
        return form, form.words(line, 0 if found.is_local else self.first_image)

    def _targets(self, index: int) -> list[tuple[Map | None, list[int]]]:
        """Maps that the result of a layer is written to, with their words."""
        if index + 1 == len(self.layers):
            return [(None, OUTSIDE)]
        if index + 1 in self.parts:
            value, block = self.parts[index + 1]
            return [(form, from_block(words, block)) for form, words in self._targets(value - 1)]
        return [self._map(index + 1, stride) for stride in self.values[index + 1].strides]

    def _release(self, index: int) -> None:
        """Gives back the maps of this pass that no later layer reads."""
        for value in sources(self.layers[index]):
            found = self.values[value]
            if found.is_local and found.last_use == index:
                self.memory.release(value)

    # -- steps ---------------------------------------------------------------------------------

    def _step(
        self, kind: int, split: tuple[int, int], source: list[int], result: list[int], **rest: Any
    ) -> None:
        """Adds a step with what :func:`~resfast.ops.network.steps.words_of_step` takes."""
        passed = self.pass_images, self.first_image
        self.steps.append(words_of_step(kind, self.tasks, split, source, result, passed, **rest))
        self.tasks += split[0] * split[1]

    def _enter(self) -> None:
        """Steps that copy the input to maps, before the first layer that reads them."""
        value = self.values[0]
        for stride in value.strides:
            if self.memory.find(0, stride) is not None:
                continue
            sizes = (value.channels, value.height, value.width, value.height, value.width)
            _, words = self._map(0, stride)
            self._step(
                ENTER, self.split.rows(self.pass_images * value.height), OUTSIDE, words, sizes=sizes
            )

    def _patches(self, conv: Conv, result: Value) -> tuple[Map, int]:
        """A step that makes the patches of the input, in memory that the caller gives back."""
        value = self.values[0]
        (rows, columns), width = conv.kernel, result.width
        form = Map(
            rows * columns * value.channels,
            result.height,
            width,
            self.pass_images,
            self.layout,
            group_size(width, self.pass_images, self.layout),
        )
        line = self.memory.take(form)
        self._step(
            PATCHES,
            self.split.rows(self.pass_images * result.height),
            OUTSIDE,
            form.words(line),
            sizes=(value.channels, value.height, value.width, result.height, width),
            window=(rows, columns, conv.stride, *conv.padding),
        )
        return form, line

    def _conv(self, index: int, conv: Conv) -> None:
        read, result, patches = self.values[conv.source], self.values[index + 1], None
        if conv.reads_patches(self.layout):
            patches = self._patches(conv, result)
            source, stride = patches[0], 1
            words = source.words(patches[1])
        else:
            stride = conv.stride
            source, words = self._map(conv.source, stride)
        targets = self._targets(index)
        added, added_words = None, OUTSIDE
        if conv.residual is not None:
            added, added_words = self._map(conv.residual)
        (written, written_words), others = targets[0], targets[1:]
        panels, side = -(-result.channels // PANEL), self.packed.sides.get(index, 0)
        if side:
            kind, first = WINOGRAD, 0
            count = self.pass_images * winograd.tiles(side, result.height, result.width)
            at_once = tiles_at_once(side, source.channels, count)
        else:
            kind = CONV
            first, count = self.tables.tiles(
                source, stride, written, added, self.pass_images, result.height, result.width
            )
            at_once = max(4, CACHE_BYTES // (self.layout.tile * LINE * source.blocks) // 4 * 4)
        taps = self.tables.taps(source, conv)
        products, least = (winograd.points(side), 12) if side else (taps[1], 4)
        groups = conv.parts
        panels, blocks = panels // groups, source.blocks // groups
        if conv.is_depthwise:
            kind, panels = DEPTHWISE, 1
        split = self.split.conv(count, panels, blocks * products, least)
        slope = struct.unpack("<q", struct.pack("<fxxxx", conv.negative_slope))[0]
        for group in range(groups):
            outputs = result.channels // groups
            shift = group * outputs // self.layout.block
            self._step(
                kind,
                split,
                from_block(words, group * blocks),
                from_block(written_words, shift),
                residual=from_block(added_words, shift),
                blocks=blocks,
                outputs=outputs,
                tiles=(first, count, at_once),
                taps=taps,
                constants=(
                    self.packed.weights[index] + group * panels * PANEL * blocks * taps[1],
                    self.packed.biases[index] + group * panels,
                ),
                activation=(NETWORK_ACTIVATIONS.index(conv.activation), slope),
                sizes=(0, read.height, read.width, result.height, result.width),
                window=(*conv.kernel, conv.stride, *conv.padding),
                winograd=(side, self.packed.transformed.get(index, 0)),
            )
        for _, other in others:  # copies, as max pools of single pixels
            self._pool(MAX_POOL, written_words, other, result, result)
        if patches is not None:
            self.memory.give_back(*patches)

    def _pool(
        self,
        kind: int,
        words: list[int],
        target: list[int],
        read: Value,
        written: Value,
        window: Sequence[int] = (1, 1, 1, 0, 0),
    ) -> None:
        split = self.split.rows(self.pass_images * (written.height if kind == MAX_POOL else 1))
        if kind == HEAD:
            split = self.split.head(self.pass_images, written.channels)
        self._step(
            kind,
            split,
            words,
            target,
            blocks=read.blocks,
            outputs=written.channels,
            sizes=(read.channels, read.height, read.width, written.height, written.width),
            window=window,
        )
