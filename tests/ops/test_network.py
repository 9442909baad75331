"""Chains of convolutions in one call, against float64."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import resfast
from resfast.inference.fuse import chains
from resfast.inference.fuse.model import FusedModel
from resfast.models.presets import create_model
from resfast.ops.conv import choice as conv_choice
from resfast.ops.conv import cpu as conv_cpu
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.conv.reference import ACTIVATIONS, conv2d_bias_act
from resfast.ops.network import network as network_module
from resfast.ops.network import plan as network_plan
from resfast.ops.network import winograd
from resfast.ops.network.layers import (
    BFLOAT16,
    FLOAT32,
    FLOAT32_TO_BFLOAT16,
    NETWORK_ACTIVATIONS,
    AveragePool,
    Concat,
    Conv,
    Head,
    Layer,
    MaxPool,
    Mean,
    Pointwise,
    Unplannable,
    shapes,
    sources,
)
from resfast.ops.network.packing import aligned_bytes, pack

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
needs_kernels = pytest.mark.skipif(
    network_module.layout_for(torch.bfloat16) is None, reason="the kernels need AVX2 with FMA"
)
KINDS = {"bf16": BFLOAT16, "fp32": FLOAT32, "bf16 in fp32": FLOAT32_TO_BFLOAT16}
"""Layout by name."""
MAX_ERRORS = {"bf16": 4e-3, "fp32": 1e-6, "bf16 in fp32": 2e-3}
"""Relative to float64."""


def runs_here(name: str) -> bool:
    """Whether this processor has the kernels of some lines."""
    if not hasattr(torch.ops.resfast, "network_run"):
        return False
    bf16, fp32 = conv_cpu._has_kernels(), torch.ops.resfast.network_f32_supported()
    return bf16 if name == "bf16" else fp32


each_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not runs_here(name), reason="this processor cannot run it"),
        )
        for name in KINDS
    ],
)


def conv(
    source: int,
    channels: int,
    outputs: int,
    kernel: int | tuple[int, int] = 3,
    stride: int = 1,
    padding: int | tuple[int, int] | None = None,
    activation: str = "relu",
    residual: int | None = None,
    bias: bool = True,
    groups: int = 1,
) -> Conv:
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    if padding is None:
        padding = (rows // 2, columns // 2)
    both = (padding, padding) if isinstance(padding, int) else padding
    inputs = channels // groups
    weight = torch.randn(outputs, inputs, rows, columns) / (inputs * rows * columns) ** 0.5
    values = torch.randn(outputs) / 4 if bias else None
    return Conv(source, weight, values, stride, both, activation, 0.1, residual, groups)


def scale_shift(source: int, channels: int, activation: str = "none") -> Pointwise:
    return Pointwise(source, torch.rand(channels) + 0.5, torch.randn(channels) / 4, activation)


CHAINS: dict[str, tuple[int, int, int, Callable[[], list[Layer]]]] = {
    "basic blocks": (
        3, 16, 16,
        lambda: [
            conv(0, 3, 64), conv(1, 64, 64), conv(2, 64, 64, residual=1),
            conv(3, 64, 96, 3, 2), conv(3, 64, 96, 1, 2, activation="none"),
            conv(4, 96, 96, residual=5), Mean(6),
        ],
    ),
    "bottleneck with a 7x7 stem and a max pool": (
        3, 30, 22,
        lambda: [
            conv(0, 3, 40, 7, 2), MaxPool(1, 3, 2, 1), conv(2, 40, 16, 1), conv(3, 16, 16),
            conv(4, 16, 72, 1, residual=None, activation="none"),
            conv(2, 40, 72, 1, residual=5),
        ],
    ),
    "channels and sizes that fill nothing": (
        5, 7, 5,
        lambda: [
            conv(0, 5, 19, 3), conv(1, 19, 33, 3, 2), conv(2, 33, 50, 2, 1, 1), conv(3, 50, 7, 1),
        ],
    ),
    "activations": (
        40, 6, 6,
        lambda: [conv(i, 40, 40, activation=name) for i, name in enumerate(NETWORK_ACTIVATIONS)],
    ),
    "depthwise": (
        3, 17, 13,
        lambda: [
            conv(0, 3, 40, 3, 2, activation="relu6"),
            conv(1, 40, 40, activation="relu6", groups=40),
            conv(2, 40, 24, 1, activation="none"), conv(3, 24, 144, 1, activation="hardswish"),
            conv(4, 144, 144, 5, 2, activation="hardswish", groups=144),
            conv(5, 144, 24, 1, activation="none"), conv(6, 24, 24, 3, groups=24, bias=False),
            conv(7, 24, 24, 1, residual=6, activation="hardsigmoid"),
        ],
    ),
    "depthwise first and last": (
        37, 9, 10,
        lambda: [
            conv(0, 37, 37, 3, 2, activation="silu", groups=37), conv(1, 37, 37, 1),
            conv(2, 37, 37, (1, 3), 1, activation="none", groups=37),
        ],
    ),
    "concatenations": (
        3, 15, 16,
        lambda: [
            conv(0, 3, 40, 3, 2), conv(1, 40, 32, 1), conv(1, 40, 64, 3), Concat((2, 3)),
            MaxPool(4, 3, 2, 1), conv(5, 96, 24, 1), conv(6, 24, 24, 3, groups=24),
            conv(6, 24, 64, 1, activation="none"), conv(7, 24, 32, 1), MaxPool(8, 3, 1, 1),
            Concat((9, 10)), conv(11, 96, 40, 3, 2), conv(11, 96, 40, 5, 1),
            conv(13, 40, 40, 3, 2, residual=12),
        ],
    ),
    "groups": (
        3, 16, 16,
        lambda: [
            conv(0, 3, 128), conv(1, 128, 64, groups=2), conv(2, 64, 192, 3, 2, groups=2),
            conv(1, 128, 192, 1, 2), conv(3, 192, 192, residual=4, groups=3), conv(5, 192, 40, 1),
        ],
    ),
    "a map read with both strides": (
        32, 9, 12,
        lambda: [
            conv(0, 32, 32), conv(1, 32, 48, 3, 2), conv(1, 32, 48, 5, 1, 2), conv(3, 48, 48, 3, 2),
            conv(4, 48, 48, 1, residual=2),
        ],
    ),
    "kernels and paddings that are not square": (
        20, 11, 13,
        lambda: [
            conv(0, 20, 24, (1, 5), 1, (0, 2)), conv(1, 24, 36, (3, 1), 2, (2, 0)),
            conv(2, 36, 36, 3, 1, 0, bias=False), conv(3, 36, 20, 3, 2, 3),
        ],
    ),
    "the input as a residual": (
        64, 8, 8,
        lambda: [conv(0, 64, 64), conv(1, 64, 64, residual=0), conv(2, 64, 64, residual=0)],
    ),
    "max pools with windows that are partly outside": (
        16, 13, 12,
        lambda: [
            conv(0, 16, 48), MaxPool(1, 3, 2, 0, ceil=True), conv(2, 48, 48),
            MaxPool(3, 2, 2, 1, ceil=True), conv(4, 48, 33),
        ],
    ),
    "squeeze and excitation": (
        3, 18, 14,
        lambda: [
            conv(0, 3, 40, 3, 2), conv(1, 40, 40, groups=40), Mean(2), conv(3, 40, 10, 1),
            conv(4, 10, 40, 1, activation="sigmoid"), Pointwise(2, gate=5),
            conv(6, 40, 64, 3, 2, activation="none"), Mean(7),
            conv(8, 64, 64, 1, activation="hardsigmoid"), Pointwise(9, gate=7),
            conv(10, 64, 64, 1, activation="silu", residual=7),
        ],
    ),
    "gates of every pixel, additions and activations": (
        37, 9, 10,
        lambda: [
            conv(0, 37, 50, 3, 2), conv(0, 37, 50, 1, 2, activation="none"),
            Pointwise(1, gate=2, residual=2, activation="relu"),
            conv(3, 50, 50, 3, 2), conv(3, 50, 50, 1, 1), conv(5, 50, 50, 3, 2),
            Pointwise(6, residual=4, activation="silu"), Pointwise(7, gate=7),
            Pointwise(8, activation="leaky_relu", negative_slope=0.3),
        ],
    ),
    "batch norms before convolutions, and average pools": (
        3, 17, 18,
        lambda: [
            scale_shift(0, 3), conv(1, 3, 40), scale_shift(2, 40, "relu"), conv(3, 40, 72),
            AveragePool(4, 2, 2), scale_shift(5, 72, "hardswish"), conv(6, 72, 64, 3, 2),
            AveragePool(7, 3, 1), scale_shift(8, 64),
        ],
    ),
    "parts of concatenations that fill no lines": (
        3, 12, 10,
        lambda: [
            conv(0, 3, 24), scale_shift(1, 24, "relu"), conv(2, 24, 12),
            scale_shift(1, 24, "relu"), scale_shift(3, 12, "relu"), Concat((4, 5)),
            conv(6, 36, 12), scale_shift(1, 24), scale_shift(3, 12), scale_shift(7, 12),
            Concat((8, 9, 10)), conv(11, 48, 70, 3, 2), MaxPool(11, 2, 2, 0),
            conv(13, 48, 7, 1, activation="none"), Pointwise(12), Pointwise(14), Concat((16, 15)),
            conv(17, 77, 33, 1),
        ],
    ),
    "max pools without padding": (
        16, 12, 12,
        lambda: [
            conv(0, 16, 48), MaxPool(1, 2, 2, 0), conv(2, 48, 48), MaxPool(3, 3, 1, 1),
            conv(4, 48, 33),
        ],
    ),
}  # fmt: skip


def rounded(layers: Sequence[Layer], kind: str) -> list[Layer]:
    """The chain with weights of the dtype that a network of its kind has."""
    return [
        dataclasses.replace(layer, weight=layer.weight.to(KINDS[kind].result))
        if isinstance(layer, Conv)
        else layer
        for layer in layers
    ]


def reference(layers: Sequence[Layer], x: Tensor, kind: str) -> Tensor:
    """The chain in float64, rounded to bfloat16 between the layers where the kernels round."""
    values = [x.double()]
    for layer in layers:
        source, *others = (values[index] for index in sources(layer))
        match layer:
            case Conv():
                value = conv2d_bias_act(
                    source,
                    layer.weight.double(),
                    None if layer.bias is None else layer.bias.double(),
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
            case Pointwise():
                value = source
                if layer.scale is not None:
                    value = value * layer.scale.double()[:, None, None]
                    value = value + layer.shift.double()[:, None, None]
                if layer.gate is not None:
                    value = value * others[0]
                if layer.residual is not None:
                    value = value + others[-1]
                value = ACTIVATIONS[layer.activation](value, layer.negative_slope)
            case AveragePool():
                value = F.avg_pool2d(source, layer.kernel, layer.stride)
            case Concat():
                value = torch.cat([source, *others], 1)
            case Mean():
                value = source.mean((2, 3), keepdim=True)
        values.append(value.bfloat16().double() if kind == "bf16" else value)
    return values[-1]


def images(count: int, channels: int, height: int, width: int, kind: str = "bf16") -> Tensor:
    x = torch.randn(count, channels, height, width).to(KINDS[kind].result)
    return x.contiguous(memory_format=torch.channels_last)


class Planned:
    """A chain with its plan and memory, for one shape."""

    def __init__(
        self,
        layers: list[Layer],
        shape: Sequence[int],
        threads: int,
        item: int,
        kind: str,
        side: int = 0,
    ) -> None:
        layout = KINDS[kind]
        sides = {
            i: side for i, layer in enumerate(layers) if side and winograd.suits(layer, layout)
        }
        self.packed = pack(rounded(layers, kind), layout, sides)
        self.plan = network_plan.plan(layers, self.packed, shape, threads, item)
        self.arena = aligned_bytes(self.plan.arena_bytes)
        self.weight = self.bias = None

    def __call__(self, x: Tensor) -> Tensor:
        plan = self.plan
        return torch.ops.resfast.network_run(
            x, plan.program, plan.tables, self.packed.memory, self.arena, self.weight, self.bias
        )


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float(((result.double() - exact).norm() / exact.norm()).detach())


@each_kind
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_computes_what_float64_does(name: str, kind: str):
    torch.manual_seed(0)
    channels, height, width, make = CHAINS[name]
    layers = rounded(make(), kind)
    x = images(13, channels, height, width, kind)
    exact = reference(layers, x, kind)
    before = None
    for item, threads in ((13, 1), (13, 3), (1, 1), (2, 2), (4, 3), (8, 1)):
        planned = Planned(layers, x.shape, threads, item, kind)
        torch.set_num_threads(threads)
        result = planned(x)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert result.dtype == KINDS[kind].result
        assert relative_error(result, exact) < MAX_ERRORS[kind]
        # The order of sums depends neither on the batch nor on the threads.
        assert before is None or torch.equal(result, before), (item, threads)
        before = result


WINOGRAD: dict[str, tuple[int, int, int, Callable[[], list[Layer]]]] = {
    **CHAINS,
    "maps that tiles do not divide": (
        17, 13, 7,
        lambda: [
            conv(0, 17, 33), conv(1, 33, 40, 3, 1, 0), conv(2, 40, 33, 3, 1, 2),
            conv(3, 33, 33, residual=1), conv(4, 33, 80, 3, 2), conv(4, 33, 80, activation="none"),
            conv(6, 80, 80, 1, 2, residual=5),
        ],
    ),
    "many channels and few tiles": (
        130, 5, 4,
        lambda: [conv(0, 130, 140), conv(1, 140, 150), conv(2, 150, 150, residual=2), Mean(3)],
    ),
}  # fmt: skip


WINOGRAD_ERRORS = {"fp32": 5e-6, "bf16": 1.5e-2}
each_side = pytest.mark.parametrize(
    ("kind", "side"),
    [
        pytest.param(
            name,
            side,
            marks=pytest.mark.skipif(not runs_here(name), reason="this processor cannot run it"),
        )
        for name in WINOGRAD_ERRORS
        for side in winograd.SIDES[KINDS[name].dtype]
    ],
)


@each_side
@pytest.mark.parametrize("name", WINOGRAD)
def test_winograd_computes_what_float64_does(name: str, kind: str, side: int):
    torch.manual_seed(0)
    channels, height, width, make = WINOGRAD[name]
    layers = rounded(make(), kind)
    x = images(13, channels, height, width, kind)
    exact = reference(layers, x, kind)
    before = None
    for item, threads in ((13, 1), (13, 3), (1, 1), (2, 2), (4, 3), (8, 1)):
        planned = Planned(layers, x.shape, threads, item, kind, side)
        torch.set_num_threads(threads)
        result = planned(x)
        assert relative_error(result, exact) < WINOGRAD_ERRORS[kind]
        assert before is None or torch.equal(result, before), (item, threads)
        before = result


@each_side
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
@pytest.mark.parametrize("count", [1, 4])
def test_winograd_keeps_what_is_not_finite_where_it_is_in_float32(
    count: int, value: float, kind: str, side: int
):
    """-inf and ReLU hide what Winograd would spread; 3e38 overflows in its transforms only."""
    torch.manual_seed(0)
    layers: list[Layer] = [
        conv(0, 16, 32), conv(1, 32, 32, activation="none"), MaxPool(2, 3, 2, 1),
        conv(3, 32, 20, activation="leaky_relu"),
    ][:count]  # fmt: skip
    for layer in layers:
        if isinstance(layer, Conv):
            layer.weight.div_(4)
    x = images(9, 16, 21, 17, kind)
    x[1, 1, 9, 3:7] = value
    exact = Planned(layers, x.shape, 1, 9, kind)(x)
    for item, threads in ((9, 1), (9, 2), (4, 1)):
        torch.set_num_threads(threads)
        result = Planned(layers, x.shape, threads, item, kind, side)(x)
        assert torch.equal(result.isnan(), exact.isnan())
        assert torch.equal(result.isposinf(), exact.isposinf())
        assert torch.equal(result.isneginf(), exact.isneginf())
        finite = exact.isfinite()
        assert finite.all() == (abs(value) == 3e38)
        assert relative_error(result[finite], exact[finite].double()) < WINOGRAD_ERRORS[kind]


@each_side
def test_winograd_depends_neither_on_earlier_calls_nor_on_other_images(kind: str, side: int):
    torch.manual_seed(0)
    channels, height, width, make = WINOGRAD["maps that tiles do not divide"]
    layers = make()
    x = images(5, channels, height, width, kind)
    for item in (5, 2):
        planned = Planned(layers, x.shape, 1, item, kind, side)
        expected = planned(x)
        for value in (torch.nan, torch.inf):
            other = x.clone()
            other[1] = value
            result = planned(other)
            assert not result[1].isfinite().any()
            assert torch.equal(result[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])
            planned(torch.full_like(x, value))
            assert torch.equal(planned(x), expected)


@each_kind
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 33])
def test_results_do_not_depend_on_the_batch(count: int, kind: str):
    torch.manual_seed(0)
    channels, height, width, make = CHAINS["basic blocks"]
    layers = make()
    x = images(count, channels, height, width, kind)
    one = Planned(layers, (1, channels, height, width), 1, 1, kind)
    expected = torch.cat([one(x[i : i + 1]) for i in range(count)])
    for item in network_plan.item_sizes(count, 2):
        torch.set_num_threads(2)
        assert torch.equal(Planned(layers, x.shape, 2, item, kind)(x), expected)


@each_kind
def test_threads_are_left_out_where_others_compute_and_the_result_stays(kind: str):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    channels, height, width, make = CHAINS["basic blocks"]
    x = images(1, channels, height, width, kind)
    planned = Planned(make(), x.shape, 2, 1, kind)
    expected = planned(x)
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        end = time.monotonic() + 30
        while torch.ops.resfast.network_threads() == 2 and time.monotonic() < end:
            assert torch.equal(planned(x), expected)
        assert torch.ops.resfast.network_threads() == 1
        assert torch.equal(planned(x), expected)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    end = time.monotonic() + 30
    while time.monotonic() < end:
        planned(x)
        if torch.ops.resfast.network_threads() == 2:
            return
    pytest.fail("one thread was left out for ever")


@each_kind
def test_memory_of_an_earlier_call_does_not_matter(kind: str):
    torch.manual_seed(0)
    for channels, height, width, make in CHAINS.values():
        layers = make()
        x = images(5, channels, height, width, kind)
        for item in (5, 2):
            planned = Planned(layers, x.shape, 1, item, kind)
            expected = planned(x)
            planned(torch.full_like(x, torch.nan))
            planned(torch.full_like(x, torch.inf))
            assert torch.equal(planned(x), expected)


@each_kind
@pytest.mark.parametrize("widths", [(32, 32), (8, 19), (48, 8), (40, 72)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_come_out_where_they_do_in_float64(
    value: float, widths: tuple[int, int], kind: str
):
    """Also where channels do not fill the lines between the layers: 0 times infinity is NaN."""
    torch.manual_seed(0)
    first, second = widths
    layers: list[Layer] = [
        conv(0, 3, first, activation="none"), conv(1, first, second), MaxPool(2, 3, 2, 1),
        conv(3, second, second, activation="gelu", residual=3),
        conv(4, second, 20, activation="leaky_relu"),
    ]  # fmt: skip
    layers = rounded(layers, kind)
    x = images(3, 3, 21, 17, kind)
    expected = reference(layers, x, kind)
    odd = x.clone()
    odd[1, 1, 9, 3] = value
    exact = reference(layers, odd, kind)
    for item in (3, 1):
        planned = Planned(layers, x.shape, 1, item, kind)
        result = planned(odd).double()
        assert torch.equal(result.isnan(), exact.isnan())
        assert torch.equal(result.isposinf(), exact.isposinf())
        assert torch.equal(result.isneginf(), exact.isneginf())
        assert exact.isfinite().any()
        assert not exact.isfinite().all()
        assert relative_error(planned(x), expected) < MAX_ERRORS[kind]


@each_kind
@pytest.mark.parametrize("groups", [1, 40])
@pytest.mark.parametrize("activation", NETWORK_ACTIVATIONS)
def test_activations_of_nan_and_infinity_are_those_of_float64(
    activation: str, groups: int, kind: str
):
    torch.manual_seed(0)
    layers: list[Layer] = [
        conv(0, 40, 40, 1, activation=activation, groups=groups),
        conv(1, 40, 40, 1, activation="none", groups=40, bias=False),
    ]
    layers = rounded(layers, kind)
    x = images(2, 40, 3, 4, kind)
    x[0, :, 0, 0], x[0, 3, 1, 1], x[1, 7, 2, 2] = torch.nan, torch.inf, -torch.inf
    exact = reference(layers, x, kind)
    result = Planned(layers, x.shape, 1, 2, kind)(x).double()
    assert exact.isnan().any()
    assert torch.equal(result.isnan(), exact.isnan())
    assert torch.equal(result.isposinf(), exact.isposinf())
    assert torch.equal(result.isneginf(), exact.isneginf())


@each_kind
@pytest.mark.parametrize(("channels", "width"), [(3, 11), (3, 77), (20, 11)])
def test_inputs_of_any_memory_order_and_of_float32_give_the_same(
    channels: int, width: int, kind: str
):
    torch.manual_seed(0)
    layers: list[Layer] = [conv(0, channels, 32), conv(1, 32, 40, 3, 2)]
    wide = torch.randn(5, channels, 9, width)
    x = wide.bfloat16().contiguous(memory_format=torch.channels_last)
    for item in (5, 2):
        planned = Planned(layers, x.shape, 2, item, kind)
        expected = planned(x)
        for other in (x.contiguous(), x.float(), x.transpose(2, 3).contiguous().mT):
            assert torch.equal(planned(other), expected)
        if kind == "bf16":  # which rounds the input
            assert torch.equal(planned(wide), expected)
        else:
            expected = planned(wide.contiguous(memory_format=torch.channels_last))
            assert torch.equal(planned(wide), expected)
        cut = torch.randn(7, channels, 12, width + 2)[1:6, :, 1:10, 2:]
        assert torch.equal(planned(cut), planned(cut.clone()))
    one = torch.randn(1, channels, 9, width)
    planned = Planned(layers, one.shape, 1, 1, kind)
    assert torch.equal(planned(one[0].unsqueeze(0)), planned(one))


@each_kind
@pytest.mark.parametrize(("outputs", "bias"), [(10, True), (1, False), (1000, True)])
def test_a_head_is_a_linear_layer_of_the_means(outputs: int, bias: bool, kind: str):
    torch.manual_seed(0)
    layers: list[Layer] = [conv(0, 3, 48), conv(1, 48, 70, 3, 2)]
    linear = nn.Linear(70, outputs, bias=bias)
    x = images(7, 3, 10, 10, kind)
    # Layout of float32 are not rounded before a head.
    exactly = "fp32" if kind == "bf16 in fp32" else kind
    means = Planned(rounded([*layers, Mean(2)], kind), x.shape, 1, 7, exactly)(x).flatten(1)
    exact = F.linear(means.double(), linear.weight.double(), linear.bias.double() if bias else None)
    for item, threads in ((7, 1), (7, 3), (2, 2)):
        torch.set_num_threads(threads)
        planned = Planned([*layers, Head(2, outputs)], x.shape, threads, item, kind)
        with pytest.raises(RuntimeError, match="head_weight is missing"):
            planned(x)
        planned.weight, planned.bias = linear.weight.detach(), linear.bias
        result = planned(x)
        assert result.dtype == torch.float32
        assert result.shape == (7, outputs)
        assert relative_error(result, exact) < 1e-6
        planned.weight = planned.weight[:, 1:].contiguous()
        with pytest.raises(RuntimeError, match=r"head_weight is \[.*, 69\]; expected \[.*, 70\]"):
            planned(x)


@each_kind
def test_nan_weights_give_nan(kind: str):
    layers: list[Layer] = [conv(0, 3, 32), conv(1, 32, 32)]
    layers[0].weight[5] = torch.nan
    x = images(2, 3, 8, 8, kind)
    assert Planned(layers, x.shape, 1, 2, kind)(x).isnan().all()


def test_strides_above_two_and_maps_smaller_than_the_kernel_cannot_be_planned():
    layers: list[Layer] = [conv(0, 3, 8), conv(1, 8, 8, 3, 3)]
    with pytest.raises(Unplannable, match="stride 3"):
        shapes(layers, (1, 3, 8, 8))
    layers = [conv(0, 3, 8, 7, 1, 0)]
    with pytest.raises(Unplannable, match="smaller than the kernel"):
        shapes(layers, (1, 3, 6, 6))


def test_layers_that_cannot_be_where_they_are_or_have_other_sizes_are_refused():
    for last in (MaxPool(1, 2, 2, 0), AveragePool(1, 2, 2), Concat((1,))):
        with pytest.raises(Unplannable, match="a pool or concatenation at the end"):
            shapes([conv(0, 3, 8), last], (1, 3, 6, 6))
    with pytest.raises(Unplannable, match="a linear layer elsewhere"):
        shapes([conv(0, 3, 8), Head(1, 8), conv(2, 8, 8, 1)], (1, 3, 6, 6))
    small: list[Layer] = [conv(0, 3, 8), conv(0, 3, 8, 3, 2), conv(0, 3, 4)]
    with pytest.raises(Unplannable, match="a product of values of other sizes"):
        shapes([*small, Pointwise(1, gate=2)], (1, 3, 6, 6))
    with pytest.raises(Unplannable, match="a product of values of other sizes"):
        shapes([*small, Pointwise(1, gate=3)], (1, 3, 6, 6))
    with pytest.raises(Unplannable, match="an addition of values of other sizes"):
        shapes([*small, Pointwise(1, residual=2)], (1, 3, 6, 6))


@each_kind
def test_arguments_are_checked(kind: str):
    layers: list[Layer] = [conv(0, 3, 32), conv(1, 32, 32)]
    planned = Planned(layers, (4, 3, 8, 8), 1, 4, kind)
    with pytest.raises(RuntimeError, match=r"x is \[4, 3, 9, 8\]; expected"):
        planned(images(4, 3, 9, 8))
    with pytest.raises(RuntimeError, match="x has 3 images; expected 4"):
        planned(images(3, 3, 8, 8))
    with pytest.raises(RuntimeError, match=r"x is torch.float64; expected torch.bfloat16 or"):
        planned(images(4, 3, 8, 8).double())
    planned.plan = dataclasses.replace(planned.plan, program=planned.plan.program[:-1])
    with pytest.raises(RuntimeError, match=r"program of .* is none of this version"):
        planned(images(4, 3, 8, 8))


def test_values_of_a_concatenation_must_fill_lines_and_be_read_once():
    def planned(layers: list[Layer]) -> None:
        network_plan.plan(layers, pack(layers), (2, 3, 8, 8), 1, 2)

    both: list[Layer] = [conv(0, 3, 32), conv(1, 32, 64)]
    planned([*both, conv(1, 32, 32), Concat((2, 3)), conv(4, 96, 8)])
    for wrong in (
        [*both, conv(1, 32, 20), Concat((3, 2)), conv(4, 84, 8)],
        [*both, Concat((1, 2)), conv(3, 96, 8), conv(4, 8, 96, residual=2)],
        [*both, Concat((2, 2)), conv(3, 128, 8)],
        [*both, Concat((0, 2)), conv(3, 67, 8)],
        [*both, conv(1, 32, 32, 3, 2), Concat((2, 3)), conv(4, 96, 8)],
        [*both, conv(1, 32, 32), Concat((2, 3))],
        [*both, conv(1, 32, 32), Concat((2, 3)), conv(4, 96, 64), conv(5, 64, 64, residual=2)],
    ):
        with pytest.raises(Unplannable, match="concatenation"):
            planned(wrong)


# -- the kernels for other processors ----------------------------------------------------------

SCRIPT = """
import sys
import pytest
import torch

