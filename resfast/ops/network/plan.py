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
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resfast.ops.conv.reference import KERNEL_ACTIVATIONS
from resfast.ops.network import winograd
from resfast.ops.network.layers import (
    BFLOAT16,
    LINE,
    PANEL,
    Conv,
    Head,
    Layer,
    Layout,
    MaxPool,
    shapes,
    sources,
)
from resfast.ops.network.maps import OUTSIDE, Map, Tables, group_size, margin
from resfast.ops.network.packing import Packed

MAGIC = 0x7265736E65740003
CONV, PATCHES, ENTER, MAX_POOL, MEAN, HEAD, WINOGRAD = range(7)
CACHE_BYTES = 512 * 1024
"""Of a core's cache, for the tiles that share one pass over the weights."""
WINOGRAD_BYTES = 4608 * 1024
"""Of the transformed inputs of Winograd tiles that share one pass over the weights."""
MOST_TILES = 96
"""That share it."""
PASS_BYTES = 640 * 1024
"""Of the largest map of a pass."""
MOST_IMAGES = {torch.bfloat16: 16, torch.float32: 32}
"""Of an item, by dtype of the maps."""
SMALL_STEP = 4000
"""Products of tiles up to which a step is not worth more parts than threads."""


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


@dataclass
class _Value:
    """A value of the network, and where it is kept."""

    channels: int
    height: int
    width: int
    layout: Layout
    readers: list[Conv] = field(default_factory=list)
    """Convolutions that read it from a map."""
    last_use: int = 0
    """Layer that reads it last."""
    segment: int = -1
    """Segment of the layer that computes it; -1 for the input."""
    last_segment: int = -1
    """Segment of the layer that reads it last."""

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.layout.block)

    @property
    def bytes(self) -> int:
        """Of one image."""
        return self.blocks * LINE * self.height * self.width

    @property
    def strides(self) -> list[int]:
        """Those it is read with; it has a map for each."""
        return sorted({reader.stride for reader in self.readers}) or [1]

    @property
    def is_local(self) -> bool:
        """Whether it is written and read within one pass."""
        return self.segment in (-1, self.last_segment)


