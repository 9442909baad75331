"""``resfast.fuse``: values that depend on layout, dtype, shapes and how weights are computed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import resfast
from resfast.errors import ResfastError
from resfast.layers import ConvBNReLU
from tests.test_fuse import images, trained_like

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.03}


@pytest.fixture(autouse=True)
def one_algorithm(monkeypatch: pytest.MonkeyPatch):
    """No time is spent on measurements."""
    monkeypatch.setenv("RESFAST_CONV", "oneDNN")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def assert_same(fused: nn.Module, expected: Tensor, *inputs: Tensor) -> None:
    with torch.no_grad():
        result = fused(*inputs)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= LIMITS[fused.dtype] * expected.abs().max()


def check(model: nn.Module, *inputs: Tensor, example: Tensor | tuple[Tensor, ...] | None) -> list:
    """Compares with the original in every dtype; returns the reports."""
    reports = []
    with torch.no_grad():
        expected = model(*inputs)
    for dtype in LIMITS:
        fused = resfast.fuse(model, dtype, example=example)
        assert_same(fused, expected, *inputs)
        reports.append(fused.report)
    return reports


class Block(nn.Module):
    def __init__(self, conv: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Viewed(nn.Module):
    def __init__(self, view, block: nn.Module) -> None:
        super().__init__()
        self.view, self.block, self.fc = view, block, nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.view(F.max_pool2d(self.block(x), 2)))


class SquareOnly(Viewed):
    """Only torch.export can trace its control flow."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != x.shape[3]:
            raise ValueError("square images only")
        return super().forward(x)


VIEWS = {
    "view": lambda x: x.view(x.size(0), -1),
    "view by name": lambda x: x.view(size=(x.size(0), -1)),
    "view_as": lambda x: x.view_as(x).view(-1, 128),
    "flatten": lambda x: torch.flatten(x, 1),
}


@pytest.mark.parametrize("kind", [Viewed, SquareOnly])
@pytest.mark.parametrize("name", VIEWS)
def test_views_have_the_values_of_contiguous_maps(name: str, kind: type[Viewed]) -> None:
    model = trained_like(kind(VIEWS[name], Block(nn.Conv2d(3, 8, 3, padding=1))))
    x = images(2, 3, 8, 8)
    check(model, x, example=x if kind is SquareOnly else None)