torch.ops.load_library(sys.argv[1])
assert not hasattr(torch.ops.resfast, "conv_gemm")
from tests.ops import test_network

test_network.conv_cpu.has_amx = lambda: sys.argv[3] == "amx"
kinds = sys.argv[2].split(",")
for kind in kinds:
    for name in test_network.CHAINS:
        test_network.test_a_chain_computes_what_float64_does(name, kind)
    for value in (torch.nan, torch.inf):
        test_network.test_nan_and_infinity_come_out_where_they_do_in_float64(value, (8, 19), kind)
    test_network.test_a_head_is_a_linear_layer_of_the_means(10, True, kind)
for kind in set(kinds) & set(test_network.WINOGRAD_ERRORS):
    for side in test_network.winograd.SIDES[test_network.KINDS[kind].dtype]:
        for name in test_network.WINOGRAD:
            test_network.test_winograd_computes_what_float64_does(name, kind, side)
        test_network.test_winograd_keeps_what_is_not_finite_where_it_is_in_float32(
            1, torch.inf, kind, side
        )
print("right")
"""


@needs_kernels
@pytest.mark.skipif(not (ROOT / "csrc").exists() or COMPILER is None, reason="no compiler")
@pytest.mark.parametrize(
    ("option", "kinds"),
    [
        pytest.param("-DRESFAST_AMX_EMULATED", "bf16", id="amx"),
        pytest.param("-DRESFAST_WITHOUT_AMX", "bf16", id="without amx"),
        pytest.param("-DRESFAST_AVX512_EMULATED", "fp32,bf16 in fp32", id="avx512"),
    ],
)
def test_kernels_for_other_processors_compute_what_float64_does(
    option: str, kinds: str, tmp_path: Path
):
    if not all(map(runs_here, kinds.split(","))):
        pytest.skip("this processor cannot run them")
    headers = Path(torch.__file__).parent
    library = tmp_path / "network.so"
    sources = sorted((ROOT / "csrc" / "cpu" / "network").glob("*.cpp"))
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fno-math-errno", option]
    options += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", headers / "include"]
    link = [f"-L{headers / 'lib'}", "-ltorch_cpu"]
    subprocess.run([COMPILER, *options, *sources, "-o", library, *link], check=True)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(library),
            kinds,
            "amx" if "AMX_EMU" in option else "none",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "RESFAST_EXTENSION": "0", "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "right\n", done.stderr


# -- fused networks ----------------------------------------------------------------------------


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Choices that are made by this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(network_module, "MEASURE_SECONDS", 0.001)
    network_module.CHOICES.forget()


def settled(model: nn.Module) -> nn.Module:
    """The model in eval mode, with batch norms that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return settled(create_model("resnet-2111"))


