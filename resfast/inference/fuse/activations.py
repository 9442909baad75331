"""Recognizes activations, those written out as arithmetic too: :func:`name_activations`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resfast.inference.fuse.nodes import ADDS, arguments, aten, leaky, only_user
from resfast.layers import fused
from resfast.layers.activation import name_and_slope
from resfast.ops.conv.reference import TORCH_NEGATIVE_SLOPE

FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "relu": (F.relu, torch.relu, aten.relu.default, "relu"),
    "silu": (F.silu, aten.silu.default),
    "gelu": (F.gelu, aten.gelu.default),
    "leaky_relu": (F.leaky_relu, aten.leaky_relu.default),
    "relu6": (F.relu6, aten.relu6.default),
    "hardswish": (F.hardswish, aten.hardswish.default),
    "hardsigmoid": (F.hardsigmoid, aten.hardsigmoid.default),
    "sigmoid": (F.sigmoid, torch.sigmoid, torch.special.expit, aten.sigmoid.default, "sigmoid"),
    "tanh": (F.tanh, torch.tanh, aten.tanh.default, "tanh"),
}
"""Name in the fused operators to the functions and methods that compute it; the first is called
for an activation that was written out."""
HARDTANHS = (F.hardtanh, aten.hardtanh.default)
CLAMPS = (torch.clamp, torch.clip, aten.clamp.default, "clamp", "clip")
CLAMP_MINS = (torch.clamp_min, aten.clamp_min.default, "clamp_min")
MULTIPLICATIONS = (operator.mul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul.Scalar)
MULTIPLICATIONS += ("mul", "multiply")
DIVISIONS = (operator.truediv, torch.div, torch.divide, torch.true_divide, aten.div.Tensor)
DIVISIONS += (aten.div.Scalar, "div", "divide", "true_divide")
_NAMES = {target: name for name, targets in FUNCTIONS.items() for target in targets}


def activation(node: fx.Node, x: Any, network: fx.GraphModule) -> dict[str, Any] | None:
    """Arguments of the fused kernel if the node is an activation of ``x``, else None."""
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if node.args != (x,) or node.kwargs or not fused.is_plain(module):
            return None
        return _module_activation(module)
    if node.op not in ("call_function", "call_method"):
        return None
    if arguments(node, "input").get("input") is not x:
        return None
    name = _NAMES.get(node.target)
    if name is None:
        found = _bounds(node)
        name = {(0, 6): "relu6", (0, None): "relu"}.get(found) if found else None
        return None if name is None else {"activation": name}
    if name == "gelu" and arguments(node, "input approximate").get("approximate", "none") != "none":
        return None
    if name == "leaky_relu":
        slope = arguments(node, "input negative_slope").get("negative_slope", TORCH_NEGATIVE_SLOPE)
        return leaky(slope)
    return {"activation": name}


def _module_activation(module: nn.Module) -> dict[str, Any] | None:
    name, slope = name_and_slope(module) or ("none", 0.0)
    if name == "leaky_relu":
        return leaky(slope)
    return None if name == "none" else {"activation": name}


def _bounds(node: fx.Node) -> tuple[float, float | None] | None:
    """The two numbers that a node clamps its input to; the upper one may be missing."""
    if node.target in HARDTANHS:
        a = {"min_val": -1.0, "max_val": 1.0, **arguments(node, "input min_val max_val")}
        found = a["min_val"], a["max_val"]
    elif node.target in CLAMPS:
        a = arguments(node, "input min max")
        found = a.get("min"), a.get("max")
    elif node.target in CLAMP_MINS:
        found = arguments(node, "input min").get("min"), None
    else:
        return None
    low, high = found
    numbers = isinstance(low, int | float) and (high is None or isinstance(high, int | float))
    return (low, high) if numbers else None


def name_activations(network: fx.GraphModule) -> None:
    """Replaces activations that are written out by one call each.

    ``x * sigmoid(x)`` becomes SiLU, ``relu6(x + 3) / 6`` hard sigmoid, and x times that hard swish,
    where nothing else reads the values in between.
    """
    graph = network.graph
    for node in list(graph.nodes):
        found = _written_out(node, network)
        if found is None:
            continue
        name, x = found
        with graph.inserting_before(node):
            new = graph.call_function(FUNCTIONS[name][0], (x,))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        _erase(node, x)


def _erase(node: fx.Node, until: fx.Node) -> None:
    """Erases a node and what only it reads, up to a value."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for value in inputs:
        if value is not until and not value.users:
            _erase(value, until)