def test_fused_layer_in_eval_mode_can_be_viewed_as_in_training() -> None:
    model = trained_like(Viewed(VIEWS["view"], ConvBNReLU(3, 8)))
    x = images(2, 3, 8, 8)
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        last = x.to(memory_format=torch.channels_last)
        out = model.block(last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    check(model, x, example=None)


@pytest.mark.parametrize(
    ("view", "word"),
    [
        (lambda x: x.as_strided((2, 128), (128, 1)), "as_strided"),
        (lambda x: x.view(torch.int32).view(2, -1).float(), "dtype"),
    ],
)
def test_what_depends_on_strides_or_bits_is_refused(view, word: str) -> None:
    model = trained_like(Viewed(view, Block(nn.Conv2d(3, 8, 3, padding=1))))
    with pytest.raises(ResfastError, match=word):
        resfast.fuse(model)


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (Block(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != x.shape[3]:
            raise ValueError("square images only")
        return self.b(self.a(x))


def test_chain_of_an_exported_network_has_its_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RESFAST_CONV")  # which turns chains off
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = images(2, 8, 8, 8)
    check(trained_like(TwoBlocks()), x, example=x)


class Head(nn.Module):
    def __init__(self, head) -> None:
        super().__init__()
        self.head, self.block, self.fc = head, Block(nn.Conv2d(3, 8, 3, padding=1)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self, self.block(x).mean((2, 3)))


HEADS = {
    "cosine": lambda m, x: F.linear(F.normalize(x), F.normalize(m.fc.weight)),
    "tied": lambda m, x: F.linear(F.relu(F.linear(x, m.fc.weight)), m.fc.weight.t()),
    "twice": lambda m, x: m.fc(F.relu(m.fc(x))),
    "keyword": lambda m, x: m.fc(input=x),
    "product": lambda m, x: x @ m.fc.weight + torch.linspace(0, 1, 8) @ m.fc.weight,
    "float": lambda m, x: m.fc(x.float() * 3).softmax(1),
    "mask": lambda m, x: m.fc(x * (x > 0.2) + (x > 0.5)),
}


@pytest.mark.parametrize("name", HEADS)
def test_linear_layers_keep_their_values_whatever_they_are_given(name: str) -> None:
    x = images(2, 3, 8, 8)
    check(trained_like(Head(HEADS[name])), x, example=x)


class Float(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(nn.Conv2d(3, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).float().mean((2, 3)) / 3


def test_deliberate_float_stays_float32() -> None:
    fused = resfast.fuse(trained_like(Float()))
    result = fused(images(2, 3, 8, 8))
    assert not torch.equal(result, result.bfloat16().float())


class Made(nn.Module):
    """Tensors are made in forward, in the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.conv = Block(nn.Conv2d(4, 8, 3, padding=1)), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.block(torch.cat([x, torch.linspace(-1, 1, w).expand(n, 1, h, w)], 1))
        return self.conv(x) + torch.cat([x[:, :4], torch.ones(n, 4, h, w)], 1)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + (x > 0)


@pytest.mark.parametrize("kind", [Made, Masked])
def test_tensors_of_another_dtype_meet_convolutions(kind: type[nn.Module]) -> None:
    x = images(2, 3, 8, 8)
    check(trained_like(kind()), x, example=x)


class Sum(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, stride, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 8, 8, 8))
        self.stride = stride

    def forward(self, x: Tensor, one: Tensor | None = None) -> Tensor:
        if self.stride > 1:
            return self.a(x) + self.b(F.adaptive_avg_pool2d(x, 7))
        return self.a(x) + (self.position if one is None else self.b(one))


def test_shapes_that_agree_by_chance_are_added_as_in_the_original() -> None:
    x, one = images(3, 3, 8, 8), images(1, 3, 8, 8)
    check(Sum().eval(), x, example=one)
    check(Sum().eval(), x, one, example=(one, one))
    (report, _) = check(Sum(32).eval(), images(3, 3, 32, 32), example=None)
    assert not report.residuals
    both = resfast.fuse(Sum().eval(), torch.float32, example=(x, x))
    assert both.report.residuals == 1


ONE_COLUMN = """
import torch, resfast
from torch import nn

torch.set_num_threads(1)
for options in ({"groups": 2}, {"groups": 8}, {"dilation": 2}):
    model = nn.Conv2d(8, 8, 3, (1, 3), (1, 0), **options).eval()
    x = torch.randn(2, 8, 32, 5)
    with torch.no_grad():
        error = (resfast.fuse(model)(x) - model(x)).abs().max()
    assert error < 0.1, (options, error)
"""


def test_kept_convolutions_hold_nothing_of_uninitialized_memory() -> None:
    """torch 2.15's bfloat16 convolution does, with AMX, where the result is one column wide."""
    environment = {**os.environ, "MALLOC_PERTURB_": "128"}  # glibc fills new memory
    command = [sys.executable, "-c", ONE_COLUMN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class AddedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        same, channels = x, x.shape[1]
        before = channels
        channels += 1
        x += 1
        x *= before
        return same * channels + x


def test_operators_in_place_change_every_name_of_a_tensor_but_not_of_a_number() -> None:
    check(AddedInPlace().eval(), images(2, 3, 8, 8), example=None)


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.weight = Block(nn.Conv2d(3, 8, 3, padding=1)), torch.ones(8, 1, 3, 3)
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        padding = self.weight.shape[-1] // 2
        return F.conv2d(x, self.weight, padding=padding, stride=2, groups=x.shape[1])


def test_convolution_with_options_from_shapes_is_left() -> None:
    x = images(2, 3, 8, 8)
    for report in check(trained_like(Options()), x, example=x):
        assert any("options are computed" in why for _, why in report.left)


@pytest.mark.parametrize(
    "options", [{}, {"groups": 4}, {"dilation": 2}, {"padding_mode": "reflect"}]
)
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "old", "pruned"])
def test_computed_weights_are_taken_as_they_are(how: str, options: dict) -> None:
    conv: nn.Module = nn.Conv2d(8, 8, 3, padding=1, **options)
    if how == "old":
        with pytest.warns(FutureWarning):
            conv = nn.utils.weight_norm(conv)
    elif how == "pruned":
        prune.l1_unstructured(conv, "weight", amount=0.5)
    else:
        conv = getattr(parametrizations, how)(conv)
    model = trained_like(Block(conv))
    x = images(2, 8, 8, 8)
    expected = model(x)  # keeps weights with gradients
    for dtype in LIMITS:
        fused = resfast.fuse(model, dtype)
        assert_same(fused, expected.detach(), x)
        assert fused.report.batch_norms == 1
    assert torch.equal(model(x), expected)
