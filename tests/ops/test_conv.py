"""``conv2d_bias_act``: every algorithm and dtype against float64, the module, and errors.

``oneDNN``, ``gemm``, ``winograd`` and ``direct`` are the algorithms of the CPU, ``cuda`` the
operator on a GPU.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resfast.layers.conv import set_winograd_tile
from resfast.ops.conv import choice as conv_choice
from resfast.ops.conv import cpu as conv_cpu
from resfast.ops.conv import op as conv
from resfast.ops.conv import reference as conv_reference
from resfast.ops.conv.op import DTYPES, ConvBiasAct, conv2d_bias_act
from tests.conftest import MEASUREMENT

ACTIVATIONS = tuple(conv_reference.ACTIVATIONS)
needs_bf16 = pytest.mark.skipif(
    not conv_cpu._has_kernels(), reason="needs the C++ kernels and AVX512-BF16"
)
needs_amx = pytest.mark.skipif(not conv_cpu.has_amx(), reason="needs the C++ kernels and AMX")
OURS = [
    *(pytest.param(name, marks=needs_bf16) for name in ("gemm", "winograd")),
    pytest.param("direct", marks=needs_amx),
]
WHERE = ["oneDNN", *OURS, pytest.param("cuda", marks=pytest.mark.gpu)]
ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Root mean square error that a dtype allows, of a result of about 1 and sums of thousands."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache file of the test's own, and no choice left from the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RESFAST_CONV", raising=False)
    monkeypatch.setattr(conv_choice, "MAX_SPREAD", torch.inf)  # the machine may be busy
    monkeypatch.setattr(conv_choice, "MEASURE_SECONDS", MEASUREMENT[0])  # or nothing is kept
    monkeypatch.setattr(conv_choice, "MAX_REPEATS", MEASUREMENT[1])
    conv_cpu.CHOICES.forget()
    conv_choice.warn_once.cache_clear()
    precision = torch.backends.cudnn.conv.fp32_precision
    if torch.cuda.is_available():  # whose tensor cores cut off what they add
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        monkeypatch.setitem(ROUNDING, torch.float32, 2.0**-15)
    yield tmp_path / "cache" / "resfast" / "conv-cpu.json"
    torch.backends.cudnn.conv.fp32_precision = precision


def arguments(
    batch: int,
    channels: int,
    outputs: int,
    size: tuple[int, int],
    kernel: int = 3,
    stride: int = 1,
    padding: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    residual: bool = False,
    groups: int = 1,
    dilation: int = 1,
) -> dict[str, Any]:
    """Random arguments of :func:`conv2d_bias_act` whose result is of the order of 1."""
    pad = kernel // 2 if padding is None else padding
    x = torch.randn(batch, channels, *size).to(dtype, memory_format=torch.channels_last)
    inputs = channels // groups
    weight = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
    result = [(side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for side in size]
    rest = torch.randn(batch, outputs, *result).to(dtype, memory_format=torch.channels_last)
    return {
        "x": x,
        "weight": weight.to(dtype),
        "bias": torch.randn(outputs),
        "residual": rest if residual else None,
        "stride": stride,
        "padding": pad,
        "activation": "none",
        **({"groups": groups} if groups > 1 else {}),
        **({"dilation": dilation} if dilation > 1 else {}),
    }


def computed(where: str, arguments: dict[str, Any]) -> Tensor:
    """The result by one algorithm of the CPU (which must apply), or on CUDA."""
    rest = dict(arguments)
    x, weight, bias, residual = (rest.pop(name) for name in ("x", "weight", "bias", "residual"))
    if where == "cuda":
        tensors = [None if t is None else t.cuda() for t in (x, weight, bias, residual)]
        return conv2d_bias_act(*tensors, **rest).cpu()
    module = ConvBiasAct(weight, bias, **rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESFAST_CONV", where)
        result = module(x, residual)
    (plan,) = module._plans.values()
    assert plan.algorithm == where
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.dtype == x.dtype
    return result


def exact(arguments: dict[str, Any]) -> Tensor:
    """The result in float64."""
    rest = dict(arguments)
    tensors = [rest.pop(name) for name in ("x", "weight", "bias", "residual")]
    stride, padding = (conv._pair(rest[name]) for name in ("stride", "padding"))
    return conv_reference.conv2d_bias_act(
        *(None if t is None else t.double() for t in tensors), stride, padding,
        rest["activation"], rest.get("negative_slope", conv_reference.TORCH_NEGATIVE_SLOPE),
        rest.get("groups", 1), conv._pair(rest.get("dilation", 1)),
    )  # fmt: skip


def assert_right(result: Tensor, arguments: dict[str, Any]) -> None:
    """No element is far off, and all together are as near as the dtype's rounding allows."""
    expected = exact(arguments)
    assert result.shape == expected.shape
    rounding = ROUNDING[result.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=4 * rounding, atol=8 * rounding)
    error = (result.double() - expected).square().mean().sqrt()
    assert error <= rounding, f"root mean square error {error:.2g}"


