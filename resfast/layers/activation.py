"""The activations of the networks as modules, and their names in the fused operators.

The functional versions are in resfast.ops.conv.reference.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

NETWORK_NEGATIVE_SLOPE = 0.1
"""Negative slope of leaky ReLU in the networks; torch's default is 0.01."""

ACTIVATIONS: dict[str, Callable[[float], nn.Module]] = {
    "relu": lambda slope: nn.ReLU(inplace=True),
    "leaky_relu": lambda slope: nn.LeakyReLU(slope, inplace=True),
    "silu": lambda slope: nn.SiLU(inplace=True),
    "gelu": lambda slope: nn.GELU(),
    "sigmoid": lambda slope: nn.Sigmoid(),
    "tanh": lambda slope: nn.Tanh(),
    "softplus": lambda slope: nn.Softplus(),
}
"""Module constructors of the networks, by name; the argument is the slope of leaky ReLU."""


def make_activation(name: str, negative_slope: float = NETWORK_NEGATIVE_SLOPE) -> nn.Module:
    """An activation of the networks.

    Args:
        name: a key of :data:`ACTIVATIONS`.
        negative_slope: of ``leaky_relu``.
    """
    return ACTIVATIONS[name](negative_slope)


_NAMES = (
    (nn.Identity, "none"),
    (nn.ReLU, "relu"),
    (nn.LeakyReLU, "leaky_relu"),
    (nn.SiLU, "silu"),
    (nn.GELU, "gelu"),
    (nn.Hardtanh, "relu6"),
    (nn.Hardswish, "hardswish"),
    (nn.Hardsigmoid, "hardsigmoid"),
    (nn.Sigmoid, "sigmoid"),
    (nn.Tanh, "tanh"),
)
"""Module types and their names in the operators; ``nn.ReLU6`` is an ``nn.Hardtanh``."""


def name_and_slope(module: nn.Module) -> tuple[str, float] | None:
    """A module's name in the operators and its negative slope, or None if they do not support it.

    The slope is 0 for all but leaky ReLU.
    """
    for kind, name in _NAMES:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            if kind is nn.GELU and module.approximate != "none":
                return None
            if name == "relu6" and (module.min_val, module.max_val) != (0, 6):
                return None
            return name, module.negative_slope if kind is nn.LeakyReLU else 0.0
    return None