def chains_of(fused: FusedModel) -> list[chains.Chain]:
    network = chains.with_chains(fused.network)
    return [] if network is None else [m for m in network.children() if isinstance(m, chains.Chain)]


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 0.01), (torch.float32, 1e-5)], ids=["bf16", "fp32"]
)
def test_a_fused_network_runs_as_one_chain(choices: None, dtype: torch.dtype, error: float):
    model = small_resnet()
    fused = resfast.fuse(model, dtype)
    (chain,) = chains_of(fused)
    assert isinstance(chain.network.layers[-1], Head)
    assert fused._chains.only(fused.network) is not None
    for count in (1, 7):
        x = torch.randn(count, 3, 32, 32)
        with torch.inference_mode():
            assert relative_error(fused(x), model.double()(x.double())) < error
            model.float()


class Branches(nn.Module):
    """A fire module, a depthwise block and a grouped convolution, with ReLU6 and hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.left, self.right = nn.Conv2d(24, 32, 1), nn.Conv2d(24, 96, 3, padding=1)
        self.depthwise = nn.Conv2d(128, 128, 3, padding=1, groups=128)
        self.groups = nn.Conv2d(128, 64, 3, padding=1, groups=2)
        self.last = nn.Conv2d(64, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        x = F.relu6(self.depthwise(F.max_pool2d(x, 3, 2, 1)))
        return F.relu(self.last(F.hardsigmoid(self.groups(x))))


@needs_kernels
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_groups_and_concatenations_are_parts_of_a_chain(
    choices: None, dtype: torch.dtype, error: float
):
    torch.manual_seed(0)
    model = Branches().eval()
    fused = resfast.fuse(model, dtype)
    (chain,) = chains_of(fused)
    kinds = [type(layer).__name__ for layer in chain.network.layers]
    assert kinds == ["Conv"] * 3 + ["Concat", "MaxPool"] + ["Conv"] * 3
    for count in (1, 7):
        x = torch.randn(count, 3, 32, 32)
        with torch.inference_mode():
            assert relative_error(fused(x), model.double()(x.double())) < error
            model.float()


@needs_kernels
def test_a_pool_called_as_a_function_and_a_classifier_end_a_chain(choices: None):
    class Pooled(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(20, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.flatten(F.adaptive_avg_pool2d(super().forward(x), (1, 1)), 1))

    torch.manual_seed(0)
    model = Pooled().eval()
    fused = resfast.fuse(model, torch.float32)
    assert fused._chains.only(fused.network) is not None
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert relative_error(fused(x), model.double()(x.double())) < 1e-5


@needs_kernels
@pytest.mark.parametrize("outside", ["left", "both"])
def test_a_concatenation_of_values_that_are_read_elsewhere_copies_them(choices: None, outside: str):
    class Read(Branches):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            left, right = self.left(x), self.right(x)
            both = torch.cat([left, left if outside == "both" else right], 1)
            return torch.cat([left.mean((2, 3)), both.sigmoid().mean((2, 3))], 1)

    torch.manual_seed(0)
    model = Read().eval()
    fused = resfast.fuse(model, torch.float32)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert relative_error(fused(x), model(x).double()) < 1e-5


class Excited(nn.Module):
    """An inverted residual with squeeze-and-excitation, and one with a gate on the left."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 72, 1)
        self.depthwise = nn.Conv2d(72, 72, 3, padding=1, groups=72)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.less, self.more, self.gate = nn.Conv2d(72, 8, 1), nn.Conv2d(8, 72, 1), gate
        self.narrow = nn.Conv2d(72, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.relu6(self.depthwise(F.relu6(self.wide(x))))
        for squeeze in (
            self.pool,
            lambda y: y.mean((2, 3), keepdim=True),
            lambda y: y.mean([-2, -1], True),
        ):
            y = self.gate(self.more(F.silu(self.less(squeeze(y))))) * y
        return F.relu(x + self.narrow(y) * 0.5)


@needs_kernels
@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_squeeze_and_excitation_is_part_of_a_chain(
    choices: None, dtype: torch.dtype, error: float, gate: type[nn.Module]
):
    torch.manual_seed(0)
    model = Excited(gate()).eval()
    fused = resfast.fuse(model, dtype)
    (chain,) = chains_of(fused)
    kinds = [type(layer).__name__ for layer in chain.network.layers]
    assert kinds == ["Conv"] * 3 + ["Mean", "Conv", "Conv", "Pointwise"] * 3 + ["Conv"]
    for count in (1, 7):
        x = torch.randn(count, 3, 30, 32)
        with torch.inference_mode():
            assert relative_error(fused(x), model.double()(x.double())) < error
            model.float()


@needs_kernels
@pytest.mark.parametrize("what", ["a gate of one channel", "a sum that broadcasts"])
def test_values_of_other_sizes_end_a_chain(choices: None, what: str):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 32, 3, padding=1)
            self.c, self.d = nn.Conv2d(32, 1, 3, padding=1), nn.Conv2d(32, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.b(F.relu(self.a(x))))
            if what == "a gate of one channel":
                return x * torch.sigmoid(self.c(x))
            return x + self.d(x.mean((2, 3), keepdim=True))

    torch.manual_seed(0)
    model = Other().eval()
    fused = resfast.fuse(model, torch.float32)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert relative_error(fused(x), model(x).double()) < 1e-5
    (chain,) = chains_of(fused)
    assert [type(layer) for layer in chain.network.layers] == [Conv, Conv]


