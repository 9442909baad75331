"""Operators as the forward of torch's own layers, as a collection of kernels holds them.

Each class has a ``forward`` and no state: it reads the weights and the options of the layer that
it takes the place of, as in ``Conv2d.forward(conv, x)``. ``has_backward`` says whether it can be
trained with, ``can_torch_compile`` whether ``torch.compile(fullgraph=True)`` takes it. These are
the kernel requirements of Hugging Face's ``kernels``. In a network of one's own,
:func:`resfast.fuse` and :func:`resfast.optimize` do more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .add_relu import op as add_relu
from .conv import op as conv
from .scale_shift import op as scale_shift


class Conv2d(nn.Module):
    """``torch.nn.Conv2d`` for inference, by :func:`resfast.ops.conv.op.conv2d_bias_act`."""

    has_backward = False
    can_torch_compile = True

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` as ``[N, K, P, Q]``, in ``channels_last`` memory.

        Raises:
            ValueError: the layer pads with something else than a number of zeros.
        """
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            raise ValueError(
                f"padding is {self.padding!r} of {self.padding_mode}; expected a number of zeros"
            )
        return conv.conv2d_bias_act(
            input,
            self.weight.to(input.dtype),
            None if self.bias is None else self.bias.float(),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            dilation=self.dilation,
        )


class BatchNorm2d(nn.Module):
    """``torch.nn.BatchNorm2d`` in eval mode, by ``scale_shift_act``."""

    has_backward = False
    can_torch_compile = True

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` of the same shape, in ``channels_last`` memory.

        Raises:
            ValueError: the layer is in training mode, or has no running statistics.
        """
        if self.training or self.running_mean is None or self.running_var is None:
            raise ValueError(
                "the batch norm has no statistics to use; expected eval mode with them"
            )
        scale = torch.rsqrt(self.running_var.float() + self.eps)
        scale = scale if self.weight is None else scale * self.weight.float()
        shift = -self.running_mean.float() * scale
        shift = shift if self.bias is None else shift + self.bias.float()
        return scale_shift.scale_shift_act([input], scale, shift)


class AddReLU(nn.Module):
    """``relu(x + residual)``, the end of a residual block."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Two tensors of one shape as one."""
        return add_relu.add_relu(x, residual)
