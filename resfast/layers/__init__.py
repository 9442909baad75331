"""Layers to build networks from; the fused ones are loaded on first use::

from resfast.layers import ConvBNAddReLU, ConvBNReLU, FusedBasicBlock, FusedBottleneck
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["ConvBNAddReLU", "ConvBNReLU", "FusedBasicBlock", "FusedBottleneck"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("resfast.layers.fused"), name)
    raise AttributeError(f"module 'resfast.layers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