def takes(where: str, kernel: int) -> bool:
    return where not in ("winograd", "direct") or kernel == 3


# Numbers


PADDINGS = {1: (0, 1), 3: (1, 0, 2), 5: (2,), 2: (1,)}
CHANNELS = (3, 8, 16, 24, 60, 64, 96, 120, 128, 250, 256, 512)
SIZES = ((7, 9), (4, 4), (8, 5), (3, 3), (13, 6))


def _shapes() -> list[tuple]:
    shapes = []
    for i, channels in enumerate(CHANNELS):
        for kernel, stride in ((3, 1), (3, 2), (1, 1), (1, 2)):
            outputs = CHANNELS[-1 - (i + kernel + stride) % len(CHANNELS)]
            shapes.append((1 + 2 * (i % 2), channels, outputs, SIZES[i % 5], kernel, stride))
    shapes += [(1, 5, 7, (6, 7), 5, 1), (2, 4, 20, (9, 8), 5, 2), (1, 6, 9, (5, 5), 2, 1)]
    shapes += [(64, 64, 64, (8, 8), 3, 1), (64, 128, 128, (4, 4), 3, 2), (64, 24, 16, (5, 5), 1, 1)]
    return shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", WHERE)
def test_every_algorithm_computes_what_float64_does(
    where: str, dtype: torch.dtype, poisoned: None
) -> None:
    if where in ("gemm", "winograd", "direct") and dtype != torch.bfloat16:
        pytest.skip("ours are for bfloat16")
    torch.manual_seed(0)
    for i, (*shape, kernel, stride) in enumerate(_shapes()):
        if not takes(where, kernel):
            continue
        for residual in (False, True):
            padding = PADDINGS[kernel][i % len(PADDINGS[kernel])]
            args = arguments(*shape, kernel, stride, padding, dtype=dtype, residual=residual)
            args["activation"] = ACTIVATIONS[(i + residual) % len(ACTIVATIONS)]
            args["negative_slope"] = (0.01, 0.1, 1.5, -0.5)[i % 4]
            assert_right(computed(where, args), args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("where", WHERE)
def test_every_activation_with_and_without_bias_and_residual(where: str, activation: str) -> None:
    torch.manual_seed(1)
    dtypes = DTYPES if where in ("oneDNN", "cuda") else (torch.bfloat16,)
    for dtype, bias, residual in itertools.product(dtypes, (False, True), (False, True)):
        args = arguments(2, 24, 40, (6, 7), dtype=dtype, residual=residual)
        args["activation"] = activation
        if not bias:
            args["bias"] = None
        assert_right(computed(where, args), args)


@pytest.mark.parametrize("where", WHERE)
def test_extreme_values_go_through_every_activation(where: str) -> None:
    """Each value alone, through a kernel that passes it on; and NaN."""
    for activation in ACTIVATIONS:
        args = arguments(1, 16, 16, (8, 1)) | {"activation": activation, "bias": None}
        args["weight"] = torch.zeros_like(args["weight"])
        args["weight"][:, :, 1, 1] = torch.eye(16)
        values = torch.tensor([-1e30, -90.0, -10.0, -0.5, 0.5, 10.0, 90.0, 1e30])
        args["x"] = torch.zeros_like(args["x"])
        args["residual"] = values.bfloat16().view(1, 1, 8, 1).repeat(1, 16, 1, 1)
        atol = 1e-5 if activation == "gelu" else 1e-30
        torch.testing.assert_close(
            computed(where, args).double(), exact(args), rtol=2e-2, atol=atol
        )
        args["residual"] = torch.full_like(args["residual"], torch.nan)
        assert computed(where, args).isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("where", ["oneDNN", *OURS])
def test_result_is_right_for_any_number_of_threads(where: str, threads: int) -> None:
    torch.manual_seed(2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((1, 64, 250, (4, 4)), (3, 96, 130, (9, 11)), (1, 16, 64, (40, 33))):
            args = arguments(*shape, residual=True)
            assert_right(computed(where, args), args)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("where", WHERE)
def test_any_strides_are_accepted_and_inputs_stay_as_they_are(where: str) -> None:
    torch.manual_seed(3)
    args = arguments(3, 16, 24, (6, 8), residual=True)
    wide = torch.randn(3, 32, 12, 8).bfloat16()
    forms = {
        "NCHW": args["x"].contiguous(),
        "every other": wide[:, ::2, ::2],
        "transposed": torch.randn(3, 16, 8, 6).bfloat16().mT,
        "expanded": torch.randn(1, 16, 6, 1).bfloat16().expand(3, 16, 6, 8),
    }
    for x in forms.values():
        given = {
            **args,
            "x": x,
            "residual": args["residual"].contiguous(),
            "weight": args["weight"].contiguous(memory_format=torch.channels_last),
        }
        before = copy.deepcopy({k: v for k, v in given.items() if isinstance(v, Tensor)})
        assert_right(computed(where, given), given)
        assert all(torch.equal(given[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("where", WHERE)
def test_batch_of_none_gives_none(where: str) -> None:
    args = arguments(0, 8, 12, (5, 5), stride=1)
    if where in ("gemm", "winograd", "direct"):
        module = ConvBiasAct(args["weight"], args["bias"], padding=1)
        assert module(args["x"]).shape == (0, 12, 5, 5)
    else:
        assert computed(where, args).shape == (0, 12, 5, 5)


GROUPED = [
    # batch, channels, outputs, size, kernel, stride, padding, groups, dilation
    (2, 16, 16, (7, 9), 3, 1, 1, 16, 1),
    (1, 24, 24, (8, 5), 5, 2, 2, 24, 1),
    (2, 8, 16, (6, 6), 3, 1, 1, 8, 1),
    (2, 32, 48, (7, 6), 3, 1, 1, 4, 1),
    (1, 12, 6, (5, 5), 1, 1, 0, 3, 1),
    (2, 6, 10, (9, 11), 3, 1, 2, 1, 2),
    (2, 16, 16, (9, 9), 3, 2, 3, 16, 3),
    (3, 20, 10, (9, 8), 2, 1, 1, 5, 2),
    (2, 8, 8, (5, 3), 3, 2, 0, 8, 1),
    (2, 8, 4, (9, 5), 3, 2, 0, 2, 2),
]
"""Of the last two the result is one column wide."""


@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [WHERE[0], WHERE[-1]])
def test_groups_and_dilation_compute_what_float64_does(
    where: str, dtype: torch.dtype, activation: str, poisoned: None
) -> None:
    torch.manual_seed(3)
    for *shape, groups, dilation in GROUPED:
        for residual in (False, True):
            options = {"residual": residual, "groups": groups, "dilation": dilation}
            args = arguments(*shape, dtype=dtype, **options) | {"activation": activation}
            assert_right(computed(where, args), args)
            if where != "cuda":
                assert_right(conv2d_bias_act(**args), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_not_finite_stay_in_their_group(dtype: torch.dtype) -> None:
    for activation, residual in itertools.product(ACTIVATIONS, (False, True)):
        for groups, dilation in ((24, 1), (4, 1), (4, 2)):
            args = arguments(
                2, 24, 24, (9, 9), dtype=dtype, residual=False, groups=groups, dilation=dilation
            ) | {"activation": activation}
            if residual:
                args["residual"] = torch.randn_like(exact(args)).to(dtype)
            for value in SPOILT.values():
                args["x"][0, 0, 0, 0] = value
                result, expected = computed("oneDNN", args), exact(args)
                right = kinds(result) == kinds(expected)
                if activation == "gelu" and dtype == torch.float32:
                    right |= (kinds(result) == 1) & (kinds(expected) == 2)
                assert right.all(), f"{value}, {groups} groups, {activation}"


SPOILT = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "-infinity": -float("inf"),
}


def kinds(values: Tensor) -> Tensor:
    """0 for finite values, 1 for NaN, 2 and 3 for infinities."""
    infinite = torch.where(values > 0, 2, 3)
    return torch.where(values.isnan(), 1, torch.where(values.isinf(), infinite, 0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("where", "dtype"),
    [("oneDNN", torch.float32), ("oneDNN", torch.bfloat16)]
    + [pytest.param(*where.values, torch.bfloat16, marks=where.marks) for where in OURS],
)
def test_values_that_are_not_finite_reach_the_results_that_depend_on_them_and_no_others(
    where: str, dtype: torch.dtype, activation: str
) -> None:
    for channels, residual, spoilt in itertools.product((3, 40), (False, True), SPOILT):
        for name in ("x", "bias", "residual") if residual else ("x", "bias"):
            args = arguments(2, channels, 24, (9, 9), dtype=dtype, residual=residual)
            args["activation"] = activation
            args[name][(0,) * args[name].ndim] = SPOILT[spoilt]
            result, expected = computed(where, args), exact(args)
            right = kinds(result) == kinds(expected)
            if activation == "gelu" and dtype == torch.float32:  # torch's own is NaN at infinity
                right |= (kinds(result) == 1) & (kinds(expected) == 2)
            assert right.all(), f"{spoilt} in {name}, {channels} channels, residual {residual}"


@pytest.mark.parametrize("where", ["oneDNN", *OURS[:1]])
def test_weights_that_are_not_finite_make_no_result_finite(where: str) -> None:
    for activation, dtype in itertools.product(("relu", "gelu"), (torch.float32, torch.bfloat16)):
        if where == "oneDNN" or dtype == torch.bfloat16:
            args = arguments(2, 8, 16, (6, 6), dtype=dtype)
            args["weight"].fill_(torch.nan)
            module = ConvBiasAct(args["weight"], padding=1, activation=activation)
            assert module(args["x"]).isnan().all()


ONE_COLUMN = """
import sys, torch
import torch.nn.functional as F
from resfast.ops.conv.op import ConvBiasAct, conv2d_bias_act

torch.set_num_threads(1)
for kernel, stride, width in ((3, 2, 3), (3, 3, 4), (5, 2, 5), (5, 4, 7)):
    for batch, channels, with_residual in ((1, 3, False), (4, 64, True)):
        x = torch.randn(batch, channels, 32, width).bfloat16()
        weight = torch.randn(16, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
        weight = weight.bfloat16()
        exact = F.conv2d(x.double(), weight.double(), None, stride)
        residual = torch.randn(exact.shape).bfloat16() if with_residual else None
        exact = exact if residual is None else exact + residual.double()
        for run in (
            ConvBiasAct(weight, stride=stride),
            lambda x, residual: conv2d_bias_act(x, weight, None, residual, stride=stride),
        ):
            error = (run(x, residual).double() - exact).abs().max().item()
            assert error < 0.1, (kernel, stride, width, error)
"""


def test_results_of_one_column_hold_nothing_of_uninitialized_memory(tmp_path: Path) -> None:
    """torch 2.15's bfloat16 convolution does, with AMX and a stride of at least 2 (measured)."""
    environment = {
        **os.environ,
        "MALLOC_PERTURB_": "128",  # glibc fills new memory with 0x7F, which is 3e38 in bfloat16
        "RESFAST_CONV": "oneDNN",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", ONE_COLUMN],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_bf16
def test_the_fallback_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def instant(*args: Any) -> Any:
        return lambda x, residual: torch.zeros(1, 16, 8, 8, dtype=x.dtype)

    for name in ("oneDNN", "gemm"):
        monkeypatch.setitem(conv_cpu.BUILDERS, name, instant)
    args = arguments(1, 16, 16, (8, 8))
    module = ConvBiasAct(args["weight"], args["bias"], padding=1)
    assert_right(module(args["x"]), args)


@needs_bf16
def test_the_last_image_of_a_large_batch_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    builders = dict(conv_cpu.BUILDERS)

    def wrong(name: str, *args: Any) -> Any:
        run = builders[name](*args)

        def call(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
            out = run(x, residual)
            out[-1] = 0
            return out

        return call

    for name in ("oneDNN", "gemm"):
        monkeypatch.setitem(conv_cpu.BUILDERS, name, functools.partial(wrong, name))
    args = arguments(3 * conv_cpu.MOST_COMPARED - 5, 16, 16, (8, 8))
    module = ConvBiasAct(args["weight"], args["bias"], padding=1)
    assert_right(module(args["x"]), args)


def test_without_onednn_the_reference_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_cpu, "_onednn_has", lambda dtype: False)
    for dtype in DTYPES:
        args = arguments(2, 8, 12, (5, 6), dtype=dtype, residual=True)
        assert_right(computed("oneDNN", args), args)


def test_operator_computes_the_same_as_the_module() -> None:
    torch.manual_seed(4)
    for dtype in DTYPES:
        args = arguments(2, 12, 20, (7, 6), stride=2, dtype=dtype, residual=True)
        args["activation"] = "relu"
        assert_right(conv2d_bias_act(**args), args)


# The face


def _wrong() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    good = arguments(2, 8, 12, (5, 6), residual=True)
    half = torch.float16
    return {
        "x float64": ({"x": good["x"].double()}, TypeError, "x is torch.float64; expected one of"),
        "weight dtype": (
            {"weight": good["weight"].to(half)},
            TypeError,
            "weight is torch.float16; expected torch.bfloat16, like x",
        ),
        "bias dtype": (
            {"bias": good["bias"].bfloat16()},
            TypeError,
            "bias is torch.bfloat16; expected torch.float32",
        ),
        "residual dtype": (
            {"residual": good["residual"].to(half)},
            TypeError,
            "residual is torch.float16; expected torch.bfloat16, like x",
        ),
        "x 3-d": ({"x": good["x"][0]}, ValueError, r"x is \[8, 5, 6\]; expected \[N, C, H, W\]"),
        "weight 3-d": ({"weight": good["weight"][0]}, ValueError, r"weight is \[8, 3, 3\]"),
        "weight empty": ({"weight": good["weight"][:0]}, ValueError, "none of them 0"),
        "channels": ({"x": good["x"][:, :4]}, ValueError, "x has 4 channels, .* is for 8"),
        "bias shape": ({"bias": torch.zeros(11)}, ValueError, r"bias is \[11\]; expected \[12\]"),
        "residual shape": (
            {"residual": good["residual"][:1]},
            ValueError,
            r"residual is \[1, 12, 5, 6\]; expected \[2, 12, 5, 6\], like the result",
        ),
        "stride": ({"stride": 0}, ValueError, r"stride is \[0, 0\]; expected .* at least 1"),
        "padding": ({"padding": (1, -1)}, ValueError, r"padding is \[1, -1\]; .* at least 0"),
        "small": (
            {"x": good["x"][..., :2, :2], "padding": 0, "residual": None},
            ValueError,
            r"images of 2x2 with padding \[0, 0\] are smaller than the kernel of 3x3",
        ),
        "activation": (
            {"activation": "rellu"},
            ValueError,
            "activation 'rellu' is unknown; expected one of none, relu, leaky_relu, silu, gelu, "
            "relu6, hardswish, hardsigmoid, sigmoid, tanh; "
            "did you mean 'relu'",
        ),
        "groups": (
            {"groups": 5},
            ValueError,
            "groups is 5; expected a divisor of the weight's 12 filters",
        ),
        "channels of groups": (
            {"groups": 2},
            ValueError,
            r"x has 8 channels, and weight \[12, 8, 3, 3\] in 2 groups is for 16",
        ),
        "dilation": ({"dilation": 0}, ValueError, r"dilation is \[0, 0\]; expected .* at least 1"),
        "small for the dilation": (
            {"x": good["x"][..., :4, :4], "padding": 0, "dilation": 2, "residual": None},
            ValueError,
            r"smaller than the kernel of 3x3 with dilation \[2, 2\]",
        ),
        "slope": (
            {"negative_slope": float("nan")},
            ValueError,
            "negative_slope is nan; expected a finite number",
        ),
        "device": (
            {"weight": good["weight"].to("meta")},
            ValueError,
            "weight is on meta; expected cpu, like x",
        ),
    }


@pytest.mark.parametrize("case", _wrong())
def test_errors_name_the_value_and_what_was_expected(case: str) -> None:
    change, kind, message = _wrong()[case]
    args = arguments(2, 8, 12, (5, 6), residual=True) | change
    with pytest.raises(kind, match=message):
        conv2d_bias_act(**args)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in args.items()}
    if case != "device":
        with pytest.raises(kind, match=message):
            conv2d_bias_act(**meta)
    rest = dict(args)
    x, residual = rest.pop("x"), rest.pop("residual")
    if case != "bias dtype":  # the module converts it
        with pytest.raises(kind, match=message):
            ConvBiasAct(**rest)(x, residual)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_tensors_that_require_grad_are_refused_outside_no_grad(name: str) -> None:
    args = arguments(1, 8, 12, (5, 6), residual=True)
    args[name].requires_grad_()
    sentence = f"{name} requires grad, and the fused convolution is for inference only; call it"
    with pytest.raises(RuntimeError, match=sentence):
        conv2d_bias_act(**args)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_right(conv2d_bias_act(**args), {**args, name: args[name].detach()})
    rest = dict(args)
    x, residual = rest.pop("x"), rest.pop("residual")
    module = ConvBiasAct(**rest)
    if name in ("x", "residual"):
        with pytest.raises(RuntimeError, match=sentence):
            module(x, residual)
    else:
        assert not module(x, residual).requires_grad


@pytest.mark.parametrize("residual", [False, True])
def test_operator_passes_opcheck(residual: bool) -> None:
    for shape in ((2, 8, 12, (5, 6)), (1, 3, 1, (3, 3)), (2, 4, 5, (1, 1))):
        args = arguments(*shape, residual=residual)
        values = [*args.values()]
        values[4:6] = [[value, value] for value in values[4:6]]
        torch.library.opcheck(torch.ops.resfast.conv2d_bias_act.default, tuple(values))
    args = arguments(2, 8, 12, (7, 6), groups=4, dilation=2, residual=residual)
    values = [*args.values()]
    values[4:6] = [[value, value] for value in values[4:6]]
    values[7:] = [0.01, 4, [2, 2]]
    torch.library.opcheck(torch.ops.resfast.conv2d_bias_act.default, tuple(values))


class Block(nn.Module):
    """Two fused convolutions, as in a fused network."""

    def __init__(self) -> None:
        super().__init__()
        one, two = arguments(1, 8, 8, (6, 6)), arguments(1, 8, 8, (6, 6))
        self.first = ConvBiasAct(one["weight"], one["bias"], padding=1, activation="relu")
        self.second = ConvBiasAct(two["weight"], two["bias"], padding=1, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), x)


def test_module_compiles_without_a_break_and_exports() -> None:
    torch.manual_seed(5)
    block, x = Block().eval(), arguments(2, 8, 8, (6, 6))["x"]
    expected = block(x).float()
    for model in (
        torch.compile(block, backend="aot_eager", fullgraph=True),
        torch.export.export(block, (x,)).module(),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model(x).float(), expected, rtol=2e-2, atol=2e-2)


def test_exported_module_takes_other_batch_sizes() -> None:
    block, x = Block().eval(), arguments(2, 8, 8, (6, 6))["x"]
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: batch},)).module()
    more = arguments(5, 8, 8, (6, 6))["x"]
    torch.testing.assert_close(exported(more).float(), block(more).float(), rtol=2e-2, atol=2e-2)


# The module's packed weights


@pytest.mark.parametrize("where", ["oneDNN", *OURS])
def test_packed_weights_follow_the_module(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESFAST_CONV", where)
    torch.manual_seed(6)
    first, second = arguments(1, 16, 16, (6, 6)), arguments(1, 16, 16, (6, 6))
    x = first["x"]
    module = ConvBiasAct(first["weight"], first["bias"], padding=1)
    other = ConvBiasAct(second["weight"], second["bias"], padding=1)
    one, two = module(x), other(x)
    assert not torch.equal(one, two)
    assert sorted(module.state_dict()) == ["bias", "weight"]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), one)
        twin.load_state_dict(other.state_dict())
        assert torch.equal(twin(x), two)
    assert torch.equal(module(x), one)
    with torch.no_grad():
        module.weight.copy_(other.weight)
        module.bias.copy_(other.bias)
    module.repack()
    assert torch.equal(module(x), two)
    module.to(torch.float32)
    assert_right(module(x.float()), {**second, "x": x.float()})
    module.to(torch.bfloat16)
    assert module.bias.dtype == torch.float32
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16; expected torch.float32"):
        module(x.float())


