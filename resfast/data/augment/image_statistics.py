"""Statistics of each image that auto-contrast and contrast need, computed once per data set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 20  # fits in a CPU cache together with its sums


def statistics(images: Tensor) -> Tensor:
    """Minimum, maximum and mean of each channel of each image, float32 ``[N, C, 3]``.

    Args:
        images: uint8 ``[N, H, W, C]``, contiguous; read in chunks of 1 MiB or one image.

    Raises:
        TypeError: ``images`` is not uint8.
        ValueError: ``images`` is not ``[N, H, W, C]``.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}; expected torch.uint8")
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images are {list(images.shape)}; expected [N, H, W, C]")
    count, height, width, channels = images.shape
    result = torch.empty((count, channels, 3), device=images.device)
    per_chunk = max(1, _CHUNK_BYTES // images[:1].numel()) if count else 1
    for chunk, out in zip(images.split(per_chunk), result.split(per_chunk), strict=True):
        rows = chunk.reshape(-1, height, width * channels)
        shape = (-1, width, channels)
        out[..., 0] = _reduce_rows(torch.minimum, rows).view(shape).amin(1)
        out[..., 1] = _reduce_rows(torch.maximum, rows).view(shape).amax(1)
        total = _reduce_rows(torch.add, rows.int()).view(shape).sum(1)  # exact
        out[..., 2] = total.double() / (height * width)
    return result


def _reduce_rows(combine: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
    """``[N, H, M]`` to ``[N, M]`` by halving; torch's own reductions are 10 times slower here."""
    while (count := rows.shape[1]) > 1:
        half = count // 2
        last = rows[:, 2 * half :]
        rows = combine(rows[:, :half], rows[:, half : 2 * half])
        rows = torch.cat([rows, last], 1) if count % 2 else rows
    return rows[:, 0]
