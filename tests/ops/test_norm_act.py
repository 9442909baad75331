"""``batch_norm_act``: result, statistics and gradients against float64, errors, and use in layers.

``operator`` is the operator on the CPU, ``interpreter`` the Triton kernels run by Triton's
interpreter, which cuts off what it rounds to bfloat16, and ``cuda`` the operator on a GPU.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import itertools
import re
import threading
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfast
from resfast.errors import ResfastError
from resfast.layers import norm
from resfast.layers.norm import norm_act
from resfast.ops.augment import reference
from resfast.ops.norm_act import op as kernel
from tests.triton_code import compiled, interpreted, triton_kernels

LAST = torch.channels_last
SLOPE = 0.1
needs_kernels = pytest.mark.skipif(
    not kernel.AVAILABLE, reason="needs the C++ kernels and AVX512-BF16"
)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = (pytest.param("cpu", marks=needs_kernels), CUDA)
KERNELS = (pytest.param("operator", marks=needs_kernels), "interpreter", CUDA)
pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    # Where masks leave out.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered"),
]


def error(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    assert got.isfinite().all()
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


def bf16(*sizes: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    values = torch.randn(sizes) * scale + shift * torch.randn(1, sizes[1], 1, 1)
    return values.to(torch.bfloat16, memory_format=LAST).requires_grad_()


def inputs(sizes: tuple[int, ...], *, residual: bool, pool: bool) -> list[Tensor]:
    x = bf16(*sizes, scale=2.0, shift=3.0)
    weight, bias = (torch.randn(sizes[1]).requires_grad_() for _ in range(2))
    return [x, weight, bias, *([bf16(*kernel.result_shape(x, pool))] if residual else [])]


def operator(tensors: list[Tensor], activation: str, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    return kernel.batch_norm_act(*tensors, activation=activation, negative_slope=SLOPE, pool=pool)


@functools.cache
def in_small_parts() -> ModuleType:
    """The Triton kernels run by the interpreter, in many small parts."""
    twin = interpreted("norm_act")
    twin.WARPS, twin.PARTS = 4, 1
    # The interpreter is fast only for the sums of Triton's own library.
    twin._plus = importlib.import_module("triton").language.standard._sum_combine
    return twin


def forward_and_backward(
    where: str,
    tensors: list[Tensor],
    activation: str,
    pool: bool,
    grad: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """Result, mean and variance, and the gradients of the tensors that there are, on the CPU."""
    x, weight, bias, residual = [*tensors, None][:4]
    if where == "interpreter":
        twin, rest = in_small_parts(), (eps, activation, SLOPE)
        leaves = [None if t is None else t.detach() for t in (x, weight, bias, residual)]
        out, mean, var, pooled, places = twin.forward(*leaves, *rest, pool)
        grad = torch.ones_like(out) if grad is None else grad
        other = None
        if residual is not None and activation != "none":
            other = leaves[3] if activation in ("silu", "gelu") else out
        saved = pooled if pool else leaves[0], *leaves[1:3], mean, var, other
        size = list(x.shape[2:])
        *found, last = twin.backward(grad, *saved, places if pool else None, size, *rest)
        found.append(grad if other is None else last)
    else:
        device = "cpu" if where == "operator" else where
        leaves = [
            None if t is None else t.detach().to(device).requires_grad_()
            for t in (x, weight, bias, residual)
        ]
        out, mean, var = kernel.batch_norm_act(
            *leaves, eps=eps, activation=activation, negative_slope=SLOPE, pool=pool
        )
        out.backward(torch.ones_like(out) if grad is None else grad.to(device))
        found = [None if leaf is None else leaf.grad for leaf in leaves]
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=LAST)
    given = zip(found, (x, weight, bias, residual), strict=True)
    gradients = [one.cpu() for one, tensor in given if tensor is not None]
    return (out.detach().cpu(), mean.cpu(), var.cpu()), gradients


def exactly(tensors: list[Tensor], activation: str, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    residual = tensors[3] if len(tensors) > 3 else None
    return reference.batch_norm_act(*tensors[:3], residual, 1e-5, activation, SLOPE, pool)


SHAPES = (
    (2, 64, 8, 8), (3, 24, 7, 9), (5, 40, 5, 4), (4, 33, 6, 6), (6, 256, 4, 4), (2, 1, 6, 5),
    (20, 64, 16, 17), (3, 130, 5, 7),
)  # fmt: skip


SMALL = ((8, 64, 6, 7), (3, 24, 7, 5), (2, 33, 4, 6), (2, 130, 3, 5), (3, 96, 2, 3))


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
@pytest.mark.parametrize(("residual", "pool"), list(itertools.product((False, True), repeat=2)))
def test_result_and_gradients_are_those_of_float64(where, activation, residual, pool, poisoned):
    torch.manual_seed(0)
    cut_off = 2 if where == "interpreter" else 1
    for sizes in SMALL if where == "interpreter" else SHAPES:
        tensors = inputs(sizes, residual=residual, pool=pool)
        grad = torch.randn(kernel.result_shape(tensors[0], pool)).bfloat16()
        (out, mean, var), got = forward_and_backward(where, tensors, activation, pool, grad)
        wide = [t.detach().double().requires_grad_() for t in tensors]
        exact = exactly(wide, activation, pool)
        assert error(out, exact[0]) < 3e-3 * cut_off
        assert error(mean, exact[1]) < 1e-5
        assert error(var, exact[2]) < 1e-5
        for gradient, expected, like in zip(
            got, torch.autograd.grad(exact[0], wide, grad.double()), tensors, strict=True
        ):
            assert gradient.dtype == like.dtype
            assert error(gradient, expected) < 5e-3 * cut_off


@pytest.mark.gpu
def test_large_maps_on_cuda_have_the_result_and_gradients_of_float64(poisoned):
    """Of more tiles than programs, and sums of more programs than are read at once."""
    torch.manual_seed(0)
    for sizes, activation, residual, pool in (
        ((500, 64, 32, 32), "gelu", False, True),
        ((500, 64, 31, 33), "relu", True, True),
        ((500, 192, 16, 16), "gelu", False, False),
        ((500, 256, 8, 8), "silu", True, False),
        ((500, 512, 4, 4), "leaky_relu", True, False),
        ((500, 33, 16, 16), "gelu", True, True),
        ((500, 256, 4, 4), "gelu", True, True),
    ):
        tensors = inputs(sizes, residual=residual, pool=pool)
        grad = torch.randn(kernel.result_shape(tensors[0], pool)).bfloat16()
        (out, mean, var), got = forward_and_backward("cuda", tensors, activation, pool, grad)
        wide = [t.detach().cuda().double().requires_grad_() for t in tensors]
        exact = exactly(wide, activation, pool)
        gradients = torch.autograd.grad(exact[0], wide, grad.cuda().double())
        assert error(out, exact[0].cpu()) < 3e-3
        assert error(mean, exact[1].cpu()) < 1e-5
        assert error(var, exact[2].cpu()) < 1e-5
        for gradient, expected in zip(got, gradients, strict=True):
            assert error(gradient, expected.cpu()) < 5e-3


@pytest.mark.parametrize("where", KERNELS)
def test_variance_is_right_where_the_mean_is_large(where):
    torch.manual_seed(1)
    x = torch.randn((8, 40, 8, 8) if where == "interpreter" else (64, 40, 16, 16)) + 100
    x[0, ::2, 0, 0] = 0.0  # what the first value is does not matter
    x = x.to(torch.bfloat16, memory_format=LAST)
    (_, mean, var), _ = forward_and_backward(where, [x, None, None], "none", False)
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert error(mean, exact[1]) < 1e-6
    assert error(var, exact[0]) < 1e-4
    same = torch.full((2, 8, 4, 4), 3.0).bfloat16()
    (out, _, var), _ = forward_and_backward(where, [same, None, torch.arange(8.0)], "none", False)
    assert not var.any()
    assert (out[0, :, 0, 0].float() - torch.arange(8.0)).abs().max() < 1e-4


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_smooth_activations_are_exact_to_bfloat16_over_all_values(where, activation):
    """With scale 1 and shift 0: the two values of a channel become -1 and 1 times their bias."""
    z = torch.linspace(-12, 12, 1201 if where == "interpreter" else 4801)
    x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, len(z), 1, 1).bfloat16()
    tensors = [x, torch.zeros(len(z)), z]
    (out, _, _), gradients = forward_and_backward(where, tensors, activation, False, eps=0.0)
    wide = z.double().requires_grad_()
    exact = {"silu": F.silu, "gelu": F.gelu}[activation](wide)
    off = (out[0, :, 0, 0].double() - exact).abs().detach()
    rounding = 2**-7 if where == "interpreter" else 2**-8
    assert (off <= rounding * exact.detach().abs() + 1.2e-5).all()
    exact.sum().backward()
    assert (gradients[2].double() / 2 - wide.grad).abs().max() < 2e-5


@pytest.mark.parametrize("where", KERNELS)
def test_pooling_takes_the_first_of_equals_and_keeps_nan(where):
    x = torch.zeros(1, 32, 4, 6).bfloat16().contiguous(memory_format=LAST)
    x[0, :, :2, :2] = 1  # a tie
    x[0, 5, 3, 5] = float("nan")
    x[0, 6, 2, 4] = float("nan")  # before numbers
    forward = torch.ops.resfast.batch_norm_act
    if where == "interpreter":
        forward = in_small_parts().forward
    on_device = x.cuda() if where == "cuda" else x
    pooled = forward(on_device, None, None, None, 1e-5, "none", 0.0, True)[3].cpu()
    assert torch.equal(pooled.isnan(), F.max_pool2d(x, 2).isnan())
    assert torch.equal(pooled.nan_to_num(), F.max_pool2d(x, 2).nan_to_num())
    x = torch.randint(0, 3, (4, 64, 6, 6)).to(torch.bfloat16, memory_format=LAST)
    grad = torch.randn(4, 64, 3, 3).to(torch.bfloat16, memory_format=LAST)
    ours = forward_and_backward(where, [x, None, None], "none", True, grad)[1][0]
    wide = x.double().requires_grad_()
    out = reference.batch_norm_act(wide, None, None, None, 1e-5, "none", 0.0, True)[0]
    exact = torch.autograd.grad(out, wide, grad.double())[0]
    assert torch.equal(ours != 0, exact != 0)


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [False, True])
def test_bits_on_cuda_are_the_same_in_every_run(pool):
    torch.manual_seed(2)
    tensors = inputs((300, 72, 19, 20), residual=True, pool=pool)
    grad = torch.randn(kernel.result_shape(tensors[0], pool)).bfloat16()
    one, other = (forward_and_backward("cuda", tensors, "gelu", pool, grad) for _ in range(2))
    for first, second in zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True):
        assert torch.equal(first, second)


@needs_kernels
@pytest.mark.parametrize("pool", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(pool):
    torch.manual_seed(2)
    before = torch.get_num_threads()
    tensors = inputs((41, 72, 9, 10), residual=True, pool=pool)
    grad, results = None, []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, mean, var = operator(tensors, "gelu", pool)
            grad = torch.randn_like(out) if grad is None else grad
            results.append((out, mean, var, *torch.autograd.grad(out, tensors, grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_are_accepted_and_frozen_parameters_get_no_gradient(device):
    torch.manual_seed(3)
    tensors = inputs((3, 48, 6, 7), residual=True, pool=False)
    tensors = [t.detach().to(device).requires_grad_() for t in tensors]
    expected = operator(tensors, "relu", False)[0]
    grad = torch.randn_like(expected)
    all_of_them = torch.autograd.grad(expected, tensors, grad)
    for frozen in range(4):
        others = [
            t.detach().contiguous().requires_grad_(i != frozen) for i, t in enumerate(tensors)
        ]
        out = operator(others, "relu", False)[0]
        assert torch.equal(out, expected)
        out.backward(grad.contiguous())
        for i, (tensor, gradient) in enumerate(zip(others, all_of_them, strict=True)):
            assert (tensor.grad is None) == (i == frozen)
            assert i == frozen or torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
def test_operator_passes_opcheck(device, activation):
    for residual, pool in itertools.product((False, True), repeat=2):
        tensors = inputs((2, 36, 6, 5), residual=residual, pool=pool)
        tensors = [t.detach().to(device).requires_grad_() for t in tensors]
        other = tensors[3] if residual else None
        arguments = (*tensors[:3], other, 1e-5, activation, SLOPE, pool)
        torch.library.opcheck(torch.ops.resfast.batch_norm_act.default, arguments)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(2, 8, 4, 4)}, TypeError, "x is torch.float32; expected torch.bfloat16"),
        ({"x": torch.zeros(8, 4, 4).bfloat16()}, ValueError, r"expected \[N, C, H, W\]"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight is \[9\]; expected \[8\]"),
        ({"bias": torch.zeros(8).double()}, TypeError, "bias is torch.float64"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta; expected cpu"),
        (
            {"x": torch.zeros(2, 8, 4, 4).bfloat16().to("meta"), "weight": None},
            ValueError,
            "x is on meta; expected the CPU or CUDA",
        ),
        ({"residual": torch.zeros(2, 8, 4, 4).bfloat16(), "pool": True}, ValueError, "residual"),
        ({"x": torch.zeros(2, 8, 1, 4).bfloat16(), "pool": True}, ValueError, "leaves nothing"),
        ({"eps": -1.0}, ValueError, "eps is -1.0; expected at least 0"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; expected one of none, relu"),
        ({"negative_slope": -0.1}, ValueError, "negative_slope is -0.1; expected at least 0"),
    ],
)
def test_errors_name_the_value_and_what_was_expected(change, kind, message):
    good = {"x": torch.zeros(2, 8, 4, 4).bfloat16(), "weight": torch.ones(8), "bias": None}
    with pytest.raises(kind, match=message):
        kernel.batch_norm_act(**(good | change))


@needs_kernels
def test_kernels_refuse_what_they_cannot_read():
    forward, backward = (
        getattr(torch.ops.resfast, f"norm_act_{n}") for n in ("forward", "backward")
    )
    x = torch.randn(2, 8, 4, 6).to(torch.bfloat16, memory_format=LAST)
    per_channel = torch.ones(8)
    rest = 1e-5, 1, 0.0
    forward(x, per_channel, None, None, *rest, True)
    planes = torch.zeros(2 * 2 * 3 * 8, dtype=torch.uint8)
    half = x[:, :, :2, :3].contiguous(memory_format=LAST)

    def ahead(x=x, weight=None, bias=None, residual=None, activation=1, pool=False):
        return forward(x, weight, bias, residual, 1e-5, activation, 0.0, pool)

    def back(grad=half, mean=per_channel, other=None, where=planes, size=(4, 6)):
        return backward(grad, half, None, None, mean, mean, other, where, list(size), *rest)

    back()
    for call, message in (
        (lambda: ahead(x.contiguous()), "x is not in channels_last"),
        (lambda: ahead(weight=per_channel[:7]), r"weight is torch.float32 \[7"),
        (lambda: ahead(bias=per_channel.double()), "bias is torch.float64"),
        (lambda: ahead(residual=x, pool=True), r"residual is \[2, 8, 4, 6\]"),
        (lambda: ahead(activation=5), "activation 5 is unknown"),
        (lambda: ahead(half[:, :, :, :1].contiguous(memory_format=LAST), pool=True), "too small"),
        (lambda: back(grad=x), r"grad is \[2, 8, 4, 6\]"),
        (lambda: back(mean=per_channel[:2]), r"mean is torch.float32 \[2\]"),
        (lambda: back(other=x), "other is"),
        (lambda: back(where=planes[:-1]), "where is torch.uint8"),
        (lambda: back(size=(6, 6)), r"size is \[6, 6\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# Compiled for each architecture, which needs no GPU.

MAPS = "x pooled out residual dz dx grad other".split()
VARIANTS = {
    "_statistics_kernel": [{"POOL": False}, {"POOL": True}],
    "_apply_kernel": [
        {"ACTIVATION": activation, "residual": residual}
        for activation, residual in itertools.product(("relu", "gelu"), (False, True))
    ],
    "_sums_kernel": [
        {"ACTIVATION": activation, "other": other}
        for activation, other in itertools.product(("leaky_relu", "gelu"), (False, True))
    ],
    "_gradient_kernel": [
        {"ACTIVATION": activation, "where": where}
        for activation, where in itertools.product(("none", "gelu"), (False, True))
    ],
}


def unroll(kernels: ModuleType, name: str, variant: dict) -> int:
    return {
        "_statistics_kernel": kernels.POOLING if variant.get("POOL") else kernels.STATISTICS,
        "_apply_kernel": kernels.APPLY_TO_TWO if variant.get("residual") else kernels.APPLY,
        "_sums_kernel": kernels.SUMS_OF_THREE if variant.get("other") else kernels.SUMS,
        "_gradient_kernel": kernels.UNPOOLING if variant.get("where") else kernels.GRADIENT,
    }[name]


def code_of(name: str, variant: dict, channels: int, capability: int) -> Any:
    """A kernel compiled for an architecture."""
    kernels = triton_kernels("norm_act")
    function = getattr(kernels, name)
    absent = {key for key in ("residual", "other", "where") if not variant.get(key)}
    if "other" in absent:
        absent.add("dz")
    if name == "_statistics_kernel":
        absent = set() if variant["POOL"] else {"pooled", "where"}
    constants = {key: value for key, value in variant.items() if key.isupper()}
    constants |= kernels.layout(channels, unroll(kernels, name, variant))
    constants |= {"PARTS": kernels.PARTS, "STEP": 256}
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    constants |= {key: None for key in absent if key in function.arg_names}
    signature = dict.fromkeys(function.arg_names, "*fp32")
    signature |= dict.fromkeys(MAPS, "*bf16") | {"where": "*u8", "eps": "fp32", "slope": "fp32"}
    signature |= dict.fromkeys(kernels.INTEGERS, "i32")
    signature = {key: kind for key, kind in signature.items() if key not in constants}
    pointers = [key for key, kind in signature.items() if kind.startswith("*")]
    options = {"num_warps": kernels.WARPS}
    return compiled(function, signature, constants, capability, options, pointers)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills_and_read_maps_in_vectors(capability, name):
    for variant in VARIANTS[name]:
        code = code_of(name, variant, 192, capability)
        assert not re.findall(r"\b(?:STL|LDL)\b", code.asm["sass"]), "registers are spilled"
        stores = re.findall(r"st\.global\S*", code.asm["ptx"])
        narrow = [store for store in stores if store == "st.global.b16"]
        assert not narrow, variant
        conversions = set(re.findall(r"cvt\S*bf16(?:x2)?\.f32", code.asm["ptx"]))
        assert conversions <= {"cvt.rn.bf16x2.f32", "cvt.rn.bf16.f32"}, variant  # to the nearest
    odd = code_of(name, VARIANTS[name][-1], 33, capability)
    assert not re.findall(r"\b(?:STL|LDL)\b", odd.asm["sass"]), "registers are spilled"


# The function of the layers


MODULES = (nn.ReLU(inplace=True), nn.LeakyReLU(SLOPE, inplace=True), nn.SiLU(), nn.GELU())


def calls_of(run, monkeypatch) -> int:
    """How many times a function runs the operator."""
    seen, own = [], kernel.batch_norm_act
    monkeypatch.setattr(
        kernel, "batch_norm_act", lambda *args, **named: seen.append(1) or own(*args, **named)
    )
    run()
    return len(seen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "silu", "gelu", *MODULES])
@pytest.mark.parametrize("pool", [False, True])
def test_function_does_what_the_modules_do(device, activation, pool, monkeypatch):
    torch.manual_seed(4)
    x = bf16(6, 32, 8, 6, shift=1.0)
    x, residual = x.to(device), bf16(*kernel.result_shape(x, pool)).to(device)
    ours, theirs = (nn.BatchNorm2d(32, momentum=0.4, device=device) for _ in range(2))
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    results = []

    def run() -> None:
        with norm.captured_step():
            results.append(norm_act(x, ours, activation, residual, pool))
            results.append(norm_act(x, ours, activation, residual, pool))

    assert calls_of(run, monkeypatch) == 2
    with monkeypatch.context() as patch:
        patch.setattr(norm, "applies", lambda *_: False)
        for result in results:
            assert error(result, norm_act(x, theirs, activation, residual, pool).double()) < 8e-3
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 2
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_steps_on_cuda_that_are_not_captured_run_as_modules(monkeypatch):
    bn, x = nn.BatchNorm2d(32).cuda(), bf16(2, 32, 4, 4).cuda()
    assert calls_of(lambda: norm_act(x, bn, "relu"), monkeypatch) == 0
    with norm.captured_step():
        assert calls_of(lambda: norm_act(x, bn, "relu"), monkeypatch) == 1
        with norm.captured_step(False):
            assert calls_of(lambda: norm_act(x, bn, "relu"), monkeypatch) == 0
    assert calls_of(lambda: norm_act(x, bn, "relu"), monkeypatch) == 0


def test_a_captured_step_ends_with_its_block_and_is_that_of_one_thread():
    seen = []

    def fail() -> None:
        with norm.captured_step():
            thread = threading.Thread(target=lambda: seen.append(norm.in_captured_step()))
            thread.start()
            thread.join()
            seen.append(norm.in_captured_step())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [*seen, norm.in_captured_step()] == [False, True, False]


def test_a_compiled_function_has_one_version_inside_a_captured_step_and_one_outside():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + 1 if norm.in_captured_step() else x - 1, backend=backend, fullgraph=True
    )
    results = []
    for captured in (True, False, True, True, False):
        with norm.captured_step(captured):
            results.append(compiled(torch.zeros(())).item())
    assert results == [1, -1, 1, 1, -1]
    assert len(graphs) == 2


def _hooked() -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(32)
    bn.register_forward_hook(lambda *_: None)
    return bn


@needs_kernels
@pytest.mark.parametrize(
    ("bn", "activation", "sizes"),
    [
        (nn.BatchNorm2d(32).eval(), "relu", (2, 32, 4, 4)),
        (nn.BatchNorm2d(8), "relu", (2, 8, 4, 4)),
        (nn.BatchNorm2d(32, momentum=None), "relu", (2, 32, 4, 4)),
        (nn.BatchNorm2d(32, track_running_stats=False), "relu", (2, 32, 4, 4)),
        (_hooked(), "relu", (2, 32, 4, 4)),
        (nn.BatchNorm2d(32), nn.GELU("tanh"), (2, 32, 4, 4)),
        (nn.BatchNorm2d(32), nn.Hardswish(), (2, 32, 4, 4)),
    ],
)
def test_other_norms_and_activations_run_as_modules(bn, activation, sizes, monkeypatch):
    x = bf16(*sizes)
    assert calls_of(lambda: norm_act(x, bn, activation), monkeypatch) == 0
    plain = nn.BatchNorm2d(sizes[1])
    assert calls_of(lambda: norm_act(x.float(), plain, "relu"), monkeypatch) == 0
    with torch.no_grad():
        assert calls_of(lambda: norm_act(x, plain, "relu"), monkeypatch) == 0


def test_without_kernels_the_operator_says_what_to_use_and_the_function_runs(monkeypatch):
    monkeypatch.setattr(kernel, "AVAILABLE", False)
    x = bf16(2, 32, 4, 4)
    with pytest.raises(RuntimeError, match="needs the C"):
        kernel.batch_norm_act(x, None, None)
    bn = nn.BatchNorm2d(32)
    assert torch.equal(norm_act(x, bn, "relu"), F.relu(nn.BatchNorm2d(32)(x)))


def test_one_value_a_channel_is_refused_as_by_the_module():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_act(bf16(1, 32, 2, 2), nn.BatchNorm2d(32), "relu", pool=True)


def test_unknown_activation_is_named():
    with pytest.raises(ResfastError, match="activation 'swish' is unknown; choose none, relu"):
        norm_act(bf16(2, 32, 2, 2), nn.BatchNorm2d(32), "swish")


# Networks


@needs_kernels
def test_network_has_nearly_the_gradients_of_float32(monkeypatch):
    """As near as with PyTorch's own norms in bfloat16, or 1.2 times as far."""
    torch.manual_seed(0)
    model = resfast.create_model("resnet-narrow").to(memory_format=LAST)
    images = torch.randn(16, 3, 16, 16).contiguous(memory_format=LAST)

    def gradients(dtype: torch.dtype | None) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(images).float(), torch.arange(16) % 10)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = gradients(None).double()
    ours = error(gradients(torch.bfloat16), exact)
    monkeypatch.setattr(norm, "applies", lambda *_: False)
    assert ours < 1.2 * error(gradients(torch.bfloat16), exact)