def test_one_module_serves_several_shapes() -> None:
    torch.manual_seed(7)
    module = None
    for batch, size in ((1, (4, 4)), (3, (9, 7)), (1, (4, 4)), (2, (4, 4))):
        args = arguments(batch, 16, 24, size)
        module = module or ConvBiasAct(args["weight"], args["bias"], padding=1)
        args |= {"weight": module.weight, "bias": module.bias}
        assert_right(module(args["x"]), args)


# The choice of an algorithm


@needs_bf16
def test_choice_is_measured_once_and_kept_for_other_processes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_choice, "MAX_SPREAD", math.inf)  # other tests run at the same time
    monkeypatch.setattr(conv_choice, "order_is_certain", lambda times: True)
    args = arguments(1, 64, 64, (8, 8))

    def fresh() -> str:
        module = ConvBiasAct(args["weight"], args["bias"], padding=1)
        module(args["x"])
        (plan,) = module._plans.values()
        return plan.algorithm

    chosen = fresh()
    (key,) = json.loads(cache.read_text())
    assert json.loads(cache.read_text())[key] == chosen
    assert "1,64,8,8" in key
    assert f"torch {torch.__version__}" in key
    monkeypatch.setattr(conv_cpu, "_fastest", lambda *args: pytest.fail("measured again"))
    assert fresh() == chosen
    conv_cpu.CHOICES.forget()  # as in another process
    assert fresh() == chosen
    other = next(name for name in conv_cpu.ALGORITHMS if name != chosen)
    cache.write_text(json.dumps({key: other}))
    conv_cpu.CHOICES.forget()
    assert fresh() == other


