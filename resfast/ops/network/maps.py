"""Where the pixels of a map are in memory, and the tiles that convolutions are computed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from .layers import Conv, Layout

OUTSIDE = [-1, 0, 0, 1, 1, 1, 1]
"""Words of the network's own input or result, or of no map."""


@dataclass(frozen=True)
class Map:
    """A map in lines; see ``csrc/cpu/network/plan.h``.

    Attributes:
        channels: of a pixel.
        height: in pixels.
        width: in pixels.
        images: that it has room for.
        layout: what it is kept in.
        group: images whose pixels of one place are next to each other.
        phases: 2 for a map that is read with stride 2, otherwise 1.
        margin: rows and columns of zeros of a plane.
    """

    channels: int
    height: int
    width: int
    images: int
    layout: Layout
    group: int = 1
    phases: int = 1
    margin: tuple[int, int] = (0, 0)

    @cached_property
    def pitch(self) -> int:
        """Columns of a plane."""
        return -(-self.width // self.phases) + self.margin[1]

    @cached_property
    def rows(self) -> int:
        """Rows of a plane."""
        return -(-self.height // self.phases) + self.margin[0]

    @cached_property
    def plane(self) -> int:
        """Layout of a plane."""
        return self.rows * self.pitch * self.group

    @cached_property
    def lead(self) -> int:
        """Layout of zeros before the first plane and after the last."""
        return (self.margin[0] * self.pitch + self.margin[1]) * self.group

    @cached_property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.layout.block)

    @cached_property
    def block_lines(self) -> int:
        """Layout from one block of channels to the next."""
        planes = -(-self.images // self.group) * self.phases**2
        return planes * self.plane + 2 * self.lead + self.layout.tile

    @property
    def lines(self) -> int:
        """All of its memory."""
        return self.blocks * self.block_lines

    def line(self, image: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """The line of each pixel, from the start of a block."""
        phase = row % self.phases * self.phases + column % self.phases
        plane = image // self.group * self.phases**2 + phase
        place = (plane * self.rows + row // self.phases) * self.pitch + column // self.phases
        return self.lead + place * self.group + image % self.group

    def words(self, line: int, image: int = 0) -> list[int]:
        """``Map`` of plan.h.

        Args:
            line: its first line.
            image: the first image, which begins a group.
        """
        line += image // self.group * self.phases**2 * self.plane
        return [line, self.block_lines, self.lead, self.group, self.pitch, self.rows, self.phases]


def group_size(width: int, images: int, layout: Layout) -> int:
    """Images to keep next to each other, so that tiles end with the rows of a map.

    Tiles of float32 need not: their pixels may be anywhere.

    Args:
        width: columns of a convolution's result.
        images: that there are.
        layout: what the map is kept in.
    """
    if layout.dtype == torch.float32:
        return 1
    group = layout.tile // math.gcd(width, layout.tile)
    while images % group:
        group //= 2
    return group


def margin(readers: Sequence[Conv], stride: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of zeros that convolutions of one stride need around a map."""
    rows = columns = 0
    for conv in readers:
        if conv.stride == stride:
            rows = max(rows, _reach(conv.kernel[0], conv.padding[0], stride, height))
            columns = max(columns, _reach(conv.kernel[1], conv.padding[1], stride, width))
    return rows, columns


def _reach(kernel: int, padding: int, stride: int, size: int) -> int:
    """Rows (or columns) that a kernel reads before the first or after the last one of a plane."""
    count = (size + 2 * padding - kernel) // stride + 1
    before = -((-padding) // stride)
    last = count - 1 + (kernel - 1 - padding) // stride
    return max(before, last - (-(-size // stride) - 1))


class Tables:
    """The tables of a plan, each made once."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._size = 0
        self._known: dict[Hashable, tuple[int, int]] = {}

    def all(self) -> np.ndarray:
        """int32, with one value at least."""
        return np.concatenate([*self._parts, np.zeros(1, np.int32)])

    def _add(self, key: Hashable, make: Callable[[], tuple[np.ndarray, int]]) -> tuple[int, int]:
        """Place of a table, and the number of its entries."""
        if key not in self._known:
            values, count = make()
            self._known[key] = (self._size, count)
            self._parts.append(values.astype(np.int32).reshape(-1))
            self._size += values.size
        return self._known[key]

    def taps(self, map_: Map, conv: Conv) -> tuple[int, int]:
        """Layout from a pixel of the first phase to each that a convolution reads for it.

        Returns:
            Place of the table, and the number of taps.
        """
        if conv.reads_patches(map_.layout):
            return self._add("patch", lambda: (np.zeros(1), 1))

        def make() -> tuple[np.ndarray, int]:
            lines = []
            for r in range(conv.kernel[0]):
                for s in range(conv.kernel[1]):
                    down, row = divmod(r - conv.padding[0], conv.stride)
                    right, column = divmod(s - conv.padding[1], conv.stride)
                    phase = row * map_.phases + column
                    lines.append(phase * map_.plane + (down * map_.pitch + right) * map_.group)
            return np.array(lines), len(lines)

        return self._add(("taps", map_, conv.kernel, conv.stride, conv.padding), make)

    def tiles(
        self,
        source: Map,
        stride: int,
        result: Map | None,
        residual: Map | None,
        images: int,
        height: int,
        width: int,
        gathered: bool = False,
    ) -> tuple[int, int]:
        """Tiles that cover the result of a convolution.

        Args:
            source: the map that it reads.
            stride: what it is read with.
            result: the map that it writes; None for the result of the network.
            residual: the map that is added, if any.
            images: of the result.
            height: rows of the result.
            width: columns of the result.
            gathered: whether tiles are of any pixels, as those of float32.

        Returns:
            Place of the table, and the number of tiles.
        """

        def make() -> tuple[np.ndarray, int]:
            image, row, column = (places.ravel() for places in np.indices((images, height, width)))
            # The first phase of a map that is read with stride 2 has the even rows and columns.
            read = source.line(image, row * stride, column * stride)
            if result is None:
                written = (image * height + row) * width + column
            else:
                written = result.line(image, row, column)
            added = np.zeros_like(read) if residual is None else residual.line(image, row, column)
            if gathered or source.layout.dtype == torch.float32:
                return _pixel_table(read, written, added, source.layout.tile)
            tile = source.layout.tile
            return _tile_table(read, written, added, residual is not None, self._size, tile)

        key = ("tiles", source, stride, result, residual, images, height, width, gathered)
        return self._add(key, make)


def _pixel_table(
    read: np.ndarray, written: np.ndarray, added: np.ndarray, tile: int
) -> tuple[np.ndarray, int]:
    """Tiles that cover all pixels in their order, the last one filled up.

    Args:
        read: line of each pixel in the map that is read.
        written: in the result.
        added: in the residual.
        tile: pixels of a tile.

    Returns:
        The pixels of the tiles, as plan.h has them; the number of tiles.
    """
    missing = -len(read) % tile
    table = np.stack([read, written, added], axis=1)
    rest = np.repeat(table[-1:], missing, axis=0)
    rest[:, 1] = -1
    return np.concatenate([table, rest]), (len(read) + missing) // tile


def _tile_table(
    read: np.ndarray,
    written: np.ndarray,
    added: np.ndarray,
    has_residual: bool,
    start: int,
    tile: int,
) -> tuple[np.ndarray, int]:
    """Tiles that cover all pixels: each begins with the first that no earlier one has.

    Args:
        read: line of each pixel in the map that is read.
        written: in the result.
        added: in the residual.
        has_residual: whether there is one.
        start: place of the table.
        tile: lines of a tile.

    Returns:
        The tiles, then the rows of those that are not sixteen lines in order, as plan.h has them;
        the number of tiles.
    """
    order = np.argsort(read, kind="stable")
    read, written, added = read[order], written[order], added[order]
    starts = [0]
    while starts[-1] < len(read):
        starts.append(int(np.searchsorted(read, read[starts[-1]] + tile)))
    tiles, rows = [], []
    steps = np.arange(tile)
    for first, last in pairwise(starts):
        in_order = (
            last - first == tile
            and np.array_equal(written[first:last], written[first] + steps)
            and (not has_residual or np.array_equal(added[first:last], added[first] + steps))
        )
        tiles.append((read[first], written[first], added[first], -1 if in_order else len(rows)))
        if not in_order:
            places = np.full((tile, 2), -1, np.int64)
            inside = read[first:last] - read[first]
            places[inside, 0], places[inside, 1] = written[first:last], added[first:last]
            rows.append(places)
    table = np.array(tiles, np.int64)
    first_row = start + table.size
    table[:, 3] = np.where(table[:, 3] < 0, -1, first_row + table[:, 3] * 2 * tile)
    return np.concatenate([table.ravel(), *(places.ravel() for places in rows)]), len(tiles)
