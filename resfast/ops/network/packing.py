"""Packs the weights of a network into one block of memory, as the kernels read them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import winograd
from .layers import BFLOAT16, LINE, PANEL, Conv, Layer, Layout, Pointwise

HUGE_PAGE = 2 * 1024 * 1024
"""Bytes of memory that the processor finds by one entry of its table, instead of 4096."""


def aligned_bytes(count: int) -> Tensor:
    """uint8 zeros ``[count]``, aligned to 64 bytes; in huge pages where Linux has them."""
    if count >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, count + HUGE_PAGE)
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        start = -memory.data_ptr() % HUGE_PAGE
    else:
        memory = torch.zeros(count + LINE, dtype=torch.uint8)
        start = -memory.data_ptr() % LINE
    return memory[start : start + count]


@dataclass
class Packed:
    """The constants of a network.

    Attributes:
        layout: what they are packed for.
        sides: results of a Winograd tile in each direction, by the number of its layer.
        memory: uint8, aligned to 64 bytes.
        weights: first line of the weights of a convolution, or of the factors of another layer, by
            the number of the layer.
        biases: first line of its bias, or of the terms added.
        transformed: first line of its weights for Winograd's algorithm.
    """

    layout: Layout
    sides: Mapping[int, int]
    memory: Tensor
    weights: dict[int, int] = field(default_factory=dict)
    biases: dict[int, int] = field(default_factory=dict)
    transformed: dict[int, int] = field(default_factory=dict)


def pack(
    layers: Sequence[Layer], layout: Layout = BFLOAT16, sides: Mapping[int, int] | None = None
) -> Packed:
    """Packs the weights of a network, as ``csrc/cpu/network/conv.h`` and ``f32.h`` read them.

    Args:
        layers: the network.
        layout: what the kernels keep maps and weights in.
        sides: those of :class:`Packed`; None: no layer uses Winograd's algorithm.
    """
    packed = Packed(layout, sides or {}, aligned_bytes(0))
    convolutions = {i: layer for i, layer in enumerate(layers) if isinstance(layer, Conv)}
    factors = {
        i: layer
        for i, layer in enumerate(layers)
        if isinstance(layer, Pointwise) and layer.scale is not None
    }
    lines = 0
    for index, point in factors.items():
        assert point.scale is not None
        count = -(-len(point.scale) // layout.block) * (layout.block // PANEL)
        packed.weights[index], packed.biases[index] = lines, lines + count
        lines += 2 * count
    for index, layer in convolutions.items():
        if layer.is_depthwise:
            blocks, lines_of_block = -(-len(layer.weight) // layout.block), layout.block // PANEL
            packed.biases[index] = lines
            packed.weights[index] = lines + blocks * lines_of_block
            lines += blocks * lines_of_block * (1 + layer.weight[0].numel())
            continue
        weight = _matrix(layer, layout)
        panels, blocks = -(-len(weight) // PANEL), -(-weight.shape[1] // layout.block)
        places = [(packed.weights, PANEL * blocks * weight.shape[2]), (packed.biases, 1)]
        if index in packed.sides:
            products = winograd.points(packed.sides[index])
            places.append((packed.transformed, PANEL * blocks * products))
        for place, count in places:
            place[index] = lines
            lines += panels * count
    packed.memory = aligned_bytes((lines + 1) * LINE)  # kernels read biases of two panels
    for index, layer in convolutions.items():
        _fill(packed, index, layer)
    for index, point in factors.items():
        for place, values in (
            (packed.weights[index], point.scale),
            (packed.biases[index], point.shift),
        ):
            assert values is not None
            packed.memory[place * LINE :].view(torch.float32)[: len(values)] = values.detach()
    return packed


def _matrix(layer: Conv, layout: Layout) -> Tensor:
    """The weight of a layer as ``[K, C, taps]``."""
    weight = layer.weight.detach()
    if layer.reads_patches(layout):
        return weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1)
    return weight.flatten(2)


def _fill(packed: Packed, index: int, layer: Conv) -> None:
    """Writes the constants of a layer, some panels at a time: copies of all would take memory."""
    layout, side = packed.layout, packed.sides.get(index)
    if layer.is_depthwise:
        _fill_depthwise(packed, index, layer)
        return
    if layer.bias is not None:
        bias = packed.memory[packed.biases[index] * LINE :].view(torch.float32)
        bias[: len(layer.bias)] = layer.bias.detach()
    places = [packed.weights[index] * LINE]
    if side is not None:
        places.append(packed.transformed[index] * LINE)
    for weight in _matrix(layer, layout).split(4 * PANEL):
        parts = [_tiles(weight.to(layout.dtype), layout)]
        if side is not None:
            values = winograd.transformed(weight.unflatten(2, (3, 3)).float(), side)
            tiles = _tiles(_even_first(values, layout).to(layout.dtype), layout)
            # [panel, block, point, ...] to [panel, point, block, ...]
            parts.append(tiles.transpose(1, 2).contiguous())
        for i, part in enumerate(parts):
            values = part.reshape(-1).view(torch.uint8)
            packed.memory[places[i] : places[i] + len(values)] = values
            places[i] += len(values)


def _fill_depthwise(packed: Packed, index: int, layer: Conv) -> None:
    """Writes float32 bias ``[block, channel]`` and weights ``[block, tap, channel]``.

    Of the 32 channels of a line of bfloat16, the even ones come first.
    """
    layout, weight = packed.layout, layer.weight.detach().to(packed.layout.dtype).float()
    values = [weight.new_zeros(1, len(weight)), weight.flatten(1).t()]
    if layer.bias is not None:
        values[0] = layer.bias.detach().float()[None]
    for place, rows in zip((packed.biases[index], packed.weights[index]), values, strict=True):
        channels = -(-len(weight) // layout.block) * layout.block
        full = torch.nn.functional.pad(rows, (0, channels - len(weight)))
        lines = full.view(len(rows), -1, layout.block).transpose(0, 1)
        if layout.dtype == torch.bfloat16:
            lines = torch.cat([lines[..., ::2], lines[..., 1::2]], -1)
        written = lines.reshape(-1).contiguous().view(torch.uint8)
        packed.memory[place * LINE : place * LINE + len(written)] = written


def _even_first(weight: Tensor, layout: Layout) -> Tensor:
    """A weight ``[K, C, taps]`` with the even channels of each block of bfloat16 before the odd."""
    if layout.dtype != torch.bfloat16:
        return weight
    blocks = -(-weight.shape[1] // layout.block)
    full = weight.new_zeros(len(weight), blocks * layout.block, weight.shape[2])
    full[:, : weight.shape[1]] = weight
    pairs = full.view(len(weight), blocks, layout.block // 2, 2, -1)
    return pairs.transpose(2, 3).reshape(full.shape)


def _tiles(weight: Tensor, layout: Layout) -> Tensor:
    """A weight ``[K, C, taps]`` as ``[panel, block, tap, channel, output, 1]``.

    Two channels of bfloat16 are next to each other: ``[..., pair, output, 2]``.
    """
    outputs, inputs, taps = weight.shape
    panels, blocks = -(-outputs // PANEL), -(-inputs // layout.block)
    together = 4 // layout.dtype.itemsize
    full = weight.new_zeros(panels * PANEL, blocks * layout.block, taps)
    full[:outputs, :inputs] = weight
    tiles = full.view(panels, PANEL, blocks, layout.block // together, together, taps)
    return tiles.permute(0, 2, 5, 3, 1, 4).contiguous()
