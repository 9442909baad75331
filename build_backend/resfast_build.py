"""Builds the package: setuptools, with the C++ and CUDA kernels wherever they can be compiled.

The kernels need a C++ compiler (``CXX``, or the one that Python was built with) and the headers of
torch, those for CUDA also a torch with CUDA and its compiler (see csrc/cuda/build.py). The
environment variables RESFAST_EXTENSION, of all kernels, and RESFAST_CUDA, of those for CUDA, decide
what happens without them:

    unset   the package is installed without the kernels, and the reason is printed
    1       that is an error
    0       they are not built even where they could be

MAX_JOBS says how many files are compiled at a time. A wheel with kernels is for every Python from
3.11 on (cp311-abi3) and every torch from 2.11 on.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch>=2.11"
"""The stable ABI of this version is compiled against; every later torch loads the result."""
NO_TORCH = f"{TORCH} is not installed here"
CPU, CUDA = "resfast._C", "resfast._CUDA"
TARGET = "0x020b000000000000"
OLDEST_PYTHON = "cp311"
"""Of a wheel with kernels, cp311-abi3: as ``requires-python`` in pyproject.toml."""
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # Results are the same for every instruction set, and loops with conditions are vectorized.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-DTORCH_TARGET_VERSION={TARGET}",
]


def _module(path: Path) -> Any:
    """A file of this repository that is no part of the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_build = _module(ROOT / "csrc" / "cuda" / "build.py")


def compiler() -> str | None:
    """The C++ compiler as CXX would name it; None where there is none."""
    named = os.environ.get("CXX")
    choices = [named] if named else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    return next((name for name in choices if name and shutil.which(shlex.split(name)[0])), None)


def obstacle() -> str | None:
    """Why the kernels are not built, or None where they can be."""
    if os.environ.get("RESFAST_EXTENSION") == "0":
        return "RESFAST_EXTENSION is 0"
    if sys.platform == "win32":
        return "they are not built on Windows"
    if compiler() is None:
        return "no C++ compiler was found (CXX names one)"
    if _torch() is None:
        return NO_TORCH
    return None


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels are not built, or None where they can be."""
    if os.environ.get("RESFAST_CUDA") == "0":
        return "RESFAST_CUDA is 0"
    return obstacle() or cuda_build.obstacle()


def _torch() -> Path | None:
    """Folder of the installed torch, which is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def say_without(kernels: str, variable: str, reason: str) -> None:
    """Says that the package goes without kernels; exits where they are required."""
    if os.environ.get(variable) == "1":
        raise SystemExit(f"resfast: the {kernels} kernels cannot be built: {reason}")
    print(f"resfast: installed without the {kernels} kernels: {reason}", file=sys.stderr)


def say_without_cpp(reason: str) -> None:
    say_without("C++", "RESFAST_EXTENSION", reason)


def say_without_cuda(reason: str) -> None:
    say_without("CUDA", "RESFAST_CUDA", reason)


def _files(*patterns: str) -> list[str]:
    """Of the repository, relative to it."""
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def extensions() -> list[Extension]:
    """What setup() takes as ``ext_modules``: those kernels that can be built."""
    torch, command = _torch(), compiler()
    if obstacle() is not None or torch is None or command is None:
        return []
    os.environ["CXX"] = command
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))  # again, after those they may change
    found = [
        Extension(
            CPU,
            _files("csrc/cpu/*/*.cpp"),
            depends=_files("csrc/common/*.h", "csrc/cpu/*/*.h"),
            language="c++",
            # As a system folder, so that the warnings are about this project's code.
            extra_compile_args=[*FLAGS, "-isystem", str(torch / "include"), *flags],
            # torch is loaded before the kernels are: they find it without a path of this machine.
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            py_limited_api=True,
            optional=True,  # BuildExt decides
        )
    ]
    if cuda_obstacle() is None:
        # A library of its own: the kernels for the CPU are there where CUDA's runtime is not.
        sources = _files("csrc/cuda/*/*.cu")
        headers = _files("csrc/common/*.h", "csrc/cuda/*/*.h", "csrc/cuda/*/*.cuh")
        found.append(Extension(CUDA, sources, depends=headers, optional=True))
    return found


def _built(folder: Path) -> Iterator[Path]:
    """The compiled kernels in a folder of the package."""
    for pattern in ("_C.*.so", "_C.*.pyd", "_CUDA.so", "_CUDA.json"):
        yield from folder.glob(pattern)


class BuildExt(build_ext):
    """Leaves kernels out where the compiler fails; setuptools or nvcc's words say why."""

    def run(self) -> None:
        for path in _built(Path(self.build_lib, "resfast")):  # of an earlier build
            path.unlink()
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_CUDA"):  # not a module: no tag of a Python
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, extension: Extension) -> None:
        if extension.name == CUDA:
            try:
                description = cuda_build.build(Path(self.get_ext_fullpath(CUDA)))
            except (RuntimeError, ValueError, OSError) as error:
                say_without_cuda(str(error))
            else:
                print(f"resfast: {description}", file=sys.stderr)
            return
        try:
            extension.extra_objects = self._compile(extension)
            extension.sources = []
            super().build_extension(extension)
        except (BaseError, CCompilerError) as error:
            say_without_cpp(f"compiling them failed: {error}")

    def _compile(self, extension: Extension) -> list[str]:
        """The objects of its sources, several at a time: setuptools compiles one by one."""

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                debug=self.debug,
                extra_postargs=extension.extra_compile_args,
            )

        with ThreadPoolExecutor(cuda_build.jobs()) as pool:
            return [path for paths in pool.map(compile_one, extension.sources) for path in paths]

    def copy_extensions_to_source(self) -> None:  # only for an editable install
        super().copy_extensions_to_source()
        record = Path(self.build_lib, "resfast", "_CUDA.json")
        if record.exists():
            self.copy_file(str(record), str(ROOT / "resfast" / record.name))


# -- the hooks of PEP 517 that differ from those of setuptools -----------------------------------


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    found = build_meta.get_requires_for_build_wheel(config_settings)
    return [*found, TORCH] if obstacle() in (None, NO_TORCH) else found


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    found = build_meta.get_requires_for_build_editable(config_settings)
    return [*found, TORCH] if obstacle() in (None, NO_TORCH) else found


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    _announce()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    _announce()
    for path in _built(ROOT / "resfast"):  # of an earlier build, also where none follow
        path.unlink()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _announce() -> None:
    try:
        cuda_build.jobs()
    except ValueError as error:
        raise SystemExit(f"resfast: {error}") from None
    for reason, say in ((obstacle(), say_without_cpp), (cuda_obstacle(), say_without_cuda)):
        if reason is not None:
            say(reason)
