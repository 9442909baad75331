"""The convolution for Hopper (csrc/cuda/conv_hopper/hopper.cuh), tested without a GPU.

CUTLASS's own code builds tensor maps, coordinates and layouts on the host; loads and sums are done
there as the hardware does them (tests/cuda_on_host/hopper.cpp), and compared with a float64
convolution. The real kernels are compiled and inspected; on a GPU of compute capability 9.0 they
run too.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resfast.ops import extension
from resfast.ops.conv import op as conv
from resfast.ops.conv import reference as conv_reference
from tests.compiled import compile_once
from tests.ops.test_conv_cuda_source import ACTIVATIONS, BAD, GOOD, ON_HOST, ROOT, cuda_build

CONFIGS = 8
CHANNELS_LAST = torch.channels_last


def compile_objects(*sources: Path) -> dict[str, str]:
    """The compiler's output, by path of the object. The installation makes the same objects."""
    reason = cuda_build.obstacle()
    if reason is not None:
        pytest.skip(reason)
    if cuda_build.find_cutlass() is None:
        pytest.skip(f"CUTLASS: {cuda_build.NO_CUTLASS}")
    return cuda_build.compile_objects(sources, nvcc=cuda_build.find_nvcc(), names="9.0a")


@pytest.fixture(scope="session")
def compiled() -> dict[str, str]:
    return compile_objects(*sorted((ROOT / "csrc" / "cuda" / "conv_hopper").glob("*.cu")))


@pytest.fixture(scope="session")
def operators(request, tmp_path_factory) -> Path:
    """The library with the operators, loaded: the installed one, or one for this session."""
    if hasattr(torch.ops.resfast, "conv2d_hopper"):
        return Path(extension.__file__).parents[1] / "_CUDA.so"
    library = tmp_path_factory.mktemp("hopper") / "hopper.so"
    objects = request.getfixturevalue("compiled")
    cuda_build.link(objects, library, nvcc=cuda_build.find_nvcc())
    torch.ops.load_library(library)
    return library


def headers_of_cuda() -> list[Path]:
    """Folders with the headers of CUDA's runtime and of its C++ library, torch's or nvcc's."""
    nvcc = cuda_build.find_nvcc()
    roots = [*cuda_build._pip_toolkits(), *([] if nvcc is None else [cuda_build._toolkit(nvcc)])]
    folders = [folder for root in roots for folder in (root / "include", root / "include/cccl")]
    return [folder for folder in folders if folder.exists()]


@pytest.fixture(scope="session")
def on_host() -> ctypes.CDLL:
    """tests/cuda_on_host/hopper.cpp, by the C++ compiler: nvcc would take three times as long."""
    compiler, cutlass, cuda = shutil.which("g++"), cuda_build.find_cutlass(), headers_of_cuda()
    if compiler is None:
        pytest.skip("g++ is not installed")
    if cutlass is None:
        pytest.skip(f"CUTLASS: {cuda_build.NO_CUTLASS}")
    if not any((folder / "cuda_runtime.h").exists() for folder in cuda):
        pytest.skip("the headers of CUDA are not installed")
    source = ON_HOST / "hopper.cpp"
    flags = "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -fpermissive -w -DNDEBUG".split()
    for folder in (cutlass / "include", cutlass / "tools/util/include", *cuda):
        flags += ["-isystem", str(folder)]
    version = cutlass / "include" / "cutlass" / "version.h"
    library = compile_once("hopper.so", [compiler, *flags, str(source)], [source], [version])
    loaded = ctypes.CDLL(str(library))
    loaded.convolve_on_host.restype = ctypes.c_char_p
    return loaded


