"""A network as a list of layers, their shapes, and their weights as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LINE = 64
"""Bytes of a line, the unit of memory."""
BLOCK = 32
"""Channels in a line."""
TILE = 16
"""Lines multiplied together, and outputs in a panel of weights."""
FEW_CHANNELS = 16
"""An input with fewer channels is read as patches, so that lines are not mostly zeros."""
MOST_PATCH = 512
"""Values of a patch."""


class Unplannable(Exception):
    """A network that the kernels cannot run."""


@dataclass(frozen=True)
class Conv:
    """A convolution with its epilogue.

    Attributes:
        source: the value it reads: 0 is the input, i the result of layer i - 1.
        weight: bfloat16 ``[K, C, R, S]``.
        bias: float32 ``[K]``, or None.
        stride: of rows and columns, 1 or 2.
        padding: rows and columns of zeros on each side.
        activation: a key of :data:`resfast.ops.conv.reference.KERNEL_ACTIVATIONS`.
        negative_slope: slope of leaky ReLU.
        residual: the value added before the activation, or None.
    """

    source: int
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: tuple[int, int]
    activation: str
    negative_slope: float
    residual: int | None = None

    @property
    def kernel(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def reads_patches(self) -> bool:
        """Whether it multiplies patches of the network's input."""
        channels, (rows, columns) = self.weight.shape[1], self.kernel
        few = channels < FEW_CHANNELS and channels * columns <= BLOCK
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
    """

    source: int
    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True)
class Mean:
    """The mean of each channel: ``[N, C, H, W]`` to ``[N, C, 1, 1]``; ends a network."""

    source: int


@dataclass(frozen=True)
class Head:
    """The mean of each channel and a linear layer of it in float32; ends a network.

    The means are rounded to bfloat16. Weight and bias are given to each call.

    Attributes:
        source: the value it reads.
        outputs: of the linear layer: ``[N, C, H, W]`` to ``[N, outputs]``.
    """

    source: int
    outputs: int


Layer = Conv | MaxPool | Mean | Head


def sources(layer: Layer) -> list[int]:
    """The values that a layer reads."""
    residual = getattr(layer, "residual", None)
    return [layer.source] if residual is None else [layer.source, residual]


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
        channels, height, width = found[layer.source]
        match layer:
            case Conv():
                outputs, inputs, rows, columns = layer.weight.shape
                if layer.stride not in (1, 2) or inputs != channels:
                    raise Unplannable(
                        f"a convolution of stride {layer.stride} and {inputs} channels, for "
                        f"{channels}"
                    )
                height = (height + 2 * layer.padding[0] - rows) // layer.stride + 1
                width = (width + 2 * layer.padding[1] - columns) // layer.stride + 1
                channels = outputs
            case MaxPool():
                height = (height + 2 * layer.padding - layer.kernel) // layer.stride + 1
                width = (width + 2 * layer.padding - layer.kernel) // layer.stride + 1
            case Mean():
                height = width = 1
            case Head():
                channels, height, width = layer.outputs, 1, 1
        if height < 1 or width < 1:
            raise Unplannable("a map that is smaller than the kernel")
        is_last = index + 1 == len(layers)
        if isinstance(layer, MaxPool if is_last else Mean | Head):
            raise Unplannable("a max pool at the end, or a mean elsewhere")
        found.append((channels, height, width))
    return found


def aligned_bytes(count: int) -> Tensor:
    """uint8 zeros ``[count]``, aligned to 64 bytes."""
    memory = torch.zeros(count + LINE, dtype=torch.uint8)
    start = -memory.data_ptr() % LINE
    return memory[start : start + count]


@dataclass
class Packed:
    """The constants of a network.

    Attributes:
        memory: uint8, aligned to 64 bytes.
        weights: first line of the weights of each convolution, by the number of its layer.
        biases: first line of its bias.
    """

    memory: Tensor
    weights: dict[int, int]
    biases: dict[int, int]


def pack(layers: Sequence[Layer]) -> Packed:
    """Packs the weights of a network, as ``csrc/cpu/network/conv.h`` reads them."""
    parts: list[Tensor] = []
    weights: dict[int, int] = {}
    biases: dict[int, int] = {}
    lines = 0
    for index, layer in enumerate(layers):
        if not isinstance(layer, Conv):
            continue
        weight = layer.weight.detach().to(torch.bfloat16)
        if layer.reads_patches:
            weight = weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1)
        outputs, inputs, rows, columns = weight.shape
        panels, blocks, taps = -(-outputs // TILE), -(-inputs // BLOCK), rows * columns
        full = weight.new_zeros(panels * TILE, blocks * BLOCK, taps)
        full[:outputs, :inputs] = weight.flatten(2)
        # [panel, output, block, pair, 2, tap] to [panel, block, tap, pair, output, 2]
        tiles = full.view(panels, TILE, blocks, BLOCK // 2, 2, taps)
        tiles = tiles.permute(0, 2, 5, 3, 1, 4).contiguous()
        bias = torch.zeros(panels * TILE)
        if layer.bias is not None:
            bias[:outputs] = layer.bias.detach().float()
        for places, values in ((weights, tiles), (biases, bias)):
            places[index] = lines
            parts.append(values.reshape(-1).view(torch.uint8))
            lines += values.numel() * values.element_size() // LINE
    memory = aligned_bytes(lines * LINE)
    torch.cat(parts, out=memory)
    return Packed(memory, weights, biases)
