"""Random crop, flip and normalization of a whole batch on its device.

The two halves are separate: :func:`sample` draws the parameters of every image of an epoch from
(seed, epoch) alone, and :func:`augment` applies explicit parameters. A fused kernel takes the
place of :func:`augment` and nothing else changes.

Shapes: N images in the data set, B in the batch; images are uint8 ``[N, H, W, C]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Flip = Literal["none", "random", "alternating"]
Padding = Literal["reflect", "zero"]


@dataclass(frozen=True)
class AugmentParams:
    """What is done to each image of a batch or an epoch.

    Attributes:
        shift: int64 ``[B, 2]``, rows and columns that the image's content moves up and left, in
            pixels; ``image[y, x]`` of the result is ``image[y + shift_y, x + shift_x]``.
        flip: bool ``[B]``, mirrored left to right (after the shift).
    """

    shift: Tensor
    flip: Tensor

    def __getitem__(self, index: Tensor) -> AugmentParams:
        return AugmentParams(self.shift[index], self.flip[index])

    def to(self, device: torch.device) -> AugmentParams:
        """The same parameters on ``device``."""
        return AugmentParams(self.shift.to(device), self.flip.to(device))


def generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and the numbers of ``stream`` alone."""
    value = seed & 0xFFFFFFFFFFFFFFFF
    for number in stream:  # splitmix64 over the numbers
        value = (value + 0x9E3779B97F4A7C15 * (number + 1)) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return torch.Generator().manual_seed(value & 0x7FFFFFFFFFFFFFFF)


_SHIFT_STREAM, _FLIP_STREAM, ORDER_STREAM = 1, 2, 3


def sample(count: int, *, crop: int, flip: Flip, seed: int, epoch: int) -> AugmentParams:
    """Draws the parameters of ``count`` images for one epoch, on the CPU.

    Args:
        count: images in the data set.
        crop: largest shift in pixels; shifts are uniform over ``-crop … crop``.
        flip: ``random`` mirrors each image with probability 1/2; ``alternating`` does so in epoch
            0 and mirrors in every later epoch exactly the images that it did not in the epoch
            before (Jordan, "94% on CIFAR-10 in 3.29 Seconds", arXiv:2404.00498, section 3.6).
        seed: seed of the run.
        epoch: epoch, from 0.
    """
    shift = torch.randint(
        -crop, crop + 1, (count, 2), generator=generator(seed, _SHIFT_STREAM, epoch)
    )
    if flip == "none":
        mirrored = torch.zeros(count, dtype=torch.bool)
    else:
        draw = 0 if flip == "alternating" else epoch
        mirrored = torch.rand(count, generator=generator(seed, _FLIP_STREAM, draw)) < 0.5
        if flip == "alternating" and epoch % 2:
            mirrored = ~mirrored
    return AugmentParams(shift, mirrored)


def augment(
    images: Tensor,
    indices: Tensor,
    params: AugmentParams | None,
    mean: Tensor,
    std: Tensor,
    *,
    padding: Padding = "reflect",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gathers, shifts, mirrors and normalizes a batch.

    Args:
        images: uint8 ``[N, H, W, C]``, contiguous.
        indices: int64 ``[B]`` into ``images``.
        params: one entry per batch image, or None for no augmentation.
        mean: float32 ``[C]``, in units of pixel / 255.
        std: float32 ``[C]``, likewise.
        padding: what a shift brings in: ``reflect`` (without repeating the border, so a shift
            must be below the image's side) or ``zero`` (black).
        dtype: of the result.

    Returns:
        ``[B, C, H, W]`` in ``channels_last`` memory, on the device of ``images``.

    Raises:
        TypeError: ``images`` is not uint8.
        ValueError: ``images`` is not ``[N, H, W, C]``, or not every index has parameters.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}; expected uint8")
    if images.ndim != 4:
        raise ValueError(f"images are {list(images.shape)}; expected [N, H, W, C]")
    inside = None
    if params is None:
        batch = images[indices]
    else:
        if len(params.flip) != len(indices):
            raise ValueError(f"{len(params.flip)} parameters for {len(indices)} images")
        height, width = images.shape[1:3]
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        flipped = torch.where(params.flip[:, None], width - 1 - columns, columns)
        rows, row_inside = _source(rows + params.shift[:, :1], height, padding)
        columns, column_inside = _source(flipped + params.shift[:, 1:], width, padding)
        batch = images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        if padding == "zero":
            inside = (row_inside[:, :, None] & column_inside[:, None, :])[..., None]
    scale = 1 / (255 * std)
    result = batch.to(torch.float32)
    if inside is not None:
        result = result * inside
    result = torch.addcmul(-mean / std, result, scale).to(dtype)
    return result.permute(0, 3, 1, 2)


def _source(position: Tensor, size: int, padding: Padding) -> tuple[Tensor, Tensor | None]:
    """Index inside ``0 … size-1`` for each position, and for zero padding which were inside."""
    if padding == "zero":
        return position.clamp(0, size - 1), (position >= 0) & (position < size)
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position), None
