"""Which values of a traced graph share memory: :class:`SharedMemory`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensorMode

from resfast.inference.fuse.activations import FUNCTIONS
from resfast.inference.fuse.inputs import map_tensors, tensors
from resfast.inference.fuse.nodes import (
    ADDS,
    CONVS,
    LINEARS,
    MAX_POOLS,
    NORMS,
    SCALINGS,
    UntraceableError,
    aten,
    quiet,
)
from resfast.layers import fused

COMPUTES = (*ADDS, *CONVS, *LINEARS, *MAX_POOLS, *NORMS, *SCALINGS)
COMPUTES += tuple(target for targets in FUNCTIONS.values() for target in targets)
"""Return new values. Most are composite operators, whose schemas need not say what is a view."""
COMPUTING_MODULES = tuple(
    f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "conv", "linear", "pooling")
)
"""Modules here return new values, but for ``nn.Identity`` and in-place activations."""
_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    AssertionError,
    KeyError,
)


class SharedMemory:
    """Which values may share memory.

    The operators' schemas say which results are views of which arguments. A result that no schema
    describes may share memory with any argument, unless it does not when the graph runs on fake
    tensors like the example. A function from outside PyTorch always may.

    Args:
        network: the traced network. Its in-place operations are made out-of-place one by one: those
            that are so already count as new values.
        example: its inputs.
    """

    def __init__(self, network: fx.GraphModule, example: tuple[Any, ...] | None) -> None:
        self.network = network
        self.storages = None if example is None else _Storages(network)
        self.example = example

    def shared(self, value: fx.Node, others: list[fx.Node]) -> list[fx.Node]:
        """Those of ``others`` that may share memory with ``value``."""
        if not others:
            return []
        found = self._among(value, others, self._sources)
        if found and self.storages is not None:
            self.storages.find(self.example)
            found = self._among(value, found, self._sources_in_example)
        return found

    def check_export(self) -> None:
        """Checks that torch.export knows of every view that is changed in place.

        It does not know of views that an operator's schema does not mention.

        Raises:
            UntraceableError: a value that is read later may be changed through such a view.
        """
        order = {node: index for index, node in enumerate(self.network.graph.nodes)}
        for node in order:
            if node.op != "call_function" or not is_mutable(node.target):
                continue
            changed = node.args[0] if node.args else None
            if not isinstance(changed, fx.Node):
                continue
            others = [
                other
                for other in order
                if other is not changed
                and order[other] < order[node]
                and any(order[user] > order[node] for user in other.users)
            ]
            known = self._among(changed, others, self._sources_in_schemas)
            for other in set(self.shared(changed, others)) - set(known):
                raise UntraceableError(f"{node} changes {changed}, which may be a view of {other}")

    def _among(
        self,
        value: fx.Node,
        others: list[fx.Node],
        sources: Callable[[fx.Node], list[fx.Node]],
    ) -> list[fx.Node]:
        neighbours: dict[fx.Node, list[fx.Node]] = {}
        for node in self.network.graph.nodes:
            for source in sources(node):
                neighbours.setdefault(node, []).append(source)
                neighbours.setdefault(source, []).append(node)
        seen, front = {value}, [value]
        while front:
            for node in neighbours.get(front.pop(), []):
                if node not in seen:
                    seen.add(node)
                    front.append(node)
        return [node for node in others if node in seen]

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that its value may share memory with."""
        described = self._described(node)
        return node.all_input_nodes if described is None else described

    def _sources_in_schemas(self, node: fx.Node) -> list[fx.Node]:
        if node.target is operator.getitem:
            return node.all_input_nodes
        return self._described(node) or []

    def _sources_in_example(self, node: fx.Node) -> list[fx.Node]:
        found = self._described(node)
        if found is not None:
            return found
        inputs = node.all_input_nodes
        if node.op == "call_function" and not is_of_torch(node.target):
            return inputs
        return [source for source in inputs if self.storages.may_share(node, source)]

    def _described(self, node: fx.Node) -> list[fx.Node] | None:
        """The inputs that a value is a view of; None if that is not known."""
        if node.op in ("placeholder", "get_attr", "output"):
            return []
        if node.op == "call_module":
            return [] if _computes(self.network.get_submodule(str(node.target))) else None
        if node.target in COMPUTES:
            return []
        if node.target is getattr:
            attribute = getattr(torch.empty(1, 1, 1, 1, device="meta"), str(node.args[1]), None)
            return None if attribute is None or isinstance(attribute, Tensor) else []
        schemas = _schemas(node)
        if not schemas:
            return None
        views: list[fx.Node] = []
        for schema in schemas:
            for index, argument in enumerate(schema.arguments):
                if argument.alias_info is not None:
                    given = node.args[index] if index < len(node.args) else None
                    given = node.kwargs.get(argument.name, given)
                    views += given if isinstance(given, list | tuple) else [given]
        return [source for source in views if isinstance(source, fx.Node)]


def is_mutable(target: Any) -> bool:
    """Whether a target is an operator of ``torch.ops`` that changes an argument."""
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    return False


def _computes(module: nn.Module) -> bool:
    home = type(module).__module__
    is_computing = home in COMPUTING_MODULES and not isinstance(module, nn.Identity)
    return is_computing and fused.is_plain(module)


def is_of_torch(target: Any) -> bool:
    """Whether a function is one of PyTorch's or an operator on Python values."""
    if isinstance(target, OpOverload | OpOverloadPacket) or target is getattr:
        return True
    name = getattr(target, "__name__", "")
    homes = (torch, F, torch._C._nn, torch.special, torch.linalg, torch.fft, operator)
    return any(getattr(home, name, None) is target for home in homes)


def _schemas(node: fx.Node) -> list[Any]:
    """Schemas that say all about the memory of a call's results; none if there are no such."""
    target = node.target
    if node.op == "call_function":
        if not is_of_torch(target):
            return []
        name = getattr(target, "__name__", "")
    else:
        name = str(target)
    if isinstance(target, OpOverload):
        overloads = [target]
    else:
        packet = target if isinstance(target, OpOverloadPacket) else getattr(aten, name, None)
        if not isinstance(packet, OpOverloadPacket):
            return []
        overloads = [getattr(packet, name) for name in packet.overloads()]
    overloads = [op for op in overloads if not op._schema.is_mutable]  # those with out=
    return [] if any(map(_may_hide_views, overloads)) else [op._schema for op in overloads]


def _may_hide_views(op: OpOverload) -> bool:
    """Whether an operator may return a view that its schema does not mention: it is composite."""
    schema = op._schema
    if not any("Tensor" in str(result.type) for result in schema.returns):
        return False
    if any(argument.alias_info is not None for argument in schema.arguments):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


class _Storages(fx.Interpreter):
    """The memory of each value when the graph runs on fake tensors."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.found: dict[fx.Node, Any] = {}

    def find(self, example: tuple[Any, ...]) -> None:
        if self.found:
            return
        device = next((x.device for x in self.module.parameters()), torch.device("cpu"))
        with FakeTensorMode(allow_non_fake_inputs=True), quiet():
            fakes = map_tensors(
                lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), example
            )
            self.run(*self.module.graph.process_inputs(*fakes), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        try:
            value = super().run_node(n)
        except _ERRORS:  # it read a value that is not known
            return None
        self.found[n] = value
        return value

    def may_share(self, node: fx.Node, source: fx.Node) -> bool:
        if node not in self.found or source not in self.found:
            return True
        return bool(self._memory(node) & self._memory(source))

    def _memory(self, node: fx.Node) -> set[int]:
        return {x.untyped_storage()._cdata for x in tensors(self.found[node])}
