"""The optimizer Muon: orthogonalization, step and state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from resfast.optim import muon
from resfast.optim.muon import COEFFICIENTS, Muon, orthogonalize


def polynomial(matrix: Tensor, steps: int) -> Tensor:
    """What orthogonalize stands for, in float64, on the singular values themselves."""
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


def with_condition(rows: int, columns: int, smallest: float) -> Tensor:
    """A matrix whose singular values fall from 1 to ``smallest``."""
    least = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, least, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, least, dtype=torch.float64)).Q
    return (u * torch.logspace(0, math.log10(smallest), least, dtype=torch.float64) @ v.T).float()


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize(("rows", "columns"), [(64, 216), (96, 32), (40, 40), (1, 27), (5, 1)])
def test_orthogonalisation_is_the_quintic_on_the_singular_values(
    rows: int, columns: int, smallest: float
):
    torch.manual_seed(0)
    matrices = torch.stack([with_condition(rows, columns, smallest) * 3 for _ in range(2)])
    result = orthogonalize(matrices, 5)
    assert result.dtype == torch.float32
    assert result.shape == matrices.shape
    for matrix, one in zip(matrices, result, strict=True):
        expected = polynomial(matrix, 5)
        assert (one - expected).norm() <= 5e-4 * expected.norm()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 9])
def test_the_number_of_iterations_is_the_one_asked_for(steps: int):
    torch.manual_seed(0)
    matrix = torch.randn(24, 70)
    expected = polynomial(matrix, steps)
    result = orthogonalize(matrix[None], steps)[0]
    assert (result - expected).norm() <= 5e-4 * expected.norm()


@pytest.mark.parametrize(("rows", "columns"), [(64, 216), (96, 32), (40, 40)])
def test_matrices_in_bfloat16_stay_that_and_agree(rows: int, columns: int):
    torch.manual_seed(0)
    matrix = with_condition(rows, columns, 1e-2)
    result = orthogonalize(matrix[None].bfloat16() * 7, 3)[0]
    expected = polynomial(matrix, 3)
    assert result.dtype == torch.bfloat16
    assert (result.double() - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("steps", [5, 8])
def test_a_matrix_of_low_rank_stays_finite(steps: int):
    torch.manual_seed(0)
    matrix = torch.randn(64, 2) @ torch.randn(2, 300)
    values = torch.linalg.svdvals(orthogonalize(matrix[None], steps)[0])
    assert 0.68 <= values[1] <= values[0] <= 1.21
    assert values[2] <= 0.01


def test_a_zero_matrix_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 9)), torch.zeros(2, 4, 9))


@pytest.mark.parametrize(("rows", "columns"), [(64, 216), (40, 40)])
def test_the_products_in_bfloat16_that_cuda_takes_agree(rows: int, columns: int):
    torch.manual_seed(0)
    matrix = with_condition(rows, columns, 1e-2)
    x = (matrix / matrix.norm()).to(torch.bfloat16)[None]
    result = muon._newton_schulz(x, 5)[0].double()
    expected = polynomial(matrix, 5)
    assert (result - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("kind", ["float64", "gaps", "another order"])
def test_weights_that_the_kernels_do_not_take_are_moved_all_the_same(kind: str):
    torch.manual_seed(0)
    value, gradient = torch.randn(2, 8, 6, 3, 3)
    ours, theirs = value.clone(), nn.Parameter(value.clone())
    if kind == "float64":
        ours = ours.double()
    elif kind == "gaps":
        ours = torch.zeros(8, 12, 3, 3)[:, ::2].copy_(value)
    ours = nn.Parameter(ours)
    optimizers = [
        Muon([{"params": [p], "muon": True}], 0.1, product_dtype=torch.float32)
        for p in (ours, theirs)
    ]
    for step in range(3):
        if kind == "another order" and step == 1:
            ours.data = ours.data.contiguous(memory_format=torch.channels_last)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=3e-4)


def test_a_dtype_of_products_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"product_dtype is torch\.float16; expected"):
        Muon([{"params": filters(), "muon": True}], product_dtype=torch.float16)


def filters() -> list[Tensor]:
    """Weights of convolutions, some of the same shape, in both memory formats."""
    torch.manual_seed(0)
    shapes = [(8, 4, 3, 3), (8, 4, 3, 3), (16, 8, 1, 1), (6, 8, 3, 3), (5, 12)]
    weights = [torch.randn(shape) for shape in shapes]
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(weight) for weight in weights]


def gradients(parameters: list[Tensor], steps: int) -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [[torch.randn_like(p) for p in parameters] for _ in range(steps)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_a_step_follows_the_formula(
    momentum: float, weight_decay: float, normalize: bool, dtype: torch.dtype, tolerance: float
):
    parameters, lr = filters(), 0.1
    expected = [p.detach().double().flatten(1) for p in parameters]
    buffers = [torch.zeros_like(e) for e in expected]
    optimizer = Muon(
        [{"params": parameters, "muon": True}],
        lr,
        momentum=momentum,
        weight_decay=weight_decay,
        normalize_filters=normalize,
        product_dtype=dtype,
    )
    for step in gradients(parameters, 4):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for i, gradient in enumerate(step):
            gradient = gradient.double().flatten(1)
            buffers[i] = momentum * buffers[i] + gradient
            update = polynomial(gradient + momentum * buffers[i], 5)
            rows, columns = expected[i].shape
            if normalize:
                expected[i] *= math.sqrt(rows) / expected[i].norm()
            expected[i] -= lr * weight_decay * expected[i]
            expected[i] -= lr * max(1, rows / columns) ** 0.5 * update
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.double().flatten(1), value, rtol=0, atol=tolerance)
    assert parameters[1].is_contiguous(memory_format=torch.channels_last)


def test_matrices_are_moved_as_by_torchs_muon():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 96).view(6, 16)) for _ in range(2))
    optimizer = Muon([{"params": [ours], "muon": True}], 0.1, momentum=0.9, weight_decay=0.1)
    other = torch.optim.Muon([theirs], 0.1, momentum=0.9, weight_decay=0.1)
    for gradient in torch.randn(5, 6, 16):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)  # theirs is in bfloat16


def test_other_groups_are_sgd_with_their_own_values():
    ours, theirs = filters(), filters()
    values = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1}
    optimizer = Muon([{"params": ours, **values}], 0.02)
    other = torch.optim.SGD(theirs, **values, nesterov=True, fused=True)
    for step in gradients(ours, 4):
        for a, b, gradient in zip(ours, theirs, step, strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_rate_that_is_a_tensor_does_the_same():
    number, tensor = filters(), filters()
    bias = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    rate = torch.tensor(0.25)
    by_number = Muon([{"params": number, "muon": True}, {"params": bias[:1]}], 0.25)
    by_tensor = Muon([{"params": tensor, "muon": True}, {"params": bias[1:]}], rate)
    for group in by_number.param_groups + by_tensor.param_groups:
        group["weight_decay"] = 0.1
    for step in gradients(number, 3):
        rate *= 0.5
        for group in by_number.param_groups:
            group["lr"] = float(rate)
        for a, b, gradient in zip(number, tensor, step, strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        for one in bias:
            one.grad = torch.full((4,), 0.5)
        by_number.step()
        by_tensor.step()
    for a, b in zip(number + bias[:1], tensor + bias[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_normalised_filters_have_the_norm_of_airbench():
    parameters = filters()
    optimizer = Muon([{"params": parameters, "muon": True}], 0.0, normalize_filters=True)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for parameter in parameters:
        assert float(parameter.detach().norm()) == pytest.approx(
            math.sqrt(len(parameter)), rel=1e-5
        )


def test_a_parameter_without_a_gradient_stays():
    parameters = filters()
    before = [p.detach().clone() for p in parameters]
    optimizer = Muon([{"params": parameters, "muon": True}], 0.1, normalize_filters=True)
    parameters[1].grad = torch.randn_like(parameters[1])
    optimizer.step()
    for index, (parameter, value) in enumerate(zip(parameters, before, strict=True)):
        assert torch.equal(parameter, value) == (index != 1)


def test_it_goes_on_from_its_state():
    whole, halves = filters(), filters()
    groups = [{"params": whole[:3], "muon": True}, {"params": whole[3:], "lr": 0.3}]
    optimizer = Muon(groups, 0.1, weight_decay=0.1, newton_schulz_steps=3)
    steps = gradients(whole, 4)
    state = None
    for number, step in enumerate(steps):
        if number == 2:
            state = copy.deepcopy(optimizer.state_dict())
            for a, b in zip(halves, whole, strict=True):
                a.data.copy_(b.data)
        for parameter, gradient in zip(whole, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    second = Muon([{"params": halves[:3], "muon": True}, {"params": halves[3:]}])
    second.load_state_dict(state)
    for step in steps[2:]:
        for parameter, gradient in zip(halves, step, strict=True):
            parameter.grad = gradient.clone()
        second.step()
    for a, b in zip(halves, whole, strict=True):
        assert torch.equal(a, b)


def test_a_vector_is_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"shape \[4\] cannot be orthogonalised.*muon=False"):
        Muon([{"params": [nn.Parameter(torch.zeros(4))], "muon": True}])


@pytest.mark.gpu
def test_a_step_on_cuda_does_not_wait_and_agrees_with_the_cpu():
    cpu, cuda = filters(), [nn.Parameter(p.data.cuda()) for p in filters()]
    on_cpu = Muon([{"params": cpu, "muon": True}], 0.1, normalize_filters=True)
    on_cuda = Muon([{"params": cuda, "muon": True}], torch.tensor(0.1, device="cuda"))
    on_cuda.param_groups[0]["normalize_filters"] = True
    for number, step in enumerate(gradients(cpu, 3)):
        for a, b, gradient in zip(cpu, cuda, step, strict=True):
            a.grad, b.grad = gradient, gradient.cuda()
        on_cpu.step()
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            on_cuda.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(cpu, cuda, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=0.02)