class _Memory:
    """The arena: lines by map. Memory is reused only by maps of one form, whose margins are in the
    same places, since nothing but the first zeros is ever written there."""

    def __init__(self) -> None:
        self.lines = 0
        self._free: dict[Map, list[int]] = {}
        self._held: dict[tuple[int, int], tuple[Map, int]] = {}

    def take(self, form: Map) -> int:
        """The first line of memory for a map."""
        free = self._free.setdefault(form, [])
        if free:
            return free.pop()
        self.lines += form.lines
        return self.lines - form.lines

    def give_back(self, form: Map, line: int) -> None:
        self._free[form].append(line)

    def find(self, value: int, stride: int) -> tuple[Map, int] | None:
        """The map of a value that is read with a stride, and its first line."""
        return self._held.get((value, stride))

    def hold(self, value: int, stride: int, form: Map) -> tuple[Map, int]:
        self._held[value, stride] = form, self.take(form)
        return self._held[value, stride]

    def release(self, value: int) -> None:
        """Gives back the maps of a value."""
        for key in [key for key in self._held if key[0] == value]:
            self.give_back(*self._held.pop(key))


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
        self.values = [_Value(*sizes, self.layout) for sizes in shapes(layers, shape)]
        self.together = images >= shape[0]
        self.split = _Split(self.layout, threads, self.together)
        self.steps: list[list[int]] = []
        self.tasks = 0
        self.tables, self.memory = Tables(), _Memory()
        self.pass_images, self.first_image = images, 0  # of the pass that is planned

    def plan(self) -> Plan:
        segments = _segments(self.layers, self.values, self.images, self.together)
        for number, (indices, _) in enumerate(segments):
            for index in indices:
                layer = self.layers[index]
                if isinstance(layer, Conv) and not layer.reads_patches(self.layout):
                    self.values[layer.source].readers.append(layer)
                for source in sources(layer):
                    self.values[source].last_use = index
                    self.values[source].last_segment = number
                self.values[index + 1].segment = number
        for number, (indices, images) in enumerate(segments):
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
        return [self._map(index + 1, stride) for stride in self.values[index + 1].strides]

    def _release(self, index: int) -> None:
        """Gives back the maps of this pass that no later layer reads."""
        for value in sources(self.layers[index]):
            found = self.values[value]
            if found.is_local and found.last_use == index:
                self.memory.release(value)

    # -- steps ---------------------------------------------------------------------------------

    def _step(
        self,
        kind: int,
        split: tuple[int, int],
        source: list[int],
        result: list[int],
        *,
        residual: list[int] = OUTSIDE,
        blocks: int = 0,
        outputs: int = 0,
        tiles: tuple[int, int, int] = (0, 0, 1),
        taps: tuple[int, int] = (0, 0),
        constants: tuple[int, int] = (0, 0),
        activation: tuple[int, int] = (0, 0),
        sizes: Sequence[int] = (0, 0, 0, 0, 0),
        window: Sequence[int] = (1, 1, 1, 0, 0),
        winograd: tuple[int, int] = (0, 0),
    ) -> None:
        """Adds a ``Step`` of plan.h."""
        words = [kind, self.tasks, *split, *source, *result, *residual, blocks, outputs, *tiles]
        words += [*taps, *constants, *activation, self.pass_images, self.first_image]
        self.steps.append([*words, *sizes, *window, *winograd])
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

    def _patches(self, conv: Conv, result: _Value) -> tuple[Map, int]:
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
        split = self.split.conv(count, panels, source.blocks * products, least)
        slope = struct.unpack("<q", struct.pack("<fxxxx", conv.negative_slope))[0]
        self._step(
            kind,
            split,
            words,
            written_words,
            residual=added_words,
            blocks=source.blocks,
            outputs=result.channels,
            tiles=(first, count, at_once),
            taps=taps,
            constants=(self.packed.weights[index], self.packed.biases[index]),
            activation=(KERNEL_ACTIVATIONS.index(conv.activation), slope),
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
        read: _Value,
        written: _Value,
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


@dataclass(frozen=True)
class _Split:
    """How threads share a step: parts in rows, images or tiles, and parts in panels of weights."""

    layout: Layout
    threads: int
    together: bool

    def rows(self, rows: int) -> tuple[int, int]:
        """Of a step that is divided by rows."""
        return (min(rows, self.threads) if self.together else 1, 1)

    def head(self, images: int, outputs: int) -> tuple[int, int]:
        """Of a linear layer."""
        parts, _ = self.rows(images)
        panels = max(1, min(self.threads // parts, outputs // PANEL)) if self.together else 1
        return parts, panels

    def conv(self, tiles: int, panels: int, products: int, least: int) -> tuple[int, int]:
        """Of a convolution.

        Args:
            tiles: of its result.
            panels: of weights.
            products: of a tile and a panel.
            least: tiles of a part.
        """
        if not self.together:
            return 1, 1
        small = tiles * panels * products <= SMALL_STEP
        wanted = self.threads if small else 2 * self.threads
        if 2 * panels >= tiles or tiles < least * wanted:
            # The panels of a line belong to one part, so that no two threads write to it.
            shared = self.layout.block // PANEL
            fitting = [parts for parts in range(1, wanted + 1) if panels % (shared * parts) == 0]
            if fitting and fitting[-1] >= self.threads:
                return 1, fitting[-1]
        return min(wanted, max(1, tiles // least)), 1


def _segments(
    layers: Sequence[Layer], values: Sequence[_Value], images: int, together: bool
) -> list[tuple[list[int], int]]:
    """Consecutive layers, and how many of an item's images pass through them at a time."""
    segments: list[tuple[list[int], int]] = []
    for index, layer in enumerate(layers):
        fitting = images
        if not together:
            read = [values[source] for source in sources(layer) if source]
            largest = max(value.bytes for value in [*read, values[index + 1]])
            fitting = min(images, 2 ** int(math.log2(max(1, PASS_BYTES // largest))))
        if segments and segments[-1][1] >= fitting:
            segments[-1][0].append(index)
        else:
            segments.append(([index], fitting))
    return segments
