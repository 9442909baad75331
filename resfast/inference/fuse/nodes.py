"""The operations that fusion recognizes, and helpers that inspect the nodes of a graph."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = (*DTYPES, torch.float64)
SUBTRACTIONS = (operator.sub, torch.sub, torch.subtract, aten.sub.Tensor, "sub", "subtract")
ADDS = (operator.add, torch.add, aten.add.Tensor, "add")
CONVS = (F.conv2d, torch.conv2d, aten.conv2d.default)
NORMS = (F.batch_norm, aten.batch_norm.default)
LINEARS = (F.linear, aten.linear.default)
CATS = (torch.cat, torch.concat, torch.concatenate, aten.cat.default)
MEANS = (torch.mean, aten.mean.dim, "mean")
MAX_POOLS = (F.max_pool2d, torch.max_pool2d, aten.max_pool2d.default)
SCALINGS = (operator.mul, torch.mul, aten.mul.Tensor, aten.mul.Scalar, "mul")
IN_PLACE = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow")
}
STATEFUL = (operator.setitem, operator.iand, operator.ior, operator.ixor, operator.imatmul)
FOREIGN = {
    *("gelu", "leaky_relu", "elu", "selu", "celu", "mish", "hardtanh", "softplus", "prelu"),
    *("rrelu", "logsigmoid", "clamp", "softsign", "hardshrink", "softshrink", "tanhshrink"),
}
"""Activations that the fused kernel does not support, with some arguments at least."""
CASTS = {"float", "double", "half", "bfloat16"}


class UntraceableError(Exception):
    """The network cannot be represented as a graph without in-place operations."""


def kind_of(node: fx.Node, network: fx.GraphModule) -> str:
    """The name of the module class, method or function that a node calls."""
    if node.op == "call_module":
        return type(network.get_submodule(node.target)).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def arguments(node: fx.Node, names: str) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names.split(), node.args, strict=False)) | dict(node.kwargs)


def leaky(slope: Any) -> dict[str, Any] | None:
    known = isinstance(slope, int | float)
    return {"activation": "leaky_relu", "negative_slope": float(slope)} if known else None


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def only_scaled(node: fx.Node) -> fx.Node | None:
    """The only user of a value, after any multiplications by a number."""
    user = only_user(node)
    while user is not None and user.target in SCALINGS and user.all_input_nodes == [node]:
        node, user = user, only_user(user)
    return user


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    match value:
        case list() | tuple():
            return type(value)(map_leaves(function, item) for item in value)
        case dict():
            return {name: map_leaves(function, item) for name, item in value.items()}
    return function(value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turns off PyTorch's log of errors, for attempts that may fail."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
