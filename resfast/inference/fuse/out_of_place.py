"""Replaces the in-place operations of a traced graph by out-of-place ones."""

from __future__ import annotations

import inspect
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resfast.inference.fuse.nodes import IN_PLACE, STATEFUL, VIEWS, UntraceableError, kind_of
from resfast.layers import fused


def make_out_of_place(network: fx.GraphModule) -> None:
    """Removes no-ops of eval mode and makes every in-place operation return a new value.

    Later users of the value that was changed use the new value instead.

    Raises:
        UntraceableError: an in-place operation on a view of a value that is read later, or one
            without an out-of-place counterpart.
    """
    graph = network.graph
    for node in list(graph.nodes):
        if _is_no_op(node, network):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is torch._assert:  # its use of the value would prevent fusion
            graph.erase_node(node)
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if "out" in node.kwargs and node.op.startswith("call_"):
            raise UntraceableError(f"{node} writes to out=")
        if not _to_out_of_place(node, network):
            continue
        old = node.args[0]
        if not isinstance(old, fx.Node):
            continue
        if old.op == "get_attr":
            raise UntraceableError(f"{node} changes the network's {old.target} in place")
        for other in _same_memory(old, graph, network) - {old, node}:
            if any(order[user] > order[node] for user in other.users):
                raise UntraceableError(f"{node} changes {other}, which shares memory, in place")
        old.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    graph.eliminate_dead_code()


def _is_no_op(node: fx.Node, network: fx.GraphModule) -> bool:
    if node.op == "call_module":
        module = network.get_submodule(node.target)
        no_op = isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
        return no_op and not fused.hooked(module) and not node.kwargs
    dropouts = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
    if node.op == "call_function" and node.target in dropouts:
        default = node.target is not torch.dropout
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", default)
        return training is False and bool(node.args)
    return False


def _to_out_of_place(node: fx.Node, network: fx.GraphModule) -> bool:
    """Makes an in-place node return a new value; returns whether the node was in-place."""
    if node.op == "call_module":
        return getattr(network.get_submodule(node.target), "inplace", False) is True
    if node.op == "call_method":
        name = node.target
        if not name.endswith("_") or name.endswith("__") or name == "requires_grad_":
            return False
        if not hasattr(Tensor, name[:-1]):
            raise UntraceableError(f"{name} has no out-of-place counterpart")
        node.target = name[:-1]
        return True
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if node.target in IN_PLACE:
        node.target = IN_PLACE[node.target]
        return True
    if node.target in STATEFUL:
        raise UntraceableError(f"{node} changes its argument in place")
    if name.endswith("_") and not name.endswith("__") and not hasattr(operator, name):
        node.target = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
        if node.target is None:
            raise UntraceableError(f"{name} has no out-of-place counterpart")
        return True
    if getattr(node.target, "__module__", None) != F.__name__:
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):
        return False
    if not bound.get("inplace", False):
        return False
    position = list(bound).index("inplace")
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    else:
        node.args = (*node.args[:position], False, *node.args[position + 1 :])
    return True


def _same_memory(node: fx.Node, graph: fx.Graph, network: fx.GraphModule) -> set[fx.Node]:
    """The values that may share memory with a value, because they are views of the same value."""

    def root(value: fx.Node) -> fx.Node:
        while (
            kind_of(value, network) in VIEWS and value.args and isinstance(value.args[0], fx.Node)
        ):
            if value.target is getattr and value.args[1] in ("shape", "dtype", "device", "ndim"):
                break
            value = value.args[0]
        return value

    base = root(node)
    return {other for other in graph.nodes if root(other) is base}
