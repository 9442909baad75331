"""A network as a list of layers, their shapes, and their weights as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..conv.reference import ACTIVATIONS, TORCH_NEGATIVE_SLOPE

LINE = 64
"""Bytes of a line, the unit of memory."""
PANEL = 16
"""Outputs in a panel of weights."""
FEW_CHANNELS = 16
"""An input with fewer channels is read as patches, so that lines are not mostly zeros."""
MOST_PATCH = 512
"""Values of a patch."""


@dataclass(frozen=True)
class Layout:
    """How kernels keep maps and weights in lines of memory.

    Attributes:
        dtype: of maps and weights.
        result: dtype of a map that is the result of a network.
        block: channels in a line.
        tile: pixels multiplied together.
        patch_row: most values in a row of a patch.
    """

    dtype: torch.dtype
    result: torch.dtype
    block: int
    tile: int
    patch_row: int


BFLOAT16 = Layout(torch.bfloat16, torch.bfloat16, 32, 16, 32)
"""For AVX512-BF16 and AMX."""
FLOAT32 = Layout(torch.float32, torch.float32, 16, 6, MOST_PATCH)
"""For AVX2 with FMA and AVX-512."""
FLOAT32_TO_BFLOAT16 = replace(FLOAT32, result=torch.bfloat16)
"""For bfloat16 networks on processors without instructions for it."""


NETWORK_ACTIVATIONS = tuple(ACTIVATIONS)[:9]
"""Those of the kernels, which number them in this order."""


class Unplannable(Exception):
    """A network that the kernels cannot run."""


@dataclass(frozen=True)
class Conv:
    """A convolution with its epilogue.

    Attributes:
        source: the value it reads: 0 is the input, i the result of layer i - 1.
        weight: bfloat16 or float32 ``[K, C / groups, R, S]``.
        bias: float32 ``[K]``, or None.
        stride: of rows and columns, 1 or 2.
        padding: rows and columns of zeros on each side.
        activation: one of :data:`NETWORK_ACTIVATIONS`.
        negative_slope: slope of leaky ReLU.
        residual: the value added before the activation, or None.
        groups: of channels.
    """

    source: int
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: tuple[int, int]
    activation: str
    negative_slope: float
    residual: int | None = None
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has one filter of its own."""
        return self.groups > 1 and self.weight.shape[0] == self.groups and self.weight.shape[1] == 1

    @property
    def parts(self) -> int:
        """Groups that are computed one by one, each from and to blocks of its own."""
        return 1 if self.is_depthwise else self.groups

    def has_kernel(self, layout: Layout) -> bool:
        """Whether its groups, if any, are of one channel or fill lines."""
        if self.groups == 1:
            return True
        if self.is_depthwise:
            return self.residual is None
        outputs, inputs = self.weight.shape[0] // self.groups, self.weight.shape[1]
        return outputs % layout.block == 0 and inputs % layout.block == 0

    def reads_patches(self, layout: Layout) -> bool:
        """Whether it multiplies patches of the network's input."""
        if self.groups > 1:
            return False
        channels, (rows, columns) = self.weight.shape[1], self.kernel
        few = channels < FEW_CHANNELS and channels * columns <= layout.patch_row
        small = rows * columns * channels <= MOST_PATCH
        return self.source == 0 and self.residual != 0 and few and small


