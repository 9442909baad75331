"""``global_pool``: maximum and mean of each channel, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.models.speednet import SpeedNet, SpeedNetSpec
from resfast.ops.global_pool import op as global_pool

LAST = torch.channels_last
SHAPES = ((2, 16, 4, 4), (3, 40, 3, 5), (1, 1, 1, 1), (5, 256, 2, 2), (2, 7, 9, 8))
pytestmark = pytest.mark.skipif(
    not global_pool.AVAILABLE, reason="the kernels are not built or need AVX512-BF16"
)


def plain(x: Tensor, kind: str) -> Tensor:
    maxima, means = F.max_pool2d(x, x.shape[2:]).flatten(1), x.mean((2, 3))
    return {"max": maxima, "avg": means, "both": torch.cat([maxima, means], 1)}[kind]


@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("kind", ["max", "avg", "both"])
def test_result_and_gradient_are_those_of_float64(kind: str, memory_format: torch.memory_format):
    torch.manual_seed(0)
    for shape in SHAPES:
        x = torch.randn(shape).bfloat16().contiguous(memory_format=memory_format)
        exact_x = x.double().requires_grad_()
        exact = plain(exact_x, kind)
        out = global_pool.global_pool(x.requires_grad_(), kind)
        grad = torch.randn(exact.shape).bfloat16()
        (exact_gradient,) = torch.autograd.grad(exact, exact_x, grad.double())
        (gradient,) = torch.autograd.grad(out, x, grad)
        # Both are rounded once.
        assert torch.equal(out, exact.to(torch.bfloat16)) or kind != "max"
        torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-8, atol=1e-6)
        assert gradient.is_contiguous(memory_format=LAST)


def test_a_gradient_goes_to_the_first_of_equal_maxima_and_nan_is_one():
    x = torch.zeros(1, 2, 2, 2, dtype=torch.bfloat16)
    x[0, 1, 1, 0] = torch.nan
    x[0, 1, 1, 1] = torch.inf
    x.requires_grad_()
    out = global_pool.global_pool(x, "max")
    expected = plain(x, "max")
    assert out[0, 0] == 0
    assert out[0, 1].isnan()
    assert expected[0, 1].isnan()
    ones = torch.ones_like(out)
    assert torch.equal(
        torch.autograd.grad(out, x, ones)[0], torch.autograd.grad(expected, x, ones)[0]
    )


def test_a_gradient_that_is_not_contiguous():
    x = torch.randn(4, 8, 3, 3).bfloat16().requires_grad_()
    out = global_pool.global_pool(x, "avg")
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, torch.full_like(gradient, 1 / 9))


def test_the_operator_is_well_formed():
    x = torch.randn(2, 5, 3, 4).bfloat16().to(memory_format=LAST).requires_grad_()
    for kind in ("max", "avg", "both"):
        torch.library.opcheck(torch.ops.resfast.global_pool, (x, kind))


def test_bad_arguments_are_refused():
    x = torch.randn(2, 5, 3, 4).bfloat16()
    with pytest.raises(ValueError, match=r"kind is 'min'; expected one of max, avg, both"):
        global_pool.global_pool(x, "min")
    with pytest.raises(TypeError, match=r"x is torch.float32; expected torch.bfloat16"):
        global_pool.global_pool(x.float(), "max")
    with pytest.raises(ValueError, match=r"x is \[2, 5, 0, 4\]"):
        global_pool.global_pool(x[:, :, :0], "max")
    positions = torch.zeros(2, 5, dtype=torch.int32)
    kernel = torch.ops.resfast.pool_backward
    with pytest.raises(RuntimeError, match=r"grad is torch.bfloat16 \[2, 4\]; expected"):
        kernel(x[:, :4, 0, 0].contiguous(), positions, [2, 5, 3, 4], True, False)
    with pytest.raises(RuntimeError, match=r"positions is torch.int64"):
        kernel(x[:, :, 0, 0].contiguous(), positions.long(), [2, 5, 3, 4], True, False)
    with pytest.raises(RuntimeError, match="neither the maximum nor the mean"):
        torch.ops.resfast.pool_forward(x.to(memory_format=LAST), False, False)


@pytest.mark.parametrize("final_pool", ["max", "avg", "both"])
def test_a_speednet_trains_alike_with_it(final_pool: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    spec = SpeedNetSpec(channels=(32, 48), convolutions=(2, 2), final_pool=final_pool)
    model = SpeedNet(spec).to(memory_format=LAST)
    images = torch.randn(8, 3, 16, 16).bfloat16().to(memory_format=LAST)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), torch.arange(8)).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    calls = []
    used = global_pool.global_pool
    monkeypatch.setattr(
        global_pool, "global_pool", lambda x, kind: calls.append(kind) or used(x, kind)
    )
    ours = gradients()
    assert calls == [final_pool]
    monkeypatch.setattr(global_pool, "applies", lambda x: False)
    for one, other in zip(ours, gradients(), strict=True):
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-6
    assert calls == [final_pool]
