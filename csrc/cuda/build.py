"""Compiles the CUDA kernels, csrc/cuda/*/*.cu, into one library that torch loads.

    python csrc/cuda/build.py resfast/_CUDA.so

The package build does the same (build_backend/resfast_build.py). The compiler is taken from
CUDA_HOME, the packages nvidia-cuda-nvcc, nvidia-nvvm and nvidia-cuda-crt (for torch's CUDA
version), or PATH, in this order. TORCH_CUDA_ARCH_LIST sets the architectures, in torch's notation
("8.0;9.0a;9.0+PTX"); the default is those of the GPUs that nvidia-smi sees, or ARCHITECTURES.
MAX_JOBS is the number of files to compile in parallel.

hopper*.cu need the headers of CUTLASS (CUTLASS_HOME, or the package nvidia-cutlass) and are
compiled only for 9.0a; without the headers, the library does not contain them.

Objects are cached in build/cuda, under a digest of everything that they depend on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CACHE = FOLDER.parents[1] / "build" / "cuda"
ARCHITECTURES = "8.0+PTX;9.0a"
"""Without a GPU: every GPU from Ampere on, and Hopper with its own instructions."""
MIN_COMPUTE_CAPABILITY = (8, 0)
"""The same as in ``resfast/runtime.py``, which cannot be imported here."""
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
HOPPER_FLAGS = ["-DNDEBUG"]
"""CUTLASS's assertions cost registers, and abort Python."""
NO_CUTLASS = "its headers are missing: `pip install --no-deps nvidia-cutlass`, or set CUTLASS_HOME"


# -- compilers and headers -----------------------------------------------------------------------


