"""Where the values of a planned network are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .layers import (
    LINE,
    Concat,
    Conv,
    Layer,
    Layout,
    Pointwise,
    Unplannable,
    sources,
)
from .maps import Map


@dataclass
class Value:
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


class Memory:
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


def place_parts(layers: Sequence[Layer], values: Sequence[Value]) -> dict[int, tuple[int, int]]:
    """Where the values of concatenations are written: by value, the concatenation's and a channel.

    A concatenation becomes a value of the first segment that writes to it.

    Raises:
        Unplannable: a value that no :class:`Pointwise` computes does not begin with a block, or
            fill its last one; or it is the input, or read elsewhere.
    """
    found: dict[int, tuple[int, int]] = {}
    read = [source for layer in layers for source in sources(layer)]
    for index, layer in enumerate(layers):
        if not isinstance(layer, Concat):
            continue
        channels = 0
        for source in layer.sources:
            value = values[source]
            fits = not channels % value.layout.block and not value.channels % value.layout.block
            if not fits and not isinstance(layers[source - 1], Pointwise):
                raise Unplannable("a concatenation of values that do not fill lines")
            if source == 0 or read.count(source) > 1:
                raise Unplannable("a concatenation of values that are read elsewhere")
            found[source] = index + 1, channels
            channels += value.channels
        values[index + 1].segment = min(values[source].segment for source in layer.sources)
    return found
