"""``resfast::conv2d_bias_act`` and ``resfast::add_relu`` in plain PyTorch.

They define what the kernels must compute, and run where no kernel of ours does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TORCH_NEGATIVE_SLOPE = 0.01
"""Default slope of leaky ReLU, the same as in ``torch.nn.LeakyReLU``."""
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda x, negative_slope: x,
    "relu": lambda x, negative_slope: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, negative_slope: F.silu(x),
    "gelu": lambda x, negative_slope: F.gelu(x),
}
"""Name to function of a tensor and the slope of leaky ReLU."""


def output_shape(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> list[int]:
    """``[N, K, P, Q]``."""
    sides = (
        (x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in (0, 1)
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
) -> Tensor:
    """Computes in float32 (float64 for float64) and rounds once to x's dtype; ``channels_last``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = F.conv2d(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding
    )
    if residual is not None:
        out = out + residual.to(dtype)
    out = ACTIVATIONS[activation](out, negative_slope).to(x.dtype)
    return channels_last(out)


def channels_last(tensor: Tensor) -> Tensor:
    """``[N, C, H, W]`` in ``channels_last`` memory, copied only if necessary."""
    return tensor.contiguous(memory_format=torch.channels_last)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """``relu(x + residual)``; the sum is rounded once."""
    return torch.relu(x + residual)


def add_relu_backward(grad: Tensor, result: Tensor) -> Tensor:
    """The gradient of either input: ``grad`` where ``result`` is not 0."""
    return torch.where(result <= 0, 0, grad)