@needs_bf16
def test_choice_of_a_busy_machine_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_choice, "MAX_SPREAD", 0.5)  # no times agree so well
    args = arguments(1, 16, 16, (8, 8))
    assert_right(ConvBiasAct(args["weight"], args["bias"], padding=1)(args["x"]), args)
    assert not cache.exists()


def test_an_order_is_certain_if_chance_does_not_explain_it() -> None:
    certain = conv_choice.order_is_certain
    slow = [1.2] * 20
    assert certain({"a": [1.0, 1.1, 1.0], "b": [1.2, 1.3, 1.15]})  # all of a before all of b
    assert certain({"a": [1.0] * 20, "b": slow, "c": [3.0] * 20})
    assert certain({"a": [1.0, 5.0] * 10, "b": [1.0, 5.0] * 10})  # equally good
    assert not certain({"a": [1.0, 1.0, 1.3], "b": [1.1, 1.2, 1.2]})
    for wins, expected in ((15, False), (16, True)):  # of 20: probabilities of 0.021 and 0.006
        first = [1.0] * wins + [2.0] * (20 - wins)
        assert certain({"a": first, "b": slow}) == certain({"b": slow, "a": first}) == expected


def test_candidates_are_measured_again_while_none_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, calls = 0.0, {"a": 0, "b": 0}
    monkeypatch.setattr(conv_choice.time, "perf_counter", lambda: now)

    def seconds(name: str, number: int) -> float:
        if name == "b":
            return 0.02
        return (0.01, 0.04)[number % 2] if number < 4 else 0.01

    def call(name: str) -> torch.Tensor:
        nonlocal now
        now += seconds(name, calls[name])
        calls[name] += 1
        return torch.empty(0)

    def measure() -> tuple[str, bool]:
        return conv_choice.fastest(
            {name: functools.partial(call, name) for name in calls},
            is_right=lambda out: True,
            seconds=conv_choice.host_seconds,
            trusted="a",
            what="a test",
        )

    assert measure() == ("a", True)
    assert 4 < calls["a"] <= 3 * conv_choice.MAX_REPEATS + 1
    calls.update(a=-1000, b=-1000)
    assert not measure()[1]
    assert calls["a"] == -1000 + 3 * conv_choice.MAX_REPEATS + 1