class Dense(nn.Module):
    """Blocks of a DenseNet whose maps of 12 channels fill no line, and a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(24 + 12 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(24 + 12 * i, 12, 3, padding=1) for i in range(3))
        self.last = nn.Conv2d(60, 30, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms[:3], self.convs, strict=True):
            x = torch.cat([conv(F.relu(norm(x))), x], 1)
        x = F.avg_pool2d(self.last(F.relu(self.norms[3](x))), 2)
        return F.max_pool2d(x, 2)


@needs_kernels
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_a_densenet_is_one_chain_whose_factors_can_be_loaded(
    choices: None, dtype: torch.dtype, error: float
):
    torch.manual_seed(0)
    model, other = settled(Dense()), settled(Dense())
    fused = resfast.fuse(model, dtype)
    assert len(chains_of(fused)) == 1
    assert fused._chains.only(fused.network) is not None
    for source in (model, other):
        fused.load_state_dict(resfast.fuse(source, dtype).state_dict())
        for count in (1, 5):
            x = torch.randn(count, 3, 12, 16)
            with torch.inference_mode():
                assert relative_error(fused(x), source.double()(x.double())) < error
                source.float()


@needs_kernels
def test_the_chain_has_no_tensors_of_its_own(choices: None):
    model = small_resnet()
    fused = resfast.fuse(model)
    before = {name: tensor.data_ptr() for name, tensor in fused.state_dict().items()}
    fused(torch.randn(2, 3, 32, 32))
    assert {name: tensor.data_ptr() for name, tensor in fused.state_dict().items()} == before


@needs_kernels
def test_loaded_weights_are_used(choices: None):
    fused, other = resfast.fuse(small_resnet()), resfast.fuse(settled(create_model("resnet-2111")))
    x = torch.randn(2, 3, 32, 32)
    first = fused(x)
    fused.load_state_dict(other.state_dict())
    assert not torch.equal(fused(x), first)
    assert torch.equal(fused(x), other(x))


@needs_kernels
def test_copies_and_pickles_compute_the_same(choices: None):
    fused = resfast.fuse(small_resnet())
    x = torch.randn(3, 3, 32, 32)
    expected = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)


@needs_kernels
def test_threads_may_call_a_network_at_the_same_time(choices: None):
    fused = resfast.fuse(small_resnet())
    inputs = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    torch.set_num_threads(1)  # the choice, and with it the rounding, depends on the threads
    expected = [fused(x) for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        torch.set_num_threads(1)
        wrong.extend(
            index for _ in range(20) if not torch.equal(fused(inputs[index]), expected[index])
        )

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_kernels
def test_the_variable_turns_chains_off(choices: None, monkeypatch: pytest.MonkeyPatch):
    fused = resfast.fuse(small_resnet())
    x = torch.randn(2, 3, 32, 32)
    fused(x)
    (chain,) = [m for m in fused._chains.network.children() if isinstance(m, chains.Chain)]
    monkeypatch.setattr(chain.network, "_choose", lambda x: pytest.fail("a chain was planned"))
    chain.network._chosen.clear()
    monkeypatch.setenv("RESFAST_NETWORK", "0")
    fused(x)
    monkeypatch.delenv("RESFAST_NETWORK")
    monkeypatch.setenv("RESFAST_CONV", "oneDNN")
    fused(x)


@needs_kernels
def test_a_wrong_result_is_not_used(choices: None, monkeypatch: pytest.MonkeyPatch, caplog):
    conv_choice.warn_once.cache_clear()
    fused = resfast.fuse(small_resnet())
    x = torch.randn(2, 3, 32, 32)
    with monkeypatch.context() as patched:
        patched.setenv("RESFAST_NETWORK", "0")
        expected = fused(x)
    run = network_module._Ready.run
    monkeypatch.setattr(network_module._Ready, "run", lambda self, x: run(self, x) * 1.1)
    assert torch.equal(fused(x), expected)
    assert "not accurate enough in one call" in caplog.text


@needs_kernels
def test_many_layers_may_amplify_rounding(choices: None):
    """MobileNetV2 with these batch norms turns bfloat16's rounding into an error of a tenth."""
    torch.manual_seed(0)
    model = models.mobilenet_v2()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    model.eval()
    fused = resfast.fuse(model, torch.bfloat16)
    (chain,) = chains_of(fused)
    network, shape = chain.network, torch.Size([2, 3, 64, 64])
    layout, current = BFLOAT16, network._current()
    is_right = network._check(current, layout, shape)

    class Computed:
        """A result that differs by a share of what rounding to bfloat16 changes."""

        def __init__(self, share: float) -> None:
            self.share = share

        def run(self, x: Tensor) -> Tensor:
            exact, unrounded = (
                network_module._reference(current, x, network.head, layout, other=other)
                for other in (False, True)
            )
            result = exact + self.share * (unrounded - exact)
            assert relative_error(result, exact.double()) > MAX_ERRORS["bf16"]
            return result

    assert is_right(Computed(0.5))
    assert not is_right(Computed(1.5))
    if not runs_here("bf16"):
        return
    (ready, *_) = network.ways(current, layout, shape).values()
    assert is_right(ready())
    wrong = network._ready(current, layout, {}, False, shape, 2)
    wrong.packed.memory[:4096] = 0  # of the first weights
    assert not network._check(current, layout, shape)(wrong)


