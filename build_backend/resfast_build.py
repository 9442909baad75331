"""Builds the package: setuptools, with the C++ kernels wherever they can be compiled.

The kernels need a C++ compiler (``CXX``, or the one that Python was built with) and the headers of
torch. The environment variable RESFAST_EXTENSION decides what happens without them:

    unset   the package is installed without the kernels, and the reason is printed
    1       that is an error
    0       they are not built even where they could be
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
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
TARGET = "0x020b000000000000"
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


def _torch() -> Path | None:
    """Folder of the installed torch, which is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def say_without(reason: str) -> None:
    """Says that the package goes without its kernels; exits where they are required."""
    if os.environ.get("RESFAST_EXTENSION") == "1":
        raise SystemExit(f"resfast: the C++ kernels cannot be built: {reason}")
    print(f"resfast: installed without the C++ kernels: {reason}", file=sys.stderr)


def extensions() -> list[Extension]:
    """What setup() takes as ``ext_modules``: the kernels, or nothing where they cannot be built."""
    torch, command = _torch(), compiler()
    if obstacle() is not None or torch is None or command is None:
        return []
    os.environ["CXX"] = command
    sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/*.cpp"))
    headers = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/*.h"))
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))  # again, after those they may change
    return [
        Extension(
            "resfast._C",
            sources,
            depends=headers,
            language="c++",
            # As a system folder, so that the warnings are about this project's code.
            extra_compile_args=[*FLAGS, "-isystem", str(torch / "include"), *flags],
            # torch is loaded before the kernels are: they find it without a path of this machine.
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            optional=True,  # BuildExt decides
        )
    ]


class BuildExt(build_ext):
    """Leaves the kernels out where the compiler fails; setuptools prints its error."""

    def build_extension(self, extension: Extension) -> None:
        try:
            super().build_extension(extension)
        except (BaseError, CCompilerError) as error:
            say_without(f"compiling them failed: {error}")

    def copy_extensions_to_source(self) -> None:  # only for an editable install
        for extension in self.extensions:  # kernels of an earlier build must not stay
            (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


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
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _announce() -> None:
    reason = obstacle()
    if reason is not None:
        say_without(reason)
