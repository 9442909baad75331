from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from resfast.ops import extension
from resfast.ops.muon import op as kernels
from resfast.optim import muon
from resfast.optim.muon import COEFFICIENTS, Muon, orthogonalize
from tests.triton_code import compiled, interpreted, triton_kernels


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


@pytest.mark.skipif(
    not kernels.has_newton_schulz_product(), reason="needs the C++ kernels and AVX-512"
)
class TestTheProductOfFactors:
    @pytest.mark.parametrize("steps", [1, 2, 3, 5])
    @pytest.mark.parametrize("size", [1, 5, 31, 32, 33, 100, 256])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_it_is_that_of_pytorchs_products(self, size: int, steps: int, normalize: bool):
        torch.manual_seed(size)
        x = torch.randn(1, size, 2 * size, dtype=torch.float64)
        if not normalize:
            x /= x.norm()
        gram = torch.bmm(x, x.mT)
        expected = muon._product(gram, steps, normalize)[0]
        result = product_of(gram[0].float(), steps, normalize)
        assert (result - expected).norm() <= 1e-5 * expected.norm()
        assert torch.equal(result, result.mT)

    def test_threads_change_no_bit(self):
        torch.manual_seed(0)
        x = torch.randn(200, 300)
        gram, threads = x @ x.mT, torch.get_num_threads()
        try:
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(product_of(gram, 3, True))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    @pytest.mark.parametrize(
        ("gram", "steps", "message"),
        [
            (torch.zeros(3, 4), 1, r"gram is \[3, 4\]; expected a contiguous square"),
            (torch.zeros(6, 6)[::2, ::2], 1, r"gram is \[3, 3\]; expected a contiguous square"),
            (torch.zeros(3, 3, dtype=torch.float64), 1, "gram is torch.float64"),
            (torch.zeros(3, 3), 0, "steps is 0; expected at least 1"),
        ],
    )
    def test_what_it_cannot_take_is_refused(self, gram: Tensor, steps: int, message: str):
        with pytest.raises(RuntimeError, match=message):
            product_of(gram, steps, True)


def product_of(gram: Tensor, steps: int, normalize: bool) -> Tensor:
    return torch.ops.resfast.newton_schulz_product(gram, steps, normalize, *COEFFICIENTS)


def memory_orders(*shape: int) -> list[Tensor]:
    one = torch.randn(shape)
    return [one, one.contiguous(memory_format=torch.channels_last)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [0, 1])
def test_the_pass_of_the_momentum_is_nesterovs(order: int, dtype: torch.dtype):
    torch.manual_seed(0)
    buffer, expected = (memory_orders(9, 70, 3, 11)[order] for _ in range(2))
    expected.copy_(buffer)
    for grad in memory_orders(9, 70, 3, 11):  # one of them in another order
        update = torch.empty_like(buffer, dtype=dtype)
        torch.ops.resfast.nesterov_(buffer, grad, update, 0.7)
        expected = 0.7 * expected + grad
        torch.testing.assert_close(buffer, expected)
        torch.testing.assert_close(update, (grad + 0.7 * expected).to(dtype))
        of_python = torch.empty_like(update)
        kernels._nesterov((buffer - grad) / 0.7, grad, of_python, 0.7)
        torch.testing.assert_close(update, of_python)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("order", [0, 1])
def test_the_pass_that_moves_filters_scales_and_subtracts(
    order: int, normalize: bool, dtype: torch.dtype
):
    torch.manual_seed(0)
    weight, update = (memory_orders(9, 70, 3, 11)[order] for _ in range(2))
    update = update.to(dtype)
    norm = math.sqrt(9) / weight.double().norm() if normalize else 1.0
    expected = (0.9 * norm * weight.double() - 0.3 * update.double()).float()
    of_python = weight.clone()
    torch.ops.resfast.move_filters_(weight, update, 0.3, 0.9, normalize)
    kernels._move_filters(of_python, update, 0.3, 0.9, normalize)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(of_python, expected)


def test_filters_of_norm_zero_stay_zero():
    weight = torch.zeros(4, 5)
    torch.ops.resfast.move_filters_(weight, torch.zeros(4, 5), 0.3, 0.9, True)
    assert torch.equal(weight, torch.zeros(4, 5))


