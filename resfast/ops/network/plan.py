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

from ..conv import cpu
from . import winograd
from .layers import (
    BFLOAT16,
    FLOAT32,
    LINE,
    NETWORK_ACTIVATIONS,
    PANEL,
    AveragePool,
    Concat,
    Conv,
    Head,
    Layer,
    Layout,
    MaxPool,
    Pointwise,
    sources,
)
from .maps import OUTSIDE, Map, Tables, group_size
from .memory import Value, place_parts
from .packing import Packed
from .places import Places
from .steps import Split, from_block, segments, words_of_step

MAGIC = 0x7265736E65740005
(
    CONV,
    PATCHES,
    ENTER,
    MAX_POOL,
    MEAN,
    HEAD,
    WINOGRAD,
    DEPTHWISE,
    POINTWISE,
    AVERAGE_POOL,
    GATHERED,
) = range(11)
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
    layers: Sequence[Layer],
    packed: Packed,
    shape: Sequence[int],
    threads: int,
    images: int,
    *,
    by_winograd: bool = True,
) -> Plan:
    """Plans a network for one shape of its input.

    Args:
        layers: the network; the value of the last layer is its result.
        packed: its constants.
        shape: ``[N, C, H, W]`` of the input.
        threads: that share the work.
        images: that go through the network together, one of :func:`item_sizes`.
        by_winograd: use Winograd's algorithm for the layers that are packed for it.

    Raises:
        Unplannable: the kernels cannot run this network for this shape.
    """
    return _Planner(layers, packed, shape, threads, images, by_winograd).plan()


def tiles_at_once(side: int, channels: int, count: int, layout: Layout = FLOAT32) -> int:
    """Winograd tiles that share one pass over the weights.

    Args:
        side: results of a tile in each direction.
        channels: of the input.
        count: tiles that there are.
        layout: what the maps are kept in.
    """
    if layout.dtype == torch.bfloat16:
        fitting = CACHE_BYTES // (winograd.points(side) * 2 * channels)
        return max(2, fitting // layout.tile) * layout.tile
    fitting = WINOGRAD_BYTES // (winograd.points(side) * 4 * channels)
    most = max(24, min(MOST_TILES, fitting))
    return -(-count // -(-count // most))


def is_gathered(conv: Conv, tiles: int, pixels: int, layout: Layout) -> bool:
    """Whether tiles of consecutive lines hold so many margins that copies of lines are faster.

    Args:
        conv: the convolution.
        tiles: of consecutive lines that its result needs.
        pixels: of its result.
        layout: what the maps are kept in.
    """
    if layout.dtype != torch.bfloat16 or conv.groups > 1 or cpu.has_amx():
        return False
    return 4 * tiles >= 5 * -(-pixels // layout.tile)


def activation_words(layer: Conv | Pointwise) -> tuple[int, int]:
    """A layer's activation in a step: its number, and the bits of a slope."""
    (slope,) = struct.unpack("<q", struct.pack("<fxxxx", layer.negative_slope))
    return NETWORK_ACTIVATIONS.index(layer.activation), slope


class _Planner(Places):
    """The state of :func:`plan`."""

    def __init__(
        self,
        layers: Sequence[Layer],
        packed: Packed,
        shape: Sequence[int],
        threads: int,
        images: int,
        by_winograd: bool,
    ) -> None:
        super().__init__(layers, shape, packed.layout, images)
        self.packed, self.threads = packed, threads
        self.sides = packed.sides if by_winograd else {}
        self.shape = tuple(shape)
        self.together = images >= shape[0]
        self.split = Split(self.layout, threads, self.together)
        self.steps: list[list[int]] = []
        self.tasks = 0
        self.tables = Tables()

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
        if 0 in sources(layer):
            self._enter()
        if isinstance(layer, Pointwise):
            self._pointwise(index, layer)
            return
        kind, window = HEAD if isinstance(layer, Head) else MEAN, (1, 1, 1, 0, 0)
        if isinstance(layer, MaxPool):
            kind = MAX_POOL
            window = (layer.kernel, layer.kernel, layer.stride, layer.padding, layer.padding)
        elif isinstance(layer, AveragePool):
            kind, window = AVERAGE_POOL, (layer.kernel, layer.kernel, layer.stride, 0, 0)
        read, written = self.values[layer.source], self.values[index + 1]
        _, words = self._map(layer.source)
        for _, target in self._targets(index):
            self._pool(kind, words, target, read, written, window)

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
        panels, side = -(-result.channels // PANEL), self.sides.get(index, 0)
        if side:
            kind, first = WINOGRAD, 0
            count = self.pass_images * winograd.tiles(side, result.height, result.width)
            at_once = tiles_at_once(side, source.channels, count, self.layout)
        else:
            kind = CONV
            sizes = self.pass_images, result.height, result.width
            first, count = self.tables.tiles(source, stride, written, added, *sizes)
            if is_gathered(conv, count, math.prod(sizes), self.layout):
                kind = GATHERED
                first, count = self.tables.tiles(source, stride, written, added, *sizes, True)
            at_once = max(4, CACHE_BYTES // (self.layout.tile * LINE * source.blocks) // 4 * 4)
        taps = self.tables.taps(source, conv)
        if kind == GATHERED:  # each line is copied for each tap
            at_once = max(1, CACHE_BYTES // (self.layout.tile * LINE * source.blocks * taps[1]))
        products, least = (winograd.points(side), 12) if side else (taps[1], 4)
        groups, size_read = conv.parts, (read.height, read.width)
        panels, blocks = panels // groups, source.blocks // groups
        if conv.is_depthwise:
            kind, panels = DEPTHWISE, 1
        split = self.split.conv(count, panels, blocks * products, least)
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
                activation=activation_words(conv),
                sizes=(source.channels // groups, *size_read, result.height, result.width),
                window=(*conv.kernel, conv.stride, *conv.padding),
                winograd=(side, self.packed.transformed.get(index, 0)),
            )
        for _, other in others:  # copies, as max pools of single pixels
            self._pool(MAX_POOL, written_words, other, result, result)
        if patches is not None:
            self.memory.give_back(*patches)

    def _pointwise(self, index: int, layer: Pointwise) -> None:
        result, source, gate = self.values[index + 1], layer.source, layer.gate
        size = result.height, result.width
        if gate is not None and (self.values[source].height, self.values[source].width) != size:
            source, gate = gate, source
        added = OUTSIDE if layer.residual is None else self._map(layer.residual)[1]
        gated, one = OUTSIDE, 0
        if gate is not None:
            gated = self._map(gate)[1]
            one = int((self.values[gate].height, self.values[gate].width) != size)
        places = self.packed.weights.get(index, -1), self.packed.biases.get(index, 0)
        is_part = index + 1 in self.parts
        lane = self.parts[index + 1][1] % self.layout.block if is_part else 0
        for _, target in self._targets(index):
            self._step(
                POINTWISE,
                self.split.rows(self.pass_images * result.height),
                self._map(source)[1],
                target,
                residual=added,
                gate=gated,
                blocks=result.blocks,
                outputs=result.channels,
                constants=places,
                activation=activation_words(layer),
                sizes=(result.channels, *size, *size),
                pointwise=(one, int(is_part), lane),
            )

    def _pool(
        self,
        kind: int,
        words: list[int],
        target: list[int],
        read: Value,
        written: Value,
        window: Sequence[int] = (1, 1, 1, 0, 0),
    ) -> None:
        is_pool = kind in (MAX_POOL, AVERAGE_POOL)
        split = self.split.rows(self.pass_images * (written.height if is_pool else 1))
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
