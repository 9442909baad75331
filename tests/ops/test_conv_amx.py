"""The bfloat16 convolutions on AMX, whose tiles are emulated: the same kernels in plain C++.

The emulation ends the process on tiles that are used without a configuration or do not fit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resfast.ops.conv import cpu as conv_cpu
from tests.compiled import ROOT, compile_once

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists() or COMPILER is None, reason="no compiler"),
    pytest.mark.skipif(
        not conv_cpu._has_kernels(), reason="the rest of the kernels needs AVX512-BF16"
    ),
]

SCRIPT = """
import sys
import torch
import torch.nn.functional as F

torch.ops.load_library(sys.argv[1])
ops = torch.ops.resfast
assert ops.conv_bf16_amx()
torch.manual_seed(0)
last = torch.channels_last
# batch, channels, outputs, height, width, kernel, stride, residual: with and without pairs that do
# not fill a tile, one or two tiles of rows and outputs, several blocks of the sum
cases = [
    (3, 64, 64, 9, 7, 3, 1, 1), (2, 3, 20, 8, 8, 3, 1, 0), (1, 512, 512, 4, 4, 3, 1, 1),
    (5, 96, 130, 6, 5, 3, 2, 1), (2, 60, 250, 5, 9, 3, 2, 0), (64, 128, 64, 4, 4, 3, 1, 0),
    (2, 24, 16, 7, 7, 1, 1, 0), (2, 24, 80, 7, 7, 1, 2, 1), (1, 5, 7, 9, 9, 5, 1, 0),
]
for threads in (1, 3):
    torch.set_num_threads(threads)
    for n, c, k, h, w, r, stride, with_residual in cases:
        x = torch.randn(n, c, h, w).bfloat16().contiguous(memory_format=last)
        weight = (torch.randn(k, c, r, r) / (c * r * r) ** 0.5).bfloat16()
        bias = torch.randn(k)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, r // 2)
        residual = None
        if with_residual:
            residual = torch.randn(exact.shape).bfloat16().contiguous(memory_format=last)
            exact += residual.double()
        exact = exact.relu()
        geometry = [k, c, r, r, stride, stride, r // 2, r // 2]
        rest = bias, residual, geometry, 1, 0.01
        results = {"gemm": ops.conv_gemm(x, ops.conv_gemm_pack(weight), *rest)}
        if r == 3:
            results["direct"] = ops.conv_direct(x, ops.conv_direct_pack(weight), *rest)
            packed = ops.conv_winograd_pack(weight, stride)
            results["winograd"] = ops.conv_winograd(x, packed, *rest)
        for name, result in results.items():
            error = (result.double() - exact).norm() / exact.norm()
            limit = 6e-3 if name == "winograd" else 3e-3
            assert error < limit, (name, c, k, r, stride, error)

# batch, channels, outputs, height, width, stride, padding: groups of 1 to 32 images, filled and
# not, tiles of 16 and 32 outputs and channels, one and several lanes
cases = [
    (33, 40, 72, 9, 7, 1, 1), (2, 33, 35, 5, 4, 1, 2), (1, 16, 64, 32, 32, 1, 1),
    (5, 96, 130, 6, 5, 2, 1), (40, 48, 16, 1, 1, 1, 1), (34, 20, 24, 16, 16, 1, 0),
    (3, 64, 64, 8, 8, 2, 2),
]
for n, c, k, h, w, stride, padding in cases:
    x = torch.randn(n, c, h, w).bfloat16().contiguous(memory_format=last)
    weight = (torch.randn(k, c, 3, 3) / (9 * c) ** 0.5).contiguous(memory_format=last)
    exact = F.conv2d(x.double(), weight.double(), None, stride, padding)
    grad = torch.randn(exact.shape).bfloat16().contiguous(memory_format=last)
    exact_x, exact_weight, _ = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight.double(), None, [stride] * 2, [padding] * 2, [1, 1],
        False, [0, 0], 1, [True, True, False],
    )
    before = None
    for threads in (1, 3):
        torch.set_num_threads(threads)
        packed = ops.conv_direct_train_pack(weight, False)
        geometry = [k, c, 3, 3, stride, stride, padding, padding]
        results = [
            (ops.conv_direct(x, packed, None, None, geometry, 0, 0.01), exact, 4e-3),
            (ops.conv_direct_weight_gradient(x, grad, stride, padding), exact_weight, 1e-5),
        ]
        if stride == 1:
            packed = ops.conv_direct_train_pack(weight, True)
            geometry = [c, k, 3, 3, 1, 1, 2 - padding, 2 - padding]
            back = ops.conv_direct(grad, packed, None, None, geometry, 0, 0.01)
            results.append((back, exact_x, 4e-3))
        for i, (result, expected, limit) in enumerate(results):
            error = (result.double() - expected).norm() / expected.norm()
            assert error < limit, (i, n, c, k, h, w, stride, padding, error)
        bits = [result for result, *_ in results]
        assert before is None or all(map(torch.equal, bits, before))
        before = bits
print("right")
"""


SOURCES = (
    "conv/conv_gemm.cpp",
    "conv/conv_winograd.cpp",
    "conv/conv_direct.cpp",
    "conv_train/conv_direct_gradient.cpp",
)


def test_convolutions_on_amx_compute_what_float64_does() -> None:
    torch_folder = Path(torch.__file__).parent
    sources = [ROOT / "csrc" / "cpu" / name for name in SOURCES]
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-DRESFAST_AMX_EMULATED"]
    options += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem"]
    options += [str(torch_folder / "include"), *map(str, sources)]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    headers = list((ROOT / "csrc" / "cpu").rglob("*.h"))
    library = compile_once("amx.so", [COMPILER, *options, *link], sources, headers)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library)], capture_output=True, text=True
    )
    assert done.stdout == "right\n", done.stderr
