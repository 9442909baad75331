"""Convolution layer of the models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` with "same" padding for odd kernels, by default without a bias.

    When gradients are recorded under CPU autocast to bfloat16, 3x3 convolutions with enough
    channels run as :func:`resfast.ops.conv_train.op.conv2d`, and strided 1x1 convolutions as matrix
    products over the pixels they read, whose gradients take a third to a tenth of oneDNN's time.

    Attributes:
        tile: largest side of a Winograd output tile, 2 to 4.
    """

    tile = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if records_in_bfloat16():
            from resfast.ops.conv import cpu as conv_cpu
            from resfast.ops.conv_train import op as conv_train

            where = self.stride[0], self.padding[0]
            if conv_train.applies(input, weight, *where):
                tile = conv_cpu.fastest_tile(input, *where, self.tile)
                out = conv_train.conv2d(input.to(torch.bfloat16), weight, *where, tile)
                return out if bias is None else out + bias.to(out.dtype)[:, None, None]
            if self.kernel_size == (1, 1) and self.stride[0] > 1 and input.device.type == "cpu":
                pixels = input.permute(0, 2, 3, 1)[:, :: self.stride[0], :: self.stride[1]]
                return F.linear(pixels, weight.flatten(1), bias).permute(0, 3, 1, 2)
        return super()._conv_forward(input, weight, bias)


def records_in_bfloat16() -> bool:
    """Whether gradients are recorded under CPU autocast to bfloat16."""
    return (
        torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def set_winograd_tile(model: nn.Module, tile: int) -> None:
    """Sets the largest Winograd output tile of 3x3 convolutions on a CPU: 2, or up to 4 for speed.

    Args:
        model: a network of :class:`Conv2d`, or fused into :class:`resfast.ops.conv.op.ConvBiasAct`.
        tile: side of the largest tile.
    """
    from resfast.ops.conv.op import ConvBiasAct

    for module in model.modules():
        if isinstance(module, (Conv2d, ConvBiasAct)):
            module.tile = tile
