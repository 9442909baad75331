"""``resfast::conv2d_bias_act`` and ``resfast::add_relu`` in plain PyTorch.

They define what the kernels must compute, and run where no kernel of ours does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TORCH_NEGATIVE_SLOPE = 0.01
"""Default slope of leaky ReLU, the same as in ``torch.nn.LeakyReLU``."""
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x, slope, inplace=False: x,
    "relu": lambda x, slope, inplace=False: F.relu(x, inplace),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, slope, inplace=False: F.silu(x, inplace),
    "gelu": lambda x, slope, inplace=False: F.gelu(x),
    "relu6": lambda x, slope, inplace=False: F.relu6(x, inplace),
    "hardswish": lambda x, slope, inplace=False: F.hardswish(x, inplace),
    "hardsigmoid": lambda x, slope, inplace=False: F.hardsigmoid(x, inplace),
    "sigmoid": lambda x, slope, inplace=False: x.sigmoid_() if inplace else x.sigmoid(),
    "tanh": lambda x, slope, inplace=False: x.tanh_() if inplace else x.tanh(),
}
"""Name to function of a tensor, the slope of leaky ReLU and whether it may overwrite the tensor."""
KERNEL_ACTIVATIONS = tuple(ACTIVATIONS)[:5]
"""Those of the kernels in C++, CUDA and Triton, which number them in this order."""


def output_shape(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> list[int]:
    """``[N, K, P, Q]``."""
    sides = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i in (0, 1)
    )
    return [x.shape[0], weight.shape[0], *sides]


def new_map(like: Tensor, sizes: list[int]) -> Tensor:
    """A new tensor ``[N, C, H, W]`` in ``channels_last``, with the dtype and device of ``like``."""
    n, c, h, w = sizes
    return like.new_empty((n, h, w, c)).permute(0, 3, 1, 2)


def conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    activation: str,
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """Computes in float32 (float64 for float64) and rounds once to x's dtype; ``channels_last``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    residual = None if residual is None else residual.to(dtype)
    epilogue = (activation, negative_slope, groups, dilation)
    out = unfused(x.to(dtype), weight.to(dtype), bias, residual, stride, padding, *epilogue)
    return channels_last(out.to(x.dtype))


def unfused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    activation: str,
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """The same in x's dtype and with standard operators only, for files of other formats."""
    bias = None if bias is None else bias.to(x.dtype)
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    out = out if residual is None else out + residual
    return ACTIVATIONS[activation](out, negative_slope)


def channels_last(tensor: Tensor) -> Tensor:
    """``[N, C, H, W]`` in ``channels_last`` memory, copied only if necessary."""
    return tensor.contiguous(memory_format=torch.channels_last)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """``relu(x + residual)``; the sum is rounded once."""
    return torch.relu(x + residual)


def add_relu_backward(grad: Tensor, result: Tensor) -> Tensor:
    """The gradient of either input: ``grad`` where ``result`` is not 0."""
    return torch.where(result <= 0, 0, grad)
