"""Chains of fused convolutions that run as one call on the CPU: :func:`with_chains`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks

from resfast.inference.fuse.chain_layers import ChainLayers, Module
from resfast.inference.fuse.nodes import arguments
from resfast.layers import fused
from resfast.ops.network.layers import (
    AveragePool,
    Concat,
    Conv,
    Head,
    Layer,
    MaxPool,
    Pointwise,
)
from resfast.ops.network.network import Network

LEAST_CONVOLUTIONS = 2
"""Of a chain; fewer are not worth a plan."""
NO_RESULTS = (MaxPool, AveragePool, Concat)
"""Layers whose kernels cannot write the result of a chain."""


class Chain(nn.Module):
    """Consecutive nodes of a network, with one input and one result.

    Args:
        network: runs them as one call.
        nodes: the same nodes as a network of their own, for inputs that the call cannot take.
    """

    def __init__(self, network: Network, nodes: fx.GraphModule) -> None:
        super().__init__()
        self.network = network
        self.nodes = nodes
        self._hooks = [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
        for module in nodes.modules():
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]

    def takes(self, x: Any) -> bool:
        """Whether the call can take an input."""
        return self.network.fits(x) and not any(self._hooks)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) if self.takes(x) else self.nodes(x)


def only_chain(network: fx.GraphModule) -> Chain | None:
    """The chain that is all of a network of :func:`with_chains`, if one is."""
    placeholder, *rest = network.graph.nodes
    if len(rest) != 2 or rest[0].args != (placeholder,) or rest[1].args != (rest[0],):
        return None
    chain = _attribute(network, str(rest[0].target)) if rest[0].op == "call_module" else None
    return chain if isinstance(chain, Chain) else None


def first_chain(network: fx.GraphModule) -> Chain | None:
    """The chain that alone reads the one input of a network of :func:`with_chains`, if one does."""
    inputs = [node for node in network.graph.nodes if node.op == "placeholder"]
    readers = list(inputs[0].users) if len(inputs) == 1 else []
    if len(readers) != 1 or readers[0].op != "call_module":
        return None
    module = _attribute(network, str(readers[0].target))
    return module if isinstance(module, Chain) else None


def with_chains(network: fx.GraphModule) -> fx.GraphModule | None:
    """A network that shares its modules with another one and runs chains of them as one call each.

    Args:
        network: a graph with fused convolutions; left as it is.

    Returns:
        None where there is no chain.
    """
    order = list(network.graph.nodes)
    layers = ChainLayers(network)
    chains = _find(order, layers)
    if not chains:
        return None
    graph = fx.Graph()
    modules: dict[str, Any] = {}
    copies: dict[fx.Node, fx.Node] = {}
    starts = {nodes[0]: nodes for nodes in chains}
    inside = {node for nodes in chains for node in nodes}
    for node in order:
        if node in starts:
            nodes = starts[node]
            name = f"chain_{len(modules)}"
            modules[name] = _chain(nodes, layers)
            copies[nodes[-1]] = graph.call_module(name, (copies[_inputs(nodes)[0]],))
        elif node not in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                modules.setdefault(node.target, _attribute(network, node.target))
    graph.set_codegen(copy.deepcopy(network.graph._codegen))  # torch.export's nested values
    return fx.GraphModule(modules, graph)


def _attribute(network: fx.GraphModule, path: str) -> Any:
    value: Any = network
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _find(order: list[fx.Node], layers: ChainLayers) -> list[list[fx.Node]]:
    """The longest runs of nodes that the kernels have, with one input and one result."""
    chains = []
    start = 0
    while start < len(order):
        best: list[fx.Node] = []
        end = start
        while end < len(order) and layers.of(order[end]) is not None:
            end += 1
            nodes = order[start:end]
            dtypes = _dtypes(nodes, layers)
            if len(dtypes) > 1:
                break
            if len(_inputs(nodes)) == 1 and _results(nodes) == [nodes[-1]]:
                best = nodes
                if layers.is_mean(nodes[-1]):
                    head = _head_nodes(nodes[-1], layers.network, *dtypes)
                    if head:
                        best = nodes + head
                        break
        if sum(len(layers.convolutions(node)) for node in best) >= LEAST_CONVOLUTIONS:
            chains.append(best)
            start = order.index(best[-1]) + 1
        else:
            start += 1
    return chains


def _inputs(nodes: list[fx.Node]) -> list[fx.Node]:
    """Values from outside that some nodes read."""
    inside = set(nodes)
    found = (value for node in nodes for value in node.all_input_nodes if value not in inside)
    return list(dict.fromkeys(found))


def _results(nodes: list[fx.Node]) -> list[fx.Node]:
    """Those of some nodes whose value is read outside."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]