@needs_kernels
def test_a_first_call_with_nan_gives_nan_and_a_later_one_does_not(choices: None):
    fused = resfast.fuse(small_resnet())
    assert fused(torch.full((2, 3, 32, 32), torch.nan)).isnan().all()
    assert fused(torch.randn(2, 3, 32, 32)).isfinite().all()


@needs_kernels
def test_planning_draws_no_random_numbers_of_the_caller(choices: None):
    fused, x = resfast.fuse(small_resnet()), torch.zeros(2, 3, 32, 32)
    before = torch.get_rng_state()
    fused(x)
    assert torch.equal(torch.get_rng_state(), before)


@needs_kernels
def test_plans_are_kept_for_some_shapes(choices: None):
    fused = resfast.fuse(small_resnet())
    for count in range(1, network_module.MOST_PLANS + 3):
        fused(torch.randn(count, 3, 8, 8))
    (chain,) = [m for m in fused._chains.network.children() if isinstance(m, chains.Chain)]
    assert len(chain.network._chosen) == network_module.MOST_PLANS


@needs_kernels
def test_no_more_than_two_ways_have_memory_at_a_time(
    choices: None, monkeypatch: pytest.MonkeyPatch
):
    made: list[weakref.ref[Tensor]] = []
    counts = []

    def noted(count: int) -> Tensor:
        memory = aligned_bytes(count)
        made.append(weakref.ref(memory))
        return memory

    def alive() -> int:
        return sum(one() is not None for one in made)

    def measured(x: Tensor, ways: dict[str, Callable[[Tensor], Tensor]]) -> tuple[str, bool]:
        for run in ways.values():
            run(x)
        counts.append(alive())
        return list(ways)[len(counts) % 2], True

    monkeypatch.setattr(network_module, "aligned_bytes", noted)
    monkeypatch.setattr(network_module, "_measure", measured)
    fused = resfast.fuse(small_resnet())
    fused(torch.randn(64, 3, 8, 8))
    assert len(made) > 2
    assert max(counts) == 2
    assert alive() <= 1