@pytest.mark.skipif(extension.MISSING is not None, reason="needs the C++ kernels")
@pytest.mark.parametrize(
    ("weight", "update", "message"),
    [
        (torch.zeros(4, 6)[:, ::2], torch.zeros(4, 3), "weight has gaps in memory"),
        (torch.zeros(4, 3), torch.zeros(3, 4).mT, "update is not in the memory order of weight"),
        (torch.zeros(4, 3), torch.zeros(4, 2), r"update is \[4, 2\]; expected \[4, 3\]"),
        (torch.zeros(4, 3), torch.zeros(4, 3).half(), "update is torch.float16"),
        (torch.zeros(4, 3).double(), torch.zeros(4, 3), "weight is torch.float64"),
    ],
)
def test_the_passes_refuse_what_they_cannot_take(weight: Tensor, update: Tensor, message: str):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resfast.move_filters_(weight, update, 0.3, 0.9, False)
    with pytest.raises(RuntimeError, match=message.replace("weight", "buffer")):
        torch.ops.resfast.nesterov_(weight, torch.zeros(weight.shape), update, 0.3)


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
    mine = Muon([{"params": [ours], "muon": True}], 0.1, momentum=0.9, weight_decay=0.1)
    other = torch.optim.Muon([theirs], 0.1, momentum=0.9, weight_decay=0.1)
    for gradient in torch.randn(5, 6, 16):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)  # theirs is in bfloat16


def test_other_groups_are_sgd_with_their_own_values():
    ours, theirs = filters(), filters()
    values = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1}
    mine = Muon([{"params": ours, **values}], 0.02)
    other = torch.optim.SGD(theirs, **values, nesterov=True, fused=True)
    for step in gradients(ours, 4):
        for a, b, gradient in zip(ours, theirs, step, strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        mine.step()
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


# -- the Triton kernels ----------------------------------------------------------------------------

FILTERS = ((8, 4, 3, 3), (40, 3, 3, 3), (33, 17, 3, 3), (64, 40, 1, 1), (70, 30, 1, 1))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("where", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("steps", "normalize", "decay"), [(1, False, 0.5), (3, True, 0.0)])
@pytest.mark.parametrize("shape", FILTERS)
def test_the_triton_kernels_do_a_step(
    shape: tuple[int, ...], steps: int, normalize: bool, decay: float, where: str
):
    name = "muon"
    module = interpreted(name) if where == "interpreter" else triton_kernels(name)
    device = "cpu" if where == "interpreter" else "cuda"
    torch.manual_seed(0)
    weights, gradients, buffers = (
        [torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2)]
        for _ in range(3)
    )
    moved, velocities = ([t.clone().to(device) for t in tensors] for tensors in (weights, buffers))
    lr = torch.tensor(0.1, device=device) if normalize else 0.1
    module.step(
        moved,
        [gradient.to(device) for gradient in gradients],
        velocities,
        lr=lr,
        momentum=0.85,
        weight_decay=decay,
        steps=steps,
        normalize=normalize,
        coefficients=COEFFICIENTS,
        least=kernels.LEAST_NORM,
        dtype=torch.float32 if where == "interpreter" else torch.bfloat16,
    )
    for before, gradient, buffer, after, velocity in zip(
        weights, gradients, buffers, moved, velocities, strict=True
    ):
        expected = 0.85 * buffer + gradient
        torch.testing.assert_close(velocity.cpu(), expected)
        update = (gradient + 0.85 * expected).flatten(1)
        start = before * (len(before) ** 0.5 / before.norm() if normalize else 1 - 0.1 * decay)
        size = 0.1 * max(1.0, len(before) / update.shape[1]) ** 0.5
        step = start - after.cpu()
        its = size * polynomial(update, steps).view(shape)
        tolerance = 1e-4 if where == "interpreter" else 0.05
        assert (step - its).norm() <= tolerance * its.norm()
        assert after.stride() == before.stride()


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_triton_kernels_compile_for_the_architecture(capability: int):
    module = triton_kernels("muon")
    half = dict.fromkeys(("out", "x", "factor", "update"), "*bf16")
    signature = dict.fromkeys(("weight", "grad", "buffer", "sums", "rate"), "*fp32") | half
    signature |= dict.fromkeys(("momentum", "least", "a", "b", "c"), "fp32")
    signature |= dict.fromkeys(("decay", "scale", "norm"), "fp32")
    signature |= dict.fromkeys(("count", "parts", "size", "length", "stride"), "i32")
    squares = {"step": 1, "NORMALIZE": True, "TILE": module.TILE, "DEPTH": module.DEPTH}
    blocks = {"ROWS": module.ROWS, "COLUMNS": module.COLUMNS, "INNER": module.INNER}
    moving = {"MOVE": True, "KEEP_NORM": True, "RATE_IN_MEMORY": True}
    for kernel, constants in (
        (module._nesterov_kernel, {"NORMALIZE": True, "BLOCK": module.BLOCK}),
        (module._symmetric_kernel, {**squares, "POLYNOMIAL": False}),
        (module._symmetric_kernel, {**squares, "POLYNOMIAL": True}),
        (module._apply_kernel, {"step": 1, "NORMALIZE": False, **moving, **blocks}),
    ):
        types = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
        if "MOVE" in constants:
            types["out"] = "*fp32"
        assert compiled(kernel, types, constants, capability).asm["cubin"]