@needs_bf16
@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', "\xff"])
def test_damaged_cache_is_ignored_and_mended(
    content: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.encode("latin-1"))
    args = arguments(1, 16, 16, (8, 8))
    with caplog.at_level(logging.WARNING, "resfast"):
        for _ in range(2):
            ConvBiasAct(args["weight"], padding=1)(args["x"])
    ignored = [record for record in caplog.records if "is ignored" in record.message]
    assert len(ignored) == (0 if content == '{"a": 1}' else 1)
    assert set(json.loads(cache.read_text()).values()) <= set(conv_cpu.ALGORITHMS)


@needs_bf16
def test_cache_that_cannot_be_written_is_reported_once(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "resfast"):
        for size in ((8, 8), (6, 6)):
            args = arguments(1, 16, 16, size)
            assert_right(ConvBiasAct(args["weight"], args["bias"], padding=1)(args["x"]), args)
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1


@needs_bf16
def test_inaccurate_algorithm_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def instant(*args: Any) -> Any:
        return lambda x, residual: torch.zeros(1, 16, 8, 8, dtype=x.dtype)

    monkeypatch.setitem(conv_cpu.BUILDERS, "gemm", instant)
    args = arguments(1, 16, 16, (8, 8))
    module = ConvBiasAct(args["weight"], args["bias"], padding=1)
    assert_right(module(args["x"]), args)


