"""``resfast.fuse`` on batch norms that do not directly follow a convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import resfast
from resfast.ops.conv.op import ConvBiasAct
from tests.test_fuse_operations import (
    LIMITS,
    assert_same,
    calls,
    counts,
    images,
    one_thread_and_no_cache_of_the_user,
    ready,
)

__all__ = ["one_thread_and_no_cache_of_the_user"]


class Layers(nn.Module):
    """Convolutions, batch norms and linear layers for a ``forward`` of one's own."""

    def __init__(self, forward: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        self.own = forward
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 4, 1, bias=False)
        self.after = nn.Conv2d(8, 6, 1)
        self.other = nn.Conv2d(8, 5, 3, stride=2, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.padded = nn.Conv2d(8, 6, 3, padding=1)
        self.reflected = nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")
        self.bn3, self.bn8, self.bn12 = nn.BatchNorm2d(3), nn.BatchNorm2d(8), nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 5, 1)
        self.fc1, self.fc2 = nn.Linear(8, 7), nn.Linear(7, 5, bias=False)
        self.rows, self.rows8 = nn.BatchNorm1d(7), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


def used_twice(m: Layers, x: Tensor) -> Tensor:
    x = F.relu(m.conv1(x))
    return m.after(m.bn8(x)) + x.mean()


FOLDED = {
    "before a 1x1": lambda m, x: m.after(m.bn8(F.relu(m.conv1(x)))),
    "before a strided one": lambda m, x: m.other(m.bn8(F.relu(m.conv1(x)))),
    "before a grouped one": lambda m, x: m.grouped(m.bn8(F.relu(m.conv1(x)))),
    "before reflected padding": lambda m, x: m.reflected(m.bn8(F.relu(m.conv1(x)))),
    "before several": lambda m, x: (lambda y: m.after(y).sum() + m.other(y))(
        m.bn8(m.conv1(x).relu())
    ),
    "the input used twice": used_twice,
    "of the images": lambda m, x: m.conv2(m.bn3(x)),
    "two in a row": lambda m, x: m.after(m.bn8(m.bn8(m.conv1(x)))),
    "after an average pool": lambda m, x: m.bn8(F.avg_pool2d(m.conv1(x), 2)),
    "after an average over pixels": lambda m, x: m.bn8(m.conv1(x).mean((2, 3), keepdim=True)),
    "after a padded average": lambda m, x: m.bn8(
        F.avg_pool2d(m.conv1(x), 3, 2, 1, ceil_mode=True, count_include_pad=False)
    ),
    "after an adaptive pool": lambda m, x: m.bn8(F.adaptive_avg_pool2d(m.conv1(x), (3, 2))),
    "after a concatenation": lambda m, x: F.relu(m.bn12(torch.cat([m.conv1(x), m.conv2(x)], 1))),
    "after a concatenation, by name": lambda m, x: m.bn12(
        torch.concat(tensors=(m.conv2(x), m.conv1(x)), dim=1)
    ),
    "in a concatenation": lambda m, x: m.wide(torch.cat([m.bn8(m.conv1(x)), m.conv2(x)], 1)),
    "after a concatenation, before a 1x1": lambda m, x: m.wide(
        m.bn12(torch.cat([F.relu(m.conv1(x)), m.conv2(x)], 1))
    ),
    "of rows after a linear layer": lambda m, x: m.fc2(
        F.relu(m.rows(m.fc1(F.relu(m.conv1(x)).mean((2, 3)))))
    ),
}
"""A ``forward`` each whose batch norms become part of other layers."""


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", FOLDED)
def test_batch_norm_becomes_part_of_another_layer(name: str, dtype: torch.dtype):
    fused = assert_same(ready(Layers(FOLDED[name])), dtype)
    found = calls(fused)
    assert not {"BatchNorm2d", "BatchNorm1d", "ScaleShiftAct"} & set(found), found
    assert fused.report.batch_norms >= 1
    assert not [name for name, why in fused.report.left if why.startswith("batch norm")]


LEFT = {
    "before padding": (lambda m, x: m.padded(m.bn8(F.relu(m.conv1(x)))), 1),
    "before an activation": (lambda m, x: m.after(F.relu(m.bn8(F.relu(m.conv1(x))))), 1),
    "also read elsewhere": (
        lambda m, x: (lambda y: m.after(y) + y.sum())(m.bn8(m.conv1(x).relu())),
        1,
    ),
    "after a pool that counts zeros": (lambda m, x: m.bn8(F.avg_pool2d(m.conv1(x), 3, 2, 1)), 1),
    "after a maximum": (lambda m, x: m.bn8(F.max_pool2d(m.conv1(x), 2)), 1),
    "after a part": (lambda m, x: m.bn8(m.conv1(x).sin()), 1),
    "after a sum of pixels": (lambda m, x: m.bn8(m.conv1(x).sum((2, 3), keepdim=True)), 1),
    "after a repeated value": (
        lambda m, x: (lambda y: m.bn12(torch.cat([y, y, y], 1)))(m.conv2(x)),
        1,
    ),
    "after activations in a concatenation": (
        lambda m, x: F.hardswish(m.bn12(torch.cat([F.relu(m.conv1(x)), m.conv2(x)], 1))),
        1,
    ),
}
"""A ``forward`` each whose batch norm stays an operation, and the number of those."""


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", LEFT)
def test_other_batch_norms_are_one_operation_with_what_surrounds_them(
    name: str, dtype: torch.dtype
):
    forward, count = LEFT[name]
    fused = assert_same(ready(Layers(forward)), dtype)
    found = calls(fused)
    assert found.count("ScaleShiftAct") == count
    assert not {"BatchNorm2d", "relu", "hardswish", "cat"} & set(found), found
    assert [why for _, why in fused.report.left if why.startswith("batch norm")]


