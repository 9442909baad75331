"""Moves batch norms to where a convolution or linear layer can take them in: :func:`place_norms`.

A batch norm in eval mode scales and shifts each channel. It commutes with average pools, splits
over the parts of a concatenation, and can be part of the layer before it or of unpadded layers
after it. What remains becomes one operation with the activation after it and the concatenation
before it: :func:`fuse_rest`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resfast.inference.fuse.nodes import CATS, LINEARS, MEANS, arguments, aten, only_user
from resfast.inference.fuse.patterns import Patterns, scale_shift
from resfast.layers import fused
from resfast.ops.scale_shift.op import ScaleShiftAct

Factors = tuple[Tensor, Tensor]
"""Scale and shift, float64 ``[C]`` each."""
MAX_RATIO = 4.0
"""Largest ratio of a mean to a standard deviation at which a 16-bit layer after a batch norm takes
it in: the layer's weights are then rounded for values that are not centred."""


def place_norms(patterns: Patterns, dtype: torch.dtype) -> int:
    """Makes every batch norm a call of :func:`scale_shift`, moved to a layer that can take it in.

    Args:
        patterns: the graph, rewritten in place.
        dtype: of the fused network.

    Returns:
        The number of batch norms that became part of a linear layer. Convolutions take in those
        after them later; those before them are in ``meta["inputs"]`` of their nodes.
    """
    for node in list(patterns.graph.nodes):
        factors = patterns.norm(node, node.args[0]) if node.args else None
        if factors is not None and isinstance(node.args[0], fx.Node):
            _mark(patterns, node, factors)
    count = _fold_after_linears(patterns)
    for node in _marked(patterns):
        _move_before_pool(patterns, node)
    for node in _marked(patterns):
        _split_over_parts(patterns, node)
    for node in _marked(patterns):
        count += _fold_into_users(patterns, node, dtype)
    return count


def _marked(patterns: Patterns) -> list[fx.Node]:
    return [node for node in patterns.graph.nodes if node.target is scale_shift]


def _mark(patterns: Patterns, node: fx.Node, factors: Factors) -> fx.Node:
    new = _insert(patterns, node, node.args[0], factors, patterns.name(node))
    new.meta = {**node.meta, **new.meta}
    node.replace_all_uses_with(new)
    patterns.erase([node])
    return new


def _insert(patterns: Patterns, before: fx.Node, x: Any, factors: Factors, name: str) -> fx.Node:
    with patterns.graph.inserting_before(before):
        new = patterns.graph.call_function(scale_shift, (x,))
    new.meta = {"factors": factors, "name": name}
    if isinstance(x, fx.Node) and "shapes" in x.meta:
        new.meta["shapes"] = x.meta["shapes"]
    return new


def takes_norm(patterns: Patterns, node: Any, user: fx.Node) -> int | None:
    """The channels of a value if it is a convolution's that can take in a norm by its only user."""
    while isinstance(node, fx.Node) and only_user(node) is user:
        if found := patterns.conv(node):
            return found[0].out_channels
        if node.target is not scale_shift:
            return None
        node, user = node.args[0], node
    return None


def _move_before_pool(patterns: Patterns, node: fx.Node) -> None:
    pool = node.args[0]
    if only_user(pool) is not node or not is_average_pool(patterns, pool):
        return
    x = pool.args[0]
    if takes_norm(patterns, x, pool) is None:
        return
    new = _insert(patterns, pool, x, node.meta["factors"], node.meta["name"])
    pool.replace_input_with(x, new)
    node.replace_all_uses_with(pool)
    patterns.graph.erase_node(node)