@needs_bf16
def test_named_algorithm_is_taken_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stride, expected in (
        ("gemm", 2, "gemm"),
        ("winograd", 1, "winograd"),
        ("winograd", 2, "winograd"),
        ("winograd", (1, 2), "oneDNN"),
    ):
        monkeypatch.setenv("RESFAST_CONV", name)
        args = arguments(1, 16, 16, (8, 8))
        module = ConvBiasAct(args["weight"], stride=stride, padding=1)
        module(args["x"])
        assert [plan.algorithm for plan in module._plans.values()] == [expected]


@needs_bf16
@pytest.mark.parametrize("size", [(16, 16), (6, 6), (3, 13), (2, 2)])
def test_larger_tiles_where_they_are_allowed(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setenv("RESFAST_CONV", "winograd")
    args = arguments(3, 32, 48, size, residual=True)
    module = ConvBiasAct(args["weight"], args["bias"], padding=1)
    expected = exact(args)
    errors = {}
    for tile in (2, 3, 4):
        set_winograd_tile(nn.Sequential(module), tile)
        out = module(args["x"], args["residual"]).double()
        errors[tile] = float((out - expected).norm() / expected.norm())
        taken = conv_cpu.fastest_tile(args["x"], 1, 1, tile)
        assert ("winograd", taken) in module._packed
    assert max(errors.values()) < 0.02
    if size == (16, 16):
        assert errors[2] < errors[4]
    assert len(module._plans) == 3


def test_unknown_name_of_an_algorithm_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RESFAST_CONV", "fft")
    args = arguments(1, 16, 16, (8, 8))
    with caplog.at_level(logging.WARNING, "resfast"):
        assert_right(ConvBiasAct(args["weight"], args["bias"], padding=1)(args["x"]), args)
    assert "RESFAST_CONV=fft is unknown; expected one of oneDNN, gemm, winograd," in caplog.text


@pytest.mark.parametrize("name", OURS)
def test_kernels_refuse_what_does_not_fit_the_packed_weights(name: str) -> None:
    args = arguments(1, 16, 24, (6, 6), residual=True)
    pack, kernel = (getattr(torch.ops.resfast, f"conv_{name}{end}") for end in ("_pack", ""))
    more = (1,) if name == "winograd" else ()
    packed, geometry = pack(args["weight"], *more), [24, 16, 3, 3, 1, 1, 1, 1]
    good = [args["x"], packed, args["bias"], args["residual"], geometry, 0, 0.01]
    kernel(*good)
    wrong = {
        "x is torch.float32": {0: args["x"].float()},
        "x is not in channels_last": {0: args["x"].contiguous()},
        r"x is \[1, 8, 6, 6\]": {0: args["x"][:, :8]},
        "packed weights of": {1: packed[:-1]},
        r"bias is torch.float32 \[23\]": {2: args["bias"][:-1]},
        r"residual is \[1, 24, 5, 6\]": {3: args["residual"][..., :5, :]},
        "geometry is": {4: [24, 16, 0, 3, 1, 1, 1, 1]},
        "padding below 0": {4: [24, 16, 3, 3, 1, 1, -1, 1]},
        "activation 5": {5: 5},
        "smaller than the kernel": {
            0: args["x"][..., :1, :1].contiguous(memory_format=torch.channels_last),
            4: [24, 16, 3, 3, 1, 1, 0, 0],
        },
    }
    for message, change in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            kernel(*(change.get(i, value) for i, value in enumerate(good)))
    with pytest.raises(RuntimeError, match="weight is"):
        pack(args["weight"].float(), *more)
    if name == "winograd":
        with pytest.raises(RuntimeError, match="stride is 3; expected 1 or 2"):
            pack(args["weight"], 3)
    if name != "gemm":
        with pytest.raises(RuntimeError, match="two strides that are both 1 or both 2"):
            kernel(*good[:4], [24, 16, 3, 3, 1, 2, 1, 1], *good[5:])
