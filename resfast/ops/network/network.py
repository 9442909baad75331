"""Runs a chain of fused convolutions on the CPU as one call: no dispatch between the layers.

Between the layers, maps stay in the layout that the kernels read, in memory that is planned ahead
(:mod:`resfast.ops.network.plan`). For bfloat16 on processors with AVX512-BF16 or AMX. The first
call for a shape measures which way to share the work among the threads is the fastest, and whether
it beats the layers one by one (:mod:`resfast.ops.conv.cpu`). The choice is kept in
``$XDG_CACHE_HOME/resfast/network-cpu.json`` by processor, version, network, shape and number of
threads, unless the machine was too busy to tell. ``RESFAST_NETWORK=0`` turns it off.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast.ops.conv import choice as conv_choice
from resfast.ops.conv import cpu as conv_cpu
from resfast.ops.conv import reference as conv_reference
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.network.layers import (
    Conv,
    Head,
    Layer,
    MaxPool,
    Mean,
    Packed,
    Unplannable,
    aligned_bytes,
    pack,
)
from resfast.ops.network.plan import Plan, item_sizes, plan

CHOICES = conv_choice.Choices("network-cpu.json")
LAYERS = "layers"
"""The choice of the layers one by one."""
MOST_PLANS = 8
"""Shapes that a network keeps plans and memory for."""
MAX_ERROR = 0.03
"""Root mean square error of a plan relative to the layers' result, which rounds differently."""
MEASURE_SECONDS = 0.1
"""Spent on each way to share the work, for each shape."""


def available() -> bool:
    """Whether the kernels are built, this processor runs them, and they are not turned off."""
    return os.environ.get("RESFAST_NETWORK") != "0" and _has_kernels()


@functools.cache
def _has_kernels() -> bool:
    return conv_cpu._has_kernels() and hasattr(torch.ops.resfast, "network_run")


@dataclass
class _Ready:
    """A plan with the memory that its calls use, one arena for each call at a time."""

    plan: Plan
    constants: Tensor
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
            self.constants,
            arena,
            None if self.head is None else self.head.weight,
            None if self.head is None else self.head.bias,
        )
        self.arenas.append(arena)
        return result