class Case:
    """Random arguments of the shape N, H, W, C, K, R, S, stride and padding in H and W."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        *,
        bias: bool = True,
        residual: bool = True,
    ) -> None:
        n, h, w, c, k, r, s, *geometry = self.shape = shape
        self.stride, self.padding = geometry[:2], geometry[2:]
        like = {"dtype": dtype, "memory_format": CHANNELS_LAST}
        self.x = torch.randn(n, c, h, w).to(**like)
        self.weight = (torch.randn(k, c, r, s) / (c * r * s) ** 0.5).to(**like)
        sides = conv_reference.output_shape(self.x, self.weight, self.stride, self.padding)
        self.bias = torch.randn(k) if bias else None
        self.residual = torch.randn(sides).to(**like) if residual else None

    def check(self, y: torch.Tensor, activation: str, slope: float, unit: float) -> None:
        """Every value must be right, up to rounding of sums to ``unit`` and of the result."""
        exact, magnitude = (
            F.conv2d(f(self.x.double()), f(self.weight.double()), None, self.stride, self.padding)
            for f in (lambda t: t, torch.abs)
        )
        for tensor in (self.bias if self.bias is None else self.bias[:, None, None], self.residual):
            if tensor is not None:
                exact, magnitude = exact + tensor.double(), magnitude + tensor.double().abs()
        exact = conv_reference.ACTIVATIONS[activation](exact, slope)
        bound = unit * magnitude + 0.51 * torch.finfo(y.dtype).eps * exact.abs() + 1e-7
        error = (y.double().cpu() - exact).abs()
        wrong = int((~(error <= bound)).sum())
        assert wrong == 0, f"{self.shape}, {activation}: {wrong} of {error.numel()}, {error.max()}"


# N, H, W, C, K, R, S, stride, padding: tiles ragged in every direction.
SHAPES = [
    (3, 5, 7, 72, 40, 3, 3, 1, 1, 1, 1),
    (2, 9, 8, 8, 136, 3, 3, 2, 2, 1, 1),  # fewer channels than a step
    (5, 7, 6, 64, 72, 1, 1, 2, 2, 0, 0),
    (3, 9, 10, 136, 264, 1, 1, 1, 1, 0, 0),  # more pixels and filters than a tile
    (2, 9, 12, 24, 64, 2, 5, 2, 3, 1, 1),  # nothing alike in H and W
    (2, 6, 4, 16, 16, 3, 3, 1, 1, 0, 2),
    (1, 1, 1, 64, 8, 1, 1, 1, 1, 0, 0),
    (1, 3, 3, 16, 8, 1, 1, 1, 1, 2, 1),  # more padding than kernel
    (260, 1, 2, 8, 8, 1, 2, 1, 1, 0, 1),  # tiles of many images
]


# -- on the host ---------------------------------------------------------------------------------


def convolve_on_host(
    library: ctypes.CDLL, config: int, case: Case, activation: str, slope: float
) -> torch.Tensor:
    def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    sides = conv_reference.output_shape(case.x, case.weight, case.stride, case.padding)
    out = torch.full(sides, torch.nan, dtype=case.x.dtype).to(memory_format=CHANNELS_LAST)
    error = library.convolve_on_host(
        config,
        (ctypes.c_int * len(case.shape))(*case.shape),
        *map(address, (case.x, case.weight, case.bias, case.residual, out)),
        ACTIVATIONS.index(activation),
        ctypes.c_float(slope),
    )
    if error is not None:
        raise RuntimeError(error.decode())
    return out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", range(CONFIGS))
def test_every_configuration_loads_and_multiplies_the_right_values(on_host, config):
    for i, shape in enumerate(SHAPES):
        j = i + config
        case = Case(shape, bias=j % 2 == 0, residual=j % 3 > 0)
        activation, slope = ACTIVATIONS[j % 5], (0.125, -0.5)[j % 2]
        y = convolve_on_host(on_host, config, case, activation, slope)
        case.check(y, activation, slope, unit=2.0**-19)


@pytest.mark.slow
def test_host_refuses_what_a_tensor_map_cannot_hold(on_host):
    """The encoders of tests/cuda_on_host/hopper.cpp check what the driver does."""
    for shape in ((1, 20, 20, 8, 8, 3, 3, 9, 1, 1, 1), (1, 4, 4, 12, 8, 1, 1, 1, 1, 0, 0)):
        with pytest.raises(RuntimeError, match=r"CUresult|CUTLASS refuses"):
            convolve_on_host(on_host, 0, Case(shape), "none", 0)


# -- the operators -------------------------------------------------------------------------------


def configs(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[int]:
    n, h, w, c, k, r, s, *geometry = shape
    x = torch.empty(n, c, h, w, dtype=dtype, device=device)
    weight = torch.empty(k, c, r, s, dtype=dtype, device=device)
    return torch.ops.resfast.conv2d_hopper_configs(x, weight, geometry[:2], geometry[2:])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_configurations_are_ordered_for_the_shape(operators, device):
    found = configs(512, 32, 32, 64, 64, 3, 3, 1, 1, 1, 1, device=device)
    assert sorted(found) == list(range(CONFIGS))
    assert found[0] in (0, 3)  # tiles of 64 filters
    assert found[-1] in (5, 6)  # 256 filters
    assert configs(512, 8, 8, 256, 256, 3, 3, 1, 1, 1, 1, device=device)[0] in (4, 5, 6)
    assert configs(8, 4, 4, 512, 512, 3, 3, 1, 1, 1, 1, device=device)[0] == 7  # few tiles
    half = configs(512, 32, 32, 64, 64, 3, 3, 1, 1, 1, 1, device=device, dtype=torch.float16)
    assert half == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((0, 8, 8, 64, 64, 3, 3, 1, 1, 1, 1), torch.bfloat16),
        ((1, 8, 8, 60, 64, 3, 3, 1, 1, 1, 1), torch.bfloat16),
        ((1, 8, 8, 64, 60, 3, 3, 1, 1, 1, 1), torch.bfloat16),
        ((1, 20, 20, 64, 64, 3, 3, 1, 9, 1, 1), torch.bfloat16),
        ((1, 8, 8, 64, 64, 3, 3, 1, 1, 128, 1), torch.bfloat16),
        ((1, 300, 8, 64, 64, 257, 3, 1, 1, 127, 1), torch.bfloat16),
        ((1, 8, 8, 64, 64, 3, 3, 1, 1, 1, 1), torch.float32),
    ],
)
def test_no_configuration_is_given_and_the_operator_says_why_where_none_applies(
    operators, shape, dtype
):
    assert configs(*shape, dtype=dtype) == []
    case = Case(shape, dtype, residual=False)
    with pytest.raises(RuntimeError, match="the kernel for Hopper takes"):
        call(case.x, case.weight, None, None, case.stride, case.padding, "relu", 0.01, 0)


def call(*arguments: object) -> None:
    """With tensors of the CPU: what does not need the device is checked first."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    torch.ops.resfast.conv2d_hopper.default.redispatch(cuda, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: next(iter(bad)))
