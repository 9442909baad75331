"""Probes of the compiled kernels and of the compilers that build them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator

from resfast.cli.doctor.line import (
    PACKAGE,
    Line,
    Options,
    State,
    dotted,
    first_line,
    installed,
    output_of,
)

MANYLINUX = (2, 28)
"""The glibc of the wheels of ``make wheel``, manylinux_2_28."""
REBUILD = "rebuild: pip install -v --no-build-isolation -e . (or make) shows what is wrong"


def probe_cpp_kernels(options: Options) -> Iterator[Line]:
    from resfast.ops import extension

    if extension.MISSING is None:
        import resfast.ops.add_relu.op
        import resfast.ops.augment.op
        import resfast.ops.conv.op  # noqa: F401  # registering fails for kernels of an old schema

        built = ", ".join(path.name for path in sorted(PACKAGE.glob("_C.*")))
        yield Line("C++ kernels", "ok", f"{built} in {PACKAGE}")
    elif "cannot be loaded" in extension.MISSING:
        yield Line("C++ kernels", "problem", extension.MISSING, REBUILD)
    else:
        text = f"slower PyTorch code is used instead: {extension.MISSING}"
        yield Line("C++ kernels", "missing", text, REBUILD)


def probe_portability(options: Options) -> Iterator[Line]:
    """Where else the compiled CPU kernels run, from what they ask for."""
    from resfast.ops import extension

    found = sorted(PACKAGE.glob("_C.*"))
    if extension.MISSING is not None or not found:
        yield Line("portability", "missing", "not known: there are no C++ kernels")
        return
    path = found[0]
    text, todo = f"{path.name} is for Python 3.11 and torch 2.11, and all later ones", ""
    if ".abi3." not in path.name:
        text, todo = f"{path.name} is for this Python alone, and torch from 2.11 on", REBUILD
    glibc = newest_glibc(path.read_bytes())
    if glibc is not None:
        text += f"; for Linux with glibc {dotted(glibc)} or later"
    if todo == "" and glibc is not None and glibc > MANYLINUX:
        todo = f"make wheel builds one for glibc {dotted(MANYLINUX)}"
    yield Line("portability", "missing" if todo else "ok", text, todo)


def newest_glibc(library: bytes) -> tuple[int, ...] | None:
    """The newest version of glibc that a library asks for, or None if it asks for none."""
    names = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)", library)
    return max((tuple(map(int, name)) for name in names), default=None)


def probe_cuda_kernels(options: Options) -> Iterator[Line]:
    import torch

    from resfast.ops import extension

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing, record = extension.CUDA_MISSING, PACKAGE / "_CUDA.json"
    if missing is not None and "cannot be loaded" in missing:
        yield Line("CUDA kernels", "problem", missing, REBUILD)
        return
    if missing is not None:
        text = f"{'cuDNN is used instead' if count else 'not needed without a GPU'}: {missing}"
        yield Line("CUDA kernels", "missing", text, REBUILD if count else "")
        return
    try:
        built = json.loads(record.read_text(encoding="utf-8"))
        architectures = [str(name) for name in built["architectures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"their target is unknown: {record} cannot be read ({error!r})"
        yield Line("CUDA kernels", "problem", text, REBUILD)
        return
    text = f"for {' '.join(architectures)}, by nvcc {built.get('nvcc')}, " + (
        "with CUTLASS" if built.get("cutlass") else "without CUTLASS"
    )
    capabilities = [torch.cuda.get_device_capability(index) for index in range(count)]
    uncovered = {c for c in capabilities if not any(covers(name, c) for name in architectures)}
    if uncovered:
        wanted = ";".join(dotted(c) + "a" * (c == (9, 0)) for c in sorted(uncovered))
        text += f", but not for this machine's {wanted}"
        todo = f"rebuild them with TORCH_CUDA_ARCH_LIST='{wanted}' in the environment"
        yield Line("CUDA kernels", "problem", text, todo)
    else:
        yield Line("CUDA kernels", "ok", text)


def covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``architecture`` (``8.0``, ``9.0a``, ``8.6+PTX``) runs on a device."""
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if match is None:
        return False
    built = int(match[1]), int(match[2])
    if match[3] == "a":  # architecture-specific features
        return capability == built
    if match[4] and not match[3]:
        return capability >= built
    return capability[0] == built[0] and capability >= built


def probe_triton(options: Options) -> Iterator[Line]:
    import torch

    needed = torch.cuda.is_available()
    state: State = "problem" if needed else "missing"
    if not installed("triton"):
        text = "not installed; many CUDA kernels and torch.compile on CUDA need it"
        yield Line("Triton", state, text, "pip install triton")
        return
    import triton

    major, minor = torch.cuda.get_device_capability() if needed else (8, 0)
    try:
        _compile_triton(10 * major + minor)
    except Exception as error:  # noqa: BLE001  # any error of its compiler, of ptxas or of the C compiler
        text = f"{triton.__version__} cannot compile for sm_{major}{minor}: {first_line(error)}"
        todo = "install the triton version that this torch requires (pip check)"
        yield Line("Triton", state, text, todo)
    else:
        text = f"{triton.__version__}, compiles for sm_{major}{minor}"
        yield Line("Triton", "ok", text)


def _compile_triton(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from resfast.ops.add_relu.triton import _backward_kernel

    pointers = dict.fromkeys(("out", "grad", "result"), "*bf16")
    signature = {**pointers, "count": "i32", "BLOCK": "constexpr"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # a cached kernel would hide a broken compiler
        source = ASTSource(_backward_kernel, signature, {(4,): 256})
        triton.compile(source, target=GPUTarget("cuda", capability, 32))


def probe_compiler(options: Options) -> Iterator[Line]:
    import torch

    from resfast import runtime

    missing = runtime.compiler_missing(torch.device("cpu"))
    if missing:
        text = f"{missing}; without one there are no C++ kernels and no torch.compile"
        yield Line("C++ compiler", "missing", text, "install g++, or set CXX to a compiler")
        return
    names = (os.environ.get("CXX") or "g++", "clang++")
    path = next(found for name in names if (found := shutil.which(name)))
    version = output_of(path, "--version").partition("\n")[0]
    yield Line("C++ compiler", "ok", f"{version} ({path})")


def probe_nvcc(options: Options) -> Iterator[Line]:
    script = PACKAGE.parent / "csrc" / "cuda" / "build.py"
    if not script.exists():
        yield Line("nvcc", "ok", "not needed: resfast is installed without its sources")
        return
    spec = importlib.util.spec_from_file_location("resfast_cuda_build", script)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    obstacle = build.obstacle()
    if obstacle is not None:
        yield Line("nvcc", "missing", f"the CUDA kernels cannot be built: {obstacle}")
        return
    path, cutlass = build.find_nvcc(), build.find_cutlass()
    text = f"{build.nvcc_version(path)} ({path})"
    if cutlass is None:
        text += "; no CUTLASS, so the kernels for Hopper are not built"
        yield Line("nvcc", "missing", text, "pip install --no-deps nvidia-cutlass")
    else:
        yield Line("nvcc", "ok", f"{text}, CUTLASS in {cutlass}")