class Network:
    """A chain of layers with one input and one result, run by one call for each batch.

    Args:
        layers: the chain; the tensors of a :class:`~resfast.ops.network.plan.Conv` are replaced by
            those that its module has when they are packed.
        modules: the module of each convolution, in the order of the chain.
        one_by_one: computes the same with the modules, for bfloat16 in ``channels_last`` memory.
        head: the linear layer of a :class:`~resfast.ops.network.layers.Head` that ends the chain.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        modules: Sequence[ConvBiasAct],
        one_by_one: Callable[[Tensor], Tensor],
        head: nn.Linear | None = None,
    ) -> None:
        self.layers, self.modules = list(layers), list(modules)
        self.one_by_one, self.head = one_by_one, head
        self._versions: list[int] = []
        self._packed: Packed | None = None
        self._chosen: OrderedDict[tuple, Callable[[Tensor], Tensor]] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        """The result for a batch.

        Args:
            x: bfloat16 or float32 ``[N, C, H, W]`` in any memory order.
        """
        versions = [module.version for module in self.modules]
        if versions != self._versions:
            self._versions, self._packed = versions, None
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
        weight = self.modules[0].weight
        return (
            type(x) is Tensor
            and x.is_cpu
            and weight.is_cpu
            and x.dtype in (torch.bfloat16, torch.float32)
            and weight.dtype == torch.bfloat16
            and x.ndim == 4
            and x.numel() > 0
            and not (torch.is_grad_enabled() and x.requires_grad)
            and available()
            and conv_choice.forced("cpu") is None
        )

    def by_layers(self, x: Tensor) -> Tensor:
        """The result by the layers one by one, for the same inputs."""
        return self.one_by_one(x.to(torch.bfloat16, memory_format=torch.channels_last))

    # -- the choice ----------------------------------------------------------------------------

    def _choose(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What computes a batch like this one."""
        threads = torch.get_num_threads()
        try:
            layers, packed = self._current()
            ready = functools.cache(functools.partial(self._ready, layers, packed, x.shape))
            sizes = item_sizes(x.shape[0], threads)
            first = ready(sizes[0])
        except Unplannable:
            return self.by_layers
        if not self._is_right(layers, first, x.shape):
            return self.by_layers
        ways = {str(images): images for images in sizes}
        names = list(ways) if conv_cpu.has_amx() else [*ways, LAYERS]
        if len(names) == 1:
            return first.run
        key = f"{conv_cpu.machine()}|{threads} threads|{self._digest()}|{list(x.shape)}"
        name = CHOICES.get(key, names)
        if name is None:
            calls = {one: ready(ways[one]).run if one in ways else self.by_layers for one in names}
            name, steady = _measure(x, calls)
            CHOICES.put(key, name, keep=steady)
        return self.by_layers if name == LAYERS else ready(ways[name]).run

    def _is_right(self, layers: list[Layer], ready: _Ready, shape: torch.Size) -> bool:
        """Whether the first and the last image of a random batch have the result of float32."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).bfloat16()
        ends = [0, len(x) - 1]
        exact = _reference(layers, x[ends], self.head)
        result = ready.run(x)[ends].float()
        finite = exact.isfinite()  # weights may be such that nothing is
        if torch.equal(finite, result.isfinite()) and (
            not finite.any() or conv_choice.near(exact[finite], MAX_ERROR)(result[finite])
        ):
            return True
        conv_choice.warn_once(
            f"the network on {list(shape)} is not accurate enough in one call, so it runs layer by "
            "layer"
        )
        return False

    def _ready(self, layers: list[Layer], packed: Packed, shape: torch.Size, images: int) -> _Ready:
        planned = plan(layers, packed, shape, torch.get_num_threads(), images)
        return _Ready(planned, packed.memory, self.head)

    def _current(self) -> tuple[list[Layer], Packed]:
        """The layers with the weights of their modules, and these packed."""
        modules = iter(self.modules)
        layers = []
        for layer in self.layers:
            if isinstance(layer, Conv):
                module = next(modules)
                layer = replace(layer, weight=module.weight, bias=module.bias)
            layers.append(layer)
        if self._packed is None:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = pack(layers)
        return layers, self._packed

    def _digest(self) -> str:
        """What the time of a call depends on besides shape and machine."""
        parts = []
        for layer in self.layers:
            values = {**vars(layer), "weight": None, "bias": None}
            parts.append(f"{type(layer).__name__} {sorted(values.items(), key=str)}")
        shapes = [list(module.weight.shape) for module in self.modules]
        return hashlib.blake2b(f"{parts} {shapes}".encode(), digest_size=8).hexdigest()


def _measure(x: Tensor, ways: dict[str, Callable[[Tensor], Tensor]]) -> tuple[str, bool]:
    """The fastest of the ways, which were checked before, and whether its times agree."""
    return conv_choice.fastest(
        {name: functools.partial(run, x) for name, run in ways.items()},
        is_right=lambda result: True,
        seconds=functools.partial(conv_choice.host_seconds, seconds=MEASURE_SECONDS),
        trusted=next(iter(ways)),
        what=f"a network on {list(x.shape)}",
    )


@torch.no_grad()
def _reference(layers: Sequence[Layer], x: Tensor, head: nn.Linear | None) -> Tensor:
    """The result of a chain in float32, rounded to bfloat16 between the layers."""
    values = [x.float()]
    for layer in layers:
        source = values[layer.source]
        match layer:
            case Conv():
                value = conv_reference.conv2d_bias_act(
                    source,
                    layer.weight.float(),
                    layer.bias,
                    None if layer.residual is None else values[layer.residual],
                    [layer.stride] * 2,
                    list(layer.padding),
                    layer.activation,
                    layer.negative_slope,
                )
            case MaxPool():
                value = F.max_pool2d(source, layer.kernel, layer.stride, layer.padding)
            case Mean():
                value = source.mean((2, 3), keepdim=True)
            case Head():
                assert head is not None
                return head(source.mean((2, 3)).bfloat16().float())
        values.append(value.bfloat16().float())
    return values[-1]
