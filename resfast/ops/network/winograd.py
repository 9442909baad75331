"""Winograd's algorithm in a network: which layers it suits, and their weights at its points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resfast.ops.network.layers import Conv, Layer, Layout

SIDES = (2, 4)
"""Results of a tile in each direction."""


def suits(layer: Layer, layout: Layout) -> bool:
    """Whether the kernels have the algorithm for a layer."""
    return (
        layout.dtype == torch.float32
        and isinstance(layer, Conv)
        and layer.kernel == (3, 3)
        and layer.stride == 1
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
    layers: Sequence[Layer], sizes: Sequence[tuple[int, int, int]], layout: Layout, side: int
) -> dict[int, int]:
    """The side of the tiles of each layer that the algorithm suits."""
    return {i: side for i, layer in enumerate(layers) if suits(layer, layout)}
