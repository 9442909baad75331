"""The CUDA convolution, tested without a GPU.

The kernel's source is compiled for the host (tests/cuda_on_host), where it runs one thread block
after the other under the address and undefined-behaviour sanitizers, and its results are compared
with a float64 convolution. If the CUDA compiler is installed, the real kernels are compiled too.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resfast.ops import extension
from resfast.ops.conv import op as conv
from resfast.ops.conv import reference as conv_reference
from tests.compiled import ROOT, compile_once, cuda_build

ON_HOST = ROOT / "tests" / "cuda_on_host"
"""Programs that run the CUDA kernels on the CPU, and the GPU primitives written in plain C++."""

TYPES = ("bf16", "fp16", "fp32", "tf32")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float32)
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu")
EPILOGUE_ONLY = -1
"""In the place of a tile, as in csrc/cuda/conv/conv_plan.h."""
FLAGS = [
    *"-std=c++17 -O1 -g1 -Wall -Wextra -fsanitize=address,undefined".split(),
    "-fno-sanitize-recover=all",
    "-DRESFAST_ON_HOST",
    f"-I{ON_HOST.parent}",
]


def host_program(name: str, *others: str) -> Path:
    """A program of tests/cuda_on_host, compiled with the sanitizers from the files named."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    sources = [ON_HOST / f"{stem}.cpp" for stem in (name, *others)]
    command = [compiler, *FLAGS, *map(str, sources)]
    return compile_once(name, command, sources, list(ON_HOST.glob("*.h")))


@pytest.fixture(scope="session")
def host_kernels() -> Path:
    """The program that runs the kernels on the host."""
    return host_program("conv", "run_block")


@dataclass(frozen=True)
class Case:
    """A convolution in the order of the fields that tests/cuda_on_host/conv.cpp reads."""

    type: int
    tile: int
    splits: int
    aligned: int
    order: int
    activation: int
    thousandths_of_slope: int
    has_bias: int
    has_residual: int
    batch: int
    height: int
    width: int
    channels: int
    filters: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    padding_h: int = 0
    padding_w: int = 0

    @property
    def out(self) -> tuple[int, int]:
        return (
            (self.height + 2 * self.padding_h - self.kernel_h) // self.stride_h + 1,
            (self.width + 2 * self.padding_w - self.kernel_w) // self.stride_w + 1,
        )


