"""Rewrites the forward of a module that calls batch norms: :func:`rewrite`.

A batch norm, the addition of a residual after it and the activation after that become one call. The
new forward calls the same submodules as the old one for everything else. It runs only while nothing
has changed that it depends on; otherwise the module runs its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from resfast.inference.fuse.activations import activation as known_activation
from resfast.inference.fuse.nodes import ADDS, IN_PLACE, arguments, only_user
from resfast.layers.replaced import observed, original_class
from resfast.ops.conv.reference import KERNEL_ACTIVATIONS, TORCH_NEGATIVE_SLOPE
from resfast.training.optimize import calls
from resfast.training.optimize.tracing import Trace, trace

_SUMS = (*ADDS, operator.iadd, "add_")
_CALLS = ("call_function", "call_method")
_RELU_IN_PLACE = (torch.relu_, "relu_")
_FRESH = (nn.Conv2d, nn.BatchNorm2d)
"""Modules whose result nothing else holds, so that nobody sees whether it changes in place."""


@dataclass(frozen=True)
class Block:
    """A rewritten forward.

    Attributes:
        forward: takes the module and its inputs.
        traced: what it depends on.
        fused: paths of the submodules that are part of fused calls: norms and activations.
        identities: paths of the submodules that are skipped because they return their input.
        activations: number of activations in fused calls.
        residuals: number of additions in fused calls.
        views: whether ``view`` became ``reshape``, so that maps may be in ``channels_last``.
    """

    forward: Callable[..., Any]
    traced: Trace
    fused: tuple[str, ...]
    identities: tuple[str, ...]
    activations: int
    residuals: int
    views: bool

    def applies(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether to run the rewritten forward for these arguments."""
        if kwargs or len(args) != self.traced.inputs or not torch.is_grad_enabled():
            return False
        for value in args:
            if not isinstance(value, Tensor):
                return False
        return self.holds(module)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is still as it was, and no hook waits for a call that is gone."""
        if not module.training or not self.traced.holds(module):
            return False
        for path in self.fused:
            if observed(_child(module, path)):
                return False
        for path in self.identities:
            child = _child(module, path)
            if type(child) is not nn.Identity or observed(child):
                return False
        return True


def _child(module: nn.Module, path: str) -> nn.Module:
    return module._modules[path] if path in module._modules else module.get_submodule(path)


def rewrite(module: nn.Module) -> Block | None:
    """The forward of a module with fused calls, or None if there is nothing to fuse.

    Raises:
        UntraceableError: the forward cannot be replaced by a graph.
    """
    traced = trace(module)
    rewriter = _Rewriter(module, traced.graph)
    rewriter.run()
    if not (rewriter.fused or rewriter.views):
        return None
    traced.graph.lint()
    code = traced.graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<resfast: {type(module).__name__}.forward>", "exec"), namespace)
    return Block(
        namespace["forward"],
        traced,
        tuple(rewriter.fused),
        tuple(dict.fromkeys(rewriter.identities)),
        rewriter.activations,
        rewriter.residuals,
        rewriter.views,
    )


class _Rewriter:
    """Fuses calls in the graph of one forward."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.fused: list[str] = []
        self.identities: list[str] = []
        self.activations = self.residuals = 0
        self.views = False

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if self._is_norm(node):
                self._fuse_norm(node)
        for node in list(self.graph.nodes):
            if node.target in _SUMS and node.op in _CALLS:
                self._fuse_sum(node)
        for node in list(self.graph.nodes):
            self._allow_any_layout(node)

    def _called(self, node: Any, inputs: int = 1) -> nn.Module | None:
        """The submodule that a node calls with so many inputs, or None."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs:
            return None
        return self.module.get_submodule(node.target) if len(node.args) == inputs else None

    def _is_norm(self, node: fx.Node) -> bool:
        norm = self._called(node)
        return norm is not None and is_batch_norm(norm) and isinstance(node.args[0], fx.Node)

    def _next(self, node: fx.Node, skipped: list[fx.Node]) -> fx.Node | None:
        """The only user of a value, after any ``nn.Identity``, which are added to ``skipped``."""
        user = only_user(node)
        while user is not None and type(self._called(user)) is nn.Identity:
            skipped.append(user)
            user = only_user(user)
        return user

    def _activation(self, node: fx.Node | None, x: fx.Node) -> tuple[Any, float] | None:
        """The activation module's path or the activation's name, and its slope."""
        if node is None:
            return None
        if node.target in _RELU_IN_PLACE and node.args == (x,) and not node.kwargs:
            return "relu", 0.0
        found = known_activation(node, x, self.module)
        if found is None or found["activation"] not in KERNEL_ACTIVATIONS:
            return None
        slope = found.get("negative_slope", TORCH_NEGATIVE_SLOPE)
        if slope < 0:
            return None
        return (None if node.op == "call_module" else found["activation"]), slope

    def _operand(self, node: fx.Node | None, x: fx.Node) -> fx.Node | None:
        """What a node adds to ``x``, or None if it does not, or changes something else in place."""
        if node is None or node.target not in _SUMS or node.op not in _CALLS:
            return None
        a = arguments(node, "input other alpha")
        pair = [a.get("input"), a.get("other")]
        if a.get("alpha", 1) != 1 or len(a) != 2 or pair.count(x) != 1:
            return None
        other = pair[1 - pair.index(x)]
        if not isinstance(other, fx.Node) or (_changes(node) and pair[0] is not x):
            return None
        return other

    def _fuse_norm(self, norm: fx.Node) -> None:
        """Fuses a batch norm with the addition and the activation that follow it."""
        x, nodes = norm.args[0], [norm]
        skipped: list[fx.Node] = []
        value, residual, place, in_place = norm, None, norm, False
        user = self._next(value, skipped)
        before = skipped[-1] if skipped else value
        other = self._operand(user, before)
        # The norm moves to the addition: nothing may change its input until then.
        if other is not None and only_user(x) is norm and x.op == "call_module":
            nodes += [*skipped, user]
            residual, value, place, in_place = other, user, user, _changes(user)
            skipped = []
            user = self._next(value, skipped)
            before = skipped[-1] if skipped else value
        activation: Any = "none"
        slope = 0.0
        if (found := self._activation(user, before)) is not None:
            activation, slope = found
            nodes += [*skipped, user]
        if len(nodes) == 1:
            return
        with self.graph.inserting_before(place):
            module = self.graph.get_attr(norm.target)
            if activation is None:
                activation = self.graph.get_attr(nodes[-1].target)
            args = (x, module, activation, slope, residual, in_place)
            new = self.graph.call_function(calls.norm_act, args)
        self._replace(nodes, new)
        self.activations += activation != "none"
        self.residuals += residual is not None

    def _fuse_sum(self, node: fx.Node) -> None:
        """Fuses an addition with the ReLU after it."""
        a = arguments(node, "input other alpha")
        if len(a) != 2 or not all(isinstance(value, fx.Node) for value in a.values()):
            return
        first, second = a.values()
        if _changes(node) and not (
            only_user(first) is node and isinstance(self._called(first), _FRESH)
        ):
            return
        skipped: list[fx.Node] = []
        user = self._next(node, skipped)
        before = skipped[-1] if skipped else node
        found = self._activation(user, before)
        if found is None or found[0] not in (None, "relu"):
            return
        if user.op == "call_module" and not isinstance(self._called(user), nn.ReLU):
            return
        with self.graph.inserting_before(node):
            is_module = user.op == "call_module"
            module = self.graph.get_attr(user.target) if is_module else None
            args = (first, second, module, _changes(node))
            new = self.graph.call_function(calls.add_relu, args)
        self._replace([node, *skipped, user], new)
        self.activations += 1
        self.residuals += 1

    def _replace(self, nodes: list[fx.Node], new: fx.Node) -> None:
        nodes[-1].replace_all_uses_with(new)
        for node in nodes:
            if node.op == "call_module":
                is_identity = type(self._called(node)) is nn.Identity
                (self.identities if is_identity else self.fused).append(node.target)
        for node in reversed(nodes):
            self.graph.erase_node(node)

    def _allow_any_layout(self, node: fx.Node) -> None:
        """Makes ``view`` accept maps in any memory format, where nothing writes through it."""
        if node.op != "call_method" or node.target != "view":
            return
        of_bits = any(isinstance(size, torch.dtype) for size in node.args[1:])
        if not of_bits and not any(map(_changes, node.users)):
            node.target = "reshape"
            self.views = True


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module's forward is that of ``nn.BatchNorm2d``, whatever its class now."""
    kind = original_class(module)
    return issubclass(kind, nn.BatchNorm2d) and kind.forward is nn.BatchNorm2d.forward


def _changes(node: fx.Node) -> bool:
    """Whether a node changes its first argument in place."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.target in IN_PLACE
