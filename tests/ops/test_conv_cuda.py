"""The choice among the CUDA convolutions.

Without a GPU the choice is tested with candidates that run on the CPU and made-up times, and the
real candidates with kernels that run on the CPU instead.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resfast.ops import extension
from resfast.ops.conv import choice as conv_choice
from resfast.ops.conv import cuda as conv_cuda
from resfast.ops.conv import reference as conv_reference
from resfast.ops.conv.cuda import Candidate
from resfast.ops.conv.op import ConvBiasAct, conv2d_bias_act

ACTIVATIONS = tuple(conv_reference.ACTIVATIONS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE = "resfast/conv-cuda.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache file of the test's own, and no choice left from before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RESFAST_CONV", raising=False)
    forget()
    yield tmp_path / CACHE
    forget()


def forget() -> None:
    """As in another process."""
    conv_cuda._chosen.clear()
    conv_cuda.CHOICES.forget()
    conv_choice.warn_once.cache_clear()


def arguments(
    shape: tuple[int, ...] = (3, 16, 24, 6, 5, 3, 1, 1),
    *,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "relu",
    residual: bool = True,
    bias: bool = True,
    device: str = "cpu",
    groups: int = 1,
    dilation: int = 1,
) -> tuple[Any, ...]:
    """Random ones of the operator, of the shape N, C, K, H, W, R = S, stride, padding."""
    n, c, k, h, w, r, stride, padding = shape
    x = torch.randn(n, c, h, w)
    weight = torch.randn(k, c // groups, r, r) / (c * r * r / groups) ** 0.5
    geometry = [stride, stride], [padding, padding]
    apart = (dilation, dilation)
    rest = torch.randn(conv_reference.output_shape(x, weight, *geometry, apart))
    as_image = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
    return (
        x.to(**as_image),
        weight.to(**as_image),
        torch.randn(k, device=device) if bias else None,
        rest.to(**as_image) if residual else None,
        *geometry,
        activation,
        0.125,
        groups,
        apart,
    )


def exact(args: tuple[Any, ...]) -> Tensor:
    tensors = [None if t is None else t.double().cpu() for t in args[:4]]
    return conv_reference.conv2d_bias_act(*tensors, *args[4:])


def assert_right(out: Tensor, args: tuple[Any, ...]) -> None:
    expected = exact(args)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[args[0].dtype]
    if out.is_cuda and out.dtype == torch.float32:  # tensor cores cut off what they add
        rounding = 1e-3 if conv_cuda.tf32(out.dtype) else 5e-5
    assert out.shape == expected.shape
    assert out.dtype == args[0].dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    error = (out.double().cpu() - expected).abs()
    assert bool((error <= 2 * rounding * (1 + expected.abs())).all()), float(error.max())


# -- the choice ------------------------------------------------------------------------------------


class Fake:
    """Candidates that run on the CPU, with made-up seconds for each."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = {name.replace("_", ":").replace("x", ","): s for name, s in seconds.items()}
        self.measured: list[tuple[str, ...]] = []
        self.wrong: dict[str, Callable[..., Tensor]] = {}
        self.spread = 1.0

    def candidates(self, args: tuple[Any, ...]) -> dict[str, Candidate]:
        rest = args[4:]

        def right(*tensors: Tensor) -> Tensor:
            return conv_reference.conv2d_bias_act(*tensors, *rest)

        names = [*self.seconds, "torch"]
        return {name: Candidate(name, self.wrong.get(name, right)) for name in names}

    def times(self, calls: dict[str, Any], fresh: Callable[[], Any]) -> conv_choice.Times:
        fresh()
        self.measured.append(tuple(calls))
        return {name: [self.seconds[name], self.seconds[name] * self.spread] for name in calls}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    one = Fake(ours_2x1=3, ours_0x2=2, hopper_4=5, cudnn=4)
    monkeypatch.setattr(conv_cuda, "_candidates", one.candidates)
    monkeypatch.setattr(conv_cuda, "seconds", one.times)
    stand_in_for_a_gpu(monkeypatch)
    return one


