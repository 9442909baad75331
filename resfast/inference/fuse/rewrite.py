"""Rewrites a traced graph: fuses each convolution with the operations after it."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from resfast.inference.fuse.dtypes import cast_as_own, convert
from resfast.inference.fuse.kept import KeptConv2d
from resfast.inference.fuse.nodes import (
    CONVS,
    NORMS,
    arguments,
    only_user,
)
from resfast.inference.fuse.norms import fuse_rest, place_norms
from resfast.inference.fuse.patterns import Patterns, scale_shift
from resfast.inference.fuse.report import FusionReport
from resfast.inference.fuse.rest import rest_of
from resfast.layers import fused
from resfast.ops.conv.op import ConvBiasAct


@dataclass
class Branch:
    """A convolution and the batch norms after it; the last of ``nodes`` is the branch's value."""

    name: str
    conv: nn.Conv2d
    nodes: list[fx.Node]
    weight: Tensor
    bias: Tensor | None
    norms: int = 0

    @property
    def x(self) -> fx.Node:
        return arguments(self.nodes[0], "input")["input"]

    @property
    def value(self) -> fx.Node:
        return self.nodes[-1]


class Rewriter(Patterns):
    """Rewrites a graph, convolution by convolution."""

    def __init__(
        self,
        network: fx.GraphModule,
        dtype: torch.dtype,
        example: tuple[Any, ...] | None,
        traced_by: str,
    ) -> None:
        super().__init__(network, example, sizes_vary=traced_by == "torch.fx")
        self.dtype = dtype
        floats = (t.dtype for t in network.parameters() if t.is_floating_point())
        self.own_dtype = next(floats, torch.float32)
        self.traced_by = traced_by
        self.counts: Counter[str] = Counter()

    def run(self) -> FusionReport:
        cast_as_own(self, self.own_dtype, self.dtype)
        self.counts["norm"] += place_norms(self, self.dtype)
        for node in list(self.graph.nodes):
            self._delay_max_pool(node)
        branches = [branch for node in self.graph.nodes if (branch := self._branch(node))]
        values = {branch.value: branch for branch in branches if self._fits(branch)}
        for branch in branches:
            if self._fits(branch):
                self._fuse(branch, values)
            else:
                self._keep(branch)
        self._report_rest()
        fuse_rest(self)
        rest = rest_of(self)
        convert(self, self.dtype)
        self.graph.eliminate_dead_code()
        self.network.delete_all_unused_submodules()
        self.graph.lint()
        self.network.recompile()
        return FusionReport(
            convolutions=self.counts["convolution"],
            batch_norms=self.counts["norm"],
            residuals=self.counts["residual"],
            activations=self.counts["activation"],
            left=tuple(dict.fromkeys(self.left)),
            rest=tuple(dict.fromkeys(rest)),
            traced_by=self.traced_by,
        )

    def _delay_max_pool(self, conv: fx.Node) -> None:
        """Moves a convolution's max pool after the norms and activations it commutes with.

        For a non-decreasing function f, max(f(x)) = f(max(x)), even with rounding.
        """
        found, pool = self.conv(conv), only_user(conv)
        if found is None or fused.why_not_fused(found[0]) or not pool:
            return
        if not self.is_max_pool(pool) or pool.args[0] is not conv:
            return
        x = conv
        while (user := only_user(pool)) and self.is_increasing(user, pool):
            user.replace_all_uses_with(pool)
            user.replace_input_with(pool, x)
            pool.replace_input_with(x, user)
            user.append(pool)
            user.meta.pop("shapes", None)
            if "shapes" in x.meta:
                user.meta["shapes"] = x.meta["shapes"]
            x = user

    def _branch(self, node: fx.Node) -> Branch | None:
        found = self.conv(node)
        if found is None or not isinstance(found[1], fx.Node):
            return None
        conv = found[0]
        branch = Branch(self.name(node), conv, [node], conv.weight, conv.bias)
        if "inputs" in node.meta:  # of a batch norm before the convolution
            factors = (*node.meta["inputs"], conv.groups)
            branch.weight, branch.bias = fused.fold_before(branch.weight, branch.bias, *factors)
            branch.norms += 1
        while user := only_user(branch.value):
            norm = self.norm(user, branch.value)
            factors = norm or self.affine(user, branch.value, conv)
            if factors is None:
                break
            branch.weight, branch.bias = fused.fold(branch.weight, branch.bias, factors)
            branch.nodes.append(user)
            branch.norms += norm is not None
        return branch

    def _fits(self, branch: Branch) -> bool:
        return fused.why_not_fused(branch.conv) is None

    def _fuse(self, branch: Branch, values: dict[fx.Node, Branch]) -> None:
        """Replaces a branch, and the addition and activation after it, by one kernel."""
        self.counts["norm"] += branch.norms
        value, residual, epilogue = branch.value, None, {}
        user = only_user(value)
        if user and (other := self.residual(user, value)):
            other_branch = values.get(other)
            # Only one of two branches can add the other's value: the one with more work, which
            # hides the cost of reading it.
            if (
                other_branch is None
                or only_user(other) is not user
                or branch.weight.numel() >= other_branch.weight.numel()
            ):
                residual, value = other, user
                branch.nodes.append(user)
                self.counts["residual"] += 1
        user = only_user(value)
        if user:
            if found := self.activation(user, value):
                epilogue, value = found, user
                branch.nodes.append(user)
                self.counts["activation"] += 1
            elif why := self.foreign_activation(user, value):
                self.left.append((self.name(user), why))
        conv = ConvBiasAct(
            branch.weight.to(self.dtype),
            branch.bias,
            stride=tuple(branch.conv.stride),
            padding=fused.conv_padding(branch.conv),
            groups=branch.conv.groups,
            dilation=tuple(branch.conv.dilation),
            **epilogue,
        )
        self.counts["convolution"] += 1
        self._replace(branch, conv, (branch.x,) if residual is None else (branch.x, residual))

    def _keep(self, branch: Branch) -> None:
        """Keeps PyTorch's convolution, with its batch norm folded."""
        why = f"convolution with {fused.why_not_fused(branch.conv)}"
        norms = branch.norms
        self.left.append((branch.name, f"{why} (its batch norm was folded)" if norms else why))
        self.counts["norm"] += norms
        conv = copy.copy(branch.conv)
        tensors = {"weight": branch.weight, "bias": branch.bias}
        conv._parameters = {
            name: None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            for name, tensor in tensors.items()
        }
        self._replace(branch, KeptConv2d(conv), (branch.x,))

    def _replace(self, branch: Branch, module: nn.Module, args: tuple[fx.Node, ...]) -> None:
        with self.graph.inserting_before(branch.value):
            node = self.graph.create_node("call_module", branch.name, args)
        node.meta = dict(branch.value.meta)
        branch.value.replace_all_uses_with(node)
        self.erase(branch.nodes)
        self.add_module(node, branch.name, module)

    def _report_rest(self) -> None:
        """Reports convolutions and batch norms that are not part of a branch."""
        named = {name for name, _ in self.left}
        for node in self.graph.nodes:
            module = self.module(node)
            name = self.name(node)
            if name in named or isinstance(module, ConvBiasAct):
                continue
            if isinstance(module, nn.modules.conv._ConvNd):
                plain = isinstance(module, nn.Conv2d)
                why = "with hooks or its own forward" if plain else "that is not nn.Conv2d"
                self.left.append((name, f"convolution {why}"))
            elif node.target in CONVS:
                plain = isinstance(self.constant(arguments(node, "input weight")["weight"]), Tensor)
                what = "options are" if plain else "weight is"
                self.left.append((name, f"convolution whose {what} computed"))
            elif node.target is scale_shift:
                self.left.append((node.meta["name"], f"batch norm {self._why_left(node)}"))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) or node.target in NORMS:
                why = "that cannot be folded (no statistics, hooks or its own forward)"
                self.left.append((name, f"batch norm {why}"))

    def _why_left(self, norm: fx.Node) -> str:
        x = norm.args[0]
        if self.is_max_pool(x):
            return "after a max pool (folded only if its scales are positive)"
        conv = self.module(x)
        if isinstance(conv, ConvBiasAct) and (conv.activation != "none" or x.args[1:]):
            conv = None  # the norm follows the activation or the addition
        if not isinstance(conv, ConvBiasAct | nn.Conv2d):
            return "that follows no convolution"
        return "after a convolution whose output is also used elsewhere"