def as_tf32(value: torch.Tensor) -> torch.Tensor:
    """float32 with 10 bits of mantissa, ties away from zero."""
    return ((value.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def check(program: Path, folder: Path, cases: list[Case]) -> None:
    """Runs the cases with random values; every output must be written and right."""
    seed = torch.seed() % 2**31
    random = torch.Generator().manual_seed(seed)
    values, written = [], []
    for case in cases:
        dtype = DTYPES[case.type]
        depth = case.kernel_h * case.kernel_w * case.channels
        x = torch.randn(case.batch, case.height, case.width, case.channels, generator=random)
        weight = torch.randn(
            case.filters, case.kernel_h, case.kernel_w, case.channels, generator=random
        )
        bias = torch.randn(case.filters, generator=random)
        residual = torch.randn(case.batch, *case.out, case.filters, generator=random)
        if case.tile == EPILOGUE_ONLY:
            weight = torch.eye(case.filters).view_as(weight) * depth**0.5
        x, weight, residual = x.to(dtype), (weight / depth**0.5).to(dtype), residual.to(dtype)
        values.append((x, weight, bias, residual))
        header = torch.tensor([*astuple(case), *case.out], dtype=torch.int32)
        parts = [header, x, weight]
        parts += [bias] * case.has_bias + [residual] * case.has_residual
        written += [raw(part) for part in parts]
    (folder / "cases").write_bytes(b"".join(written))
    done = subprocess.run(
        [str(program), str(folder / "cases"), str(folder / "outputs")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{cases}\n{done.stderr}"

    found, start = (folder / "outputs").read_bytes(), 0
    for case, (x, weight, bias, residual) in zip(cases, values, strict=True):
        dtype, size = DTYPES[case.type], residual.numel() * residual.element_size()
        y = torch.frombuffer(bytearray(found[start : start + size]), dtype=dtype)
        start += size
        if case.type == 3:
            x, weight = as_tf32(x), as_tf32(weight)
        x, weight = (tensor.double().permute(0, 3, 1, 2) for tensor in (x, weight))
        geometry = {
            "stride": (case.stride_h, case.stride_w),
            "padding": (case.padding_h, case.padding_w),
        }
        exact = F.conv2d(x, weight, **geometry)
        magnitude = F.conv2d(x.abs(), weight.abs(), **geometry)
        if case.has_bias:
            exact, magnitude = (
                sums + one.double()[:, None, None]
                for sums, one in ((exact, bias), (magnitude, bias.abs()))
            )
        if case.has_residual:
            added = residual.double().permute(0, 3, 1, 2)
            exact, magnitude = exact + added, magnitude + added.abs()
        slope = torch.tensor(case.thousandths_of_slope / 1000).item()  # as a float32 holds it
        exact = conv_reference.ACTIVATIONS[ACTIVATIONS[case.activation]](exact, slope)
        # float32 sums, then the rounding of the result.
        bound = 2.0**-19 * magnitude + 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7
        error = (y.view(residual.shape).permute(0, 3, 1, 2).double() - exact).abs()
        assert bool((error <= bound).all()), (
            f"{case}, seed {seed}: error {error.max():.3g}, "
            f"{int((~(error <= bound)).sum())} of {error.numel()} values beyond the bound"
        )
    assert start == len(found)


# N, H, W, C, K, R, S, stride, padding: every way for a tile to be ragged.
ALIGNED = [
    (1, 5, 7, 8, 8, 3, 3, 1, 1),
    (3, 4, 4, 16, 24, 1, 1, 1, 0),
    (3, 9, 5, 24, 60, 3, 3, 2, 1),
    (1, 8, 8, 64, 96, 3, 3, 1, 1),
    (3, 7, 7, 96, 16, 1, 1, 2, 0),
    (1, 6, 11, 16, 72, 5, 5, 1, 2),
    (1, 1, 1, 64, 130, 1, 1, 1, 0),
    (2, 16, 9, 8, 64, 7, 7, 2, 3),
]
UNALIGNED = [
    (1, 9, 7, 3, 64, 3, 3, 1, 1),
    (3, 5, 5, 60, 10, 3, 3, 2, 1),
    (2, 6, 4, 3, 16, 7, 7, 2, 3),
    (1, 11, 6, 1, 24, 5, 5, 1, 2),
    (3, 3, 3, 24, 60, 1, 1, 1, 0),  # aligned sizes are right on the slow path too
]


def make_case(
    type_: int,
    tile: int,
    aligned: int,
    shape: tuple[int, ...],
    *,
    splits: int = 1,
    order: int = 0,
    activation: int = 0,
    slope: int = 10,
    bias: int = 0,
    residual: int = 0,
) -> Case:
    """A case of the shape N, H, W, C, K, R, S, stride, padding."""
    *sizes, stride, padding = shape
    options = (splits, int(aligned), order, activation, slope, bias, residual)
    return Case(type_, tile, *options, *sizes, stride, stride, padding, padding)


def grid(type_: int, tile: int, aligned: bool) -> list[Case]:
    """The shapes, with activation, bias, residual and order of execution varied along them."""
    result = []
    for i, shape in enumerate(ALIGNED if aligned else UNALIGNED):
        j = i + type_ + tile
        options = {"activation": j % 4, "slope": (10, 100, -500)[j // 4 % 3]}
        options |= {"bias": j // 2 % 2, "residual": (j // 3 + i) % 2}
        result.append(make_case(type_, tile, aligned, shape, order=j, **options))
    return result


def has_tile(type_: int, tile: int, aligned: bool) -> bool:
    """`has_tile` of csrc/cuda/conv/conv_plan.h."""
    if not aligned:
        return tile in (2, 4)
    return type_ < 2 or tile in (2, 4, 6)


VARIANTS = [
    pytest.param(type_, tile, aligned, id=f"{name}-{tile}-{'vectors' if aligned else 'values'}")
    for type_, name in enumerate(TYPES)
    for tile in range(8)
    for aligned in (True, False)
    if has_tile(type_, tile, aligned)
]


@pytest.mark.parametrize(("type_", "tile", "aligned"), VARIANTS)
def test_every_tile_shape_equals_a_float64_convolution(
    host_kernels, tmp_path, type_, tile, aligned
):
    check(host_kernels, tmp_path, grid(type_, tile, aligned))


@pytest.mark.parametrize("channels", [3, 8, 16, 24, 60, 64, 96])
@pytest.mark.parametrize("type_", range(4), ids=TYPES)
def test_any_number_of_channels_is_right(host_kernels, tmp_path, type_, channels):
    """In and out; with 16-byte loads where the channels allow it."""
    aligned = channels % (8 if type_ < 2 else 4) == 0
    options = {"activation": 1, "bias": 1, "residual": 1}
    cases = []
    for batch, filters, kernel, stride in (
        (1, channels, 3, 1),
        (3, 96, 1, 2),
        (1, 60, 5, 2),
        (3, 3, 3, 1),
    ):
        shape = (batch, 5, 6, channels, filters, kernel, kernel, stride, kernel // 2)
        cases.append(make_case(type_, 4, aligned, shape, order=len(cases), **options))
    check(host_kernels, tmp_path, cases)


@pytest.mark.parametrize("type_", range(4), ids=TYPES)
def test_every_combination_of_bias_residual_and_activation_is_right(host_kernels, tmp_path, type_):
    cases = []
    activations = (*((activation, 10) for activation in range(5)), (2, 100))
    for (activation, slope), bias, residual in itertools.product(activations, (0, 1), (0, 1)):
        options = {"activation": activation, "slope": slope, "bias": bias, "residual": residual}
        for filters, splits in ((24, 1), (26, 1), (26, 2)):
            shape = (1, 6, 5, 16, filters, 3, 3, 1, 1)
            cases.append(make_case(type_, 6, True, shape, splits=splits, **options))
    check(host_kernels, tmp_path, cases)


@pytest.mark.parametrize(("type_", "tile", "aligned"), VARIANTS)
def test_a_split_reduction_is_right(host_kernels, tmp_path, type_, tile, aligned):
    """As many splits as there are stages, a few, and a last one that is shorter."""
    value_bytes = 2 if type_ < 2 else 4
    stage = (8 if tile in (4, 6, 7) else 4) * 16 // value_bytes
    channels = 40 if aligned else 39
    blocks = -(-9 * channels // stage)
    counts = {-(-blocks // -(-blocks // wanted)) for wanted in (2, 3, 4, blocks)} - {1}
    cases = []
    for i, splits in enumerate(sorted(counts)):
        shape = (2, 5, 4, channels, (24, 23)[i % 2], 3, 3, 1, 1)
        options = {"activation": i % 4, "bias": 1, "residual": i % 2}
        cases.append(make_case(type_, tile, aligned, shape, splits=splits, order=i, **options))
    check(host_kernels, tmp_path, cases)


def test_stride_and_padding_of_rows_and_columns_are_not_mixed_up(host_kernels, tmp_path):
    cases = [
        Case(0, tile, 1, aligned, 0, 0, 0, 0, 0, 2, 9, 6, channels, 16, *kernel, *stride, *padding)
        for tile, aligned, channels in ((2, 1, 16), (4, 0, 5))
        for kernel, stride, padding in (
            ((3, 1), (1, 2), (1, 0)),
            ((1, 5), (3, 1), (0, 2)),
            ((2, 4), (2, 3), (4, 1)),  # more padding than kernel: rows of zeros
        )
    ]
    check(host_kernels, tmp_path, cases)


@pytest.mark.parametrize("type_", range(3), ids=TYPES[:3])
def test_epilogue_alone_finishes_what_another_convolution_left(host_kernels, tmp_path, type_):
    """x is that convolution's result: as if a 1x1 kernel had multiplied by one."""
    cases = []
    for i, filters in enumerate((8, 24, 10, 3, 130)):
        shape = (2, 5, 3, filters, filters, 1, 1, 1, 0)
        for activation, bias, residual in ((i % 4, 1, 1), (2, i % 2, 0), (0, 0, 1), (3, 0, 0)):
            options = {"activation": activation, "slope": 100, "bias": bias, "residual": residual}
            cases.append(make_case(type_, EPILOGUE_ONLY, True, shape, splits=0, order=i, **options))
    check(host_kernels, tmp_path, cases)


def candidates(program: Path, folder: Path, case: Case, processors: int) -> list[tuple[int, int]]:
    header = torch.tensor([*astuple(case), *case.out], dtype=torch.int32)
    (folder / "cases").write_bytes(raw(header))
    subprocess.run(
        [str(program), str(folder / "cases"), str(folder / "outputs"), str(processors)], check=True
    )
    numbers = torch.frombuffer(bytearray((folder / "outputs").read_bytes()), dtype=torch.int32)
    assert len(numbers) == 1 + 2 * int(numbers[0])
    return [tuple(pair) for pair in numbers[1:].view(-1, 2).tolist()]


SHAPES = ((256, 64), (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 64), (16, 64))


@pytest.mark.parametrize("batch", [1, 8, 64, 512, 2048])
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (64, 32), (128, 16), (256, 8), (512, 4)])
@pytest.mark.parametrize("type_", range(3), ids=TYPES[:3])
def test_tile_shapes_are_chosen_that_exist_and_fill_the_chip(
    host_kernels, tmp_path, type_, channels, side, batch
):
    vector = 8 if type_ < 2 else 4
    aligned, filters = channels % vector == 0, max(channels, 64)
    case = make_case(type_, 0, aligned, (batch, side, side, channels, filters, 3, 3, 1, 1))
    found = candidates(host_kernels, tmp_path, case, 132)
    assert len(set(found)) == len(found) > 0
    assert all(has_tile(type_, tile, aligned) for tile, _ in found)
    (tile, splits), pixels = found[0], batch * side * side
    height, width = SHAPES[tile]
    blocks = -(-pixels // height) * -(-filters // width) * splits
    if aligned:  # no multiprocessor is left out where tiles of 32x64 can be had for half of them
        assert blocks >= min(66, -(-pixels // 32) * -(-filters // 64))
    if batch >= 512:
        assert splits == 1


# -- the real kernels ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def compiled() -> dict[str, str]:
    """The output of ptxas for the kernels in csrc/cuda/conv, by path of the object.

    The installation compiles the same objects, where it sees no GPU: they are not compiled again.
    """
    reason = cuda_build.obstacle()
    if reason is not None:
        pytest.skip(reason)
    sources = sorted((ROOT / "csrc" / "cuda" / "conv").glob("*.cu"))
    return cuda_build.compile_objects(
        sources, nvcc=cuda_build.find_nvcc(), names=cuda_build.ARCHITECTURES
    )


needs_cuda_kernels = pytest.mark.skipif(
    extension.CUDA_MISSING is not None, reason=f"no CUDA kernels: {extension.CUDA_MISSING}"
)


def test_architectures_are_named_as_for_torch():
    assert cuda_build.architecture_flags("8.0;9.0a 9.0+PTX") == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_90,code=sm_90"),
        *("-gencode", "arch=compute_90,code=compute_90"),
    ]
    for name in ("7.5", "Hopper", "8.0;sm_90"):
        with pytest.raises(ValueError, match=r"expected 8\.0 or newer"):
            cuda_build.architecture_flags(name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cuda_kernels_compile_without_register_spills(compiled):
    kernels = re.findall(
        r"entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        "".join(compiled.values()),
        re.DOTALL,
    )
    ours = [kernel for kernel in kernels if "resfast" in kernel[0]]
    variants = len(VARIANTS) + len(TYPES)  # and the second kernel of a split reduction
    for architecture in ("sm_80", "sm_90a"):
        assert sum(kernel[1] == architecture for kernel in ours) == variants
    spilled = [kernel for kernel in ours if int(kernel[2]) or int(kernel[3])]
    assert not spilled
    # Threads of every tile times registers: two blocks fit on a multiprocessor.
    assert max(int(kernel[4]) for kernel in ours) * 128 * 2 <= 65536


GOOD = {
    "x": torch.zeros(2, 8, 5, 6),
    "weight": torch.zeros(4, 8, 3, 3),
    "bias": torch.zeros(4),
    "residual": torch.zeros(2, 4, 5, 6),
    "stride": [1, 1],
    "padding": [1, 1],
    "activation": "relu",
    "negative_slope": 0.01,
}
BAD = [
    {"x": torch.zeros(2, 8, 5, 6, dtype=torch.float64)},
    {"weight": torch.zeros(4, 8, 3, 3, dtype=torch.bfloat16)},
    {"bias": torch.zeros(4, dtype=torch.float16)},
    {"residual": torch.zeros(2, 4, 5, 6, dtype=torch.float16)},
    {"x": torch.zeros(8, 5, 6)},
    {"weight": torch.zeros(4, 8, 3)},
    {"weight": torch.zeros(4, 0, 3, 3)},
    {"weight": torch.zeros(4, 4, 3, 3)},
    {"stride": [1, 0]},
    {"padding": [-1, 1]},
    {"negative_slope": float("nan")},
    {"weight": torch.zeros(4, 8, 9, 9)},
    {"bias": torch.zeros(5)},
    {"bias": torch.zeros(4, 1)},
    {"residual": torch.zeros(2, 4, 6, 5)},
]


def call_cuda_kernel(**arguments: object) -> None:
    """With tensors of the CPU, whose device is what the kernel checks last."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operator = torch.ops.resfast.conv2d_cuda.default
    operator.redispatch(cuda, *{**GOOD, **arguments}.values(), 2, 1, False)


@needs_cuda_kernels
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: next(iter(bad)))
def test_cuda_kernel_refuses_wrong_arguments_with_the_words_of_the_python_check(bad):
    with pytest.raises((TypeError, ValueError)) as expected:
        conv.check_arguments(*{**GOOD, **bad}.values())
    with pytest.raises(RuntimeError) as found:
        call_cuda_kernel(**bad)
    assert str(found.value).splitlines()[0] == str(expected.value)


@needs_cuda_kernels
def test_cuda_kernel_refuses_tensors_of_the_cpu():
    with pytest.raises(RuntimeError, match="x is not on a CUDA device"):
        call_cuda_kernel()


@needs_cuda_kernels
def test_library_names_what_it_was_built_for():
    folder = Path(extension.__file__).parents[1]
    facts = json.loads((folder / "_CUDA.json").read_text())
    assert set(facts) == {"architectures", "cutlass", "nvcc", "torch"}
    assert cuda_build.architecture_flags(";".join(facts["architectures"]))
    hopper = hasattr(torch.ops.resfast, "conv2d_hopper")
    assert facts["cutlass"] == hopper


@pytest.mark.gpu
@needs_cuda_kernels
@pytest.mark.parametrize("index", range(len(ALIGNED) + len(UNALIGNED) + 2))
@pytest.mark.parametrize("type_", range(4), ids=TYPES)
def test_every_tile_shape_is_right_on_the_gpu(type_, index):
    """Every candidate, each in a stream of its own."""
    larger = [(8, 32, 32, 64, 64, 3, 3, 1, 1), (2, 8, 8, 256, 512, 3, 3, 2, 1)]
    n, h, w, c, k, r, s, stride, padding = [*ALIGNED, *UNALIGNED, *larger][index]
    dtype, tf32, name = DTYPES[type_], type_ == 3, ACTIVATIONS[index % 5]
    on_gpu = {"device": "cuda", "dtype": dtype, "memory_format": torch.channels_last}
    x = torch.randn(n, c, h, w).to(**on_gpu)
    weight = (torch.randn(k, c, r, s) / (c * r * s) ** 0.5).to(**on_gpu)
    bias = torch.randn(k, device="cuda")
    exact_x, exact_weight = (as_tf32(x), as_tf32(weight)) if tf32 else (x, weight)
    geometry = {"stride": stride, "padding": padding}
    parts = exact_x.double().cpu(), exact_weight.double().cpu()
    sums = F.conv2d(*parts, **geometry)
    residual = torch.randn(sums.shape).to(**on_gpu)
    magnitude = F.conv2d(parts[0].abs(), parts[1].abs(), **geometry)
    for tensor in (bias[:, None, None], residual):
        sums, magnitude = sums + tensor.double().cpu(), magnitude + tensor.double().abs().cpu()
    exact = conv_reference.ACTIVATIONS[name](sums, 0.125)
    # Tensor cores cut off what they add.
    bound = 2.0**-16 * magnitude + 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7
    pairs = [stride, stride], [padding, padding]
    flat = torch.ops.resfast.conv2d_cuda_candidates(x, weight, *pairs, 132)
    assert len(flat) >= 4
    for tile, splits in zip(flat[::2], flat[1::2], strict=True):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = torch.ops.resfast.conv2d_cuda(
                x, weight, bias, residual, *pairs, name, 0.125, tile, splits, tf32
            )
        stream.synchronize()
        assert y.is_contiguous(memory_format=torch.channels_last)
        error = (y.double().cpu() - exact).abs()
        assert bool((error <= bound).all()), (tile, splits, float(error.max()))
