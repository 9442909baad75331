"""``add_relu`` and its gradient: every kernel against torch, and its errors.

``operator`` is the registered operator on the CPU (C++ if it was built), ``interpreter`` the Triton
kernel run by Triton's interpreter, ``cuda`` the same kernel on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resfast.ops.add_relu.op import add_relu
from resfast.ops.conv import reference
from resfast.ops.conv.op import DTYPES
from tests.triton_code import interpreted

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # Triton's interpreter
]

KERNELS = ("operator", "reference", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu))


def forward_and_backward(
    where: str, x: Tensor, residual: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The result, and what the backward makes of ``grad``."""
    if where in ("interpreter", "reference"):
        kernels = interpreted("add_relu") if where == "interpreter" else reference
        result = kernels.add_relu(x, residual)
        return result, kernels.add_relu_backward(grad, result)
    device = "cpu" if where == "operator" else "cuda"
    x, residual = (tensor.detach().to(device).requires_grad_() for tensor in (x, residual))
    result = add_relu(x, residual)
    result.backward(grad.to(device))
    assert torch.equal(x.grad, residual.grad)
    return result.detach().cpu(), x.grad.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", KERNELS)
def test_add_relu_and_its_gradient_are_those_of_torch(
    where: str, dtype: torch.dtype, poisoned: None
) -> None:
    torch.manual_seed(8)
    fmt = torch.channels_last
    for shape in ((), (0, 3), (7,), (1,), (5, 33), (2, 3, 5, 7), (70_001,), (4, 64, 8, 8)):
        x, residual, grad = (torch.randn(shape).to(dtype) for _ in range(3))
        if len(shape) == 4:
            x = x.contiguous(memory_format=fmt)  # the others are in another order
        expected = torch.relu(x + residual)
        result, gradient = forward_and_backward(where, x, residual, grad)
        if where == "interpreter" and dtype == torch.bfloat16:  # which cuts off when it converts
            torch.testing.assert_close(result, expected, rtol=2.0**-7, atol=0)
            grad[(result == 0) & (expected != 0)] = 0
        else:
            assert torch.equal(result, expected)
        assert result.stride() == torch.empty_like(x).stride()
        assert torch.equal(gradient, torch.where(expected > 0, grad, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", KERNELS)
def test_add_relu_treats_special_values_like_torch(where: str, dtype: torch.dtype) -> None:
    info, inf, nan = torch.finfo(dtype), torch.inf, torch.nan
    interpreted_bf16 = where == "interpreter" and dtype == torch.bfloat16
    values = [0.0, -0.0, 1.0, -1.0, info.max, -info.max, info.tiny, inf, -inf, nan]
    values += [] if interpreted_bf16 else [info.tiny / 4]  # taken for 0 there
    table = torch.tensor(values).to(dtype)
    x, residual = (part.flatten() for part in torch.meshgrid(table, table, indexing="ij"))
    grad = torch.arange(1, len(x) + 1).to(dtype)
    result, gradient = forward_and_backward(where, x, residual, grad)
    expected, rtol = torch.relu(x + residual), 0.0
    if interpreted_bf16:  # cuts off when it converts
        keep = expected.isfinite()
        result, expected, gradient, grad = (t[keep] for t in (result, expected, gradient, grad))
        rtol = 2.0**-7
    torch.testing.assert_close(result, expected, rtol=rtol, atol=0, equal_nan=True)
    assert torch.equal(gradient, torch.where(expected <= 0, 0, grad))


def test_add_relu_passes_opcheck() -> None:
    for dtype in DTYPES:
        x = torch.randn(2, 3, 4, 5).to(dtype, memory_format=torch.channels_last).requires_grad_()
        residual = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
        torch.library.opcheck(torch.ops.resfast.add_relu.default, (x, residual))


def test_add_relu_compiles_without_a_break_with_its_gradient() -> None:
    x, residual = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    torch.compile(add_relu, backend="aot_eager", fullgraph=True)(x, residual).sum().backward()
    assert torch.equal(x.grad, (x + residual > 0).float())


def test_add_relu_errors_name_the_value_and_what_was_expected() -> None:
    x = torch.randn(2, 3)
    for wrong, kind, message in (
        (x.half(), TypeError, "residual is torch.float16; expected torch.float32, like x"),
        (x[:1], ValueError, r"residual is \[1, 3\]; expected \[2, 3\], like x"),
        (x.to("meta"), ValueError, "residual is on meta; expected cpu, like x"),
    ):
        with pytest.raises(kind, match=message):
            add_relu(x, wrong)
    with pytest.raises(TypeError, match=r"x is torch.float64; expected one of torch.float32"):
        add_relu(x.double(), x.double())
    for wrong in (x.half(), x[:1]):  # the operator itself, whose kernel may be C++
        with pytest.raises(
            (RuntimeError, TypeError, ValueError), match=r"residual is .*; expected"
        ):
            torch.ops.resfast.add_relu(x, wrong)
