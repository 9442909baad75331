"""Maps of 8-bit values: how they represent floats, and max pools of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv.reference import channels_last

LEVELS = 255
"""Largest value of a map."""


@dataclass(frozen=True)
class Quantization:
    """How a map is represented: value = scale · (q - zero_point), with q in 0 to 255."""

    scale: float
    zero_point: int

    @classmethod
    def of_range(cls, low: float, high: float) -> Quantization:
        """For values between ``low`` and ``high``; 0, which pads maps, is represented exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / LEVELS
        if scale < torch.finfo(torch.float32).tiny:
            return cls(1.0, 0)
        return cls(scale, min(LEVELS, max(0, round(-low / scale))))

    def quantize(self, x: Tensor) -> Tensor:
        """float ``x`` as uint8; NaN becomes the zero point, other values are clipped."""
        scaled = x.float() / self.scale + self.zero_point
        scaled = scaled.nan_to_num_(nan=self.zero_point).round_().clamp_(0, LEVELS)
        return scaled.to(torch.uint8)

    def dequantize(self, q: Tensor) -> Tensor:
        """uint8 ``q`` as float32."""
        return (q.float() - self.zero_point) * self.scale


def max_pool(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool2d`` of uint8 ``[N, C, H, W]``, in columns of each window and then in rows.

    torch's own refuses ``channels_last`` maps of 256 pixels or more (2.15).
    """
    ends, counts = [], []
    for axis in (0, 1):
        size, step, pad = x.shape[2 + axis], stride[axis], padding[axis]
        span = dilation[axis] * (kernel[axis] - 1) + 1
        count = (size + 2 * pad - span + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (count - 1) * step >= size + pad:
            count -= 1  # a window that would begin in the padding
        counts.append(count)
        ends.append(max(0, (count - 1) * step + span - size - pad))
    x = channels_last(x)
    if any(padding) or any(ends):
        x = F.pad(x, (padding[1], ends[1], padding[0], ends[0]))  # 0 is the smallest value
    for axis in (0, 1):
        reach = stride[axis] * (counts[axis] - 1) + 1
        rows = [
            x.narrow(2 + axis, dilation[axis] * offset, reach)[
                (..., slice(None, None, stride[axis]), *[slice(None)] * (1 - axis))
            ]
            for offset in range(kernel[axis])
        ]
        x = rows[0].clone() if len(rows) == 1 else functools.reduce(torch.maximum, rows)
    return x