@needs_kernels
def test_a_chosen_chain_leaves_its_layers_without_packed_weights(
    choices: None, monkeypatch: pytest.MonkeyPatch
):
    def measured(x: Tensor, ways: dict[str, Callable[[Tensor], Tensor]]) -> tuple[str, bool]:
        for run in ways.values():
            run(x)
        return next(iter(ways)), True

    monkeypatch.setattr(network_module, "_measure", measured)
    fused, x = resfast.fuse(small_resnet()), torch.randn(2, 3, 32, 32)
    fused(x)
    convolutions = [module for module in fused.modules() if isinstance(module, ConvBiasAct)]
    assert convolutions
    assert not any(module._packed for module in convolutions)
    monkeypatch.setenv("RESFAST_NETWORK", "0")
    layers = fused(x)
    monkeypatch.delenv("RESFAST_NETWORK")
    assert relative_error(fused(x), layers.double()) < 0.01


@needs_kernels
def test_a_chain_at_the_beginning_converts_the_input_itself(
    choices: None, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    model = settled(
        nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(32 * 64, 10),
        )
    )
    fused, x = resfast.fuse(model), torch.randn(2, 3, 16, 16)
    seen = []
    call = network_module.Network.__call__
    monkeypatch.setattr(
        network_module.Network, "__call__", lambda self, x: (seen.append(x), call(self, x))[1]
    )
    with torch.inference_mode():
        result = fused(x)
        assert len(seen) == 1
        assert seen[0] is x
        assert relative_error(result, model(x).double()) < 0.01
        rounded = x.bfloat16().contiguous(memory_format=torch.channels_last)
        assert torch.equal(fused(rounded), result)