@dataclass(frozen=True)
class MaxPool:
    """Max pooling over square windows.

    Attributes:
        source: the value it reads.
        kernel: height and width of a window.
        stride: rows and columns from one window to the next.
        padding: rows and columns around the map that belong to windows but have no values.
        ceil: whether a last window that is partly outside counts.
    """

    source: int
    kernel: int
    stride: int
    padding: int
    ceil: bool = False

    def size(self, size: int) -> int:
        """Rows (or columns) of the result for those of the map."""
        room = size + 2 * self.padding - self.kernel
        if not self.ceil:
            return room // self.stride + 1
        count = -(-room // self.stride) + 1
        begins_inside = (count - 1) * self.stride < size + self.padding
        return count if begins_inside else count - 1


@dataclass(frozen=True)
class AveragePool:
    """Average pooling over square windows without padding; those partly outside are left out.

    Attributes:
        source: the value it reads.
        kernel: height and width of a window.
        stride: rows and columns from one window to the next.
    """

    source: int
    kernel: int
    stride: int


@dataclass(frozen=True)
class Pointwise:
    """``activation((x * scale + shift) * gate + residual)``, where what is None is left out.

    Attributes:
        source: the value it reads.
        scale: float32 ``[C]``, or None.
        shift: float32 ``[C]``, or None like ``scale``.
        activation: one of :data:`NETWORK_ACTIVATIONS`.
        negative_slope: slope of leaky ReLU.
        gate: the value it is multiplied with: of the same size, or either of the two of one pixel.
        residual: the value that is added, of the size of the result.
        first: of the channels of the module that scale and shift are from.
    """

    source: int
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "none"
    negative_slope: float = TORCH_NEGATIVE_SLOPE
    gate: int | None = None
    residual: int | None = None
    first: int = 0


@dataclass(frozen=True)
class Concat:
    """Values next to each other along the channels; each is read here only.

    It computes nothing: the values are written where they belong. Those that do not begin with a
    line are results of :class:`Pointwise`.

    Attributes:
        sources: the values.
    """

    sources: tuple[int, ...]


@dataclass(frozen=True)
class Mean:
    """The mean of each channel: ``[N, C, H, W]`` to ``[N, C, 1, 1]``."""

    source: int


@dataclass(frozen=True)
class Head:
    """The mean of each channel and a linear layer of it in float32; ends a network.

    The means of lines of bfloat16 are rounded to it. Weight and bias are given to each call.

    Attributes:
        source: the value it reads.
        outputs: of the linear layer: ``[N, C, H, W]`` to ``[N, outputs]``.
    """

    source: int
    outputs: int


Layer = Conv | MaxPool | AveragePool | Pointwise | Concat | Mean | Head


def sources(layer: Layer) -> list[int]:
    """The values that a layer reads."""
    if isinstance(layer, Concat):
        return list(layer.sources)
    others = (getattr(layer, name, None) for name in ("gate", "residual"))
    return [layer.source, *(value for value in others if value is not None)]


def shapes(layers: Sequence[Layer], shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """Channels, height and width of all values.

    Args:
        layers: the network.
        shape: ``[N, C, H, W]`` of the input.

    Raises:
        Unplannable: a layer that the kernels do not support, or a map smaller than the kernel.
    """
    found = [(shape[1], shape[2], shape[3])]
    for index, layer in enumerate(layers):
        channels, height, width = found[sources(layer)[0]]
        match layer:
            case Conv():
                outputs, inputs, rows, columns = layer.weight.shape
                if layer.stride not in (1, 2) or inputs * layer.groups != channels:
                    raise Unplannable(
                        f"a convolution of stride {layer.stride} and {inputs * layer.groups} "
                        f"channels, for {channels}"
                    )
                height = (height + 2 * layer.padding[0] - rows) // layer.stride + 1
                width = (width + 2 * layer.padding[1] - columns) // layer.stride + 1
                channels = outputs
            case MaxPool():
                height, width = layer.size(height), layer.size(width)
            case AveragePool():
                height = (height - layer.kernel) // layer.stride + 1
                width = (width - layer.kernel) // layer.stride + 1
            case Pointwise():
                height, width = _pointwise_size(layer, found)
            case Concat():
                if any(found[source][1:] != (height, width) for source in layer.sources):
                    raise Unplannable("a concatenation of maps of several sizes")
                channels = sum(found[source][0] for source in layer.sources)
            case Mean():
                height = width = 1
            case Head():
                channels, height, width = layer.outputs, 1, 1
        if height < 1 or width < 1:
            raise Unplannable("a map that is smaller than the kernel")
        is_last = index + 1 == len(layers)
        if isinstance(layer, MaxPool | AveragePool | Concat if is_last else Head):
            raise Unplannable("a pool or concatenation at the end, or a linear layer elsewhere")
        found.append((channels, height, width))
    return found


def _pointwise_size(layer: Pointwise, found: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Height and width of the result, for the shapes of all values before it."""
    channels, *size = found[layer.source]
    if layer.gate is not None:
        others, *gate_size = found[layer.gate]
        if others != channels or (gate_size != size and [1, 1] not in (gate_size, size)):
            raise Unplannable("a product of values of other sizes")
        size = max(size, gate_size)
    if layer.residual is not None and found[layer.residual] != (channels, *size):
        raise Unplannable("an addition of values of other sizes")
    return size[0], size[1]
