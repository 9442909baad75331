"""Runs a chain of fused convolutions on the CPU as one call: no dispatch between the layers.

Between the layers, maps stay in the layout that the kernels read, in memory that is planned ahead
(:mod:`resfast.ops.network.plan`). For bfloat16 on processors with AVX512-BF16 or AMX, and for
float32 with AVX2 or AVX-512; the latter also run bfloat16 networks on processors without
instructions for it, in float32 until the result is rounded. The first call for a shape measures
which way to share the work among the threads is the fastest, and whether it beats the layers one by
one (:mod:`resfast.ops.conv.cpu`). The choice is kept in
``$XDG_CACHE_HOME/resfast/network-cpu.json`` by processor, version, network, shape, dtype and number
of threads, unless the machine was too busy to tell. ``RESFAST_NETWORK=0`` turns it off.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import runtime
from ..conv import choice as conv_choice
from ..conv import cpu as conv_cpu
from ..conv import reference as conv_reference
from ..conv.op import ConvBiasAct
from ..scale_shift.op import ScaleShiftAct
from . import winograd
from .layers import (
    BFLOAT16,
    FLOAT32,
    FLOAT32_TO_BFLOAT16,
    AveragePool,
    Concat,
    Conv,
    Head,
    Layer,
    Layout,
    MaxPool,
    Mean,
    Pointwise,
    Unplannable,
    shapes,
    sources,
)
from .packing import Packed, aligned_bytes, pack
from .plan import MOST_IMAGES, Plan, item_sizes, plan

CHOICES = conv_choice.Choices("network-cpu.json")
LAYERS = "layers"
"""The choice of the layers one by one."""
WINOGRAD = "w"
"""Ends the names of choices where layers use Winograd's algorithm."""
MOST_PLANS = 8
"""Shapes that a network keeps plans and memory for."""
MAX_ERRORS = {torch.bfloat16: 0.03, torch.float32: 1e-5}
"""Root mean square error of a result relative to the reference, by dtype of the result."""
MOST_ROUNDING = 1.0
"""The same, relative to what rounding to the lines' dtype changes."""
MEASURE_SECONDS = 0.1
"""Spent on each way to share the work, for each shape."""


