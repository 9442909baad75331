"""``resfast::scale_shift_act`` against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from resfast.ops.conv.reference import ACTIVATIONS
from resfast.ops.scale_shift import op as scale_shift
from resfast.ops.scale_shift.op import ScaleShiftAct, scale_shift_act

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SHAPES = (
    # channels of the maps, batch, height, width
    ((16,), 2, 5, 7),
    ((3, 1, 12), 1, 4, 4),
    ((24, 24, 24), 3, 1, 1),
    ((5,), 1, 1, 9),
    ((8, 40), 2, 9, 1),
    ((130,), 4, 33, 31),
)


@pytest.fixture(params=["kernel", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute it on the CPU."""
    if request.param == "PyTorch":
        monkeypatch.setattr(scale_shift, "HAS_KERNEL", False)
    elif not scale_shift.HAS_KERNEL:
        pytest.skip("needs the C++ kernels")
    return request.param


def arguments(
    channels: tuple[int, ...], *size: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    batch, height, width = size
    maps = [torch.randn(batch, c, height, width) * 3 for c in channels]
    maps = [x.to(device, dtype, memory_format=torch.channels_last) for x in maps]
    count = sum(channels)
    return maps, torch.randn(count, device=device), torch.randn(count, device=device)


def assert_right(result: Tensor, arguments: tuple[Any, ...], activation: str, slope: float) -> None:
    maps, scale, shift = arguments
    maps = [x.double() for x in maps]
    exact = scale_shift.reference(maps, scale.double(), shift.double(), activation, slope)
    assert result.dtype == arguments[0][0].dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    rounding = ROUNDING[result.dtype]
    if result.is_cuda and result.dtype != torch.float32:  # rounded before the activation too
        rounding *= 4
    torch.testing.assert_close(result.double(), exact, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_activation_dtype_and_shape(way: str, device: str, activation: str) -> None:
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        args = arguments(*shape, dtype=dtype, device=device)
        result = scale_shift_act(*args, activation=activation, negative_slope=-0.25)
        assert_right(result, args, activation, -0.25)
        module = ScaleShiftAct(*args[1:], activation=activation, negative_slope=-0.25)
        assert torch.equal(module(*args[0]), result)


def test_any_memory_layout_and_slices_of_channels(way: str) -> None:
    maps, scale, shift = arguments((16,), 2, 5, 7, dtype=torch.float32)
    expected = scale_shift_act(maps, scale, shift)
    (x,) = maps
    for given in (
        [x.contiguous()],
        list(x.split([3, 8, 5], 1)),
        list(x.contiguous().split([3, 8, 5], 1)),
        [x.transpose(2, 3).contiguous().transpose(2, 3)],
        [torch.cat([x, x], 3)[..., :7]],
        [torch.cat([x, x], 2)[:, :, 5:]],
        [x[:1].expand(2, -1, -1, -1)],
    ):
        before = [part.clone() for part in given]
        exact = scale_shift_act([torch.cat(given, 1).contiguous()], scale, shift)
        torch.testing.assert_close(scale_shift_act(given, scale, shift), exact)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    torch.testing.assert_close(expected, scale_shift_act(list(x.split(4, 1)), scale, shift))


def test_values_that_are_not_finite_are_those_of_the_original(way: str) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -1e30, -4.0, 0.0, 5.0, 7.0, 1e30])
    x = values.view(1, 1, 1, -1).expand(1, 8, 1, 9).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.ones(8), torch.zeros(8)
    for activation, function in ACTIVATIONS.items():
        if activation == "gelu":
            continue  # torch's own is NaN at infinity
        result = scale_shift_act([x], scale, shift, activation=activation)
        torch.testing.assert_close(result, function(x, 0.01), equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    args = arguments((30, 50), 3, 40, 41, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = scale_shift_act(*args, activation="relu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result, scale_shift_act(*args, activation="relu"))


def test_empty_batches_and_other_ranks() -> None:
    module = ScaleShiftAct(torch.rand(6), torch.rand(6), activation="relu6")
    assert module(torch.rand(0, 6, 3, 3)).shape == (0, 6, 3, 3)
    for x in (torch.randn(5, 6), torch.randn(2, 6, 7), torch.randn(2, 6, 3, 3).double()):
        sizes = [-1] + [1] * (x.ndim - 2)
        exact = (x * module.scale.view(sizes) + module.shift.view(sizes)).clamp(0, 6)
        torch.testing.assert_close(module(x), exact.to(x.dtype))
    both = module(torch.ones(1, 2, 2, 2), torch.ones(1, 4, 2, 2, dtype=torch.bfloat16))
    torch.testing.assert_close(both, module(torch.ones(1, 6, 2, 2)))


def _wrong() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    maps, scale, _ = arguments((4, 3), 2, 5, 5, dtype=torch.float32)
    return {
        "none": ({"maps": []}, ValueError, "maps has no tensors"),
        "dtype": ({"maps": [maps[0].double()]}, TypeError, "a map is torch.float64"),
        "dtypes": ({"maps": [maps[0], maps[1].half()]}, TypeError, "a map is torch.float16"),
        "rank": ({"maps": [maps[0][0]]}, ValueError, r"a map is \[4, 5, 5\]; expected \[N, C"),
        "size": ({"maps": [maps[0], maps[1][:, :, 1:]]}, ValueError, r"\[2, 3, 4, 5\]; expected"),
        "scale dtype": ({"scale": scale.half()}, TypeError, "scale is torch.float16"),
        "scale": ({"scale": scale[1:]}, ValueError, r"scale is \[6\]; expected \[7\]"),
        "shift": ({"shift": scale[:1]}, ValueError, r"shift is \[1\]; expected \[7\]"),
        "activation": ({"activation": "rellu6"}, ValueError, "did you mean 'relu6'"),
        "device": ({"scale": scale.to("meta")}, ValueError, "scale is on meta; expected cpu"),
    }


@pytest.mark.parametrize("case", _wrong())
def test_errors_name_the_value_and_what_was_expected(case: str) -> None:
    change, kind, message = _wrong()[case]
    maps, scale, shift = arguments((4, 3), 2, 5, 5, dtype=torch.float32)
    with pytest.raises(kind, match=message):
        scale_shift_act(**{"maps": maps, "scale": scale, "shift": shift, **change})


def test_gradients_are_refused() -> None:
    maps, scale, shift = arguments((4, 3), 2, 5, 5, dtype=torch.float32)
    maps[1].requires_grad_()
    with pytest.raises(RuntimeError, match="a map requires grad"):
        scale_shift_act(maps, scale, shift)
    with pytest.raises(RuntimeError, match="a map requires grad"):
        ScaleShiftAct(scale, shift)(*maps)
    with torch.no_grad():
        scale_shift_act(maps, scale, shift)


def test_operator_passes_opcheck() -> None:
    for shape in SHAPES[:3]:
        args = arguments(*shape, dtype=torch.bfloat16)
        torch.library.opcheck(torch.ops.resfast.scale_shift_act.default, (*args, "relu6", 0.01))
        torch.library.opcheck(torch.ops.resfast.scale_shift_act.default, (*args, "silu"))


def test_the_module_keeps_float32_and_can_be_exported() -> None:
    args = arguments((4, 3), 2, 5, 5, dtype=torch.float32)
    module = ScaleShiftAct(*args[1:], activation="relu").to(torch.bfloat16)
    assert module.scale.dtype == module.shift.dtype == torch.float32
    program = torch.export.export(module, tuple(args[0]))
    assert "scale_shift_act" in str(program.graph)
    torch.testing.assert_close(program.module()(*args[0]), module(*args[0]))
