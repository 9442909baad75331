"""Converts a fused network to its dtype: :func:`convert`.

Casts and new tensors of an explicit dtype stay as they are written, so a deliberate ``x.float()``
computes in float32, as does the last linear layer. Where such values, or tensors that forward makes
in the default dtype, meet weights of the network's dtype, one of them is cast.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from resfast.inference.fuse.nodes import (
    CASTS,
    FLOATS,
    LINEARS,
    NORMS,
    kind_of,
    map_leaves,
    only_scaled,
)
from resfast.inference.fuse.patterns import Patterns
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.scale_shift.op import ScaleShiftAct

ONE_DTYPE = {
    *("linear", "bilinear", "matmul", "mm", "bmm", "mv", "dot", "vdot", "outer", "inner", "einsum"),
    *("tensordot", "addmm", "addbmm", "baddbmm", "addmv", "addr", "kron", "cross", "cdist"),
    *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"),
    *("conv_transpose3d", "layer_norm", "group_norm", "instance_norm", "rms_norm", "prelu"),
    *("native_layer_norm", "native_group_norm", "scaled_dot_product_attention", "grid_sample"),
    *("cosine_similarity", "lerp", "index_put", "index_add", "index_copy", "scatter"),
    *("scatter_add", "masked_scatter", "embedding_bag", "multi_head_attention_forward"),
}
"""Functions whose floating-point tensors must have the same dtype."""
OF_FIRST = {
    *("view", "reshape", "flatten", "transpose", "permute", "t", "squeeze", "unsqueeze", "expand"),
    *("contiguous", "detach", "chunk", "split", "unbind", "getitem", "select", "narrow", "slice"),
    *("relu", "silu", "gelu", "leaky_relu", "sigmoid", "tanh", "hardswish", "relu6", "softmax"),
    *("mean", "sum", "amax", "amin", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "clamp"),
    *("adaptive_max_pool2d", "pad", "interpolate", "normalize", "neg", "abs", "exp", "sqrt"),
}
"""Functions of a floating-point tensor whose result has its dtype."""
OF_ALL = {"add", "sub", "mul", "truediv", "div", "maximum", "minimum", "cat", "stack"}
"""Functions of floating-point tensors whose result has the widest of their dtypes."""


def floating_to(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating-point tensor in it cast to ``dtype``."""
    return map_leaves(lambda x: x.to(dtype) if _is_floating(x) else x, value)


def same_dtype(*values: Any) -> tuple[Any, ...]:
    """The values, with every floating-point tensor cast to the widest of their dtypes."""
    dtypes = [value.dtype for value in values if _is_floating(value)]
    if len(set(dtypes)) < 2:
        return values
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return tuple(value.to(widest) if _is_floating(value) else value for value in values)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cast_as_own(patterns: Patterns, own: torch.dtype, dtype: torch.dtype) -> None:
    """Turns casts to the original's dtype into casts to the network's, unless it is float32.

    In a float32 network, a cast to float32 asks for float32.
    """
    if own == torch.float32 or own == dtype:
        return
    methods = {"float": torch.float32, "half": torch.float16, "double": torch.float64}
    methods["bfloat16"] = torch.bfloat16
    for node in patterns.graph.nodes:
        if node.op == "call_method" and methods.get(node.target) == own:
            node.target, node.args, node.kwargs = "to", (node.args[0], dtype), {}
        elif node.op.startswith("call_"):
            node.args, node.kwargs = (
                map_leaves(lambda value: dtype if value is own else value, part)
                for part in (node.args, node.kwargs)
            )


def convert(patterns: Patterns, dtype: torch.dtype) -> None:
    """Converts all weights to ``dtype``, but batch norms and a last linear layer to float32."""
    _Conversion(patterns, dtype).run()


