"""The choice of an algorithm for convolutions in training: right values, measured once a shape."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resfast
from resfast.ops.conv import choice as conv_choice
from resfast.ops.conv_train import choice
from resfast.ops.conv_train import op as conv_train

pytestmark = pytest.mark.skipif(
    not conv_train.AVAILABLE, reason="needs the C++ kernels and AVX512-BF16"
)
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.forget()
    yield
    choice.forget()


def tensors(n: int, c: int, k: int, side: int, kernel: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(n, c, side, side).to(torch.bfloat16, memory_format=LAST).requires_grad_()
    weight = (torch.randn(k, c, kernel, kernel) / (c * kernel**2) ** 0.5).requires_grad_()
    return x, weight


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "expected"),
    [
        (1, 1, 0, ["torch", "matmul"]),
        (1, 2, 0, ["torch", "matmul"]),
        (1, 1, 1, ["torch"]),
        (3, 1, 1, ["torch", "conv2d_train:2", "conv2d_train:3", "conv2d_train:4"]),
        (3, 2, 1, ["torch", "conv2d_train:2"]),
        (3, 3, 1, ["torch"]),
        (5, 1, 2, ["torch"]),
    ],
)
def test_every_candidate_has_the_gradients_of_float64(kernel, stride, padding, expected):
    x, weight = tensors(3, 24, 32, 7, kernel)
    assert choice.candidates(x, weight, stride, padding, 4) == expected
    bias = torch.randn(32, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    wide = torch.nn.functional.conv2d(*exact, stride, padding)
    grad = torch.randn_like(wide)
    wanted = torch.autograd.grad(wide, exact, grad)
    for name in expected:
        out = choice.run(name, x, weight, bias, stride, padding)
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=LAST)
        found = torch.autograd.grad(out, (x, weight, bias), grad.bfloat16())
        for one, other in zip((out, *found), (wide, *wanted), strict=True):
            assert (one.double() - other).norm() < 0.02 * other.norm()


def test_a_shape_is_measured_once_and_the_choice_is_kept(tmp_path, monkeypatch):
    calls = []

    def fastest(candidates, **rest):
        calls.append(sorted(candidates))
        for call in candidates.values():
            assert rest["is_right"](call())
        return "conv2d_train:2", True

    monkeypatch.setattr(conv_choice, "fastest", fastest)
    x, weight = tensors(2, 16, 16, 6, 3)
    before = torch.get_rng_state()
    for _ in range(2):
        assert choice.algorithm(x, weight, 1, 1) == "conv2d_train:2"
    choice.forget()
    assert choice.algorithm(x, weight, 1, 1) == "conv2d_train:2"
    assert calls == [["conv2d_train:2", "torch"]]
    (key,) = json.loads((tmp_path / "resfast" / "conv-train-cpu.json").read_text())
    assert "2,16,6,6-16,16,3,3-1-1" in key
    choice.algorithm(x.detach(), weight, 1, 1)
    choice.algorithm(x, weight, 1, 1, 3)
    assert len(calls) == 3
    assert weight.grad is None
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_measured_follows_a_rule():
    x, weight = tensors(2, 16, 16, 6, 3)
    assert choice.by_rule(x, weight, 1, 1) == "conv2d_train:2"
    assert choice.by_rule(x, weight, 3, 1) == "torch"
    pixel = weight[:, :, :1, :1]
    assert choice.by_rule(x, pixel, 1, 0) == "torch"
    assert choice.by_rule(x, pixel, 2, 0) == ("matmul" if conv_train.AMX else "torch")


def test_measuring_within_a_checkpoint_does_not_disturb_it():
    torch.manual_seed(1)
    model = resfast.optimize(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))[0]
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert x.grad.isfinite().all()
    assert choice._known
