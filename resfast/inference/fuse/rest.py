"""Names what a rewritten graph still leaves to PyTorch, and why: :func:`rest_of`."""

from __future__ import annotations

from torch import fx, nn

from resfast.inference.fuse.nodes import ADDS, FOREIGN, kind_of
from resfast.inference.fuse.norms import parts_of
from resfast.inference.fuse.patterns import Patterns
from resfast.layers import fused
from resfast.ops.conv.op import ConvBiasAct


def rest_of(patterns: Patterns) -> list[tuple[str, str]]:
    """Name and reason of each activation, addition, concatenation and pool in the graph."""
    found = []
    for node in patterns.graph.nodes:
        if node.op.startswith("call_") and (reason := _reason(patterns, node)):
            found.append((patterns.name(node), reason))
    return found


def _reason(patterns: Patterns, node: fx.Node) -> str | None:
    name = kind_of(node, patterns.network).partition(".")[0]
    if parts_of(node) is not None:
        return "concatenation: its result is read as a whole"
    if "pool" in name.lower():
        return f"{name}: a pool is an operation of its own"
    x = node.args[0] if node.args else None
    if patterns.activation(node, x) or _is_foreign(patterns, node, name):
        return f"{name}: {_why_apart(patterns, x, node)}"
    if node.target in ADDS and len(node.all_input_nodes) > 1:
        return f"addition: {_why_apart(patterns, node.all_input_nodes, node)}"
    return None


def _is_foreign(patterns: Patterns, node: fx.Node, name: str) -> bool:
    module = patterns.module(node)
    if module is None:
        return name in FOREIGN
    return type(module).__module__ == nn.ReLU.__module__


def _why_apart(patterns: Patterns, inputs: object, node: fx.Node) -> str:
    """Why an operation is not part of a convolution before it."""
    values = inputs if isinstance(inputs, list) else [inputs]
    convs = [
        value
        for value in values
        if isinstance(value, fx.Node) and isinstance(patterns.module(value), ConvBiasAct)
    ]
    module = patterns.module(node)
    if module is not None and not fused.is_plain(module):
        return "it has hooks or a forward of its own"
    if not convs:
        return "it follows no convolution"
    if all(len(conv.users) > 1 for conv in convs):
        return "the convolution before it is also read elsewhere"
    if len(values) == 1 and patterns.activation(node, convs[0]) is None:
        return "the fused kernel does not support it"
    return "the convolution before it already has an activation or an addition"