class _Conversion:
    """The conversion of one graph.

    Attributes:
        dtypes: dtype of each node's value, if it is certain to be a floating-point tensor of it.
        exact: linear layers that are computed in float32, because only scaling follows.
        wide: names of modules that are kept in float32.
    """

    def __init__(self, patterns: Patterns, dtype: torch.dtype) -> None:
        self.patterns, self.graph, self.dtype = patterns, patterns.graph, dtype
        self.dtypes: dict[fx.Node, torch.dtype] = {}
        output = next(node for node in self.graph.nodes if node.op == "output")
        linears = (node for node in self.graph.nodes if self._is_linear(node))
        self.exact = {node for node in linears if only_scaled(node) is output}
        self.wide = {node.target for node in self.exact if node.op == "call_module"}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            dtype = self._dtype(node)
            if dtype is not None:
                self.dtypes[node] = dtype
        self._convert_modules()
        self._convert_constants()

    def _is_linear(self, node: fx.Node) -> bool:
        linear = isinstance(self.patterns.module(node), nn.Linear) or node.target in LINEARS
        return linear and bool(node.all_input_nodes)

    def _dtype(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of a node's value, after its inputs are cast as it needs them."""
        if node.op == "placeholder":
            modules = (self.patterns.module(user) for user in node.users)
            kinds = ConvBiasAct | nn.Conv2d | nn.Linear | ScaleShiftAct
            floating = any(isinstance(m, kinds) for m in modules)
            return self.dtype if floating else None
        if node.op == "get_attr":
            return self.dtype if _is_floating(self.patterns.constant(node)) else None
        if node.op == "call_module":
            return self._module_dtype(node)
        if node.op in ("call_function", "call_method"):
            return self._function_dtype(node)
        return None

    def _module_dtype(self, node: fx.Node) -> torch.dtype | None:
        module = self.patterns.module(node)
        inputs = {self.dtypes.get(value) for value in node.all_input_nodes}
        first = next(iter(inputs)) if len(inputs) == 1 else None
        if isinstance(module, nn.modules.batchnorm._BatchNorm | ScaleShiftAct):
            return first
        if not any(_is_floating(tensor) for tensor in (*module.parameters(), *module.buffers())):
            return first if type(module).__module__.startswith("torch.nn.modules") else None
        if first == torch.float32 != self.dtype and not isinstance(module, ConvBiasAct):
            calls = [other for other in self.graph.nodes if other.target == node.target]
            if len(calls) == 1:
                self.wide.add(node.target)
        dtype = torch.float32 if node.target in self.wide else self.dtype
        floats = isinstance(module, ConvBiasAct | nn.modules.conv._ConvNd | nn.Linear)
        self._cast_inputs(node, dtype, floats=floats)
        return dtype

    def _function_dtype(self, node: fx.Node) -> torch.dtype | None:
        name = kind_of(node, self.patterns.network).partition(".")[0]
        if node in self.exact:
            self._cast_inputs(node, torch.float32, floats=True)
            return torch.float32
        inputs = node.all_input_nodes
        known = [self.dtypes.get(value) for value in inputs]
        if name in CASTS or name in ("to", "type"):
            given = [value for value in (*node.args, *node.kwargs.values()) if value in FLOATS]
            if name == "float":
                given = [torch.float32]
            return given[0] if given else None
        if "dtype" in node.kwargs and name in OF_FIRST:
            given = node.kwargs["dtype"]
            return given if given in FLOATS else None if given is not None else known[0]
        if name in ONE_DTYPE and len(inputs) > 1:
            if set(known) != {self.dtype}:
                self._make_same(node)
            return self.dtype if set(known) == {self.dtype} else None
        if node.target in NORMS or (name in OF_FIRST and node.args and inputs):
            return known[0] if node.args[0] is inputs[0] else None
        if name in OF_ALL and inputs and None not in known:
            widest = known[0]
            for dtype in known[1:]:
                widest = torch.promote_types(widest, dtype)
            return widest
        return None

    def _cast_inputs(self, node: fx.Node, dtype: torch.dtype, *, floats: bool) -> None:
        """Casts the inputs of a node unless they are known to have a dtype."""

        def cast(value: Any) -> Any:
            if not isinstance(value, fx.Node) or self.dtypes.get(value) == dtype == self.dtype:
                return value
            if value.op == "get_attr" and self.exact.issuperset(value.users):
                return value  # stays in float32
            with self.graph.inserting_before(node):
                if floats:
                    new = self.graph.call_method("to", (value, dtype))
                else:
                    new = self.graph.call_function(floating_to, (value, dtype))
            self.dtypes[new] = dtype
            return new

        node.args = map_leaves(cast, node.args)
        node.kwargs = map_leaves(cast, node.kwargs)

    def _make_same(self, node: fx.Node) -> None:
        """Casts the inputs of a node to the widest of their dtypes."""
        if self.dtype == torch.float32:
            return
        with self.graph.inserting_before(node):
            inputs = node.all_input_nodes
            same = self.graph.call_function(same_dtype, tuple(inputs))
            new = {
                value: self.graph.call_function(operator.getitem, (same, index))
                for index, value in enumerate(inputs)
            }
        node.args = map_leaves(lambda x: new.get(x, x) if isinstance(x, fx.Node) else x, node.args)
        node.kwargs = map_leaves(
            lambda x: new.get(x, x) if isinstance(x, fx.Node) else x, node.kwargs
        )

    def _convert_modules(self) -> None:
        for target in {node.target for node in self.graph.nodes if node.op == "call_module"}:
            module = self.patterns.network.get_submodule(target)
            if isinstance(module, ConvBiasAct | ScaleShiftAct):
                continue
            wide = isinstance(module, nn.modules.batchnorm._BatchNorm) or target in self.wide
            dtype = torch.float32 if wide else self.dtype
            module.to(dtype)
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.ndim == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)

    def _convert_constants(self) -> None:
        users: dict[str, set[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                users.setdefault(node.target, set()).update(node.users)
        for target, readers in users.items():
            first = next(node for node in self.graph.nodes if node.target == target)
            tensor = self.patterns.constant(first)
            if not _is_floating(tensor):
                continue
            wide = all(
                reader in self.exact
                or reader.target in NORMS
                or self.dtypes.get(reader) == torch.float32
                for reader in readers
            )
            owner, _, name = target.rpartition(".")
            place = self.patterns.network.get_submodule(owner)
            tensor = tensor.to(torch.float32 if wide else self.dtype)
            if name in place._parameters:
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(place, name, tensor)
