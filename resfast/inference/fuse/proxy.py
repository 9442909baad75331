"""Values of a traced network whose ``+=`` and the like are in place, as those of tensors are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from resfast.inference.fuse.nodes import IN_PLACE

_OF_SHAPES = ("shape", "ndim", "dtype", "device")


class Proxy(fx.Proxy):
    """A traced value; ``torch.fx`` itself takes ``x += y`` for ``x = x + y``."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Proxy, other: Any) -> Any:
        if _is_number(self.node):
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in IN_PLACE:
    setattr(Proxy, f"__{_function.__name__}__", _in_place(_function))


def _is_number(node: fx.Node) -> bool:
    """Whether a value is a size or computed from sizes only, as numbers do not change in place."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "item")
    if node.target is getattr:
        return node.args[1] in _OF_SHAPES
    computed = node.op == "call_function" and node.target in vars(operator).values()
    inputs = node.all_input_nodes
    return computed and bool(inputs) and all(map(_is_number, inputs))
