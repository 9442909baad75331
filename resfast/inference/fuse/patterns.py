"""Recognizes convolutions, batch norms, activations and residuals in a traced graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from resfast.inference.fuse import activations
from resfast.inference.fuse.inputs import map_tensors
from resfast.inference.fuse.nodes import (
    ADDS,
    CONVS,
    FOREIGN,
    MAX_POOLS,
    MEANS,
    NORMS,
    SUBTRACTIONS,
    arguments,
    kind_of,
    quiet,
)
from resfast.layers import fused

GUESSED_SIZE = 224
"""Height and width, in pixels, of the images assumed for shape propagation without an example."""
INCREASING = ("relu", "relu6", "hardsigmoid")
"""Activations that never decrease, rounding included."""
LARGEST_STRIDE = 32
"""Of networks; image sizes that differ by it have the same remainders on the way."""
_SHAPE_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)


def device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _leaves(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


class Shapes(fx.Interpreter):
    """Propagates shapes through a graph up to the last operation that they matter for.

    Those are additions, means, and batch norms of rows. Shapes that cannot be inferred are missing.

    Args:
        network: the graph; each node's ``meta["shapes"]`` gets the shape of its value.
        run: the key of that shape, as there are several for inputs of different sizes.
    """

    def __init__(self, network: fx.GraphModule, run: int = 0) -> None:
        super().__init__(network)
        self.number = run
        nodes = list(network.graph.nodes)
        needed = [index for index, node in enumerate(nodes) if self._needs_shapes(node)]
        self.needed = set(nodes[: needed[-1] + 1]) if needed else set()

    def _needs_shapes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            return isinstance(module, nn.BatchNorm1d)
        return node.target in ADDS or node.target in MEANS

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.needed:
            return None
        try:
            value = super().run_node(n)
        except _SHAPE_ERRORS:  # an input of unknown shape, or a wrong guess of the image size
            return None
        if isinstance(value, Tensor):
            n.meta.setdefault("shapes", {})[self.number] = tuple(value.shape)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if fused.is_norm(self.fetch_attr(target)) and len(args) == 1:
            return args[0]  # the same shape, which is slow to infer
        return super().call_module(target, args, kwargs)


Shape = tuple[int, ...]


def scale_shift(x: Tensor) -> Tensor:
    """Stands for a batch norm in a graph that is being rewritten: its factors are in the node."""
    raise NotImplementedError


def _fake(shapes: Iterator[Shape], device: torch.device, x: Tensor) -> Tensor:
    """A tensor of the next shape, with the dtype of another one."""
    return torch.empty(next(shapes), dtype=x.dtype, device=device)


def _variants(shapes: list[Shape], sizes_vary: bool) -> list[list[Shape]]:
    """The inputs' shapes with another size of each batch and, if they vary, of the images.

    Inputs of several images have one batch size; one of a single image may be for all of them.
    """
    together = [index for index, shape in enumerate(shapes) if shape and shape[0] > 1]
    alone = [[index] for index, shape in enumerate(shapes) if shape and shape[0] == 1]
    variants = []
    for changed in ([together] if together else []) + alone:
        variants.append([*shapes])
        for index in changed:
            variants[-1][index] = (shapes[index][0] + 1, *shapes[index][1:])
    if sizes_vary:
        step = LARGEST_STRIDE

        def larger(shape: Shape) -> Shape:
            return (*shape[:2], shape[2] + step, shape[3] + 2 * step) if len(shape) == 4 else shape

        variants.append([larger(shape) for shape in shapes])
    return variants


class Patterns:
    """Recognizes the operations of a graph.

    Attributes:
        network: the traced network, in eval mode.
        graph: its graph.
        left: name of each operation that is not fused, and the reason.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        example: tuple[Any, ...] | None,
        *,
        sizes_vary: bool = True,
    ) -> None:
        self.network = network.eval()
        self.graph = network.graph
        self.left: list[tuple[str, str]] = []
        self._find_shapes(example, sizes_vary)

    def _find_shapes(self, example: tuple[Any, ...] | None, sizes_vary: bool) -> None:
        """Finds shapes for inputs like the example, and for other batch and image sizes."""
        device = device_of(self.network)
        inputs: tuple[Any, ...]
        if example is not None:
            inputs = example
        else:
            needed = [n for n in self.graph.nodes if n.op == "placeholder" and not n.args]
            convs = (self.conv(node) for node in self.graph.nodes)
            first = next((conv for conv in convs if conv is not None), None)
            if first is None or len(needed) != 1:
                return
            size = (2, first[0].in_channels, GUESSED_SIZE, GUESSED_SIZE)
            inputs = (torch.empty(size, dtype=first[0].weight.dtype, device="meta"),)
        shapes: list[Shape] = []
        map_tensors(lambda x: shapes.append(tuple(x.shape)), inputs)
        with FakeTensorMode(allow_non_fake_inputs=True), quiet():
            for number, sizes in enumerate([shapes, *_variants(shapes, sizes_vary)]):
                fakes = map_tensors(functools.partial(_fake, iter(sizes), device), inputs)
                flat = self.graph.process_inputs(*fakes)
                Shapes(self.network, number).run(*flat, enable_io_processing=False)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.network.get_submodule(node.target) if node.op == "call_module" else None

    def constant(self, value: Any) -> Tensor | None:
        """The parameter or buffer that a node reads, or None."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            found = operator.attrgetter(value.target)(self.network)
            return found if isinstance(found, Tensor) else None
        return None

    def name(self, node: fx.Node) -> str:
        """Name of the module a node calls, or of the module that owns its first parameter."""
        if node.op == "call_module":
            return node.target
        owners = (n.target for n in node.all_input_nodes if n.op == "get_attr")
        return next(owners, node.name).rpartition(".")[0] or node.name

    def conv(self, node: fx.Node) -> tuple[nn.Conv2d, fx.Node] | None:
        """The convolution that a node calls, as a module, and its input; None for other nodes."""
        module = self.module(node)
        if module is not None:
            plain = fused.is_conv(module) and len(node.args) == 1 and not node.kwargs
            return (module, node.args[0]) if plain else None
        if node.op != "call_function" or node.target not in CONVS:
            return None
        a = arguments(node, "input weight bias stride padding dilation groups")
        weight, bias = self.constant(a["weight"]), self.constant(a.get("bias"))
        if weight is None or (bias is None and a.get("bias") is not None):
            return None
        names = ("stride", "padding", "dilation", "groups")
        if any(isinstance(x, fx.Node) for n in names for x in _leaves(a.get(n))):
            return None
        options = {
            name: tuple(a[name]) if isinstance(a[name], list) else a[name]
            for name in names
            if name in a
        }
        k, c, *size = weight.shape
        channels = c * options.get("groups", 1)
        conv = nn.Conv2d(channels, k, tuple(size), bias=bias is not None, device="meta", **options)
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return conv, a["input"]

    def norm(self, node: fx.Node, x: Any, *, of_rows: bool = False) -> tuple[Tensor, Tensor] | None:
        """Scale and shift, float64 ``[C]``, if the node is a batch norm of ``x``, else None.

        Args:
            node: the node.
            x: its input.
            of_rows: whether it may be for ``[N, C]`` instead of images.
        """
        if not node.args or node.args[0] is not x:
            return None
        if node.target is scale_shift:
            return node.meta["factors"]
        module = self.module(node)
        if module is not None:
            is_norm = fused.is_norm(module, of_rows=of_rows)
            if not is_norm or len(node.args) != 1 or node.kwargs:
                return None
            tensors = module.weight, module.bias, module.running_mean, module.running_var
            return fused.norm_factors(*tensors, module.eps)
        if node.op != "call_function" or node.target not in NORMS:
            return None
        stats, affine = "running_mean running_var", "weight bias"
        first, second = (stats, affine) if node.target is F.batch_norm else (affine, stats)
        a = arguments(node, f"input {first} {second} training momentum eps")
        names = ("weight", "bias", "running_mean", "running_var")
        tensors = [self.constant(a.get(name)) for name in names]
        known = all(t is not None or a.get(n) is None for t, n in zip(tensors, names, strict=True))
        if a.get("training", False) or not known or tensors[2] is None or tensors[3] is None:
            return None
        return fused.norm_factors(*tensors, a.get("eps", 1e-5))

    def affine(self, node: fx.Node, x: fx.Node, conv: nn.Conv2d) -> tuple[Tensor, Tensor] | None:
        """Scale and shift if the node multiplies or adds constants to a convolution's value."""
        for targets in (activations.MULTIPLICATIONS, activations.DIVISIONS, ADDS, SUBTRACTIONS):
            pair = activations.operands(node, targets)
            if pair is None or (pair[0] is x) == (pair[1] is x):
                continue
            is_first = pair[0] is x
            value = self._for_channels(pair[1 if is_first else 0], conv)
            if value is None:
                return None
            one, zero = torch.ones_like(value), torch.zeros_like(value)
            if targets is activations.MULTIPLICATIONS:
                return value, zero
            if targets is ADDS:
                return one, value
            if targets is SUBTRACTIONS:
                return (one, -value) if is_first else (-one, value)
            return (1 / value, zero) if is_first and bool((value != 0).all()) else None
        return None

    def _for_channels(self, value: Any, conv: nn.Conv2d) -> Tensor | None:
        """A finite number or constant as float64 ``[C]``, if it has one value for each channel."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            tensor: Tensor | None = torch.tensor(float(value), dtype=torch.float64)
        else:
            tensor = self.constant(value)
            if tensor is None or (tensor.ndim and tensor.dtype != conv.weight.dtype):
                return None
        if tensor is None or not tensor.is_floating_point() or not tensor.isfinite().all():
            return None
        if tensor.ndim > 4 or any(size != 1 for size in (*tensor.shape[:-3], *tensor.shape[-2:])):
            return None
        count = tensor.numel()
        fits = count == 1 or (count == conv.out_channels and tensor.ndim >= 3)
        values = tensor.detach().to(conv.weight.device, torch.float64).flatten()
        return values.expand(conv.out_channels) if fits else None

    def activation(self, node: fx.Node, x: fx.Node) -> dict[str, Any] | None:
        """Arguments of the fused kernel if the node is an activation of ``x``, else None."""
        return activations.activation(node, x, self.network)

    def erase(self, nodes: list[fx.Node]) -> None:
        """Erases nodes, the last one first, and the constants that only they read."""
        for old in reversed(nodes):
            constants = [n for n in old.all_input_nodes if n.op == "get_attr"]
            self.graph.erase_node(old)
            for constant in constants:
                if not constant.users:
                    self.graph.erase_node(constant)

    def add_module(self, node: fx.Node, name: str, module: nn.Module) -> None:
        """Adds the module that a new node calls, under the name or one like it that is free."""
        named = (n for n in self.graph.nodes if n.op in ("call_module", "get_attr"))
        taken = [n.target for n in named if n is not node]
        base, count = name, 1
        while any(t == name or t.startswith(f"{name}.") for t in taken):
            name, count = f"{base}_{count}", count + 1
        node.target = name
        self.network.add_submodule(name, module)

    def residual(self, node: fx.Node, x: fx.Node) -> fx.Node | None:
        """The other operand if the node adds a value of the same shape to ``x``, else None."""
        if node.op not in ("call_function", "call_method") or node.target not in ADDS:
            return None
        a = arguments(node, "input other alpha")
        pair = [a.get("input"), a.get("other")]
        if a.get("alpha", 1) != 1 or pair.count(x) != 1:
            return None
        other = pair[1 - pair.index(x)]
        if not isinstance(other, fx.Node):
            return None
        ours, theirs = x.meta.get("shapes", {}), other.meta.get("shapes", {})
        if 0 not in ours or 0 not in theirs:
            self.left.append((node.name, "addition of values of unknown shape; pass an example"))
            return None
        if ours[0] != theirs[0]:
            self.left.append((node.name, "addition that broadcasts"))
            return None
        if any(ours[run] != theirs[run] for run in ours.keys() & theirs.keys()):
            self.left.append((node.name, "addition that broadcasts for other batches or images"))
            return None
        return other

    def is_max_pool(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return type(module) is nn.MaxPool2d and fused.is_plain(module)
        return node.op == "call_function" and node.target in MAX_POOLS

    def is_increasing(self, node: fx.Node, x: fx.Node) -> bool:
        """Whether the node is a norm or an activation of ``x`` that never decreases."""
        if norm := self.norm(node, x):
            return bool((norm[0] > 0).all())
        found = self.activation(node, x) or {}
        kind, slope = found.get("activation"), found.get("negative_slope", 0)
        return kind in INCREASING or (kind == "leaky_relu" and slope >= 0)

    def foreign_activation(self, node: fx.Node, x: fx.Node) -> str | None:
        """The reason not to fuse, if the node is an activation of ``x`` the kernel lacks."""
        module = self.module(node)
        name = kind_of(node, self.network)
        if module is not None:
            known = type(module).__module__ == nn.ReLU.__module__
        else:
            known = node.op != "placeholder" and name.partition(".")[0] in FOREIGN
        reason = f"{name}: not supported by the fused kernel"
        return reason if known and x in node.args else None
