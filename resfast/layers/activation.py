"""The activations of the networks as modules, and what the fused operators call them.

Their functions are in resfast.ops.conv.reference.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

NETWORK_NEGATIVE_SLOPE = 0.1
"""Slope of leaky ReLU in the networks; torch's own default is 0.01."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(NETWORK_NEGATIVE_SLOPE, inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
}
"""Name to module, for the networks."""


_NAMES = (
    (nn.Identity, "none"),
    (nn.ReLU, "relu"),
    (nn.LeakyReLU, "leaky_relu"),
    (nn.SiLU, "silu"),
    (nn.GELU, "gelu"),
)
"""Module to the operators' name of it."""


def name_and_slope(module: nn.Module) -> tuple[str, float] | None:
    """What the operators call a module and its slope, or None if they do not have it."""
    for kind, name in _NAMES:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if kind is nn.GELU and module.approximate != "none":
                return None
            return name, module.negative_slope if kind is nn.LeakyReLU else 0.0
    return None
