"""Winograd's algorithm in a network: which layers it suits, and their weights at its points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..conv import cpu
from .layers import Conv, Layer, Layout, shapes

SIDES = {torch.float32: (2, 4), torch.bfloat16: (2,)}
"""Results of a tile in each direction, by dtype of the maps."""
PRODUCTS_PER_CYCLE = {torch.float32: 16, torch.bfloat16: 28}
"""Of a core with AVX2 or AVX512-BF16, for the estimate of :func:`sides`."""
BYTES_PER_CYCLE = 6
"""Of weights that come from memory."""
TRANSFORM_CYCLES = 0.3
"""For each channel and point of a tile."""
TOGETHER = {torch.float32: 4, torch.bfloat16: 16}
"""Tiles that are multiplied at a time, whether there are as many or not."""


def suits(layer: Layer, layout: Layout) -> bool:
    """Whether the kernels have the algorithm for a layer."""
    return (
        isinstance(layer, Conv)
        and layer.kernel == (3, 3)
        and layer.stride == 1
        and layer.groups == 1
        and not layer.reads_patches(layout)
    )


def points(side: int) -> int:
    """Products of a tile."""
    return (side + 2) ** 2


def tiles(side: int, height: int, width: int) -> int:
    """Tiles of a result of a height and width."""
    return -(-height // side) * -(-width // side)


def transform(side: int) -> Tensor:
    """The matrix ``[side + 2, 3]`` of a filter's values at the points of ``csrc``'s forms, float64.

    Lavin and Gray (arXiv:1509.09308) call it G.
    """
    if side == 2:
        rows = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
        return torch.tensor(rows, dtype=torch.float64)
    a, b = 2 / 3, 3 / 2
    of_a, of_b = 1 / (2 * a**2 * (a**2 - b**2)), 1 / (2 * b**2 * (b**2 - a**2))
    rows = [[1, 0, 0]]
    for point, factor in ((a, of_a), (-a, of_a), (b, of_b), (-b, of_b)):
        rows.append([factor, factor * point, factor * point**2])
    return torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)


def transformed(weight: Tensor, side: int) -> Tensor:
    """The filters of a layer at the points.

    Args:
        weight: float32 ``[K, C, 3, 3]``.
        side: one of :data:`SIDES`.

    Returns:
        float32 ``[K, C, points]``.
    """
    matrix = transform(side)
    values = torch.einsum("ir,kcrs,js->kcij", matrix, weight.double(), matrix)
    return values.flatten(2).float()


def sides(
    layers: Sequence[Layer], shape: Sequence[int], layout: Layout, images: int
) -> dict[int, int]:
    """Which layers to compute by Winograd's algorithm, by an estimate of their time.

    Args:
        layers: the network.
        shape: ``[N, C, H, W]`` of the input.
        layout: what the maps are kept in.
        images: that go through a layer together.

    Returns:
        The side of the tiles of each of these layers.
    """
    if layout.dtype == torch.bfloat16 and cpu.has_amx():
        return {}  # the matrix unit is faster than its transforms
    sizes = shapes(layers, shape)
    found = {}
    for index, layer in enumerate(layers):
        if not suits(layer, layout) or not isinstance(layer, Conv):
            continue
        outputs, inputs = layer.weight.shape[:2]
        _, height, width = sizes[index + 1]
        pixels = images * height * width
        best = _cycles(9, pixels, inputs, outputs, 0, layout)
        for side in SIDES[layout.dtype]:
            count = images * tiles(side, height, width)
            count = -(-count // TOGETHER[layout.dtype]) * TOGETHER[layout.dtype]
            per_channel = TRANSFORM_CYCLES * points(side)
            cycles = _cycles(points(side), count, inputs, outputs, per_channel, layout)
            if cycles < best:
                best, found[index] = cycles, side
    return found


def _cycles(
    products: int, count: int, inputs: int, outputs: int, per_channel: float, layout: Layout
) -> float:
    """Of products of ``count`` rows and the weights, which are read once, and of transforms."""
    weights = products * inputs * outputs
    transforms = count * (inputs + outputs) * per_channel
    per_weight = count / PRODUCTS_PER_CYCLE[layout.dtype] + layout.dtype.itemsize / BYTES_PER_CYCLE
    return weights * per_weight + transforms
