"""What rewritten forwards and replaced modules call in place of PyTorch's modules.

Each computes what the modules would, with a training kernel where one applies to the arguments at
hand, else with PyTorch. Kernels write their results in ``channels_last`` memory, so they are used
only where PyTorch's results would be in it too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast.layers import norm as layers_norm
from resfast.layers.conv import records_in_bfloat16
from resfast.ops.conv.reference import ACTIVATIONS
from resfast.ops.conv_train import choice
from resfast.ops.conv_train import op as conv_train

MIN_VALUES = 2**18
"""Fewest values of a map for which a kernel for norm and activation, or a sum, saves time: with
fewer, PyTorch's modules return earlier (``benchmarks/optimize.py``, two cores of an EPYC)."""
MIN_VALUES_ALONE = 2**19
"""The same for a norm without an activation and an addition."""


def is_channels_last(x: Tensor) -> bool:
    """Whether ``[N, C, H, W]`` is in ``channels_last`` memory."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


MEASURES = True
"""Whether convolutions are measured; otherwise a rule chooses how to compute them."""


def conv_forward(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``nn.Conv2d._conv_forward`` of a convolution for which :func:`why_not_conv` is None."""
    if records_in_bfloat16() and input.device.type == "cpu" and is_channels_last(input):
        where = self.stride[0], self.padding[0]
        if MEASURES and not torch.compiler.is_compiling():
            name = choice.algorithm(input, weight, *where, self.tile)
        else:
            name = choice.by_rule(input, weight, *where, self.tile)
        if name != "torch":
            return choice.run(name, input, weight, bias, *where)
    return nn.Conv2d._conv_forward(self, input, weight, bias)


def why_not_conv(conv: nn.Conv2d) -> str | None:
    """Why no training kernel can be faster for a convolution, whatever its input, or None."""
    if not conv_train.AVAILABLE:
        return "convolution: the kernels for bfloat16 are not built or need AVX512-BF16"
    if conv.groups != 1 or conv.dilation != (1, 1):
        return "convolution with groups or dilation"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"convolution with padding {conv.padding!r} of {conv.padding_mode}"
    if conv.kernel_size not in ((1, 1), (3, 3)):
        return "convolution other than 3x3 and 1x1"
    limits = (2, 2) if conv.kernel_size == (3, 3) else (max(conv.stride), 0)
    if (
        len({*conv.stride}) > 1
        or len({*conv.padding}) > 1
        or (conv.stride[0] > limits[0] or conv.padding[0] > limits[1])
    ):
        return f"convolution with stride {conv.stride} and padding {conv.padding}"
    if min(conv.in_channels, conv.out_channels) < conv_train.MIN_CHANNELS:
        return f"convolution of fewer than {conv_train.MIN_CHANNELS} channels"
    return None


def norm_forward(self: nn.BatchNorm2d, input: Tensor) -> Tensor:
    """``nn.BatchNorm2d.forward``."""
    if (
        _is_large(input, MIN_VALUES_ALONE)
        and layers_norm.applies(input, self)
        and is_channels_last(input)
    ):
        return layers_norm.fused_norm_act(input, self)
    return nn.BatchNorm2d.forward(self, input)


def norm_act(
    x: Tensor,
    norm: nn.Module,
    activation: str | nn.Module,
    negative_slope: float = 0.0,
    residual: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """``activation(norm(x) + residual)``.

    Args:
        x: ``[N, C, H, W]``.
        norm: a plain batch norm.
        activation: a module, or a name in ``conv2d_bias_act``.
        negative_slope: of an activation given by name.
        residual: what is added, if anything.
        in_place: whether the modules would add in place, and the result has the norm's dtype.
    """
    known = (
        layers_norm.kernel_activation(activation)
        if isinstance(activation, nn.Module)
        else (activation, negative_slope)
    )
    if (
        known is not None
        and _is_large(x, MIN_VALUES)
        and layers_norm.applies(x, norm)
        and is_channels_last(x)
        and (residual is None or _is_addable(x, residual))
    ):
        return layers_norm.fused_norm_act(x, norm, *known, residual)
    out = norm(x)
    if residual is not None:
        out = out.add_(residual) if in_place else out + residual
    if isinstance(activation, nn.Module):
        return activation(out)
    return ACTIVATIONS[activation](out, negative_slope)


def add_relu(
    x: Tensor, residual: Tensor, activation: nn.Module | None, in_place: bool = False
) -> Tensor:
    """``relu(x + residual)``; ``activation`` is the module that is called for it, if one is."""
    if _is_addable(x, residual) and torch.is_grad_enabled() and _is_large(x, MIN_VALUES):
        from resfast.ops.add_relu import op as kernel

        if x.device.type == "cpu" and x.dtype in kernel.DTYPES:
            return kernel.add_relu(x, residual)
    out = x.add_(residual) if in_place else x + residual
    return F.relu(out) if activation is None else activation(out)


def _is_large(x: Tensor, least: int) -> bool:
    """Whether a kernel saves more time than calling it takes, which compiled code does not."""
    return torch.compiler.is_compiling() or x.numel() >= least


def _is_addable(x: Tensor, residual: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )
