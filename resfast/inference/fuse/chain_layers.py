"""The nodes of a fused graph as layers of a chain: :class:`ChainLayers`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resfast.inference.fuse import activations
from resfast.inference.fuse.nodes import ADDS, CATS, MAX_POOLS, MEANS, arguments, aten
from resfast.layers import fused
from resfast.ops.basic_block.op import BasicBlock
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.network.layers import (
    BFLOAT16,
    NETWORK_ACTIVATIONS,
    AveragePool,
    Concat,
    Conv,
    Layer,
    Layout,
    MaxPool,
    Mean,
    Pointwise,
)
from resfast.ops.network.network import layout_for
from resfast.ops.scale_shift.op import ScaleShiftAct

AVERAGE_POOLS = (F.avg_pool2d, aten.avg_pool2d.default)
PIXELS = ((2, 3), (-2, -1), (3, 2), (-1, -2))
"""Dimensions of a mean over a map."""
Module = ConvBiasAct | ScaleShiftAct


class ChainLayers:
    """What the nodes of a graph compute, as layers of a chain.

    Args:
        network: the fused graph.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self._known: dict[fx.Node, list[tuple[Layer, Module | None]] | None] = {}

    def of(self, node: fx.Node) -> list[tuple[Layer, Module | None]] | None:
        """A node's layers with the modules that their tensors are from; None: they have no kernels.

        A layer reads the node's arguments by their number, and the k-th layer of the node as -k.
        """
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def convolutions(self, node: fx.Node) -> list[Conv]:
        """Those of a node."""
        return [layer for layer, _ in self.of(node) or () if isinstance(layer, Conv)]

    def is_mean(self, node: fx.Node) -> bool:
        """Whether a node is the mean of a whole map."""
        return any(isinstance(layer, Mean) for layer, _ in self.of(node) or ())

    def _find(self, node: fx.Node) -> list[tuple[Layer, Module | None]] | None:
        if node.op == "call_module":
            return self._of_module(node)
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target in CATS:
            return self._concat(node)
        layer = self._of_function(node)
        return None if layer is None else [(layer, None)]

    def _of_module(self, node: fx.Node) -> list[tuple[Layer, Module | None]] | None:
        if node.kwargs:
            return None
        module = self.network.get_submodule(str(node.target))
        layer: Layer | None = None
        match module:
            case ConvBiasAct() if len(node.args) <= 2:
                conv = _conv(module, 0, 1 if len(node.args) == 2 else None)
                return None if conv is None else [(conv, module)]
            case BasicBlock():
                first, second = _conv(module.conv1, 0, None), _conv(module.conv2, -1, 0)
                if first is None or second is None:
                    return None
                return [(first, module.conv1), (second, module.conv2)]
            case ScaleShiftAct():
                return self._scale_shift(node, module)
            case nn.MaxPool2d() if fused.is_plain(module):
                layer = _max_pool(vars(module))
            case nn.AvgPool2d() if fused.is_plain(module):
                layer = _average_pool(vars(module))
            case nn.AdaptiveAvgPool2d() if fused.is_plain(module):
                layer = _mean(module.output_size)
            case _:
                layer = self._activation(node)
        return None if layer is None else [(layer, None)]

    def _of_function(self, node: fx.Node) -> Layer | None:
        if node.target in MAX_POOLS:
            names = "input kernel_size stride padding dilation ceil_mode return_indices"
            return _max_pool(arguments(node, names))
        if node.target in AVERAGE_POOLS:
            names = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
            return _average_pool(arguments(node, names))
        if node.target is F.adaptive_avg_pool2d:
            return _mean(arguments(node, "input output_size").get("output_size"))
        if node.target in MEANS:
            options = arguments(node, "input dim keepdim")
            dim = options.get("dim")
            over_pixels = isinstance(dim, list | tuple) and tuple(dim) in PIXELS
            kept = options.get("keepdim") is True and set(options) == {"input", "dim", "keepdim"}
            return Mean(0) if over_pixels and kept else None
        for targets, name in ((activations.MULTIPLICATIONS, "gate"), (ADDS, "residual")):
            pair = activations.operands(node, targets)
            if pair is not None:
                fits = self._fit(*pair, broadcasts=name == "gate")
                return Pointwise(0, **{name: 1}) if fits else None  # type: ignore[arg-type]
        return self._activation(node)

    def _fit(self, first: Any, second: Any, *, broadcasts: bool) -> bool:
        """Whether two values have the same channels, and size if none of one pixel broadcasts."""
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return False
        if not broadcasts and self._is_pixel(first) != self._is_pixel(second):
            return False
        channels = {self._channels(first), self._channels(second)} - {None}
        return len(channels) < 2

    def _is_pixel(self, value: fx.Node) -> bool:
        """Whether a value is a map of one pixel, since it depends on means of maps alone."""
        if self.of(value) is None:
            return False
        return self.is_mean(value) or all(map(self._is_pixel, value.all_input_nodes))

    def _activation(self, node: fx.Node) -> Layer | None:
        """An activation on its own."""
        inputs = node.all_input_nodes
        found = activations.activation(node, inputs[0], self.network) if len(inputs) == 1 else None
        if found is None or found["activation"] not in NETWORK_ACTIVATIONS:
            return None
        return Pointwise(0, **found)

    def _scale_shift(
        self, node: fx.Node, module: ScaleShiftAct
    ) -> list[tuple[Layer, Module | None]] | None:
        """A batch norm and an activation, over a concatenation of several arguments."""
        if module.activation not in NETWORK_ACTIVATIONS:
            return None
        found: list[tuple[Layer, Module | None]] = []
        first = 0
        for number, value in enumerate(node.args):
            count = len(module.scale) if len(node.args) == 1 else self._channels(value)
            if count is None:
                return None
            part = slice(first, first + count)
            factors = module.scale[part], module.shift[part]
            epilogue = module.activation, module.negative_slope
            found.append((Pointwise(number, *factors, *epilogue, first=first), module))
            first += count
        if len(found) > 1:
            found.append((Concat(tuple(-k - 1 for k in range(len(found)))), None))
        return found

    def _concat(self, node: fx.Node) -> list[tuple[Layer, Module | None]] | None:
        """A concatenation: convolutions write to their places, other values are copied there."""
        options = arguments(node, "tensors dim")
        values = options.get("tensors")
        if not isinstance(values, list | tuple) or options.get("dim", 0) not in (1, -3):
            return None
        copies: list[tuple[Layer, Module | None]] = []
        places = []
        channels: int | None = 0
        for number, value in enumerate(values):
            if not isinstance(value, fx.Node):
                return None
            count = self._channels(value)
            if self._writes_to(value, node, channels, count):
                places.append(number)
            else:
                copies.append((Pointwise(number), None))
                places.append(-len(copies))
            channels = None if channels is None or count is None else channels + count
        return [*copies, (Concat(tuple(places)), None)]

    def _writes_to(
        self, value: fx.Node, concatenation: fx.Node, first: int | None, count: int | None
    ) -> bool:
        """Whether a value's kernel can write to its place in a concatenation, from a channel on."""
        layers = self.of(value) if list(value.users) == [concatenation] else None
        if not layers or first is None or count is None or not isinstance(layers[-1][0], Conv):
            return False
        block = _layout(layers[-1][0]).block
        return not first % block and not count % block

    def _channels(self, value: Any) -> int | None:
        """Channels of a value, if layers of this class tell."""
        layers = self.of(value) if isinstance(value, fx.Node) else None
        if not layers:
            return None
        assert isinstance(value, fx.Node)
        inputs: list[fx.Node] = []
        fx.map_arg((value.args, value.kwargs), inputs.append)
        counts: list[int | None] = []
        for layer, _ in layers:
            if isinstance(layer, Conv):
                counts.append(layer.weight.shape[0])
                continue
            read = layer.sources if isinstance(layer, Concat) else (layer.source,)
            found = [counts[-k - 1] if k < 0 else self._channels(inputs[k]) for k in read]
            known = [count for count in found if count is not None]
            counts.append(sum(known) if len(known) == len(found) else None)
        return counts[-1]


