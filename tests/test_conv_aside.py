"""``conv2d_aside``: result and gradients, and its weight gradients on a branch of a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resfast.kernels import conv_aside
from resfast.layers.conv import Conv2d, compute_weight_gradients_aside
from resfast.models.speednet import SpeedNet, SpeedNetSpec
from resfast.training.config import OptimConfig
from resfast.training.optim import Schedule, build_optimizer
from resfast.training.step import TrainStep

LAST = torch.channels_last
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# images, channels in and out, height, width, kernel, stride, padding
SHAPES = ((3, 16, 24, 9, 7, 3, 1, 1), (2, 8, 5, 8, 8, 3, 2, 1), (4, 32, 16, 5, 5, 1, 2, 0))


def arguments(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, int, int]:
    torch.manual_seed(0)
    n, c, k, h, w, kernel, stride, padding = shape
    x = torch.randn(n, c, h, w, device=device).to(torch.bfloat16, memory_format=LAST)
    weight = torch.randn(k, c, kernel, kernel, device=device).contiguous(memory_format=LAST)
    return x.requires_grad_(), weight.requires_grad_(), stride, padding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_those_of_float64(shape: tuple[int, ...], device: str):
    x, weight, stride, padding = arguments(shape, device)
    out = conv_aside.conv2d(x, weight, stride, padding)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=LAST)
    grad = torch.randn_like(out)
    for_x, for_weight = torch.autograd.grad(out, (x, weight), grad)
    assert for_weight.dtype == torch.float32
    assert for_weight.stride() == weight.stride()
    wide = [x.detach().double().requires_grad_(), weight.detach().bfloat16().double()]
    wide[1].requires_grad_()
    exact = torch.conv2d(*wide, None, stride, padding)
    theirs = torch.autograd.grad(exact, wide, grad.double())
    for mine, its in zip((out, for_x, for_weight), (exact, *theirs), strict=True):
        assert (mine.double() - its).norm() <= 1e-2 * its.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_is_well_formed(device: str):
    torch.library.opcheck(torch.ops.resfast.conv2d_aside, arguments(SHAPES[0], device))


def test_a_gradient_that_is_not_needed_is_not_computed(monkeypatch: pytest.MonkeyPatch):
    x, weight, stride, padding = arguments(SHAPES[0], "cpu")
    asked = []
    inner = conv_aside.torch.ops.resfast.conv2d_aside_backward

    class Ops:
        conv2d_aside_backward = staticmethod(lambda *args: asked.append(args[-1]) or inner(*args))

    out = conv_aside.conv2d(x.detach(), weight, stride, padding)
    monkeypatch.setattr(torch.ops, "resfast", Ops)
    out.sum().backward()
    assert asked == [[False, True]]
    assert weight.grad.isfinite().all()


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"x is torch.float32 .* expected bfloat16 or float16"):
        conv_aside.conv2d(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3))


def test_a_step_sets_convolutions_apart_on_cuda_alone():
    model = nn.Sequential(Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    compute_weight_gradients_aside(model, True)
    assert model[0].aside
    model = captured_step(torch.device("cpu"), aside=None).model
    assert not any(module.aside for module in model.modules() if isinstance(module, Conv2d))


def captured_step(device: torch.device, *, aside: bool | None, compile: bool = False) -> TrainStep:
    torch.manual_seed(0)
    spec = SpeedNetSpec(channels=(32, 64), convolutions=(3, 3), residual=True)
    model = SpeedNet(spec).to(device, memory_format=LAST)
    config = OptimConfig(
        optimizer="muon", lr=0.02, bias_lr=0.1, sgd_momentum=0.85, normalize_filters=True
    )
    optimizer = build_optimizer(model, config)
    step = TrainStep(
        model,
        optimizer,
        config,
        device=device,
        dtype=torch.bfloat16,
        compile=compile,
        schedule=Schedule(optimizer, config, 1, 40),
        captured=True,
    )
    if aside is not None:
        compute_weight_gradients_aside(model, aside)
    return step


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_graph_with_gradients_aside_learns_as_one_without(compile: bool):
    results = []
    for aside in (True, False):
        step = captured_step(torch.device("cuda"), aside=aside, compile=compile)
        torch.manual_seed(1)
        batches = [
            (
                torch.randn(64, 3, 16, 16, device="cuda").to(torch.bfloat16, memory_format=LAST),
                torch.randint(10, (64,), device="cuda"),
            )
            for _ in range(4)
        ]
        step.warm_up(*batches[0], fall_back=False)
        losses = [float(step(*batches[number % 4])[0]) for number in range(24)]
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=0.05, abs=0.02)
    assert results[0][-1] < 0.7 * results[0][0]
