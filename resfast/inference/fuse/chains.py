"""Chains of fused convolutions that run as one call on the CPU: :func:`with_chains`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks

from resfast.inference.fuse.nodes import MAX_POOLS, arguments
from resfast.layers import fused
from resfast.ops.basic_block.op import BasicBlock
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.network.layers import (
    BFLOAT16,
    NETWORK_ACTIVATIONS,
    Concat,
    Conv,
    Head,
    Layer,
    MaxPool,
    Mean,
)
from resfast.ops.network.network import Network, layout_for

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
LEAST_CONVOLUTIONS = 2
"""Of a chain; fewer are not worth a plan."""


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


def with_chains(network: fx.GraphModule) -> fx.GraphModule | None:
    """A network that shares its modules with another one and runs chains of them as one call each.

    Args:
        network: a graph with fused convolutions; left as it is.

    Returns:
        None where there is no chain.
    """
    order = list(network.graph.nodes)
    chains = _find(order, network)
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
            modules[name] = _chain(nodes, network)
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


def _find(order: list[fx.Node], network: fx.GraphModule) -> list[list[fx.Node]]:
    """The longest runs of nodes that the kernels have, with one input and one result."""
    chains = []
    start = 0
    while start < len(order):
        best = start
        end = start
        while end < len(order) and _layers(order[end], network) is not None:
            end += 1
            nodes = order[start:end]
            if len(_dtypes(nodes, network)) > 1:
                break
            layers = _layers(nodes[-1], network) or []
            ends = not isinstance(layers[-1], MaxPool | Concat) and not _has_groups(layers[-1])
            if ends and len(_inputs(nodes)) == 1 and _results(nodes) == [nodes[-1]]:
                best = end
            if _is_mean(order[end - 1], network):
                break
        nodes = order[start:best]
        if nodes and _is_mean(nodes[-1], network):
            nodes += _head_nodes(nodes[-1], network, *_dtypes(nodes, network))
        if sum(_convolutions(node, network) for node in nodes) >= LEAST_CONVOLUTIONS:
            chains.append(nodes)
            start = order.index(nodes[-1]) + 1
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


def _dtypes(nodes: list[fx.Node], network: fx.GraphModule) -> set[torch.dtype]:
    """Dtypes of the weights of some nodes."""
    layers = (layer for node in nodes for layer in _layers(node, network) or ())
    return {layer.weight.dtype for layer in layers if isinstance(layer, Conv)}


def _convolutions(node: fx.Node, network: fx.GraphModule) -> int:
    return sum(isinstance(layer, Conv) for layer in _layers(node, network) or ())


def _is_mean(node: fx.Node, network: fx.GraphModule) -> bool:
    return any(isinstance(layer, Mean) for layer in _layers(node, network) or ())


def _layers(node: fx.Node, network: fx.GraphModule) -> list[Layer] | None:
    """A node as layers, whose sources are numbered by its arguments; None where there are none.

    The first layer of a residual block is value -1 of the second.
    """
    if node.target in MAX_POOLS and node.op == "call_function":
        names = "input kernel_size stride padding dilation ceil_mode return_indices"
        return _pool(arguments(node, names))
    if node.target in CONCATENATIONS:
        return _concat(node, network)
    if node.target is F.adaptive_avg_pool2d:
        return _mean(arguments(node, "input output_size").get("output_size"))
    if node.op != "call_module" or node.kwargs:
        return None
    module = network.get_submodule(str(node.target))
    match module:
        case ConvBiasAct() if len(node.args) <= 2:
            conv = _conv(module, 0, 1 if len(node.args) == 2 else None)
            return None if conv is None else [conv]
        case BasicBlock():
            pair = _conv(module.conv1, 0, None), _conv(module.conv2, -1, 0)
            return None if None in pair else list(pair)
        case nn.MaxPool2d() if fused.is_plain(module):
            return _pool(vars(module))
        case nn.AdaptiveAvgPool2d() if fused.is_plain(module):
            return _mean(module.output_size)
    return None


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


def _conv(module: ConvBiasAct, source: int, residual: int | None) -> Conv | None:
    if module.weight.dtype not in (torch.bfloat16, torch.float32):
        return None
    if max(module.dilation) > 1 or module.activation not in NETWORK_ACTIVATIONS:
        return None
    if module.stride[0] != module.stride[1] or module.stride[0] > 2:
        return None
    conv = Conv(
        source,
        module.weight,
        module.bias,
        module.stride[0],
        (module.padding[0], module.padding[1]),
        module.activation,
        module.negative_slope,
        residual,
        module.groups,
    )
    return conv if conv.has_kernel(layout_for(module.weight.dtype) or BFLOAT16) else None


def _concat(node: fx.Node, network: fx.GraphModule) -> list[Layer] | None:
    """A concatenation of results of convolutions that are read here only, and that fill lines."""
    options = arguments(node, "tensors dim")
    values = options.get("tensors")
    if not isinstance(values, list | tuple) or len(set(values)) < len(values):
        return None
    if options.get("dim", 0) not in (1, -3):
        return None
    for value in values:
        if not isinstance(value, fx.Node) or list(value.users) != [node]:
            return None
        layers = _layers(value, network) if value.op == "call_module" else None
        if layers is None or not isinstance(layers[-1], Conv):
            return None
        layout = layout_for(layers[-1].weight.dtype) or BFLOAT16
        if layers[-1].weight.shape[0] % layout.block:
            return None
    return [Concat(tuple(range(len(values))))]


def _has_groups(layer: Layer) -> bool:
    """Whether a convolution's groups are computed one by one, which a result is not written by."""
    return isinstance(layer, Conv) and layer.parts > 1