@needs_kernels
def test_values_that_are_read_outside_end_a_chain(choices: None):
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(
                nn.Conv2d(3, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.ReLU(),
            )
            self.second = nn.Sequential(
                nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            low = self.first(x)
            return low, self.second(low)

    torch.manual_seed(0)
    model = Pyramid().eval()
    fused = resfast.fuse(model)
    assert [len(chain.network.layers) for chain in chains_of(fused)] == [2, 2]
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        for result, expected in zip(fused(x), model(x), strict=True):
            assert relative_error(result, expected.double()) < 0.01


@needs_kernels
def test_a_compiled_fused_network_has_no_chains(choices: None):
    fused = resfast.fuse(small_resnet())
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert relative_error(compiled(x), fused(x).double()) < 0.01


@needs_kernels
def test_hooks_on_modules_of_a_chain_are_called(choices: None):
    fused = resfast.fuse(small_resnet())
    x = torch.randn(2, 3, 32, 32)
    expected, seen = fused(x), []
    handles = [
        module.register_forward_hook(lambda *_: seen.append(1))
        for module in fused.network.modules()
        if isinstance(module, ConvBiasAct)
    ]
    assert relative_error(fused(x), expected.double()) < 0.01
    assert len(seen) == len(handles)
    for handle in handles:
        handle.remove()
    assert torch.equal(fused(x), expected)


@needs_kernels
def test_a_value_may_be_input_and_residual_of_one_convolution(choices: None):
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 32, 3, padding=1)
            self.second = nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return (self.second(x) + x).relu()

    torch.manual_seed(0)
    model = Doubled().eval()
    fused, x = resfast.fuse(model), torch.randn(2, 3, 9, 9)
    (chain,) = chains_of(fused)
    assert chain.network.layers[1].residual == chain.network.layers[1].source == 1
    with torch.inference_mode():
        assert relative_error(fused(x), model(x).double()) < 0.01