def _layout(conv: Conv) -> Layout:
    return layout_for(conv.weight.dtype) or BFLOAT16


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
    return conv if conv.has_kernel(_layout(conv)) else None


def _mean(size: Any) -> Layer | None:
    """An adaptive average pool to a size."""
    return Mean(0) if size in (1, (1, 1), [1, 1]) else None


def _square(value: Any) -> int | None:
    """The number that an option for rows and columns is, if it is one."""
    if isinstance(value, int):
        return value
    same = isinstance(value, list | tuple) and len(set(value)) == 1
    return value[0] if same and isinstance(value[0], int) else None


def _window(options: dict[str, Any]) -> tuple[int, int, int] | None:
    """Kernel, stride and padding of a pool, if its windows are square."""
    kernel = _square(options.get("kernel_size"))
    stride = _square(options.get("stride") or options.get("kernel_size"))
    padding = _square(options.get("padding", 0))
    if kernel is None or stride is None or padding is None:
        return None
    return kernel, stride, padding


def _max_pool(options: dict[str, Any]) -> Layer | None:
    window = _window(options)
    if window is None or _square(options.get("dilation", 1)) != 1:
        return None
    if options.get("return_indices", False):
        return None
    return MaxPool(0, *window, bool(options.get("ceil_mode", False)))


def _average_pool(options: dict[str, Any]) -> Layer | None:
    window = _window(options)
    divisor = options.get("divisor_override")
    if window is None or window[2] or options.get("ceil_mode", False) or divisor is not None:
        return None
    return AveragePool(0, *window[:2])
