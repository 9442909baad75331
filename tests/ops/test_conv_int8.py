"""Convolutions with 8-bit operands against float64, by the values that the operands stand for."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.ops.conv import reference as conv_reference
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.conv_int8 import op as int8
from resfast.ops.conv_int8.maps import Quantization, max_pool
from resfast.ops.conv_int8.op import Int8Conv

pytestmark = pytest.mark.skipif(not int8.available(), reason="torch has no oneDNN here")

X = Quantization(0.02, 37)
RESIDUAL = Quantization(0.05, 20)
RESULT = Quantization(0.1, 90)
GEOMETRIES = {
    "3x3": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "groups": {"padding": 1, "groups": 4},
    "depthwise": {"padding": 1, "groups": 16},
    "dilated": {"padding": (2, 1), "dilation": (2, 1)},
}


def convolution(geometry: str, activation: str = "none", size: int = 3) -> ConvBiasAct:
    options = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(0)
    shape = (32, 16 // options.get("groups", 1), size, size)
    weight = torch.randn(shape, generator=generator) * 0.1
    bias = torch.randn(32, generator=generator)
    return ConvBiasAct(weight, bias, activation=activation, negative_slope=0.1, **options)


def maps(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return values.contiguous(memory_format=torch.channels_last)


def exact(conv: ConvBiasAct, module: Int8Conv, x: Tensor, residual: Tensor | None) -> Tensor:
    """The result in float64 from the values that the operands stand for."""
    weight, scale = int8.multiplied(module.weight, module.weight_scale)
    weight = weight.double() * scale.double()[:, None, None, None]
    added = None if residual is None else (residual.double() - RESIDUAL.zero_point) * RESIDUAL.scale
    return conv_reference.conv2d_bias_act(
        (x.double() - X.zero_point) * X.scale, weight, conv.bias.double(), added, conv.stride,
        conv.padding, conv.activation, conv.negative_slope, conv.groups, conv.dilation,
    )  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("activation", conv_reference.ACTIVATIONS)
def test_results_are_those_of_float64(geometry: str, activation: str) -> None:
    conv = convolution(geometry, activation)
    x = maps(2, 16, 9, 7)
    for has_residual, result in itertools.product((False, True), (None, RESULT)):
        module = Int8Conv(conv, X, result, RESIDUAL if has_residual else None)
        residual = maps(*conv(x.float()).shape, seed=1) if has_residual else None
        expected = exact(conv, module, x, residual)
        found = module(x, residual)
        assert found.is_contiguous(memory_format=torch.channels_last)
        if result is None:
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
            continue
        levels = expected / result.scale + result.zero_point
        off = (found.double() - levels.clamp(0, 255)).abs()
        assert found.dtype == torch.uint8
        assert off.max() < 0.501  # rounded once
        single = module(x[0], None if residual is None else residual[0])
        assert torch.equal(single, found[0])


@pytest.mark.parametrize("result", [None, RESULT], ids=["float32", "uint8"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_operator_passes_opcheck_and_agrees_with_the_module(
    has_residual: bool, result: Quantization | None
) -> None:
    conv = convolution("strided", "relu")
    module = Int8Conv(conv, X, result, RESIDUAL if has_residual else None)
    x = maps(2, 16, 9, 7)
    residual = maps(*conv(x.float()).shape, seed=1) if has_residual else None
    arguments = (
        x, module.weight, module.weight_scale, module.bias, residual, *module.geometry, "relu",
        0.01, [q.scale for q in module.quantizations], [q.zero_point for q in module.quantizations],
        module.to_uint8,
    )  # fmt: skip
    operator = torch.ops.resfast.conv2d_int8
    for _ in range(2):  # packed, and from the cache
        assert torch.equal(operator(*arguments), module(x, residual))
    module.weight.neg_()  # packed anew
    module._packed = None
    assert torch.equal(operator(*arguments), module(x, residual))
    torch.library.opcheck(operator.default, arguments)


def test_weights_are_within_half_a_step() -> None:
    module = Int8Conv(conv := convolution("3x3"), X, None)
    for exact_sums in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(int8, "sums_are_exact", lambda exact_sums=exact_sums: exact_sums)
            weight, scale = int8.multiplied(module.weight, module.weight_scale)
        off = (weight * scale[:, None, None, None] - conv.weight).abs().amax((1, 2, 3))
        assert (off <= (0.501 if exact_sums else 0.751) * scale).all()
        # Two products of an unsigned and a signed byte fit 16 bits.
        assert exact_sums or 2 * 255 * int(weight.abs().max()) < 2**15


def test_extreme_operands_do_not_saturate() -> None:
    """All products as large as they can be; a processor without VNNI adds pairs in 16 bits."""
    conv = ConvBiasAct(torch.full((16, 16, 3, 3), 1.0), torch.zeros(16), padding=1)
    module = Int8Conv(conv, Quantization(1.0, 0), None)
    x = torch.full((1, 16, 5, 5), 255, dtype=torch.uint8)
    assert module(x)[0, 0, 2, 2].item() == pytest.approx(255 * 16 * 9, rel=0.02)


def test_a_residual_is_overwritten_only_where_that_is_allowed() -> None:
    conv = convolution("3x3", "relu")
    x, residual = maps(2, 16, 9, 7), maps(2, 32, 9, 7, seed=1)
    before = residual.clone()
    kept = Int8Conv(conv, X, RESULT, RESIDUAL)(x, residual)
    assert torch.equal(residual, before)
    taken = Int8Conv(conv, X, RESULT, RESIDUAL, overwrites=True)(x, residual)
    assert torch.equal(taken, kept)


def test_copies_and_other_weights() -> None:
    conv = convolution("3x3", "relu")
    module = Int8Conv(conv, X, RESULT)
    x = maps(2, 16, 9, 7)
    found = module(x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), found)
    flipped = ConvBiasAct(conv.weight.flip(0), conv.bias, padding=1, activation="relu")
    other = Int8Conv(flipped, X, RESULT)
    module.load_state_dict(other.state_dict())  # packs anew
    assert torch.equal(module(x), other(x))
    assert not torch.equal(module(x), found)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 6.0), (-3.0, 5.0), (-2.0, 0.0), (0.0, 0.0), (1, 4)]
)
def test_zero_is_exact_and_ends_are_close(low: float, high: float) -> None:
    found = Quantization.of_range(low, high)
    values = torch.tensor([0.0, low, high])
    back = found.dequantize(found.quantize(values))
    assert back[0] == 0
    assert (back - values).abs().max() <= 0.5 * found.scale * 1.001


def test_values_outside_are_clipped() -> None:
    found = Quantization(0.1, 10)
    values = torch.tensor([-5.0, 100.0, torch.inf, -torch.inf, torch.nan])
    assert found.quantize(values).tolist() == [0, 255, 255, 0, 10]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_max_pools_are_those_of_float(layout: torch.memory_format) -> None:
    for kernel, stride, padding, dilation, ceil_mode, size in itertools.product(
        ((1, 1), (2, 2), (3, 2)), ((1, 1), (2, 2), (3, 1)), (0, 1), (1, 2), (False, True),
        ((9, 7), (16, 17)),
    ):  # fmt: skip
        if padding > min(kernel) // 2:
            continue
        x = maps(2, 5, *size).contiguous(memory_format=layout)
        options = kernel, stride, (padding, padding), (dilation, dilation), ceil_mode
        found = max_pool(x, *options)
        assert torch.equal(found.float(), F.max_pool2d(x.float(), *options)), options
        assert found.dtype == torch.uint8
        assert found.data_ptr() != x.data_ptr()


def test_other_dtypes_are_refused() -> None:
    module = Int8Conv(convolution("3x3"), X, None)
    with pytest.raises(TypeError, match=r"float32; expected torch\.uint8"):
        module(torch.zeros(1, 16, 4, 4))