@needs_kernels
def test_compiled_network_is_one_graph_with_the_same_result_and_statistics():
    torch.manual_seed(0)
    models = [resfast.create_model("resnet-narrow").to(memory_format=LAST) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=LAST)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code.count("resfast.batch_norm_act"))
        return graph.forward

    def forward(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images).float()

    torch._dynamo.reset()
    compiled = torch.compile(lambda: forward(models[0]), backend=backend, fullgraph=True)
    assert torch.equal(compiled(), forward(models[1]))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in models[0].modules())
    assert graphs == [norms]
    for (name, value), expected in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet-narrow", "speednet-94"])
def test_compiled_network_on_cuda_computes_what_the_modules_do(name, monkeypatch):
    """And nothing waits for the GPU."""
    torch.manual_seed(0)
    ours = resfast.create_model(name).cuda().to(memory_format=LAST).train()
    theirs, exact = copy.deepcopy(ours), copy.deepcopy(ours)
    images = torch.randn(64, 3, 32, 32, device="cuda").contiguous(memory_format=LAST)
    labels = torch.arange(64, device="cuda") % 10
    assert kernel.available(images.device)

    def loss_of(model: nn.Module, enabled: bool) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            return F.cross_entropy(model(images).float(), labels)

    def gradients(model: nn.Module) -> Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch._dynamo.reset()
    step = torch.compile(loss_of)
    before = copy.deepcopy(ours.state_dict())
    with norm.captured_step():
        step(ours, True).backward()  # compiles
    ours.load_state_dict(before)
    ours.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with norm.captured_step():
            loss = step(ours, True)
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(norm, "applies", lambda *_: False)
    other = loss_of(theirs, True)
    other.backward()
    loss_of(exact, False).backward()
    assert abs(float(loss) - float(other)) < 0.02 * abs(float(other))
    true = gradients(exact).double()
    assert error(gradients(ours), true) < 1.3 * error(gradients(theirs), true)
    for (key, value), expected in zip(
        ours.named_buffers(), dict(theirs.named_buffers()).values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2, msg=key)