def _folder_of(package: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def torch_version() -> tuple[str, str | None]:
    """Version of the installed torch and of the CUDA that it was built for, or None.

    Raises:
        RuntimeError: torch is not installed.
    """
    folder = _folder_of("torch")
    if folder is None:
        raise RuntimeError("torch is not installed; its headers are needed")
    # Load only this file: importing torch takes seconds.
    spec = importlib.util.spec_from_file_location("_torch_version", folder / "version.py")
    assert spec is not None
    assert spec.loader is not None
    version = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(version)
    return version.__version__, version.cuda


def _pip_toolkits() -> list[Path]:
    """Folders like site-packages/nvidia/cu13, newest first."""
    folder = _folder_of("nvidia")
    return [] if folder is None else sorted(folder.glob("cu[0-9]*"), reverse=True)


def find_nvcc() -> Path | None:
    """Path of nvcc; None if it is not installed."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return path if (path := Path(home) / "bin" / "nvcc").exists() else None
    for root in _pip_toolkits():
        # All three packages are needed to compile.
        parts = [root / "bin" / "nvcc", root / "nvvm" / "bin" / "cicc", root / "bin" / "crt"]
        if all(path.exists() for path in parts):
            return parts[0]
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def find_cutlass() -> Path | None:
    """CUTLASS's folder, with include and tools/util/include; None if it is not installed."""
    home, package = os.environ.get("CUTLASS_HOME"), _folder_of("cutlass_library")
    folder = Path(home) if home else package / "source" if package else None
    if folder is None or not (folder / "include" / "cutlass" / "version.h").exists():
        return None
    return folder


@functools.cache
def nvcc_version(nvcc: Path) -> str:
    """The version of nvcc, such as ``13.2.86``.

    Raises:
        RuntimeError: it does not run, or is not nvcc.
    """
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise RuntimeError(f"{nvcc} does not run: {error}") from None
    match = re.search(r"release .*, V(\d+\.\d+\.\d+)", output)
    if match is None:
        raise RuntimeError(f"{nvcc} --version does not name a version of nvcc: {output!r}")
    return match[1]


@functools.cache
def _toolkit(nvcc: Path) -> Path:
    """The folder of nvcc's headers, even if ``nvcc`` is a script that calls it."""
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    match = re.search(r"^#\$ TOP=(.+)$", done.stdout + done.stderr, re.MULTILINE)
    return Path(match[1]).resolve() if match else nvcc.parents[1]


def obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here, or None if they can."""
    try:
        version, cuda = torch_version()
        if cuda is None:
            return f"torch {version} is built without CUDA"
        nvcc = find_nvcc()
        if nvcc is None:
            home = os.environ.get("CUDA_HOME")
            where = f"in CUDA_HOME={home}" if home else "(CUDA_HOME, the package, PATH)"
            wanted = f"nvidia-cuda-nvcc=={cuda}.* nvidia-nvvm=={cuda}.* nvidia-cuda-crt=={cuda}.*"
            return f"there is no nvcc {where}; `pip install {wanted}` installs one"
        found = nvcc_version(nvcc)
        if found.split(".")[0] != cuda.split(".")[0]:
            return (
                f"nvcc is of CUDA {found} ({nvcc}) and torch of {cuda}, which cannot be mixed; "
                f"set CUDA_HOME to a toolkit of CUDA {cuda.split('.')[0]}"
            )
        architecture_flags(architectures())
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


# -- architectures -------------------------------------------------------------------------------


def architectures() -> str:
    """Architectures to compile for, in the notation of TORCH_CUDA_ARCH_LIST.

    Raises:
        RuntimeError: every GPU here is too old.
    """
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named:
        return named
    seen = _capabilities()
    if not seen:
        return ARCHITECTURES
    supported = sorted(one for one in seen if one >= MIN_COMPUTE_CAPABILITY)
    if not supported:
        found = ", ".join("{}.{}".format(*one) for one in sorted(seen))
        raise RuntimeError(
            f"the GPU is of compute capability {found}, and the kernels need 8.0 or newer"
        )
    return ";".join("9.0a" if one == (9, 0) else "{}.{}".format(*one) for one in supported)


def _capabilities() -> set[tuple[int, int]]:
    """Compute capabilities of the GPUs that nvidia-smi sees; empty if it is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    if done.returncode:
        return set()
    return {(int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d+)\s*$", done.stdout, re.M)}


def _split(names: str) -> list[str]:
    return [name for name in re.split(r"[;,\s]+", names) if name]


def architecture_flags(names: str) -> list[str]:
    """nvcc's flags for architectures in the notation of TORCH_CUDA_ARCH_LIST.

    Raises:
        ValueError: an invalid name, or an architecture below 8.0.
    """
    flags = []
    for name in _split(names) or [names]:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None or (int(match[1]), int(match[2])) < MIN_COMPUTE_CAPABILITY:
            raise ValueError(
                f"architecture {name!r} in {names!r}; expected 8.0 or newer, as in '8.0;9.0+PTX'"
            )
        number = match[1] + match[2] + match[3]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


# -- compilation ---------------------------------------------------------------------------------


def jobs() -> int:
    """Number of files to compile in parallel: MAX_JOBS, or the number of processors.

    Raises:
        ValueError: MAX_JOBS is not a number of at least 1.
    """
    named = os.environ.get("MAX_JOBS")
    if not named:
        has_affinity = hasattr(os, "sched_getaffinity")
        return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if not named.isdecimal() or int(named) < 1:
        raise ValueError(f"MAX_JOBS is {named!r}; expected a number of at least 1")
    return int(named)


def host_compiler() -> str | None:
    """The program in CXX, without wrappers and flags (``g++`` of ``ccache g++ -pthread``)."""
    words = [word for word in shlex.split(os.environ.get("CXX", "")) if not word.startswith("-")]
    return words[-1] if words else None


def host_flags() -> list[str]:
    """nvcc's flags for a host compiler that is not its default.

    Objects are the same, and found in the cache, whether or not CXX names the default compiler.
    """
    named, default = (shutil.which(name or "") for name in (host_compiler(), "g++"))
    if named is None or (default is not None and os.path.samefile(named, default)):
        return []
    return ["-ccbin", named]


def is_hopper(source: Path) -> bool:
    return source.name.startswith("hopper")


def sources_for(names: str) -> list[Path]:
    """The files to compile for these architectures."""
    hopper = "9.0a" in _split(names) and find_cutlass() is not None
    found = [path for path in FOLDER.glob("*/*.cu") if hopper or not is_hopper(path)]
    return sorted(found, key=lambda path: (not is_hopper(path), path.name))  # slowest first


def read_with_includes(source: Path) -> dict[Path, bytes]:
    """Contents of a file and of the existing files that it includes in quotation marks."""
    found: dict[Path, bytes] = {}
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found[path] = path.read_bytes()
        names = re.findall(rb'^\s*#\s*include\s*"([^"]+)"', found[path], re.MULTILINE)
        waiting += [(path.parent / os.fsdecode(name)).resolve() for name in names]
    return found


def compile_objects(
    sources: Iterable[Path] | None = None, *, nvcc: Path, names: str | None = None
) -> dict[str, str]:
    """Compiles .cu files, except those whose object is in the cache.

    Args:
        sources: files of this folder; by default, ``sources_for(names)``.
        nvcc: the compiler.
        names: architectures; by default, ``architectures()``.

    Returns:
        The compiler's output by path of the object: registers and spills of each kernel.

    Raises:
        RuntimeError: torch or CUTLASS is missing, or a file does not compile.
        ValueError: an invalid architecture, or an invalid MAX_JOBS.
    """
    names = names or architectures()
    version, _ = torch_version()
    torch = _folder_of("torch")
    includes = ["-isystem", str(torch / "include")]
    toolkit = _toolkit(nvcc)
    if not any(
        toolkit.glob(f"{folder}/cuda_runtime.h") for folder in ("include", "targets/*/include")
    ):
        # The compiler's pip package lacks the runtime's headers, which come with torch.
        includes += [f"-I{root / 'include'}" for root in _pip_toolkits()]
    CACHE.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> tuple[str, str]:
        flags, made_from = [*FLAGS], [version, nvcc_version(nvcc)]
        if is_hopper(source):
            cutlass = find_cutlass()
            if cutlass is None:
                raise RuntimeError(f"{source.name} needs CUTLASS: {NO_CUTLASS}")
            flags += [*HOPPER_FLAGS, *architecture_flags("9.0a")]
            for name in ("include", "tools/util/include"):
                flags += ["-isystem", str(cutlass / name)]
            made_from.append((cutlass / "include" / "cutlass" / "version.h").read_text())
        else:
            flags += architecture_flags(names)
        flags += [*includes, *host_flags()]
        digest = hashlib.sha256("\0".join([*flags, *made_from]).encode())
        for path, content in sorted(read_with_includes(source).items()):
            digest.update(path.name.encode() + b"\0" + content + b"\0")
        target = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        log = target.with_suffix(".log")
        if target.exists() and log.exists():
            return str(target), log.read_text(encoding="utf-8")
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / target.name
            command = [str(nvcc), *flags, "-c", str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            output = done.stdout + done.stderr
            if done.returncode:
                raise RuntimeError(f"nvcc {nvcc_version(nvcc)} fails for {source.name}:\n{output}")
            made.with_suffix(".log").write_text(output, encoding="utf-8")
            made.with_suffix(".log").replace(log)
            made.replace(target)
        print(f"resfast: {source.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        return str(target), output

    with ThreadPoolExecutor(jobs()) as pool:
        return dict(pool.map(compile_one, sources_for(names) if sources is None else sources))


def link(objects: Iterable[str], library: Path, *, nvcc: Path) -> None:
    """Links the objects to a library, without a path of this machine in it.

    Raises:
        RuntimeError: the linker fails.
    """
    torch = _folder_of("torch")
    assert torch is not None  # compile_objects needed it
    toolkit = _toolkit(nvcc)
    with tempfile.TemporaryDirectory() as folder:
        # The packages have libcudart.so.13, but the linker looks for libcudart.so.
        plain = Path(folder) / "libcudart.so"
        runtimes = [one for root in _pip_toolkits() for one in root.glob("lib/libcudart.so*")]
        if runtimes:
            plain.symlink_to(runtimes[0])
        command = [host_compiler() or "g++", "-shared", "-o", str(library), *objects]
        command += [f"-L{folder}", f"-L{torch / 'lib'}"]
        command += [f"-L{path}" for path in (toolkit / "lib64", toolkit / "lib")]
        command += [f"-l{name}" for name in LIBRARIES]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"linking the CUDA kernels fails:\n{done.stderr}")


# -- the library ---------------------------------------------------------------------------------


def build(library: Path) -> str:
    """Writes the library and its description: ``_CUDA.so`` and ``_CUDA.json``.

    If this fails, neither file exists.

    Returns:
        What was built, in one line.

    Raises:
        RuntimeError: something is missing or does not compile.
        ValueError: an invalid architecture, or an invalid MAX_JOBS.
    """
    record = library.with_suffix(".json")
    for path in (library, record):
        path.unlink(missing_ok=True)
    reason = obstacle()
    if reason:
        raise RuntimeError(reason)
    nvcc, names = find_nvcc(), architectures()
    assert nvcc is not None  # or there was an obstacle
    sources = sources_for(names)
    objects = compile_objects(sources, nvcc=nvcc, names=names)
    library.parent.mkdir(parents=True, exist_ok=True)
    hopper = any(is_hopper(path) for path in sources)
    release = ".".join(nvcc_version(nvcc).split(".")[:2])
    facts = {
        "architectures": _split(names),
        "cutlass": hopper,
        "nvcc": release,
        "torch": torch_version()[0],
    }
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        link(objects, made, nvcc=nvcc)
        made.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        made.replace(library)
        made.with_suffix(".json").replace(record)
    description = f"CUDA kernels for {' and '.join(_split(names))} by nvcc {release}"
    if "9.0a" in _split(names) and not hopper and any(map(is_hopper, FOLDER.glob("*/*.cu"))):
        description += f", without those for Hopper on CUTLASS: {NO_CUTLASS}"
    return description


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        print(f"{sys.argv[1]}: {build(Path(sys.argv[1]).resolve())}")
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
