"""Compiles csrc/cuda/*.cu, the CUDA kernels, into one library that torch loads.

    python csrc/cuda/build.py resfast/_CUDA.so        # then torch.ops.load_library of that file

The compiler is that of CUDA_HOME, of PATH, or of the packages nvidia-cuda-nvcc, nvidia-nvvm and
nvidia-cuda-crt (of torch's CUDA version). TORCH_CUDA_ARCH_LIST names the architectures, in torch's
form ("8.0;9.0a;9.0+PTX"), MAX_JOBS how many files are compiled at a time. A build of the whole
package takes ``compile_objects`` as ``extra_objects`` and LIBRARIES of its extension.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;9.0+PTX"
LIBRARIES = ("torch_cpu", "torch_cuda", "cudart")
FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xptxas",
    "-v",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _pip_toolkits() -> list[Path]:
    """Folders like site-packages/nvidia/cu13, newest first."""
    folder = _folder_of("nvidia")
    return [] if folder is None else sorted(folder.glob("cu[0-9]*"), reverse=True)


def find_nvcc() -> Path | None:
    """The CUDA compiler; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return path if (path := Path(home) / "bin" / "nvcc").exists() else None
    found = shutil.which("nvcc")
    if found:
        return Path(found).resolve()
    return next(
        (path for root in _pip_toolkits() if (path := root / "bin" / "nvcc").exists()), None
    )


def architecture_flags(names: str) -> list[str]:
    """nvcc's flags for architectures as TORCH_CUDA_ARCH_LIST names them.

    Raises:
        ValueError: a name that is not one, or an architecture below 8.0.
    """
    flags = []
    for name in re.split(r"[;,\s]+", names.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None or int(match[1]) < 8:
            raise ValueError(
                f"architecture {name!r} in {names!r}; expected 8.0 or newer, as in '8.0;9.0+PTX'"
            )
        number = match[1] + match[2] + match[3]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def compile_objects(
    folder: Path, *, nvcc: Path, architectures: str | None = None, jobs: int | None = None
) -> dict[str, str]:
    """Compiles every .cu file.

    Args:
        folder: where the objects are written.
        nvcc: the compiler.
        architectures: as ``TORCH_CUDA_ARCH_LIST``, which is the default.
        jobs: files at a time; ``MAX_JOBS``, or as many as there are processors, by default.

    Returns:
        What the compiler said, by path of the object: registers and spills of each kernel.

    Raises:
        RuntimeError: torch is missing, or a file does not compile.
        ValueError: a bad name of an architecture.
    """
    torch = _folder_of("torch")
    if torch is None:
        raise RuntimeError("torch is not installed; its headers are needed")
    names = architectures or os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    toolkit = nvcc.parents[1]
    includes = ["-isystem", str(torch / "include")]
    # The pip compiler may stand apart from the runtime's headers, which come with torch.
    if (toolkit / "nvvm").exists() and not (toolkit / "include" / "cuda_runtime.h").exists():
        includes += [f"-I{root / 'include'}" for root in _pip_toolkits()]
    host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
    flags = [*FLAGS, *architecture_flags(names), *includes, *host]

    def compile_one(source: Path) -> tuple[str, str]:
        target = folder / f"{source.stem}.o"
        command = [str(nvcc), *flags, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed for {source.name}:\n{done.stdout}{done.stderr}")
        return str(target), done.stderr

    jobs = jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(compile_one, sorted(FOLDER.glob("*.cu"))))


def link(objects: list[str], library: Path) -> None:
    """Links the objects to a library, without a path of this machine in it.

    Raises:
        RuntimeError: the linker fails.
    """
    torch = _folder_of("torch")
    assert torch is not None  # compile_objects needed it
    with tempfile.TemporaryDirectory() as folder:
        # The packages have libcudart.so.13 without the plain name that a linker looks for.
        runtimes = [
            path for root in _pip_toolkits() for path in (root / "lib").glob("libcudart.so*")
        ]
        for path in runtimes:
            if not (Path(folder) / "libcudart.so").exists():
                (Path(folder) / "libcudart.so").symlink_to(path)
        command = [os.environ.get("CXX", "g++"), "-shared", "-o", str(library), *objects]
        command += [f"-L{folder}", f"-L{torch / 'lib'}"]
        if home := os.environ.get("CUDA_HOME"):
            command += [f"-L{Path(home) / name}" for name in ("lib64", "lib")]
        command += [f"-l{name}" for name in LIBRARIES]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"linking failed:\n{done.stderr}")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc was not found: set CUDA_HOME, or install nvidia-cuda-nvcc")
    try:
        with tempfile.TemporaryDirectory() as folder:
            said = compile_objects(Path(folder), nvcc=nvcc)
            link(list(said), Path(sys.argv[1]))
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from None
    print(f"{sys.argv[1]} is built with {nvcc}")


if __name__ == "__main__":
    main()