def _written_out(node: fx.Node, network: fx.GraphModule) -> tuple[str, fx.Node] | None:
    """The activation that a node is the last operation of, and its input."""
    if (pair := operands(node, MULTIPLICATIONS)) and pair[0] is not pair[1]:
        for x, gate in (pair, pair[::-1]):
            if not _is_value(x) or not _is_value(gate) or only_user(gate) is not node:
                continue
            found = activation(gate, x, network)
            for of_gate, product in (("sigmoid", "silu"), ("hardsigmoid", "hardswish")):
                if found == {"activation": of_gate}:
                    return product, x
    if (six := _scaled(node, 6)) is not None and only_user(six) is node:
        if (x := _shifted_relu6(six, network)) is not None:
            return "hardsigmoid", x
        if pair := operands(six, MULTIPLICATIONS):
            for x, gate in (pair, pair[::-1]):
                if _is_value(gate) and only_user(gate) is six:
                    inner = _shifted_relu6(gate, network)
                    if inner is not None and inner is x:
                        return "hardswish", x
    if _bounds(node) == (0, 1) and (x := _line_of_hardsigmoid(node)) is not None:
        return "hardsigmoid", x
    return None


def _shifted_relu6(node: fx.Node, network: fx.GraphModule) -> fx.Node | None:
    """x if the node is ``relu6(x + 3)``."""
    inner = arguments(node, "input").get("input")
    if not isinstance(inner, fx.Node) or only_user(inner) is not node:
        return None
    if activation(node, inner, network) != {"activation": "relu6"}:
        return None
    return _shifted(inner, 3)


def _line_of_hardsigmoid(node: fx.Node) -> fx.Node | None:
    """x if the node clamps ``x / 6 + 0.5`` or ``(x + 3) / 6``."""
    line = arguments(node, "input").get("input")
    if not isinstance(line, fx.Node) or only_user(line) is not node:
        return None
    for outer, inner in (
        (lambda value: _shifted(value, 0.5), lambda value: _scaled(value, 6)),
        (lambda value: _scaled(value, 6), lambda value: _shifted(value, 3)),
    ):
        middle = outer(line)
        if middle is not None and only_user(middle) is line:
            x = inner(middle)
            if x is not None:
                return x
    return None


def _is_value(value: Any) -> bool:
    """Whether a value is computed by the network, which is not done in integers."""
    return isinstance(value, fx.Node) and value.op.startswith("call_")


def operands(node: Any, targets: Sequence[Any]) -> tuple[Any, Any] | None:
    """The two operands if the node is a call of one of the targets without other arguments."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target not in targets:
        return None
    a = arguments(node, "input other")
    return (a["input"], a["other"]) if set(a) == {"input", "other"} and len(a) == 2 else None


def _with_number(
    node: fx.Node, targets: Sequence[Any], is_right: Callable[[float], bool], *, swap: bool
) -> fx.Node | None:
    """x if the node combines x with a number that is right."""
    pair = operands(node, targets)
    for x, number in (pair, pair[::-1])[: 2 if swap else 1] if pair else ():
        if _is_value(x) and isinstance(number, int | float) and is_right(number):
            return x
    return None


def _shifted(node: fx.Node, number: float) -> fx.Node | None:
    """x if the node is ``x + number``."""
    return _with_number(node, ADDS, lambda value: value == number, swap=True)


def _scaled(node: fx.Node, divisor: float) -> fx.Node | None:
    """x if the node is ``x / divisor``, or x times the inverse in float32."""
    x = _with_number(node, DIVISIONS, lambda value: value == divisor, swap=False)
    if x is not None:
        return x

    def is_inverse(value: float) -> bool:
        return math.isclose(value * divisor, 1, rel_tol=1e-7)

    return _with_number(node, MULTIPLICATIONS, is_inverse, swap=True)
