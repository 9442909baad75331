"""Convolution layer of the models."""

from __future__ import annotations

from torch import nn


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` without bias and with "same" padding for odd kernels."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
