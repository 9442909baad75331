"""Replaces the in-place operations of a traced graph by out-of-place ones."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resfast.inference.fuse.memory import SharedMemory, is_mutable
from resfast.inference.fuse.nodes import IN_PLACE, STATEFUL, UntraceableError, arguments
from resfast.layers import fused

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
DROPOUTS += (F.alpha_dropout, F.feature_alpha_dropout)


def make_out_of_place(network: fx.GraphModule, example: tuple[Any, ...] | None) -> None:
    """Removes no-ops of eval mode and makes every in-place operation return a new value.

    Later users of the value that was changed use the new value instead.

    Args:
        network: the traced network; rewritten in place.
        example: its inputs, to find out which values share memory where schemas do not say it.

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
    memory = SharedMemory(network, example)
    for node in list(graph.nodes):
        if node.kwargs.get("out") is not None and node.op.startswith("call_"):
            raise UntraceableError(f"{node} writes to out=")
        if not _to_out_of_place(node, network):
            continue
        old = node.args[0]
        if not isinstance(old, fx.Node):
            continue
        if old.op == "get_attr":
            raise UntraceableError(f"{node} changes the network's {old.target} in place")

        def is_read_later(value: fx.Node, node: fx.Node = node) -> bool:
            return any(order[user] > order[node] for user in value.users)

        earlier = [value for value in order if order[value] < order[node] and value is not old]
        others = [value for value in earlier if is_read_later(value)]
        for other in memory.shared(old, others):
            raise UntraceableError(f"{node} changes {old} in place, whose memory {other} may share")
        old.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    graph.eliminate_dead_code()


def _is_no_op(node: fx.Node, network: fx.GraphModule) -> bool:
    if node.op == "call_module":
        module = network.get_submodule(node.target)
        no_op = isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
        return no_op and not module.training and fused.is_plain(module) and not node.kwargs
    if node.op != "call_function" or not node.args:
        return False
    if node.target in DROPOUTS:
        default = inspect.signature(node.target).parameters["training"].default
        return arguments(node, "input p training").get("training", default) is False
    if node.target is torch.dropout:
        return arguments(node, "input p train").get("train") is False
    if getattr(node.target, "__module__", None) == "torchvision.ops.stochastic_depth":
        return arguments(node, "input p mode training").get("training", True) is False
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
    if node.target in STATEFUL or is_mutable(node.target):
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