def test_wrong_arguments_are_refused_with_the_words_of_the_python_check(operators, bad):
    with pytest.raises((TypeError, ValueError)) as expected:
        conv.check_arguments(*{**GOOD, **bad}.values())
    with pytest.raises(RuntimeError) as found:
        call(*{**GOOD, **bad}.values(), 0)
    assert str(found.value).splitlines()[0] == str(expected.value)


@pytest.mark.slow
def test_a_wrong_configuration_and_tensors_of_the_cpu_are_refused(operators):
    case = Case(SHAPES[0], residual=False)
    arguments = (case.x, case.weight, None, None, case.stride, case.padding, "relu", 0.01)
    for config in (-1, CONFIGS):
        with pytest.raises(RuntimeError, match=f"config is {config}; expected one of"):
            call(*arguments, config)
    with pytest.raises(RuntimeError, match="x is not on a CUDA device"):
        call(*arguments, 0)


@pytest.mark.slow
def test_the_library_loads_without_a_driver(operators):
    """It asks the runtime for the driver's functions; a machine without a GPU has no libcuda."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    output = subprocess.run(
        ["readelf", "--dynamic", "--wide", operators], capture_output=True, text=True, check=True
    ).stdout
    assert "libcudart.so" in output
    assert "libcuda.so" not in output


# -- the real kernels ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_without_register_spills(compiled):
    output = "".join(compiled.values())
    kernels = re.findall(
        r"entry function '(\w+)' for 'sm_90a'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        output,
        re.DOTALL,
    )
    assert len({name for name, *_ in kernels if "resfast" in name}) == 2 * CONFIGS
    assert not [kernel for kernel in kernels if any(map(int, kernel[1:]))]
    assert "setmaxnreg" not in output  # ptxas says where it ignores it
    assert "serialized" not in output  # and where wgmma would wait for each other


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_use_the_copy_engine_and_the_warp_group_multiplication(compiled):
    cuobjdump = cuda_build.find_nvcc().parent / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump")
    functions = []
    for path in compiled:
        output = subprocess.run(
            [cuobjdump, "--dump-sass", path], capture_output=True, text=True, check=True
        ).stdout
        functions += re.split(r"Function : ", output)[1:]
    assert len(functions) == 2 * CONFIGS
    for function in functions:
        for instruction in ("HGMMA", r"UTMALDG\.4D\.IM2COL", r"UTMALDG\.4D\b", "UTMASTG"):
            assert re.search(instruction, function), f"{function[:400]}: no {instruction}"
        assert not re.search(r"\b(LDL|STL|HMMA)\b", function)


# -- on a GPU ------------------------------------------------------------------------------------

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
LARGER = [
    (64, 32, 32, 64, 64, 3, 3, 1, 1, 1, 1),
    (33, 16, 16, 64, 128, 3, 3, 2, 2, 1, 1),
    (65, 8, 8, 256, 256, 3, 3, 1, 1, 1, 1),
    (3, 4, 4, 512, 512, 3, 3, 1, 1, 1, 1),
    (64, 14, 14, 1024, 256, 1, 1, 1, 1, 0, 0),
]


def convolve(case: Case, activation: str, slope: float, config: int) -> torch.Tensor:
    tensors = (
        None if tensor is None else tensor.cuda()
        for tensor in (case.x, case.weight, case.bias, case.residual)
    )
    return torch.ops.resfast.conv2d_hopper(
        *tensors, case.stride, case.padding, activation, slope, config
    )


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("config", range(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_configuration_is_right_on_the_gpu(operators, dtype, config):
    for i, shape in enumerate(SHAPES + LARGER):
        j = i + config
        case = Case(shape, dtype, bias=j % 2 == 0, residual=j % 3 > 0)
        activation, slope = ACTIVATIONS[j % 5], (0.125, -0.5)[j % 2]
        y = convolve(case, activation, slope, config)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
        case.check(y, activation, slope, unit=2.0**-16)  # tensor cores cut off what they add


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_combination_is_right_on_the_gpu(operators, activation):
    for bias in (False, True):
        for residual in (False, True):
            case = Case(SHAPES[0], bias=bias, residual=residual)
            for config in (0, 5, 7):
                case.check(convolve(case, activation, 0.25, config), activation, 0.25, 2.0**-16)


@pytest.mark.gpu
@needs_hopper
def test_views_are_right_on_the_gpu(operators):
    """NCHW memory, and tensors that begin where no 16-byte vector does."""
    case = Case(SHAPES[0])
    expected = convolve(case, "relu", 0.01, 1)
    geometry = (case.stride, case.padding, "relu", 0.01, 1)
    tensors = [t.cuda() for t in (case.x, case.weight, case.bias, case.residual)]
    plain = [tensor.contiguous() for tensor in tensors]
    assert torch.equal(torch.ops.resfast.conv2d_hopper(*plain, *geometry), expected)
    shifted = []
    for tensor in tensors:
        memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
        view = memory[1:].as_strided(tensor.shape, tensor.stride())
        shifted.append(view.copy_(tensor))
    assert torch.equal(torch.ops.resfast.conv2d_hopper(*shifted, *geometry), expected)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("config", range(CONFIGS))
def test_streams_and_graphs_give_the_same_bits(operators, config):
    case = Case(LARGER[3])
    tensors = [t.cuda() for t in (case.x, case.weight, case.bias, case.residual)]

    def run() -> torch.Tensor:
        return torch.ops.resfast.conv2d_hopper(
            *tensors, case.stride, case.padding, "relu", 0.01, config
        )

    expected = run()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(run(), expected)
    with torch.cuda.graph(graph, stream=stream):
        y = run()
    for _ in range(3):
        tensors[0].neg_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, run())
