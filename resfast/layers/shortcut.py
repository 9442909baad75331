"""Parameter-free shortcut of a residual block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PoolPadShortcut(nn.Module):
    """Average-pools by ``stride`` and pads the new channels with zeros.

    Option A of He et al., "Deep Residual Learning" (arXiv:1512.03385), with average pooling
    instead of strided subsampling (He et al., arXiv:1812.01187, ResNet-D).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least ``in_channels``.
        stride: pooling window and stride in pixels; partial windows at the border are averaged
            over the pixels they have.

    Shape: ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H/stride), ceil(W/stride)]``, of
    the same dtype and memory format.

    Raises:
        ValueError: ``out_channels`` is below ``in_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"a parameter-free shortcut cannot narrow {in_channels} channels to "
                f"{out_channels}; use a 1x1 or 3x3 convolution"
            )
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else x
