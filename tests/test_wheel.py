"""Wheels with C++ kernels: for every Python and torch from the oldest on, and for older Linux."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_build import ROOT, build, copy_source, needs_compiler

_SPEC = importlib.util.spec_from_file_location("audit", ROOT / "build_backend" / "audit.py")
audit = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(audit)

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("objdump"), reason="needs objdump on Linux"
    ),
]
# Of manylinux_2_28: glibc 2.28 and the libstdc++ of GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the kernels of one operator and what all of them need."""
    source = copy_source(tmp_path_factory.mktemp("wheel"))
    for path in (source / "csrc" / "cpu").rglob("*.cpp"):
        if path.name not in ("philox.cpp", "portable.cpp"):
            path.unlink()
    return build(source)[2]


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("resfast/_C.abi3.so", tmp_path_factory.mktemp("library")))


def dynamic(library: Path, option: str) -> str:
    done = subprocess.run(["objdump", option, library], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_wheel_is_for_every_python_from_the_oldest_on(wheel):
    assert re.search(r"-cp311-abi3-linux_\w+\.whl$", wheel.name)


def test_the_library_does_not_use_python(library):
    undefined = [line for line in dynamic(library, "-T").splitlines() if "*UND*" in line]
    assert len(undefined) > 10
    assert not [line for line in undefined if re.search(r"\s_?Py\w+$", line)]
    needed = re.findall(r"NEEDED\s+(\S+)", dynamic(library, "-p"))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or name.startswith("libc10")]


def test_no_symbol_is_newer_than_those_of_manylinux_2_28(library):
    found = re.findall(r"\((GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\)", dynamic(library, "-T"))
    assert {name for name, _ in found} >= {"GLIBC", "GLIBCXX"}
    for name, version in found:
        assert tuple(map(int, version.split("."))) <= NEWEST[name], f"{name}_{version}"


def test_the_library_loads_where_only_torch_is_loaded(library):
    code = f"""
import torch
operators = torch.library.Library("resfast", "DEF")
operators.define(
    "philox(Tensor indices, int seed, int epoch, int stream) -> Tensor")
torch.ops.load_library({str(library)!r})
print(torch.ops.resfast.philox(torch.arange(2), 1, 2, 3).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size(["), done.stdout


def report(**values: object) -> dict[str, object]:
    symbols = {"libc.so.6": ["GLIBC_2.17"]}
    common = {"external_libs": {"libtorch_cpu.so": None}, "sym_tag": "manylinux_2_17_x86_64"}
    return {"versioned_symbols": symbols, **common, **values}


def test_the_audit_names_what_is_not_portable():
    assert audit.faults(report()) == []
    others = {"libtorch_cuda.so": None, "libcudart.so.13": None}
    assert audit.faults(report(external_libs=others)) == []
    (fault,) = audit.faults(report(external_libs={"libpng.so.6": None, "libtorch_cpu.so": None}))
    assert "libpng.so.6, which no Linux" in fault
    (fault,) = audit.faults(report(sym_tag="manylinux_2_34_x86_64"))
    assert "glibc 2.34" in fault
    (fault,) = audit.faults(report(sym_tag="linux_x86_64"))
    assert "no known Linux" in fault
