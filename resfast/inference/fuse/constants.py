"""Computes what depends on parameters and buffers only: :func:`fold_constants`.

Standardised weights, weight norms written in forward, the normalised weights of a cosine
classifier, the exponential of a learned scale: computed once, in the original dtype.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resfast.inference.fuse.memory import is_mutable, is_of_torch
from resfast.inference.fuse.nodes import map_leaves
from resfast.layers import fused

_SIMPLE = (bool, int, float, str, torch.dtype, torch.device, type(None))


class _NotConstantError(Exception):
    """An operator of a computation is random or changes something."""


class _Pure(TorchDispatchMode):
    """Raises for operators that are random or change a tensor that the network keeps."""

    def __init__(self, kept: set[int]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _NotConstantError
        given = {**dict(enumerate(args)), **(kwargs or {})}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed = given.get(argument.name, given.get(index))
                if isinstance(changed, Tensor) and changed.untyped_storage()._cdata in self.kept:
                    raise _NotConstantError
        return func(*args, **(kwargs or {}))


def fold_constants(network: fx.GraphModule) -> None:
    """Replaces every value that depends on parameters and buffers only by a buffer or a number.

    Not replaced are those of random operators, of functions from outside PyTorch, of modules with
    hooks or a forward of their own, and those of tensors that the network changes.
    """
    graph = network.graph
    values: dict[fx.Node, Any] = {}
    changed = {
        node.args[0].target
        for node in graph.nodes
        if node.op == "call_function"
        and is_mutable(node.target)
        and isinstance(node.args[0], fx.Node)
    }
    tensors = (*network.parameters(), *network.buffers())
    pure = _Pure({tensor.untyped_storage()._cdata for tensor in tensors})
    for node in graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(network)
            if isinstance(value, Tensor) and node.target not in changed:
                values[node] = value
        elif _may_be_constant(node, network, values):
            found = _computed(node, network, values, pure)
            if found is not None:
                values[node] = found
    for node, value in list(values.items()):
        if node.op != "get_attr":
            _replace(node, value, values, network)
    graph.eliminate_dead_code()


def _may_be_constant(node: fx.Node, network: fx.GraphModule, values: dict[fx.Node, Any]) -> bool:
    inputs = node.all_input_nodes
    if not inputs or any(value not in values for value in inputs):
        return False
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        home = type(module).__module__
        return home.startswith("torch.nn.modules") and fused.is_plain(module)
    if node.op == "call_function":
        return is_of_torch(node.target) and not is_mutable(node.target)
    return node.op == "call_method"


def _computed(
    node: fx.Node, network: fx.GraphModule, values: dict[fx.Node, Any], pure: _Pure
) -> Any:
    """The value of a node, or None if it is not a constant."""
    args, kwargs = (
        map_leaves(lambda value: values[value] if isinstance(value, fx.Node) else value, part)
        for part in (node.args, node.kwargs)
    )
    try:
        with pure, torch.no_grad():
            if node.op == "call_module":
                value = network.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - the network itself then fails at this operation
        return None
    return value


def _replace(
    node: fx.Node, value: Any, values: dict[fx.Node, Any], network: fx.GraphModule
) -> None:
    """Replaces a constant where something that is not constant reads it."""
    readers = [user for user in node.users if user not in values]
    if not readers:
        return
    if isinstance(value, Tensor):
        with network.graph.inserting_before(node):
            new: Any = network.graph.get_attr(_add_buffer(node, value, network))
        new.meta = dict(node.meta)
    elif not _is_simple(value):
        return  # a tuple of tensors, say: its parts are replaced
    else:
        new = value
    for reader in readers:
        reader.args, reader.kwargs = (
            map_leaves(lambda part: new if part is node else part, given)
            for given in (reader.args, reader.kwargs)
        )


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_simple, value))
    return isinstance(value, _SIMPLE)


def _add_buffer(node: fx.Node, value: Tensor, network: fx.GraphModule) -> str:
    """Adds a buffer beside the first parameter that a constant depends on; returns its name."""
    first = node
    while first.op != "get_attr":
        first = first.all_input_nodes[0]
    owner, _, name = str(first.target).rpartition(".")
    module: nn.Module = network.get_submodule(owner)
    free, count = f"{name}_computed", 1
    while hasattr(module, free):
        free, count = f"{name}_computed_{count}", count + 1
    module.register_buffer(free, value.detach().clone())
    return f"{owner}.{free}".removeprefix(".")