def _dtypes(nodes: list[fx.Node], layers: ChainLayers) -> set[torch.dtype]:
    """Dtypes of the weights of some nodes."""
    return {conv.weight.dtype for node in nodes for conv in layers.convolutions(node)}


def _head_nodes(
    mean: fx.Node, network: fx.GraphModule, dtype: torch.dtype = torch.float32
) -> list[fx.Node]:
    """What follows a mean of a dtype: flattening, conversion to float32 and a linear layer; or
    nothing."""
    found: list[fx.Node] = []
    node = mean
    conversion = () if dtype == torch.float32 else (_is_conversion,)
    for is_next in (_is_flatten, *conversion, _is_linear):
        users = list(node.users)
        if len(users) != 1 or not is_next(users[0], node, network):
            return []
        node = users[0]
        found.append(node)
    return found


def _is_flatten(node: fx.Node, source: fx.Node, network: fx.GraphModule) -> bool:
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        plain = type(module) is nn.Flatten and fused.is_plain(module)
        return plain and (module.start_dim, module.end_dim) in ((1, -1), (1, 3))
    if node.target not in (torch.flatten, "flatten"):
        return False
    options = arguments(node, "input start_dim end_dim")
    return options.get("start_dim") == 1 and options.get("end_dim", -1) in (-1, 3)


def _is_conversion(node: fx.Node, source: fx.Node, network: fx.GraphModule) -> bool:
    return node.target == "to" and node.args == (source, torch.float32) and not node.kwargs


def _is_linear(node: fx.Node, source: fx.Node, network: fx.GraphModule) -> bool:
    if node.op != "call_module" or node.args != (source,) or node.kwargs:
        return False
    module = network.get_submodule(str(node.target))
    plain = type(module) is nn.Linear and fused.is_plain(module)
    return plain and module.weight.dtype == torch.float32


def _chain(nodes: list[fx.Node], known: ChainLayers) -> Chain:
    """Some nodes as one call, and as a network of their own."""
    value = _inputs(nodes)[0]
    numbers = {value: 0}
    layers: list[Layer] = []
    sources: list[Module | None] = []
    graph = fx.Graph()
    copies = {value: graph.placeholder("x")}
    modules: dict[str, Any] = {}
    head = None
    for node in nodes:
        inputs: list[fx.Node] = []  # as often as the node reads each
        fx.map_arg((node.args, node.kwargs), inputs.append)
        found = [numbers[value] for value in inputs]
        first = len(layers)
        for layer, module in known.of(node) or ():
            layers.append(_renumbered(layer, found, first))
            sources.append(module)
        numbers[node] = len(layers)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            called = known.network.get_submodule(str(node.target))
            modules[str(node.target)] = called
            head = called if isinstance(called, nn.Linear) else head
    graph.output(copies[nodes[-1]])
    if head is not None:
        layers[-1] = Head(layers[-1].source, head.out_features)
    elif isinstance(layers[-1], NO_RESULTS) or _has_groups(layers[-1]):
        layers.append(Pointwise(len(layers)))
        sources.append(None)
    one_by_one = fx.GraphModule(modules, graph)
    return Chain(Network(layers, sources, one_by_one, head), one_by_one)


def _renumbered(layer: Layer, found: list[int], first: int) -> Layer:
    """A layer of a node with the numbers of the values that it reads.

    Args:
        layer: as :class:`ChainLayers` has it.
        found: numbers of the node's arguments.
        first: layers before those of the node.
    """

    def number(value: int) -> int:
        return found[value] if value >= 0 else first - value

    if isinstance(layer, Concat):
        return Concat(tuple(map(number, layer.sources)))
    names = ("source", "gate", "residual")
    read = {name: getattr(layer, name, None) for name in names}
    return replace(layer, **{name: number(v) for name, v in read.items() if v is not None})


def _has_groups(layer: Layer) -> bool:
    """Whether a convolution's groups are computed one by one."""
    return isinstance(layer, Conv) and layer.parts > 1