def available(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels for weights of a dtype are built, run here, and are not turned off."""
    return os.environ.get("RESFAST_NETWORK") != "0" and layout_for(dtype) is not None


@functools.cache
def layout_for(dtype: torch.dtype) -> Layout | None:
    """What a network with weights of a dtype is kept in on this processor; None: no kernels."""
    if not hasattr(torch.ops.resfast, "network_run"):
        return None
    if dtype == torch.bfloat16 and conv_cpu._has_kernels():
        return BFLOAT16
    if not torch.ops.resfast.network_f32_supported():
        return None
    return {torch.float32: FLOAT32, torch.bfloat16: FLOAT32_TO_BFLOAT16}.get(dtype)


@dataclass(eq=False)
class _Ready:
    """A plan with the memory that its calls use, one arena for each call at a time."""

    plan: Plan
    packed: Packed
    head: nn.Linear | None = None
    arenas: list[Tensor] = field(default_factory=list)

    def run(self, x: Tensor) -> Tensor:
        try:
            arena = self.arenas.pop()
        except IndexError:  # the first call, or several at a time
            with torch.inference_mode(False):
                arena = aligned_bytes(self.plan.arena_bytes)
        result = torch.ops.resfast.network_run.default(
            x,
            self.plan.program,
            self.plan.tables,
            self.packed.memory,
            arena,
            None if self.head is None else self.head.weight,
            None if self.head is None else self.head.bias,
        )
        self.arenas.append(arena)
        return result


class Network:
    """A chain of layers with one input and one result, run by one call for each batch.

    Args:
        layers: the chain; tensors are replaced by those of their modules when they are packed.
        modules: for each layer the module that its tensors are from, or None.
        one_by_one: computes the same with the modules, for inputs of the weights' dtype in
            ``channels_last`` memory.
        head: the linear layer of a :class:`~resfast.ops.network.layers.Head` that ends the chain.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        modules: Sequence[ConvBiasAct | ScaleShiftAct | None],
        one_by_one: Callable[[Tensor], Tensor],
        head: nn.Linear | None = None,
    ) -> None:
        self.layers, self.modules = list(layers), list(modules)
        self._with_tensors = [module for module in self.modules if module is not None]
        self._conv = next(module for module in self.modules if isinstance(module, ConvBiasAct))
        self.one_by_one, self.head = one_by_one, head
        self._versions: list[int] = []
        self._packed: WeakValueDictionary[tuple, Packed] = WeakValueDictionary()
        self._chosen: OrderedDict[tuple, Callable[[Tensor], Tensor]] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        """The result for a batch.

        Args:
            x: bfloat16 or float32 ``[N, C, H, W]`` in any memory order.
        """
        versions = [module.version for module in self._with_tensors]
        if versions != self._versions:
            self._versions = versions
            self._packed.clear()
            self._chosen.clear()
        key = (x.shape, torch.get_num_threads())
        run = self._chosen.get(key)
        if run is None:
            run = self._choose(x)
            while len(self._chosen) >= MOST_PLANS:
                self._chosen.popitem(last=False)
            self._chosen[key] = run
        return run(x)

    def fits(self, x: Tensor) -> bool:
        """Whether the kernels can run a batch."""
        weight = self._conv.weight
        return (
            type(x) is Tensor
            and x.is_cpu
            and weight.is_cpu
            and x.dtype in (torch.bfloat16, torch.float32)
            and x.ndim == 4
            and x.numel() > 0
            and not (torch.is_grad_enabled() and x.requires_grad)
            and available(weight.dtype)
            and conv_choice.forced("cpu") is None
        )

    def by_layers(self, x: Tensor) -> Tensor:
        """The result by the layers one by one, for the same inputs."""
        dtype = self._conv.weight.dtype
        return self.one_by_one(x.to(dtype, memory_format=torch.channels_last))

    # -- the choice ----------------------------------------------------------------------------

    def _choose(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What computes a batch like this one."""
        layers, dtype = self._current(), self._conv.weight.dtype
        layout = layout_for(dtype)
        assert layout is not None  # as `fits` found
        try:
            ways = self.ways(layers, layout, x.shape)
            is_right = self._check(layers, layout, x.shape)
        except Unplannable:
            return self.by_layers
        names = [*ways, LAYERS]
        threads = f"{torch.get_num_threads()} threads"
        key = f"{conv_cpu.machine()}|{threads}|{self._digest()}|{list(x.shape)}|{dtype}"
        name = CHOICES.get(key, names)
        if name is None:
            name, steady = self._fastest(x, ways, is_right)
            CHOICES.put(key, name, keep=steady)
        elif name != LAYERS and not is_right(ways[name]()):
            name = LAYERS
        if name == LAYERS:
            runtime.release_memory(x.device)
            return self.by_layers
        if self.by_layers not in self._chosen.values():
            for module in self._with_tensors:
                if isinstance(module, ConvBiasAct):
                    module.discard_packed()
        runtime.release_memory(x.device)  # of references and of what was slower
        if not name.endswith(WINOGRAD):  # without the weights of Winograd's algorithm
            return self._ready(layers, layout, {}, False, x.shape, int(name)).run
        return ways[name]().run

    def _fastest(
        self,
        x: Tensor,
        ways: dict[str, Callable[[], _Ready]],
        is_right: Callable[[_Ready], bool],
    ) -> tuple[str, bool]:
        """The fastest of the ways that are right and of the layers, and whether that is certain.

        Each way has an arena, so no more than two are kept: the fastest yet and the next one.
        """
        best: str | None = None
        is_certain = False
        runtime.release_memory(x.device)  # of the reference
        for name in [*ways, LAYERS]:
            if name != LAYERS and not is_right(ways[name]()):
                ways[name]().arenas.clear()
                continue
            if best is None:
                best, is_certain = name, name != LAYERS  # other weights may be computed in one call
                continue
            runtime.release_memory(x.device)
            pair = {
                one: self.by_layers if one == LAYERS else ways[one]().run for one in (best, name)
            }
            faster, steady = _measure(x, pair)
            slower = best if faster == name else name
            # Whether the others that `slower` was compared with are slower still does not matter.
            is_certain = steady and (is_certain or faster == name)
            if slower != LAYERS:
                ways[slower]().arenas.clear()
            best = faster
        assert best is not None  # the layers at least
        return best, is_certain

    def ways(
        self, layers: list[Layer], layout: Layout, shape: torch.Size
    ) -> dict[str, Callable[[], _Ready]]:
        """Plans by name: images of an item, with "w" where layers use Winograd's algorithm.

        Raises:
            Unplannable: the kernels cannot run this network for this shape.
        """
        shapes(layers, shape)
        sizes = item_sizes(shape[0], torch.get_num_threads(), layout)
        # The same for all, so that one copy of the weights serves them.
        sides = winograd.sides(layers, shape, layout, sizes[0])
        found: dict[str, Callable[[], _Ready]] = {}
        for images in sizes:
            for mark in ("", WINOGRAD) if sides else ("",):
                ready = functools.partial(
                    self._ready, layers, layout, sides, bool(mark), shape, images
                )
                found[f"{images}{mark}"] = functools.cache(ready)
        return found

    def _check(
        self, layers: list[Layer], layout: Layout, shape: torch.Size
    ) -> Callable[[_Ready], bool]:
        """A predicate: the first and the last image of a random batch have the right result."""
        generator = torch.Generator().manual_seed(0)
        count = min(shape[0], _most_images() + 1)  # the last item of a large batch is not full
        x = torch.randn((count, *shape[1:]), generator=generator).to(layout.result)
        ends = [0, len(x) - 1]
        exact = _reference(layers, x[ends], self.head, layout)
        finite = exact.isfinite()  # weights may be such that nothing is
        is_near = conv_choice.near(exact[finite], MAX_ERRORS[layout.result])

        @functools.cache
        def is_as_near_as_rounding() -> Callable[[Tensor], bool]:
            # Many layers amplify what one rounding changes, whoever computes them.
            other = _reference(layers, x[ends], self.head, layout, other=True)[finite]
            error = float((other - exact[finite]).norm() / exact[finite].norm())
            return conv_choice.near(exact[finite], MOST_ROUNDING * error)

        @functools.cache
        def is_right(ready: _Ready) -> bool:
            result = ready.run(x)[ends].to(exact.dtype)
            if torch.equal(finite, result.isfinite()):
                result = result[finite]
                if not len(result) or is_near(result) or is_as_near_as_rounding()(result):
                    return True
            conv_choice.warn_once(
                f"the network on {list(shape)} is not accurate enough in one call, so it runs "
                "layer by layer or without Winograd's algorithm"
            )
            return False

        return is_right

    def _ready(
        self,
        layers: list[Layer],
        layout: Layout,
        sides: dict[int, int],
        by_winograd: bool,
        shape: torch.Size,
        images: int,
    ) -> _Ready:
        """A plan for items of some images, with weights for Winograd's algorithm and without."""
        key = tuple(sides.items())
        packed = self._packed.get(key)
        if packed is None:
            with torch.inference_mode(False), torch.no_grad():
                packed = self._packed[key] = pack(layers, layout, sides)
        threads = torch.get_num_threads()
        planned = plan(layers, packed, shape, threads, images, by_winograd=by_winograd)
        return _Ready(planned, packed, self.head)

    def _current(self) -> list[Layer]:
        """The layers with the weights of their modules."""
        layers = []
        for layer, module in zip(self.layers, self.modules, strict=True):
            if isinstance(layer, Conv) and isinstance(module, ConvBiasAct):
                layer = replace(layer, weight=module.weight, bias=module.bias)
            elif isinstance(layer, Pointwise) and isinstance(module, ScaleShiftAct):
                assert layer.scale is not None
                part = slice(layer.first, layer.first + len(layer.scale))
                layer = replace(layer, scale=module.scale[part], shift=module.shift[part])
            layers.append(layer)
        return layers

    def _digest(self) -> str:
        """What the time of a call depends on besides shape and machine."""
        parts = []
        for layer in self.layers:
            values = {
                name: list(value.shape) if isinstance(value, Tensor) else value
                for name, value in vars(layer).items()
            }
            parts.append(f"{type(layer).__name__} {sorted(values.items(), key=str)}")
        return hashlib.blake2b(str(parts).encode(), digest_size=8).hexdigest()


def _most_images() -> int:
    """Images of a batch that are tried: a full item for each thread."""
    return max(MOST_IMAGES.values()) * torch.get_num_threads()


def _measure(x: Tensor, ways: dict[str, Callable[[Tensor], Tensor]]) -> tuple[str, bool]:
    """The fastest of the ways, which were checked before, and whether its times agree."""
    x = x[: _most_images()]
    return conv_choice.fastest(
        {name: functools.partial(run, x) for name, run in ways.items()},
        is_right=lambda result: True,
        seconds=functools.partial(conv_choice.host_seconds, seconds=MEASURE_SECONDS),
        trusted=next(iter(ways)),
        what=f"a network on {list(x.shape)}",
    )


@torch.no_grad()
def _reference(
    layers: Sequence[Layer], x: Tensor, head: nn.Linear | None, layout: Layout, other: bool = False
) -> Tensor:
    """The result of a chain in float32, rounded as the lines are; for float32 in float64.

    Args:
        layers: the chain.
        x: its input.
        head: its linear layer, if it ends with one.
        layout: what the lines are kept in.
        other: unrounded for bfloat16, and rounded for float32.
    """
    exactly = torch.float64 if layout.result == torch.float32 else torch.float32
    dtype = torch.float32 if other else exactly

    def kept(value: Tensor) -> Tensor:
        rounded = layout.dtype == torch.bfloat16 and not other
        return value.bfloat16().to(dtype) if rounded else value

    values = [x.to(dtype)]
    for layer in layers:
        source, *others = (values[index] for index in sources(layer))
        match layer:
            case Pointwise():
                value = _pointwise(layer, source, others)
            case AveragePool():
                value = F.avg_pool2d(source, layer.kernel, layer.stride)
            case Conv():
                value = conv_reference.conv2d_bias_act(
                    source,
                    layer.weight.to(dtype),
                    layer.bias,
                    others[0] if others else None,
                    [layer.stride] * 2,
                    list(layer.padding),
                    layer.activation,
                    layer.negative_slope,
                    layer.groups,
                )
            case MaxPool():
                value = F.max_pool2d(
                    source, layer.kernel, layer.stride, layer.padding, ceil_mode=layer.ceil
                )
            case Concat():
                value = torch.cat([source, *others], 1)
            case Mean():
                value = source.mean((2, 3), keepdim=True)
            case Head():
                assert head is not None
                bias = None if head.bias is None else head.bias.to(dtype)
                value = F.linear(kept(source.mean((2, 3))), head.weight.to(dtype), bias)
                values.append(value)
                break
        values.append(kept(value))
    return values[-1].to(exactly)


def _pointwise(layer: Pointwise, x: Tensor, others: list[Tensor]) -> Tensor:
    """The result of a layer for the values that it reads, in their dtype."""
    if layer.scale is not None and layer.shift is not None:
        x = x * layer.scale.to(x.dtype)[:, None, None] + layer.shift.to(x.dtype)[:, None, None]
    if layer.gate is not None:
        x = x * others[0]
    if layer.residual is not None:
        x = x + others[-1]
    return conv_reference.ACTIVATIONS[layer.activation](x, layer.negative_slope)
