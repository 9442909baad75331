"""``resfast::conv2d_bias_act`` and ``resfast::add_relu`` in plain PyTorch.

They run wherever no kernel of our own does, and say what the kernels must compute.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, LEAKY_SLOPE),
    "silu": F.silu,
}


def conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    activation: str,
) -> Tensor:
    """All in float32 (float64 for float64), rounded once to x's dtype; ``channels_last``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = F.conv2d(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding
    )
    if residual is not None:
        out = out + residual.to(dtype)
    return ACTIVATIONS[activation](out).to(x.dtype).contiguous(memory_format=torch.channels_last)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """``relu(x + residual)``; the sum is rounded once."""
    return torch.relu(x + residual)


def add_relu_backward(grad: Tensor, result: Tensor) -> Tensor:
    """The gradient of either input: ``grad`` where ``result`` is not 0."""
    return torch.where(result <= 0, 0, grad)