def is_average_pool(patterns: Patterns, node: fx.Node) -> bool:
    """Whether a node averages over pixels only, with weights whose sum is 1."""
    module = patterns.module(node)
    if module is not None:
        if not fused.is_plain(module) or len(node.args) != 1 or node.kwargs:
            return False
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return True
        if type(module) is not nn.AvgPool2d or module.divisor_override is not None:
            return False
        return not module.count_include_pad or module.padding in (0, (0, 0))
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    if node.target in (F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default):
        return True
    if node.target in (F.avg_pool2d, aten.avg_pool2d.default):
        names = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
        a = arguments(node, names)
        if a.get("divisor_override") is not None:
            return False
        return not a.get("count_include_pad", True) or a.get("padding", 0) in (0, (0, 0), [0, 0])
    if node.target in MEANS:
        a = arguments(node, "input dim keepdim")
        dim = a.get("dim")
        four = [len(s) for s in node.args[0].meta.get("shapes", {}).values()]
        kept = a.get("keepdim", False) is True and "dtype" not in a
        return kept and bool(four) and set(four) == {4} and _pixels(dim)
    return False


def _pixels(dim: Any) -> bool:
    return isinstance(dim, list | tuple) and sorted(d % 4 for d in dim) == [2, 3]


def parts_of(node: Any) -> list[fx.Node] | None:
    """The values that a node concatenates along the channels, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in CATS:
        return None
    a = arguments(node, "tensors dim")
    parts, dim = a.get("tensors"), a.get("dim", a.get("axis", 0))
    if dim != 1 or not isinstance(parts, list | tuple):
        return None
    return list(parts) if parts and all(isinstance(p, fx.Node) for p in parts) else None


def _split_over_parts(patterns: Patterns, node: fx.Node) -> None:
    cat = node.args[0]
    parts = parts_of(cat)
    if parts is None or only_user(cat) is not node or len(set(parts)) != len(parts):
        return
    channels = [takes_norm(patterns, part, cat) for part in parts]
    scale, shift = node.meta["factors"]
    if None in channels or sum(c for c in channels if c) != len(scale):
        return
    sizes = [c for c in channels if c]
    new = [
        _insert(patterns, cat, part, factors, node.meta["name"])
        for part, *factors in zip(parts, scale.split(sizes), shift.split(sizes), strict=True)
    ]
    cat.args = (new, *cat.args[1:]) if cat.args else ()
    if "tensors" in cat.kwargs:
        cat.kwargs = {**cat.kwargs, "tensors": new}
    node.replace_all_uses_with(cat)
    patterns.graph.erase_node(node)


# -- layers after a norm, and linear layers before one --------------------------------------------


def _fold_into_users(patterns: Patterns, node: fx.Node, dtype: torch.dtype) -> int:
    """Lets all users of a norm take it in, if no convolution before it does and all of them can."""
    scale, shift = node.meta["factors"]
    if takes_norm(patterns, node.args[0], node) is not None or not node.users:
        return 0
    if dtype != torch.float32 and not bool((shift.abs() <= MAX_RATIO).all()):
        return 0
    users = list(node.users)
    convs = [patterns.conv(user) for user in users]
    linears = [linear_of(patterns, user, node) for user in users]
    for user, conv, linear in zip(users, convs, linears, strict=True):
        if conv is not None:
            is_right = conv[1] is node and conv[0].in_channels == len(scale)
            if not is_right or not _pads_nothing(conv[0], shift) or "inputs" in user.meta:
                return 0
        elif linear is None or linear[0].shape[1] != len(scale) or not _has_rank(node, 2):
            return 0
    for user, linear in zip(users, linears, strict=True):
        if linear is None:
            user.meta["inputs"] = node.meta["factors"]
            user.meta["norm"] = node.meta["name"]
            user.replace_input_with(node, node.args[0])
        else:
            weight, bias = linear
            moved = weight.double() @ shift
            _replace_linear(
                patterns, user, weight.double() * scale,
                moved if bias is None else bias.double() + moved,
                node.args[0],
            )  # fmt: skip
    patterns.graph.erase_node(node)
    return any(linear is not None for linear in linears)


def _pads_nothing(conv: nn.Conv2d, shift: Tensor) -> bool:
    """Whether the values that a convolution pads with are normalised like all others."""
    padding = fused.conv_padding(conv)
    return padding == (0, 0) or conv.padding_mode != "zeros" or bool((shift == 0).all())


def linear_of(patterns: Patterns, node: fx.Node, x: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias if the node is a plain linear layer of ``x`` with constant weights."""
    module = patterns.module(node)
    if module is not None:
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if not plain or not fused.is_plain(module) or node.args != (x,) or node.kwargs:
            return None
        return module.weight, module.bias
    if node.op != "call_function" or node.target not in LINEARS:
        return None
    a = arguments(node, "input weight bias")
    weight, bias = patterns.constant(a["weight"]), patterns.constant(a.get("bias"))
    if a["input"] is not x or weight is None or weight.ndim != 2:
        return None
    return None if bias is None and a.get("bias") is not None else (weight, bias)