def test_concatenations_for_batch_norms_only_are_not_copied():
    """As in a DenseNet: each layer reads all earlier ones."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4 * i + 3, 4, 3, padding=1) for i in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4 * i + 3) for i in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = torch.cat([conv(F.relu(norm(x))), x], 1)
            return x

    fused = assert_same(ready(Dense()))
    assert calls(fused) == ["ScaleShiftAct", "ConvBiasAct"] * 4 + ["cat"]
    assert_same(ready(Dense()), torch.bfloat16)


def test_means_far_from_0_are_not_folded_forward_in_16_bits():
    model = ready(Layers(FOLDED["before a 1x1"]))
    model.bn8.running_mean.fill_(50.0)
    assert "ScaleShiftAct" in calls(assert_same(model, torch.bfloat16))
    assert "ScaleShiftAct" not in calls(assert_same(model, torch.float32))


def test_rows_of_unknown_rank_are_left():
    """``nn.BatchNorm1d`` normalises dimension 1, which is not that of a linear layer's features."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.fc(x))

    model = ready(Sequence())
    for shape in ((4, 6, 6), (4, 6)):
        x = torch.randn(shape)
        for example in (None, x):
            fused = resfast.fuse(model, torch.float32, example=example)
            with torch.no_grad():
                torch.testing.assert_close(fused(x), model(x))
            assert fused.report.batch_norms == (example is not None and x.ndim == 2)


AFFINE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "times a gain": lambda m, x: F.relu(x * m.gain),
    "a gain of one image": lambda m, x: m.gain[None] * x,
    "plus an offset": lambda m, x: F.hardswish(x + m.gain),
    "scalars": lambda m, x: (2 - x * 0.5) / 3 + 1,
    "a learned scalar": lambda m, x: x * m.scalar.exp() - m.scalar,
    "in place": lambda m, x: x.mul_(m.gain).add_(0.25).relu_(),
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", AFFINE)
def test_constants_for_each_channel_become_part_of_the_convolution(name: str, dtype: torch.dtype):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=False)
            self.gain = nn.Parameter(torch.ones(8, 1, 1))
            self.scalar = nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return AFFINE[name](self, self.conv(x))

    fused = assert_same(ready(Scaled()), dtype)
    assert calls(fused) == ["ConvBiasAct"]


NOT_AFFINE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "one for each position": lambda m, x: x * m.position,
    "one for each column": lambda m, x: x + m.column,
    "a power": lambda m, x: x.abs() ** 2,
    "alpha": lambda m, x: torch.add(x, m.gain, alpha=2),
    "the number over it": lambda m, x: 1 / (x * x + 1),
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_other_arithmetic_stays(name: str):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=False)
            self.gain = nn.Parameter(torch.ones(8, 1, 1))
            self.position = nn.Parameter(torch.ones(8, 6, 6))
            self.column = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return NOT_AFFINE[name](self, self.conv(x))

    assert_same(ready(Other()), sizes=((2, 8, 8), (1, 8, 8)))


def test_a_wider_constant_still_widens():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.register_buffer("gain", torch.ones(8, 1, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.gain

    fused = resfast.fuse(ready(Wide()), torch.float32)
    assert calls(fused) == ["ConvBiasAct", "mul"]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_frozen_batch_norms_are_folded(dtype: torch.dtype):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), torchvision.ops.FrozenBatchNorm2d(8), nn.ReLU()
    )
    for name, buffer in model[1].named_buffers():
        buffer.copy_(images(8, seed=len(name)).abs() + 0.5)
    fused = assert_same(model.eval(), dtype)
    assert calls(fused) == ["ConvBiasAct"]
    assert counts(fused)[3] == 1


def test_every_convolution_is_one_kernel_in_a_densenet():
    model = ready(torchvision.models.densenet121(num_classes=7, memory_efficient=False))
    fused = resfast.fuse(model, torch.float32)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert (fused(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    kernels = [m for m in fused.modules() if isinstance(m, ConvBiasAct)]
    assert len(kernels) == fused.report.convolutions == 120
    assert "BatchNorm2d" not in calls(fused)