def stand_in_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_cuda, "machine", lambda device: "a GPU|9.0|versions")
    monkeypatch.setattr(conv_cuda, "may_measure", lambda: True)
    monkeypatch.setattr(conv_cuda, "tf32", lambda dtype: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def chosen(args: tuple[Any, ...] | None = None) -> str:
    args = args or arguments()
    plan = conv_cuda.plan(*args)
    assert_right(plan.run(args[0], args[3]), args)
    assert plan.shape == exact(args).shape
    return plan.algorithm


def test_fastest_way_is_measured_once_and_kept_for_other_processes(fake: Fake, cache: Path) -> None:
    assert chosen() == "ours:0,2"
    assert fake.measured == [("ours:2,1", "ours:0,2", "hopper:4", "cudnn")]
    ((key, name),) = json.loads(cache.read_text()).items()
    assert name == "ours:0,2"
    for part in ("a GPU|9.0|versions", "bfloat16", "3,16,6,5-24,16,3,3-1,1-1,1-1", "relu"):
        assert part in key
    assert chosen() == "ours:0,2"
    forget()
    assert chosen() == "ours:0,2"
    assert len(fake.measured) == 1
    forget()
    cache.write_text(json.dumps({key: "cudnn"}))
    assert chosen() == "cudnn"
    assert len(fake.measured) == 1


def test_operator_and_module_share_the_choice(fake: Fake) -> None:
    args = arguments()
    assert_right(conv_cuda.conv2d_bias_act(*args), args)
    assert chosen(arguments()) == "ours:0,2"
    assert_right(conv_cuda.conv2d_bias_act(*args[:-3]), (*args[:-3], 0.01))  # the slope's default
    assert len(fake.measured) == 1  # kept in the file, which does not tell slopes apart


def test_everything_that_changes_the_time_has_a_choice_of_its_own(
    fake: Fake, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    different = [
        arguments(),
        arguments(residual=False),
        arguments(activation="silu"),
        arguments(dtype=torch.float16),
        arguments(dtype=torch.float32),
        arguments((4, 16, 24, 6, 5, 3, 1, 1)),
        arguments((3, 16, 24, 6, 5, 3, 2, 1)),
        arguments((3, 16, 24, 6, 5, 3, 1, 0)),
        arguments((3, 16, 24, 5, 6, 3, 1, 1)),
    ]
    for args in different:
        chosen(args)
    monkeypatch.setattr(conv_cuda, "tf32", lambda dtype: dtype == torch.float32)
    chosen(different[4])
    monkeypatch.setattr(conv_cuda, "machine", lambda device: "another GPU")
    conv_cuda._chosen.clear()  # one process has one kind of each device
    chosen(different[0])
    assert len(json.loads(cache.read_text())) == len(fake.measured) == len(different) + 2


def test_choices_of_another_process_are_kept_too(fake: Fake, cache: Path) -> None:
    chosen()
    theirs = {**json.loads(cache.read_text()), "theirs": "ours:7,1"}
    cache.write_text(json.dumps(theirs))
    chosen(arguments(residual=False))
    assert theirs.items() < json.loads(cache.read_text()).items()


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', "\xff"])
def test_damaged_file_is_ignored_and_mended(
    content: str, fake: Fake, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "resfast"):
        assert chosen() == chosen(arguments(residual=False)) == "ours:0,2"
    assert caplog.text.count("is ignored") == (0 if content == '{"a": 1}' else 1)
    assert set(json.loads(cache.read_text()).values()) == {"ours:0,2"}


def test_choice_that_is_no_longer_there_is_measured_again(fake: Fake, cache: Path) -> None:
    chosen()
    forget()
    key = next(iter(json.loads(cache.read_text())))
    cache.write_text(json.dumps({key: "ours:9,9"}))
    assert chosen() == "ours:0,2"
    assert len(fake.measured) == 2


def test_choice_of_a_busy_gpu_is_not_kept(fake: Fake, cache: Path) -> None:
    fake.spread = 10
    assert chosen() == "ours:0,2"
    assert not cache.exists()
    assert chosen() == "ours:0,2"
    assert len(fake.measured) == 1


@pytest.mark.parametrize(
    ("named", "expected", "measured"),
    [
        ("ours", "ours:0,2", [("ours:2,1", "ours:0,2")]),
        ("ours:2,1", "ours:2,1", []),
        ("hopper", "hopper:4", []),
        ("hopper:4", "hopper:4", []),
        ("cudnn", "cudnn", []),
        ("torch", "torch", []),
        ("ours:5,1", "ours:0,2", [("ours:2,1", "ours:0,2", "hopper:4", "cudnn")]),
        ("oneDNN", "ours:0,2", [("ours:2,1", "ours:0,2", "hopper:4", "cudnn")]),
    ],
)
def test_named_way_is_taken_where_it_applies(
    named: str,
    expected: str,
    measured: list[tuple[str, ...]],
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("RESFAST_CONV", named)
    with caplog.at_level(logging.WARNING, "resfast"):
        assert chosen() == expected
    assert fake.measured == measured
    assert not caplog.text
    monkeypatch.delenv("RESFAST_CONV")
    assert chosen() == "ours:0,2"  # no other process inherits what was forced


def test_unknown_name_is_reported_once(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RESFAST_CONV", "fft")
    with caplog.at_level(logging.WARNING, "resfast"):
        assert chosen() == chosen(arguments(residual=False)) == "ours:0,2"
    assert caplog.text.count("RESFAST_CONV=fft is unknown; expected one of oneDNN, gemm,") == 1
    assert "cudnn, torch, ours:TILE,SPLITS" in caplog.text


def test_nothing_is_measured_during_a_capture(
    fake: Fake, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_cuda, "may_measure", lambda: False)
    plan = conv_cuda.plan(*arguments())
    assert (plan.algorithm, plan.settled) == ("ours:2,1", False)  # the best guess
    assert not cache.exists()
    assert fake.measured == []
    monkeypatch.setattr(conv_cuda, "may_measure", lambda: True)
    assert chosen() == "ours:0,2"
    monkeypatch.setattr(conv_cuda, "may_measure", lambda: False)
    forget()
    plan = conv_cuda.plan(*arguments())
    assert (plan.algorithm, plan.settled) == ("ours:0,2", True)  # what is known is taken


def test_way_with_a_wrong_result_or_an_error_is_never_chosen(
    fake: Fake, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*tensors: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available\nand more")

    def last_image_missing(*tensors: Tensor) -> Tensor:
        out = conv_reference.conv2d_bias_act(*tensors, *args[4:])
        out[-1] = 0
        return out

    args = arguments((40, 16, 24, 6, 5, 3, 1, 1))
    fake.wrong = {"ours:0,2": broken, "ours:2,1": last_image_missing}
    with caplog.at_level(logging.WARNING, "resfast"):
        assert chosen(args) == "cudnn"
    assert fake.measured == [("hopper:4", "cudnn")]
    assert "ours:0,2 failed and is not used" in caplog.text
    assert ": no kernel image is available" in caplog.text
    assert "ours:2,1 is not accurate enough" in caplog.text


def test_plain_torch_is_the_last_resort(
    fake: Fake, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def zeros(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return torch.zeros(3, 24, 6, 5, dtype=x.dtype)

    fake.wrong = dict.fromkeys(fake.seconds, zeros)
    with caplog.at_level(logging.WARNING, "resfast"):
        assert chosen() == "torch"
    assert "using torch for" in caplog.text
    assert not cache.exists()


def test_values_that_nothing_can_be_compared_with_settle_nothing(fake: Fake, cache: Path) -> None:
    args = arguments()
    args[0][0, 0, 0, 0] = torch.nan
    plan = conv_cuda.plan(*args)
    assert (plan.algorithm, plan.settled) == ("ours:2,1", False)
    args[0][0, 0, 0, 0] = 1
    assert chosen(args) == "ours:0,2"
    assert len(fake.measured) == 1


def test_no_memory_to_measure_settles_nothing(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "resfast"):
        patch.setattr(conv_cuda, "_exact", full)
        plan = conv_cuda.plan(*arguments())
    assert (plan.algorithm, plan.settled) == ("ours:2,1", False)
    assert "not enough GPU memory to measure the convolution of [3, 16, 6, 5]" in caplog.text
    assert chosen() == "ours:0,2"


def test_only_the_likely_ones_of_ours_are_measured(fake: Fake) -> None:
    fake.seconds = {f"ours:{i},1": 9 - i for i in range(9)} | {"cudnn": 7}
    assert chosen() == "ours:5,1"
    assert fake.measured == [(*(f"ours:{i},1" for i in range(6)), "cudnn")]


def test_given_tensors_are_not_written_by_the_measurement(fake: Fake) -> None:
    def spoils(x: Tensor, weight: Tensor, bias: Any, residual: Tensor) -> Tensor:
        out = conv_reference.conv2d_bias_act(x, weight, bias, residual, *args[4:])
        for tensor in (x, weight, residual):
            tensor.zero_()
        return out

    fake.wrong = {"ours:2,1": spoils}
    args = arguments()
    before = [tensor.clone() for tensor in args[:4]]
    candidates = {"ours:2,1": fake.candidates(args)["ours:2,1"]}
    assert conv_cuda._fastest("key", candidates, args) == "ours:2,1"
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=False))


def test_empty_batch_is_not_measured(fake: Fake) -> None:
    assert chosen(arguments((0, 16, 24, 6, 5, 3, 1, 1))) == "torch"
    assert fake.measured == []


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Sets what float32 may be rounded to in convolutions of cuDNN."""
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    yield lambda name: setattr(switch, "fp32_precision", name)
    torch.backends.cudnn.allow_tf32 = True  # as it is by default
    switch.fp32_precision = before


def test_tf32_follows_the_switches_of_torch(precision: Callable[[str], None]) -> None:
    for value in (True, False):
        torch.backends.cudnn.allow_tf32 = value
        assert conv_cuda.tf32(torch.float32) == value
    for name in ("tf32", "ieee"):
        precision(name)
        assert conv_cuda.tf32(torch.float32) == (name == "tf32")
        assert not conv_cuda.tf32(torch.bfloat16)


def test_times_are_taken_in_turns_after_a_warm_up_without_what_is_done_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    clock = 0.0

    def work(name: str, milliseconds: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal clock
            clock += milliseconds * (100 if len(log) < 4 else 1)  # a cold start
            log.append(name)

        return call

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Flush:
        zero_ = staticmethod(work("flush", 7))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(conv_cuda, "_l2_bytes", lambda device: 5)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Flush)
    times = conv_cuda.seconds({"a": work("a", 2), "b": work("b", 3)}, fresh=work("fresh", 11))
    assert {name: {round(s, 9) for s in values} for name, values in times.items()} == {
        "a": {0.002},
        "b": {0.003},
    }
    assert {len(values) for values in times.values()} == {conv_cuda.ROUNDS}
    turn = [*["flush"] * conv_cuda.FLUSHES, "fresh"]
    assert log == [*turn, "a", *turn, "b"] * (conv_cuda.ROUNDS + 2)


# -- the candidates, with kernels that run on the CPU ------------------------------------------

SHAPES = [
    (3, 16, 24, 6, 5, 3, 1, 1),
    (1, 64, 64, 8, 8, 3, 1, 1),
    (2, 3, 64, 9, 7, 3, 1, 1),
    (5, 24, 60, 7, 7, 1, 2, 0),
    (1, 250, 120, 4, 4, 3, 2, 1),
    (2, 8, 10, 5, 6, 5, 1, 2),
]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The real candidates, with our operators on the CPU, and cuDNN's; yields what was called."""
    if extension.CUDA_MISSING is not None:
        pytest.skip(f"no CUDA kernels: {extension.CUDA_MISSING}")
    called = set()
    library = torch.library.Library("resfast", "IMPL")

    def ours(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        tile, splits, tf32 = rest[-3:]
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert tile in range(8)
        assert splits >= 1
        assert tf32 is False
        called.add("ours")
        return conv_reference.conv2d_bias_act(x, weight, *rest[:-3])

    def epilogue(
        out: Tensor, bias: Tensor | None, residual: Tensor | None, name: str, slope: float
    ) -> Tensor:
        assert out.is_contiguous(memory_format=torch.channels_last)
        called.add("epilogue")
        value = out.float() + (0 if bias is None else bias[:, None, None])
        value = value + (0 if residual is None else residual)
        return out.copy_(conv_reference.ACTIVATIONS[name](value, slope))

    def fused(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        *z, bias, stride, padding, dilation, groups = rest
        assert bias.dtype == x.dtype
        assert z[1:] == [1.0][: len(z) // 2]
        called.add("cudnn")
        residual = z[0] if z else None
        args = x, weight, bias, residual, stride, padding, "relu", 0, groups, dilation
        return conv_reference.conv2d_bias_act(*args)

    library.impl("conv2d_cuda", ours, "CPU")
    library.impl("conv2d_epilogue_", epilogue, "CPU")
    if hasattr(torch.ops.resfast, "conv2d_hopper"):

        def hopper(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
            called.add("hopper")
            return conv_reference.conv2d_bias_act(x, weight, *rest[:-1])

        library.impl("conv2d_hopper", hopper, "CPU")
    stand_in_for_a_gpu(monkeypatch)
    monkeypatch.setattr(conv_cuda, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(conv_cuda, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", fused)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    yield called
    library._destroy()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_gets_the_arguments_that_it_takes(
    emulated: set[str], dtype: torch.dtype, activation: str
) -> None:
    torch.manual_seed(0)
    for i, shape in enumerate(SHAPES):
        bias, residual = i % 2 == 0, i % 3 == 0
        args = arguments(shape, dtype=dtype, activation=activation, bias=bias, residual=residual)
        candidates = conv_cuda._candidates(args)
        kinds = [name.partition(":")[0] for name in candidates]
        assert kinds[0] == "ours"
        assert kinds[-2:] == ["cudnn", "torch"]
        for name, candidate in candidates.items():
            assert candidate.name == name
            assert_right(conv_cuda._call(candidate, args)(), args)
    assert "ours" in emulated
    assert ("cudnn" if activation == "relu" else "epilogue") in emulated
    if hasattr(torch.ops.resfast, "conv2d_hopper") and dtype != torch.float32:
        assert "hopper" in emulated


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "hardswish"])
@pytest.mark.parametrize(
    ("groups", "dilation"), [(4, 1), (16, 1), (1, 2), (8, 2)], ids=lambda value: str(value)
)
def test_groups_and_dilation_are_left_to_cudnn_and_torch(
    emulated: set[str], activation: str, groups: int, dilation: int
) -> None:
    for shape in (
        (2, 16, 32, 7, 9, 3, 1, 1),
        (1, 16, 16, 8, 8, 3, 2, 2),
        (2, 16, 48, 5, 5, 1, 1, 0),
    ):
        for bias, residual in ((True, False), (False, True)):
            args = arguments(
                shape,
                activation=activation,
                bias=bias,
                residual=residual,
                groups=groups,
                dilation=dilation,
            )
            candidates = conv_cuda._candidates(args)
            assert list(candidates) == ["cudnn", "torch"]
            for candidate in candidates.values():
                assert_right(conv_cuda._call(candidate, args)(), args)


def test_groups_and_dilations_have_choices_of_their_own(fake: Fake, cache: Path) -> None:
    shape = (2, 16, 32, 9, 9, 3, 1, 2)
    for groups, dilation in ((1, 1), (1, 2), (4, 1), (4, 2)):
        assert chosen(arguments(shape, groups=groups, dilation=dilation)) == "ours:0,2"
    assert len(fake.measured) == len(json.loads(cache.read_text())) == 4


@pytest.mark.parametrize("named", ["ours", "cudnn", "torch"])
def test_plan_and_operator_take_any_strides(
    emulated: set[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESFAST_CONV", named)
    monkeypatch.setattr(conv_cuda, "seconds", lambda calls, fresh: {name: [1.0] for name in calls})
    torch.manual_seed(0)
    for residual in (False, True):
        args = list(arguments(residual=residual))
        args[:2] = args[0].contiguous(), args[1].contiguous()
        args[3] = args[3].contiguous() if residual else None
        out = conv_cuda.conv2d_bias_act(*args)
        assert_right(out, tuple(args))
        plan = conv_cuda.plan(*args)
        assert plan.algorithm.partition(":")[0] == named
        assert torch.equal(plan.run(args[0], args[3]), out)
        assert plan.shape == out.shape


def test_kernels_are_left_out_where_the_gpu_is_too_old_or_they_were_not_built(
    emulated: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_cuda, "_capability", lambda device: (7, 5))
    assert list(conv_cuda._candidates(arguments())) == ["cudnn", "torch"]
    assert list(conv_cuda._candidates(arguments(activation="silu"))) == ["torch"]
    monkeypatch.setattr(conv_cuda, "_capability", lambda device: (8, 6))
    kinds = {name.partition(":")[0] for name in conv_cuda._candidates(arguments())}
    assert kinds == {"ours", "cudnn", "torch"}
    monkeypatch.setattr(conv_cuda, "_built", lambda name: False)
    assert list(conv_cuda._candidates(arguments())) == ["cudnn", "torch"]
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert list(conv_cuda._candidates(arguments())) == ["torch"]


def test_convolution_beyond_the_positions_of_our_kernel_is_left_to_others(
    emulated: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.empty(1, 8, 1, 1, dtype=torch.bfloat16).expand(1 << 15, 8, 512, 512)
    weight = torch.zeros(8, 8, 1, 1, dtype=torch.bfloat16)
    args = (x, weight, None, None, [1, 1], [0, 0], "relu", 0.01, 1, (1, 1))
    with caplog.at_level(logging.WARNING, "resfast"):
        assert "cudnn" in conv_cuda._candidates(args)
    assert "too large for the CUDA kernel's 32-bit positions" in caplog.text


# -- on a GPU --------------------------------------------------------------------------------------

ON_GPU = [
    *SHAPES,
    (64, 64, 64, 32, 32, 3, 1, 1),
    (3, 96, 128, 9, 11, 3, 2, 1),
    (64, 256, 512, 4, 4, 3, 1, 1),
    (1, 512, 512, 4, 4, 3, 1, 1),
    (3, 60, 250, 13, 5, 1, 1, 0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ON_GPU, ids=str)
@pytest.mark.parametrize("kind", ["tf32", "ieee", "bfloat16", "float16"])
def test_every_way_is_right_on_the_gpu(
    kind: str, shape: tuple[int, ...], precision: Callable[[str], None]
) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, kind, torch.float32)
    if dtype == torch.float32:
        precision(kind)
        assert conv_cuda.tf32(dtype) == (kind == "tf32")
    for i, activation in enumerate(ACTIVATIONS):
        for residual in (False, True):
            bias = i % 2 == residual
            args = arguments(
                shape, dtype=dtype, activation=activation, residual=residual, bias=bias,
                device="cuda",
            )  # fmt: skip
            for candidate in conv_cuda._candidates(args).values():
                assert_right(conv_cuda._call(candidate, args)(), args)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_choice_is_made_kept_and_right_on_the_gpu(activation: str, cache: Path) -> None:
    args = arguments((8, 64, 128, 16, 16, 3, 1, 1), activation=activation, device="cuda")
    x, weight, bias, residual = args[:4]
    rest = {"activation": activation, "negative_slope": 0.125, "padding": 1}
    module = ConvBiasAct(weight.contiguous(), bias, **rest)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert_right(module(x, residual), args)
    ((key, name),) = json.loads(cache.read_text()).items() if cache.exists() else ((None, None),)
    assert key is None or (
        name in conv_cuda._candidates(args) and torch.cuda.get_device_name() in key
    )
    assert_right(conv2d_bias_act(x, weight, bias, residual, **rest), args)
    assert_right(torch.compile(module)(x, residual), args)


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_cuda_graph_replays_the_convolution(warm: bool, activation: str, cache: Path) -> None:
    args = arguments((2, 64, 64, 8, 8, 3, 1, 1), activation=activation, device="cuda")
    x, weight, bias, residual = args[:4]
    module = ConvBiasAct(weight, bias, padding=1, activation=activation)
    if warm:
        module(x, residual)
        torch.cuda.synchronize()
    graph, still = torch.cuda.CUDAGraph(), x.clone()
    with torch.inference_mode(), torch.cuda.graph(graph):
        captured = module(still, residual)
    assert cache.exists() <= warm  # nothing was measured within the capture
    for value in (torch.randn_like(x), x):
        still.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_right(captured, (value, *args[1:]))


@pytest.mark.gpu
@pytest.mark.parametrize("named", ["ours", "cudnn", "torch"])
def test_convolution_runs_in_the_current_stream(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESFAST_CONV", named)
    args = arguments((64, 64, 64, 32, 32, 3, 1, 1), residual=False, device="cuda")
    module = ConvBiasAct(args[1], args[2], padding=1, activation="relu")
    module(args[0])
    for _ in range(5):
        x, stream = torch.zeros_like(args[0]), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # what the convolution must wait for, in its stream
            x.copy_(args[0])
            out = module(x)
        stream.synchronize()
        assert_right(out, args)


@pytest.mark.gpu
def test_views_that_begin_anywhere_are_right_on_the_gpu() -> None:
    args = arguments((2, 64, 64, 9, 9, 3, 1, 1), residual=False, device="cuda")
    whole = torch.randn(2 * 64 * 81 + 3, device="cuda", dtype=args[0].dtype)
    module = ConvBiasAct(args[1], args[2], padding=1, activation="relu")
    for start in (0, 1, 3):
        x = whole[start : start + 2 * 64 * 81].view(2, 9, 9, 64).permute(0, 3, 1, 2)
        assert_right(module(x), (x, *args[1:]))
    wide = torch.randn(2, 96, 20, 20, device="cuda", dtype=args[0].dtype)
    x = wide[:, 5:69, 1:19:2, 2::2]
    assert_right(module(x), (x, *args[1:]))


@pytest.mark.gpu
def test_wrong_device_is_named() -> None:
    args = arguments(device="cuda")
    module = ConvBiasAct(args[1], args[2], padding=1)
    with pytest.raises(ValueError, match="weight is on cuda:0; expected cpu, like x"):
        module(args[0].cpu())
    with pytest.raises(ValueError, match="residual is on cpu; expected cuda:0, like x"):
        module(args[0], args[3].cpu())
    with pytest.raises(RuntimeError, match="x requires grad"):
        module(args[0].requires_grad_())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_computes_what_is_on_it() -> None:
    args = arguments((4, 64, 64, 8, 8, 3, 1, 1), device="cuda:1")
    module = ConvBiasAct(args[1], args[2], padding=1, activation="relu")
    with torch.cuda.device(0):
        out = module(args[0], args[3])
    assert out.device == torch.device("cuda:1")
    assert_right(out, args)
