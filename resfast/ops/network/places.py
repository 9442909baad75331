"""Where the values of a network that is planned are: :class:`Places`."""

from __future__ import annotations

from collections.abc import Sequence

from .layers import Layer, Layout, shapes, sources
from .maps import OUTSIDE, Map, group_size, margin
from .memory import Memory, Value
from .steps import from_block


class Places:
    """The values of a network, and their maps in memory while its steps are planned.

    Args:
        layers: the network.
        shape: ``[N, C, H, W]`` of its input.
        layout: what maps are kept in.
        images: of an item.
    """

    def __init__(
        self, layers: Sequence[Layer], shape: Sequence[int], layout: Layout, images: int
    ) -> None:
        self.layers, self.layout, self.images = layers, layout, images
        self.values = [Value(*sizes, layout) for sizes in shapes(layers, shape)]
        self.parts: dict[int, tuple[int, int]] = {}  # of a concatenation: its value, the channel
        self.memory = Memory()
        self.pass_images, self.first_image = images, 0  # of the pass that is planned

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
            value, channel = self.parts[index + 1]
            block = channel // self.layout.block
            return [(form, from_block(words, block)) for form, words in self._targets(value - 1)]
        return [self._map(index + 1, stride) for stride in self.values[index + 1].strides]

    def _release(self, index: int) -> None:
        """Gives back the maps of this pass that no later layer reads."""
        for value in sources(self.layers[index]):
            found = self.values[value]
            if found.is_local and found.last_use == index:
                self.memory.release(value)