def _has_rank(node: fx.Node, rank: int) -> bool:
    shapes = node.meta.get("shapes", {}).values()
    return bool(shapes) and all(len(shape) == rank for shape in shapes)


def _replace_linear(
    patterns: Patterns, node: fx.Node, weight: Tensor, bias: Tensor, x: Any
) -> fx.Node:
    """Replaces a linear layer by one of other weights; returns its node."""
    new = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    new.weight = nn.Parameter(weight.float(), requires_grad=False)
    new.bias = nn.Parameter(bias.float(), requires_grad=False)
    name = patterns.name(node)
    with patterns.graph.inserting_before(node):
        call = patterns.graph.create_node("call_module", name, (x,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    patterns.erase([node])
    patterns.add_module(call, name, new.eval())
    return call


def _fold_after_linears(patterns: Patterns) -> int:
    """Folds batch norms of ``[N, C]`` into the linear layers before them."""
    count = 0
    for node in list(patterns.graph.nodes):
        factors = patterns.norm(node, node.args[0], of_rows=True) if node.args else None
        x = node.args[0] if factors else None
        if not isinstance(x, fx.Node) or only_user(x) is not node or not _has_rank(x, 2):
            continue
        before = x.args[0] if x.args else arguments(x, "input").get("input")
        linear = linear_of(patterns, x, before)
        if linear is None or factors is None:
            continue
        scale, shift = factors
        weight, bias = linear
        moved = shift if bias is None else shift + scale * bias.double()
        call = _replace_linear(patterns, x, weight.double() * scale[:, None], moved, before)
        node.replace_all_uses_with(call)
        patterns.erase([node])
        count += 1
    return count


# -- the rest -------------------------------------------------------------------------------------


def fuse_rest(patterns: Patterns) -> None:
    """Makes one operation of each norm left, with the concatenation and activation around it."""
    nodes = _marked(patterns)
    copied = _copied_cats(patterns)
    _flatten_cats(patterns, copied)
    for node in nodes:
        scale, shift = node.meta["factors"]
        options: dict[str, Any] = {}
        last, user = node, only_user(node)
        if user is not None and (found := patterns.activation(user, node)):
            options, last = found, user
        parts = _flat(node.args[0], copied)
        with patterns.graph.inserting_before(last):
            call = patterns.graph.create_node("call_module", node.meta["name"], tuple(parts))
        call.meta = {name: value for name, value in last.meta.items() if name == "shapes"}
        last.replace_all_uses_with(call)
        patterns.erase([node] if last is node else [node, last])
        patterns.add_module(call, node.meta["name"], ScaleShiftAct(scale, shift, **options))
    patterns.graph.eliminate_dead_code()


def _copied_cats(patterns: Patterns) -> set[fx.Node]:
    """Concatenations that something else than a norm or another concatenation reads."""
    cats = (node for node in patterns.graph.nodes if parts_of(node) is not None)
    return {
        cat
        for cat in cats
        if any(u.target is not scale_shift and parts_of(u) is None for u in cat.users)
    }


def _flatten_cats(patterns: Patterns, copied: set[fx.Node]) -> None:
    """Lets concatenations read the parts of others that need not be copied."""
    for node in copied:
        parts = [inner for part in parts_of(node) or () for inner in _flat(part, copied)]
        node.args, node.kwargs = (parts, 1), {}


def _flat(node: fx.Node, copied: set[fx.Node]) -> list[fx.Node]:
    parts = parts_of(node)
    if parts is None or node in copied:
        return [node]
    return [inner for part in parts for inner in _flat(part, copied)]