def _mean(size: Any) -> list[Layer] | None:
    """An adaptive average pool to a size."""
    return [Mean(0)] if size in (1, (1, 1), [1, 1]) else None


def _pool(options: dict[str, Any]) -> list[Layer] | None:
    def one(value: Any) -> int | None:
        if isinstance(value, int):
            return value
        same = isinstance(value, list | tuple) and len(set(value)) == 1
        return value[0] if same and isinstance(value[0], int) else None

    kernel = one(options.get("kernel_size"))
    stride = one(options.get("stride") or options.get("kernel_size"))
    padding = one(options.get("padding", 0))
    if None in (kernel, stride, padding) or one(options.get("dilation", 1)) != 1:
        return None
    if options.get("return_indices", False):
        return None
    return [MaxPool(0, kernel, stride, padding, bool(options.get("ceil_mode", False)))]


def _chain(nodes: list[fx.Node], network: fx.GraphModule) -> Chain:
    """Some nodes as one call, and as a network of their own."""
    value = _inputs(nodes)[0]
    numbers = {value: 0}
    layers: list[Layer] = []
    convolutions: list[ConvBiasAct] = []
    graph = fx.Graph()
    copies = {value: graph.placeholder("x")}
    modules: dict[str, Any] = {}
    head = None
    for node in nodes:
        inputs: list[fx.Node] = []  # as often as the node reads each
        fx.map_arg((node.args, node.kwargs), inputs.append)
        found = [numbers[value] for value in inputs]
        for layer in _layers(node, network) or ():
            if isinstance(layer, Concat):
                layers.append(Concat(tuple(found)))
                continue
            values = {"source": len(layers) if layer.source < 0 else found[layer.source]}
            if isinstance(layer, Conv) and layer.residual is not None:
                values["residual"] = found[layer.residual]
            layers.append(replace(layer, **values))
        numbers[node] = len(layers)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            modules[str(node.target)] = module
            head = module if isinstance(module, nn.Linear) else head
            convolutions += [m for m in module.modules() if isinstance(m, ConvBiasAct)]
    graph.output(copies[nodes[-1]])
    if head is not None:
        layers[-1] = Head(layers[-1].source, head.out_features)
    one_by_one = fx.GraphModule(modules, graph)
    return Chain(Network(layers, convolutions, one_by_one, head), one_by_one)
