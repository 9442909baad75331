"""``frozen_conv_act``: result and the bias's gradient, by every kernel, and where it is used."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast.models.speednet import SpeedNet, SpeedNetSpec
from resfast.ops.conv import reference as conv_reference
from resfast.ops.frozen_conv import op as frozen_conv
from tests.triton_code import compiled, interpreted, triton_kernels

LAST = torch.channels_last
NEEDS_KERNELS = pytest.mark.skipif(
    not frozen_conv.ON_CPU, reason="the C++ kernels are not built or need AVX512-BF16"
)
KERNELS = (
    "operator",
    "interpreter",
    pytest.param("bfloat16", marks=NEEDS_KERNELS),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
SLOPE = 0.1
# images, channels, height, width, side of the filters, their number, zeros before and after
SHAPES = (
    (3, 3, 9, 7, 2, 16, 0, 1),
    (2, 3, 6, 6, 3, 24, 1, 1),
    (2, 1, 5, 5, 2, 8, 0, 0),
    (2, 4, 5, 6, 4, 100, 1, 2),
)


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    n, c, h, w, side, filters = shape[:6]
    x = torch.randn(n, c, h, w).to(dtype, memory_format=LAST)
    weight = torch.randn(filters, c, side, side).contiguous(memory_format=LAST)
    return x, weight.bfloat16().float(), torch.randn(filters)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", conv_reference.KERNEL_ACTIVATIONS)
def test_result_and_gradient_are_those_of_float64(kernel: str, activation: str):
    dtype = torch.bfloat16 if kernel in ("bfloat16", "cuda") else torch.float32
    for shape in SHAPES:
        before, after = shape[6:]
        given = tensors(shape, dtype)
        x, weight, bias = (t.detach().double() for t in given)
        bias.requires_grad_()
        z = F.conv2d(F.pad(x, (before, after, before, after)), weight, bias)
        exact = conv_reference.ACTIVATIONS[activation](z, SLOPE)
        grad = torch.randn(exact.shape).to(dtype, memory_format=LAST)
        (exact_gradient,) = torch.autograd.grad(exact, bias, grad.double())

        rest = (before, after, activation, SLOPE)
        if kernel == "interpreter":
            module = interpreted("frozen_conv")
            out, gradient = module.forward(*given, *rest), module.backward(grad, *given, *rest)
        else:
            device = "cuda" if kernel == "cuda" else "cpu"
            x, weight, bias = (t.to(device) for t in given)
            bias.requires_grad_()
            options = {"activation": activation, "negative_slope": SLOPE}
            out = frozen_conv.frozen_conv_act(
                x, weight, bias, before=before, after=after, **options
            )
            (gradient,) = torch.autograd.grad(out, bias, grad.to(device))
        tolerance = 4e-3 if dtype == torch.bfloat16 else 2e-6
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=LAST)
        for result, expected in ((out, exact), (gradient, exact_gradient)):
            difference = result.cpu().double() - expected
            assert difference.norm() <= tolerance * expected.norm()


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_the_architecture(capability: int):
    module = triton_kernels("frozen_conv")
    types = dict.fromkeys(("out", "grad", "x"), "*bf16")
    types |= dict.fromkeys(("partials", "weight", "bias"), "*fp32") | {"slope": "fp32"}
    types |= dict.fromkeys((*module.INTEGERS, "filters", "blocks"), "i32")
    constants = module._constants(torch.empty(16, 3, 2, 2), "gelu")
    options = {"num_warps": constants.pop("num_warps")}
    for kernel in (module._forward_kernel, module._backward_kernel):
        own = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        code = compiled(kernel, own, constants, capability, options)
        assert not re.findall(r"\b(?:STL|LDL)\b", code.asm["sass"]), "registers are spilled"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_operator_is_well_formed(device: str):
    x, weight, bias = (t.to(device) for t in tensors(SHAPES[0], torch.float32))
    args = (x, weight, bias.requires_grad_(), 0, 1, "gelu", SLOPE)
    torch.library.opcheck(torch.ops.resfast.frozen_conv_act, args)


def test_bad_arguments_are_refused():
    x, weight, bias = tensors(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="activation is 'tanh'; expected one of none, relu"):
        frozen_conv.frozen_conv_act(x, weight, bias, activation="tanh")
    with pytest.raises(ValueError, match="images of 1x7 with 0 and 0 rows of zeros are smaller"):
        frozen_conv.frozen_conv_act(x[:, :, :1], weight, bias)
    with pytest.raises(RuntimeError, match="a gradient only for the bias"):
        frozen_conv.frozen_conv_act(x.requires_grad_(), weight, bias)


def test_on_the_cpu_it_is_for_training_in_bfloat16():
    x, weight, bias = tensors(SHAPES[0], torch.bfloat16)
    assert frozen_conv.applies(x, weight, bias) == frozen_conv.ON_CPU
    assert not frozen_conv.applies(x.float(), weight, bias)
    with torch.no_grad():
        assert not frozen_conv.applies(x, weight, bias)


@NEEDS_KERNELS
def test_the_number_of_threads_does_not_change_the_bits():
    x, weight, bias = tensors((9, 3, 17, 13, 2, 24, 0, 1), torch.bfloat16)
    bias.requires_grad_()
    grad = torch.randn(9, 24, 17, 13).bfloat16().to(memory_format=LAST)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = frozen_conv.frozen_conv_act(x, weight, bias, after=1, activation="gelu")
            found.append((out.detach(), *torch.autograd.grad(out, bias, grad)))
    finally:
        torch.set_num_threads(threads)
    for out, gradient in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(gradient, found[0][1])


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_speednet_trains_alike_with_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = SpeedNet(SpeedNetSpec(channels=(32,), convolutions=(2,), whitening_padding="same"))
    model = model.to(memory_format=LAST)
    nn.init.normal_(model.whitening.bias, std=0.1)
    images = torch.randn(6, 3, 12, 12).to(dtype, memory_format=LAST)

    def gradient() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), torch.arange(6)).backward()
        return model.whitening.bias.grad.clone()

    ours = gradient()
    monkeypatch.setattr(frozen_conv, "applies", lambda *args: False)
    plain = gradient()
    assert (ours - plain).norm() <= 0.03 * plain.norm()
    assert torch.equal(ours, plain) == (dtype == torch.float32)  # it was used, or not


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_speednet_on_cuda_is_the_same_with_it(padding: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    spec = SpeedNetSpec(channels=(32,), convolutions=(2,), whitening_padding=padding)
    model = SpeedNet(spec).cuda().to(memory_format=LAST)
    nn.init.normal_(model.whitening.bias, std=0.1)
    x = torch.randn(16, 3, 12, 12, device="cuda").to(torch.bfloat16, memory_format=LAST)
    found = []
    for available in (True, False):
        monkeypatch.setattr(frozen_conv, "AVAILABLE", available)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = model._first(x)
        out.float().square().sum().backward()
        found.append((out.detach().float(), model.whitening.bias.grad.clone()))
    for result, expected in zip(*found, strict=True):
        assert (result - expected).norm() <= 2e-2 * expected.norm()
