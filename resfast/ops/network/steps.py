"""The steps of a plan: their words, and how threads and passes share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .layers import PANEL, Layer, Layout, sources
from .maps import OUTSIDE
from .memory import Value

PASS_BYTES = 640 * 1024
"""Of the largest map of a pass."""
SMALL_STEP = 4000
"""Products of tiles up to which a step is not worth more parts than threads."""


def words_of_step(
    kind: int,
    first_task: int,
    split: tuple[int, int],
    source: list[int],
    result: list[int],
    passed: tuple[int, int],
    *,
    residual: list[int] = OUTSIDE,
    gate: list[int] = OUTSIDE,
    blocks: int = 0,
    outputs: int = 0,
    tiles: tuple[int, int, int] = (0, 0, 1),
    taps: tuple[int, int] = (0, 0),
    constants: tuple[int, int] = (0, 0),
    activation: tuple[int, int] = (0, 0),
    sizes: Sequence[int] = (0, 0, 0, 0, 0),
    window: Sequence[int] = (1, 1, 1, 0, 0),
    winograd: tuple[int, int] = (0, 0),
    pointwise: tuple[int, int, int] = (0, 0, 0),
) -> list[int]:
    """A ``Step`` of plan.h.

    Args:
        kind: of the step.
        first_task: its first task.
        split: parts in rows, images or tiles, and parts in panels of weights.
        source: words of the map that it reads.
        result: words of the map that it writes.
        passed: images of the pass, and its first one.
        residual: words of the map that is added.
        gate: words of the map that it multiplies with.
        blocks: of channels that it reads.
        outputs: channels that it writes.
        tiles: first one in the tables, how many, and how many share the caches.
        taps: first one in the tables, and how many.
        constants: lines of weights and bias.
        activation: its number, and the bits of a slope.
        sizes: channels, height and width that it reads, height and width that it writes.
        window: rows and columns of the kernel, stride, rows and columns of padding.
        winograd: results of a tile in each direction, and lines of transformed weights.
        pointwise: 1 for a gate of one pixel; 1 for a part of a map; its first lane.
    """
    words = [kind, first_task, *split, *source, *result, *residual, *gate, blocks, outputs, *tiles]
    words += [*taps, *constants, *activation, *passed]
    return [*words, *sizes, *window, *winograd, *pointwise]


def from_block(words: list[int], block: int) -> list[int]:
    """A map's words from one of its blocks of channels on."""
    line, block_lines, *rest = words
    return words if line < 0 else [line + block * block_lines, block_lines, *rest]


@dataclass(frozen=True)
class Split:
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


def segments(
    layers: Sequence[Layer], values: Sequence[Value], images: int, together: bool
) -> list[tuple[list[int], int]]:
    """Consecutive layers, and how many of an item's images pass through them at a time."""
    fitting = [images] * len(layers)
    for index, layer in enumerate([] if together else layers):
        read = [values[source] for source in sources(layer) if source]
        largest = max(value.bytes for value in [*read, values[index + 1]])
        fitting[index] = min(images, 2 ** int(math.log2(max(1, PASS_BYTES // largest))))
    found: list[tuple[list[int], int]] = []
    for index in range(len(layers)):
        least = min(fitting[index:])  # maps grow again after one pixel of squeeze-and-excitation
        if found and found[-1][1] >= least:
            found[-1][0].append(index)
        else:
            found.append(([index], least))
    return found
