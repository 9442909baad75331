"""Muon's operators on CPU, and its Triton kernels, against PyTorch's own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from resfast.ops import extension
from resfast.ops.muon import op as kernels
from resfast.optim import muon
from resfast.optim.muon import COEFFICIENTS
from tests.test_muon import polynomial
from tests.triton_code import compiled, interpreted, triton_kernels


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
        min_norm=kernels.MIN_NORM,
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
        expected_step = size * polynomial(update, steps).view(shape)
        tolerance = 1e-4 if where == "interpreter" else 0.05
        assert (step - expected_step).norm() <= tolerance * expected_step.norm()
        assert after.stride() == before.stride()


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_triton_kernels_compile_for_the_architecture(capability: int):
    module = triton_kernels("muon")
    half = dict.fromkeys(("out", "x", "factor", "update"), "*bf16")
    signature = dict.fromkeys(("weight", "grad", "buffer", "sums", "rate"), "*fp32") | half
    signature |= dict.fromkeys(("momentum", "min_norm", "a", "b", "c"), "fp32")
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
