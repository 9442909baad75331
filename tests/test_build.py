"""The C++ extension: build, linked libraries, memory and errors."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from resfast.ops import extension
from resfast.ops.augment import op as augment
from resfast.ops.augment.op import check_arguments

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location(
    "resfast_build", ROOT / "build_backend" / "resfast_build.py"
)
resfast_build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(resfast_build)
cuda_build = resfast_build.cuda_build

needs_compiler = pytest.mark.skipif(
    resfast_build.compiler() is None, reason="there is no C++ compiler"
)
needs_extension = pytest.mark.skipif(
    extension.MISSING is not None, reason=f"without the extension: {extension.MISSING}"
)
needs_gcc_on_linux = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux"
)


def extension_path() -> Path:
    """The compiled kernels that this process has loaded; torchvision has a ``_C`` too."""
    folder = Path(extension.__file__).parents[1]
    loaded = [Path(name) for name in torch.ops.loaded_libraries]
    (path,) = [path for path in loaded if path.parent == folder and path.name.startswith("_C.")]
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the package is built from."""
    return copy_source(tmp_path)


def copy_source(parent: Path) -> Path:
    folder = parent / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("resfast", "csrc", "build_backend", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def build(source: Path, *, editable: bool = False, **environment: str) -> tuple[str, str, Path]:
    """Builds a wheel with the backend itself; what it printed, its tag and the file."""
    target = source.parent / "wheels"
    target.mkdir(exist_ok=True)
    kind = "editable" if editable else "wheel"
    done = run_backend(source, f"build_{kind}({str(target)!r})", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("*.whl")
    return done.stdout + done.stderr, wheel.stem.split("-", 2)[2], wheel


def run_backend(source: Path, call: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a hook of the build backend in a fresh interpreter, as pip does."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RESFAST_")}
    env["RESFAST_CUDA"] = "0"  # they take minutes; the tests of their build say otherwise
    return subprocess.run(
        [sys.executable, "-c", f"import resfast_build; print(resfast_build.{call})"],
        cwd=source,
        env={**env, "PYTHONPATH": "build_backend", **environment},
        capture_output=True,
        text=True,
    )


def broken_compiler(folder: Path) -> str:
    path = folder / "broken-c++"
    path.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


# -- build -------------------------------------------------------------------------------------


@needs_compiler
def test_development_install_has_the_extension():
    assert extension.MISSING is None


SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"


@pytest.fixture(scope="session")
def sanitizers() -> list[str]:
    """The run-time libraries of g++'s sanitizers, where g++ is what the kernels are built with."""
    named = shlex.split(resfast_build.compiler() or "")
    if sys.platform != "linux" or not named or not is_gcc(named):
        return []
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [*named, f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(done.stdout.strip())  # the name alone where it is missing
    return found if all(Path(path).is_absolute() for path in found) else []


def is_gcc(command: list[str]) -> bool:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return "Free Software Foundation" in done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory, sanitizers) -> tuple[str, str, Path]:
    """A wheel with all C++ kernels, of which two tests share the minute that it takes.

    Sanitized where that is possible, and with -Og: -O3 takes three times as long.
    """
    folder = tmp_path_factory.mktemp("built")
    flags = f"-Og -g1 {SANITIZE}" if sanitizers else "-Og"
    return build(copy_source(folder), CXXFLAGS=flags)


@needs_compiler
@pytest.mark.timeout(900)
def test_wheel_holds_the_extension_and_compiles_without_a_warning(built):
    output, tag, wheel = built
    assert not tag.startswith("py3-none"), tag
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    (library,) = [name for name in names if name.endswith((".so", ".dylib"))]
    assert re.fullmatch(r"resfast/_C\.abi3\.(so|dylib)", library)
    assert tag.startswith("cp311-abi3-"), tag
    assert not re.search(r"csrc/\S+: (warning|error)", output), output
    assert "without the C++ kernels" not in output


def test_extension_is_left_out_on_request(source):
    output, tag, wheel = build(source, RESFAST_EXTENSION="0")
    assert tag == "py3-none-any"
    assert output.count("installed without the C++ kernels: RESFAST_EXTENSION is 0") == 1
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_C." in name]


def test_no_compiler_is_reported_once_and_the_package_installs_without(source):
    output, tag, _ = build(source, CXX="no-such-compiler")
    assert tag == "py3-none-any"
    assert output.count("without the C++ kernels: no C++ compiler was found") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows")
def test_broken_compiler_is_reported_with_the_error_and_the_package_installs_without(source):
    stale = source / "resfast" / f"_C{extension.importlib.machinery.EXTENSION_SUFFIXES[0]}"
    stale.touch()
    output, _, wheel = build(source, editable=True, CXX=broken_compiler(source.parent))
    assert "this compiler is broken" in output
    assert "installed without the C++ kernels: compiling them failed" in output
    assert not stale.exists()
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_C." in name]


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "broken"])
def test_extension_that_is_required_and_cannot_be_built_is_an_error(compiler, source):
    name = broken_compiler(source.parent) if compiler == "broken" else compiler
    done = run_backend(source, "build_wheel('.')", CXX=name, RESFAST_EXTENSION="1")
    assert done.returncode != 0
    assert "resfast: the C++ kernels cannot be built" in done.stderr
    assert not list(source.glob("*.whl"))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_torch_is_a_build_requirement_only_where_it_is_compiled_against(kind, source):
    call = f"get_requires_for_build_{kind}()"
    python = Path(sys.executable).name  # any program will do: nothing is compiled
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for environment, needed in (
        ({"CXX": python, "PATH": path}, sys.platform != "win32"),
        ({"CXX": python, "PATH": path, "RESFAST_EXTENSION": "1"}, sys.platform != "win32"),
        ({"CXX": python, "PATH": path, "RESFAST_EXTENSION": "0"}, False),
        ({"CXX": "no-such-compiler"}, False),
        ({"CXX": "no-such-compiler", "RESFAST_EXTENSION": "1"}, False),
    ):
        done = run_backend(source, call, **environment)
        assert done.returncode == 0, done.stderr
        assert ("torch>=2.11" in done.stdout.splitlines()[-1]) == needed, environment


def test_source_distribution_holds_what_a_build_needs(source):
    done = run_backend(source, f"build_sdist({str(source.parent)!r})")
    assert done.returncode == 0, done.stderr
    (path,) = source.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        str(file.relative_to(ROOT).as_posix())
        for folder in ("csrc", "build_backend")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".cpp", ".cu", ".cuh", ".h", ".py")
    }
    assert {
        "csrc/cpu/augment/augment.cpp",
        "csrc/cuda/conv/conv.cu",
        "csrc/cuda/build.py",
    } <= needed
    assert needed | {"setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", "_CUDA.json"))]


@needs_compiler
def test_every_file_of_the_kernels_is_known_to_the_build():
    """A source outside the folders it looks in would be left out, a header changed unnoticed."""
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")]
    made = {extension.name: extension for extension in resfast_build.extensions()}["resfast._C"]
    assert sorted(made.sources) == sorted(name for name in files if name.endswith(".cpp"))
    shared = ("csrc/common/", "csrc/cpu/")
    headers = [name for name in files if name.endswith(".h") and name.startswith(shared)]
    assert sorted(made.depends) == sorted(headers)
    of_cuda = [path for path in files if path.endswith(".cu")]
    assert sorted(resfast_build._files("csrc/cuda/*/*.cu")) == sorted(of_cuda)
    names = {path.name for path in cuda_build.sources_for("8.0")}
    assert names == {Path(name).name for name in of_cuda if "/conv_hopper/" not in name}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_again_where_a_kernel_changed():
    done = subprocess.run(
        ["make", "--silent", "--eval=kernels: ; @echo $(KERNELS)", "kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "build_backend").rglob("*.py")]
    kept = {
        path.relative_to(ROOT).as_posix() for path in sources if path.suffix not in (".md", ".pyc")
    }
    assert set(done.stdout.split()) == kept


# -- build of the CUDA kernels, with a compiler that only says that it is nvcc --------------------

NVCC = r"""#!/bin/sh
echo "begin $*" >> "$(dirname "$0")/log"
case "$*" in
  *--version*) echo "Cuda compilation tools, release VERSION.9, VVERSION.9.1";;
  *--dryrun*) echo "#\$ TOP=$(dirname "$0")/..";;
  *broken.cu*) echo "broken.cu(1): error: no such kernel" >&2; exit 1;;
  *)
    for last; do :; done
    echo "ptxas info: 7 registers" >&2
    sleep 0.2
    echo | g++ -x c++ -c - -o "$last";;
esac
echo "end $*" >> "$(dirname "$0")/log"
"""

needs_torch_with_cuda = pytest.mark.skipif(
    torch.version.cuda is None or sys.platform != "linux" or not shutil.which("g++"),
    reason="needs a torch with CUDA, and g++ on Linux",
)


def make_nvcc(home: Path, *, version: str | None = None) -> Path:
    """A CUDA_HOME whose nvcc writes empty objects and a log; of torch's version of CUDA."""
    (home / "bin").mkdir(parents=True)
    path = home / "bin" / "nvcc"
    version = version or str(torch.version.cuda).partition(".")[0]
    path.write_text(NVCC.replace("VERSION", version), encoding="utf-8")
    path.chmod(0o755)
    cuda_build.nvcc_version.cache_clear()
    cuda_build._toolkit.cache_clear()
    return path


def compiled(nvcc: Path) -> list[str]:
    """Names of the files that it compiled so far."""
    lines = (nvcc.parent / "log").read_text().splitlines()
    return sorted(
        Path(line.split(" -c ")[1].split()[0]).name for line in lines if line.startswith("end -std")
    )


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one operator with small files, instead of csrc/cuda; a clean environment."""
    folder = tmp_path / "cuda" / "conv"
    folder.mkdir(parents=True)
    (folder / "a.cu").write_text('#include "a.h"\n')
    (folder / "b.cu").write_text('#include "../both.h"\n#include <vector>\n')
    (folder / "a.h").write_text('#include "../both.h"\n')
    (folder.parent / "both.h").write_text("// one\n")
    monkeypatch.setattr(cuda_build, "FOLDER", folder.parent)
    monkeypatch.setattr(cuda_build, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(cuda_build, "_capabilities", set)
    for name in ("CUDA_HOME", "CUTLASS_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def small_source(source: Path) -> Path:
    """With one C++ file alone, so that the tests of CUDA do not wait for the others."""
    for path in (source / "csrc" / "cpu").rglob("*.cpp"):
        if path.name != "philox.cpp":
            path.unlink()
    return source


@needs_torch_with_cuda
def test_wheel_holds_the_cuda_kernels_and_says_what_they_are_for(small_source):
    nvcc = make_nvcc(small_source.parent / "home")
    environment = {"CUDA_HOME": str(nvcc.parents[1]), "TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}
    output, tag, wheel = build(small_source, RESFAST_CUDA="1", **environment)
    release = cuda_build.nvcc_version(nvcc).rpartition(".")[0]
    assert output.count(f"resfast: CUDA kernels for 8.0 and 9.0+PTX by nvcc {release}") == 1
    assert not tag.startswith("py3-none")
    with zipfile.ZipFile(wheel) as archive:
        assert {"resfast/_CUDA.so", "resfast/_CUDA.json"} < set(archive.namelist())
        facts = json.loads(archive.read("resfast/_CUDA.json"))
    assert facts == {
        "architectures": ["8.0", "9.0+PTX"],
        "cutlass": False,
        "nvcc": release,
        "torch": torch.__version__,
    }
    assert {"conv.cu", "conv_bf16.cu"} <= set(compiled(nvcc))
    wheel.unlink()
    _, _, wheel = build(small_source, RESFAST_CUDA="0")  # in the same tree
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_CUDA" in name]


@needs_torch_with_cuda
def test_editable_install_has_the_cuda_kernels_and_loses_those_of_before(small_source):
    nvcc = make_nvcc(small_source.parent / "home")
    environment = {"CUDA_HOME": str(nvcc.parents[1]), "TORCH_CUDA_ARCH_LIST": "8.0"}
    library = small_source / "resfast" / "_CUDA.so"
    build(small_source, editable=True, RESFAST_CUDA="1", **environment)[2].unlink()
    first = compiled(nvcc)
    assert library.exists()
    assert library.with_suffix(".json").exists()
    build(small_source, editable=True, RESFAST_CUDA="1", **environment)[2].unlink()
    assert compiled(nvcc) == first  # nothing is compiled again
    (small_source / "csrc" / "cuda" / "conv" / "broken.cu").touch()
    output, _, wheel = build(small_source, editable=True, RESFAST_CUDA="", **environment)
    assert "resfast: installed without the CUDA kernels: nvcc" in output
    assert "broken.cu(1): error: no such kernel" in output
    assert not library.exists()
    assert not library.with_suffix(".json").exists()
    assert list((small_source / "resfast").glob("_C.*"))  # the others are there
    wheel.unlink()
    done = run_backend(small_source, "build_wheel('.')", RESFAST_CUDA="1", **environment)
    assert done.returncode != 0
    assert "resfast: the CUDA kernels cannot be built: nvcc" in done.stderr
    library.touch()
    output, _, _ = build(small_source, editable=True, RESFAST_EXTENSION="0")
    assert not library.exists()
    assert output.count("installed without the CUDA kernels: RESFAST_CUDA is 0") == 1


def test_cuda_kernels_that_are_required_and_cannot_be_built_are_an_error(source):
    for environment, reason in (
        ({"CUDA_HOME": "/nowhere"}, "there is no nvcc in CUDA_HOME=/nowhere"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found"),
        ({"RESFAST_EXTENSION": "0"}, "RESFAST_EXTENSION is 0"),
    ):
        done = run_backend(source, "build_wheel('.')", RESFAST_CUDA="1", **environment)
        assert done.returncode != 0
        if torch.version.cuda is None and "CUDA_HOME" in environment:
            reason = "is built without CUDA"
        assert "resfast: the CUDA kernels cannot be built: " in done.stderr
        assert reason in done.stderr


def test_bad_number_of_jobs_is_an_error(source):
    done = run_backend(source, "build_wheel('.')", MAX_JOBS="many")
    assert done.returncode != 0
    assert "MAX_JOBS is 'many'; expected a number of at least 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_reason_against_cuda_kernels_says_what_to_do(kernels, tmp_path, monkeypatch):
    def reason(version: str = "2.15.0", cuda: str | None = "13.2") -> str | None:
        monkeypatch.setattr(cuda_build, "torch_version", lambda: (version, cuda))
        return cuda_build.obstacle()

    assert reason("2.15.0+cpu", None) == "torch 2.15.0+cpu is built without CUDA"
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    assert "`pip install nvidia-cuda-nvcc==13.2.* nvidia-nvvm==13.2.* " in reason()
    old = make_nvcc(tmp_path / "old", version="12")
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: old)
    assert f"nvcc is of CUDA 12.9.1 ({old}) and torch of 13.2" in reason()
    assert "set CUDA_HOME to a toolkit of CUDA 13" in reason()
    new = make_nvcc(tmp_path / "new", version="13")
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: new)
    assert reason() is None
    new.write_text("#!/bin/sh\necho not nvcc\n")
    cuda_build.nvcc_version.cache_clear()
    assert "does not name a version of nvcc: 'not nvcc" in reason()
    make_nvcc(tmp_path / "newer", version="13").rename(new)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert "architecture '7.5' in '7.5'; expected 8.0 or newer" in reason()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(cuda_build, "_capabilities", lambda: {(7, 5)})
    assert "compute capability 7.5, and the kernels need 8.0 or newer" in reason()


def test_compiler_is_that_of_cuda_home_then_of_the_packages_then_of_path(
    kernels, tmp_path, monkeypatch
):
    by_path = make_nvcc(tmp_path / "path")
    monkeypatch.setenv("PATH", str(by_path.parent), prepend=os.pathsep)
    monkeypatch.setattr(cuda_build, "_pip_toolkits", list)
    assert cuda_build.find_nvcc() == by_path
    package = make_nvcc(tmp_path / "cu13")
    monkeypatch.setattr(cuda_build, "_pip_toolkits", lambda: [tmp_path / "cu13"])
    assert cuda_build.find_nvcc() == by_path  # one package of three
    for part in ("bin/crt", "nvvm/bin/cicc"):
        (tmp_path / "cu13" / part).mkdir(parents=True)
    assert cuda_build.find_nvcc() == package
    home = make_nvcc(tmp_path / "home")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda_build.find_nvcc() == home
    home.unlink()
    assert cuda_build.find_nvcc() is None  # what was named is not replaced by another


def test_architectures_are_those_of_the_gpus_here(kernels, tmp_path, monkeypatch):
    assert cuda_build.architectures() == cuda_build.ARCHITECTURES
    monkeypatch.undo()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    smi = tmp_path / "nvidia-smi"
    smi.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for smi_output, expected in (
        ("echo 9.0; echo 8.6; echo 9.0", "8.6;9.0a"),
        ("echo 12.0; echo 7.5", "12.0"),
        ("echo '[N/A]'", cuda_build.ARCHITECTURES),
        ("echo 'driver failed'; exit 9", cuda_build.ARCHITECTURES),
    ):
        smi.write_text(f"#!/bin/sh\n{smi_output}\n")
        assert cuda_build.architectures() == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    assert cuda_build.architectures() == "8.9"


def compile_all(nvcc: Path, names: str = "8.0") -> dict[str, str]:
    return cuda_build.compile_objects(nvcc=nvcc, names=names)


@needs_gcc_on_linux
def test_only_what_changed_is_compiled_again(kernels, tmp_path, monkeypatch):
    nvcc = make_nvcc(tmp_path / "home")
    first = compile_all(nvcc)
    assert set(first.values()) == {"ptxas info: 7 registers\n"}
    assert compile_all(nvcc) == first
    assert compiled(nvcc) == ["a.cu", "b.cu"]
    (kernels / "a.h").write_text('#include "../both.h"\n// changed\n')
    second = compile_all(nvcc)
    assert compiled(nvcc) == ["a.cu", "a.cu", "b.cu"]
    assert len(set(first) & set(second)) == 1
    (kernels.parent / "both.h").write_text("// two\n")
    compile_all(nvcc)
    assert compiled(nvcc) == ["a.cu"] * 3 + ["b.cu"] * 2
    monkeypatch.setenv("CXX", f"env {shutil.which('g++')} -pthread")  # as it is without
    compile_all(nvcc)
    assert compiled(nvcc) == ["a.cu"] * 3 + ["b.cu"] * 2
    compile_all(nvcc, "8.0;9.0")  # for others
    assert compiled(nvcc) == ["a.cu"] * 4 + ["b.cu"] * 3
    nvcc.write_text(nvcc.read_text().replace(".9.1", ".9.2"))  # by another compiler
    cuda_build.nvcc_version.cache_clear()
    compile_all(nvcc)
    assert compiled(nvcc) == ["a.cu"] * 5 + ["b.cu"] * 4
    other = tmp_path / "other-c++"
    other.touch(0o755)
    monkeypatch.setenv("CXX", str(other))
    compile_all(nvcc)
    assert compiled(nvcc) == ["a.cu"] * 6 + ["b.cu"] * 5
    assert (nvcc.parent / "log").read_text().count(f"-ccbin {other} ") == 4  # begin and end of each


@needs_gcc_on_linux
def test_file_that_does_not_compile_leaves_nothing_behind(kernels, tmp_path):
    nvcc = make_nvcc(tmp_path / "home")
    (kernels / "broken.cu").touch()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"fails for broken.cu:\nbroken.cu\(1\): error"):
            compile_all(nvcc)
    assert not list((tmp_path / "cache").glob("*broken*"))


@needs_gcc_on_linux
@pytest.mark.parametrize(("jobs", "most"), [("1", 1), ("3", 3)])
def test_as_many_files_at_a_time_as_max_jobs_says(kernels, tmp_path, monkeypatch, jobs, most):
    for i in range(6):
        (kernels / f"{i}.cu").write_text(f"// {i}\n")
    nvcc = make_nvcc(tmp_path / "home")
    monkeypatch.setenv("MAX_JOBS", jobs)
    compile_all(nvcc)
    running = seen = 0
    for line in (nvcc.parent / "log").read_text().splitlines():
        if " -c " in line and "--dryrun" not in line:
            running += 1 if line.startswith("begin") else -1
            seen = max(seen, running)
    assert seen == most


@needs_torch_with_cuda
def test_kernels_on_cutlass_are_built_for_hopper_where_it_is_installed(
    kernels, tmp_path, monkeypatch
):
    nvcc = make_nvcc(tmp_path / "home")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    (kernels / "hopper_x.cu").touch()
    version = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    version.parent.mkdir(parents=True)
    library = tmp_path / "_CUDA.so"
    monkeypatch.setattr(cuda_build, "_folder_of", lambda name, of=cuda_build._folder_of: (
        None if name == "cutlass_library" else of(name)
    ))  # fmt: skip
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    output = cuda_build.build(library)
    assert output.endswith("`pip install --no-deps nvidia-cutlass`, or set CUTLASS_HOME")
    assert json.loads((tmp_path / "_CUDA.json").read_text())["cutlass"] is False
    monkeypatch.setenv("CUTLASS_HOME", str(tmp_path / "cutlass"))
    assert cuda_build.find_cutlass() is None  # the folder is empty
    version.write_text("1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert "CUTLASS" not in cuda_build.build(library)
    assert "hopper_x.cu" not in compiled(nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    assert "CUTLASS" not in cuda_build.build(library)
    assert json.loads((tmp_path / "_CUDA.json").read_text())["cutlass"] is True
    (command,) = [
        line for line in (nvcc.parent / "log").read_text().splitlines()
        if line.startswith("end") and "hopper_x.cu" in line
    ]  # fmt: skip
    assert "sm_90a" in command
    assert "sm_80" not in command
    assert f"-isystem {tmp_path}/cutlass/include" in command
    version.write_text("2")
    cuda_build.build(library)
    assert compiled(nvcc).count("hopper_x.cu") == 2


def test_cuda_kernels_are_left_out_at_run_time_on_request(tmp_path):
    code = "from resfast.ops import extension; print(extension.CUDA_MISSING)"
    for name in ("RESFAST_EXTENSION", "RESFAST_CUDA"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), name: "0"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == f"{name} is 0", done.stderr


# -- what it links to --------------------------------------------------------------------------


@needs_extension
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("nm"), reason="needs nm and ELF files"
)
def test_extension_uses_only_the_stable_interface_of_torch():
    path = extension_path()
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    )
    undefined = [line.split()[-2:] for line in done.stdout.splitlines()]
    stable, others = set(), set()
    for kind, symbol in undefined:
        if re.match(r"(aoti_)?torch_[a-z0-9_]+$", symbol):
            stable.add(symbol)
        elif kind != "w" and not re.search(
            r"^_ZNK?St|@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$", symbol
        ):
            others.add(symbol)
    assert {"torch_parallel_for", "aoti_torch_library_init_impl"} <= stable
    assert not others


@needs_extension
@pytest.mark.parametrize("schema_first", [False, True])
def test_schema_and_kernel_may_be_registered_in_either_order(schema_first, tmp_path):
    steps = [
        f"torch.ops.load_library({str(extension_path())!r})",
        "library = torch.library.Library('resfast', 'FRAGMENT')\n"
        "library.define('philox(Tensor indices, int seed, int epoch, int stream) -> Tensor')",
    ]
    code = ["import torch", *(reversed(steps) if schema_first else steps)]
    code.append("print(torch.ops.resfast.philox(torch.arange(3), 1, 2, 3).shape)")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([4, 3])"


# -- results and memory ------------------------------------------------------------------------

# Compares every combination of steps with the reference and prints a digest of the results; then
# gives values out of range without `check`, which may give any pixel but must not leave the image.
CASES = """
import hashlib, itertools, sys
import torch
from resfast.ops import extension
if len(sys.argv) > 1:
    torch.ops.load_library(sys.argv[1])
    extension.MISSING = None
assert extension.MISSING is None, extension.MISSING
from resfast.ops.augment import op as augment, reference
from resfast.ops.philox import op as philox

generator = torch.Generator().manual_seed(0)
def rand(*shape):
    return torch.rand(shape, generator=generator)
def randint(low, high, *shape):
    return torch.randint(low, high, shape, generator=generator)

digest = hashlib.sha256()
def add(tensor):
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())

sizes = [(32, 32), (28, 28), (33, 31), (1, 1), (2, 5), (5, 1)]
for (height, width), channels in itertools.product(sizes, (1, 2, 3, 4)):
    count, batch = 3, 4
    images = randint(0, 256, count, height, width, channels).to(torch.uint8)
    offset, scale = rand(channels) * 255, rand(channels) / 50 + 0.001
    shift = torch.stack(
        [randint(1 - side, side, count) for side in (height, width)], 1
    ).int()
    flip = rand(count) < 0.5
    affine = torch.eye(2, 3) * 0.7 + (rand(count, 2, 3) - 0.5) * 0.3
    color = rand(count, channels, channels + 1)
    box = randint(-3, 36, count, 4).int()
    mix = randint(0, count, batch), rand(batch), randint(-3, 36, batch, 4).int()
    geometry = [(None, None, None), (shift, None, None), (shift, flip, None), (None, None, affine)]
    for step, (moved, matrix, cutout, mixed, zero) in enumerate(itertools.product(
        geometry, (None, color), (None, box), ((None, None, None), mix), (False, True)
    )):
        indices = randint(0, count, 1 if step % 5 == 0 else batch)
        if len(indices) == 1:
            mixed = tuple(part if part is None else part[:1].clone() for part in mixed)
        dtype = augment.DTYPES[step % 3]
        args = images, indices, offset, scale, *moved, matrix, cutout, *mixed, zero, dtype
        found, expected = torch.ops.resfast.augment(*args, False), reference.augment(*args)
        if matrix is None:
            assert torch.equal(found, expected), (height, width, channels, step)
        else:
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-4)
        add(found)
    wild = [
        (torch.full((count, 2), value, dtype=torch.int32), None, None)
        for value in (-2**31, -100, 100, 2**31 - 1)
    ] + [
        (None, None, torch.full((count, 2, 3), value))
        for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e5, 300.0)
    ]
    edges = torch.tensor([-2**31, -2**31, 2**31 - 1, 2**31 - 1], dtype=torch.int32)
    for moved, matrix, zero in itertools.product(wild, (None, color), (False, True)):
        torch.ops.resfast.augment(
            images, indices, offset, scale, *moved, matrix, edges.repeat(count, 1),
            torch.zeros_like(indices), torch.full((len(indices),), float("nan")),
            edges.repeat(len(indices), 1), zero, torch.float32, False,
        )
for size in (0, 1, 7, 1001):
    indices = torch.randint(-2**63, 2**63 - 1, (size,), generator=generator)
    words = philox.philox(indices, seed=-5, epoch=2**32 - 1, stream=3)
    assert torch.equal(words, reference.philox(indices, -5, 2**32 - 1, 3))
    add(words)

# The convolutions: their numbers are tested elsewhere, here only what they touch.
ops, last = torch.ops.resfast, torch.channels_last


def run_chains(kind, side=0):
    from tests.ops.test_network import WINOGRAD, Planned, images as network_images

    for channels, height, width, layers in WINOGRAD.values():
        x = network_images(5, channels, height, width, kind)
        for item, wide in itertools.product((5, 2), (False, True)):
            planned = Planned(layers(), x.shape, 2, item, kind, side)
            planned(x.float().contiguous() if wide else x)
            planned(torch.full_like(x, float("nan")))


if len(sys.argv) > 1 and hasattr(ops, "network_run") and ops.network_f32_supported():
    run_chains("bf16 in fp32")
    for tile in (0, 2, 4):
        run_chains("fp32", tile)
if len(sys.argv) > 1 and hasattr(ops, "conv_bf16_supported") and ops.conv_bf16_supported():
    from resfast.ops.conv_train import op as conv_train

    for n, c, k, side, stride, padding, tile in [
        (3, 32, 48, 9, 1, 1, 2), (2, 40, 64, 8, 2, 1, 2), (1, 33, 35, 7, 1, 0, 2),
        (2, 64, 32, 5, 1, 2, 2), (3, 3, 20, 6, 2, 1, 2), (1, 250, 60, 3, 1, 1, 2),
        (5, 16, 130, 4, 2, 0, 2), (2, 128, 96, 5, 2, 2, 2), (3, 33, 35, 9, 1, 1, 4),
        (1, 250, 60, 3, 1, 1, 4), (2, 24, 130, 7, 1, 2, 4),
    ]:
        x = torch.randn(n, c, side, side).to(torch.bfloat16, memory_format=last).requires_grad_()
        weight = torch.randn(k, c, 3, 3, requires_grad=True)
        y = conv_train.conv2d(x, weight, stride, padding, tile)
        y.backward(torch.randn_like(y))
        residual = torch.randn(y.shape).to(torch.bfloat16, memory_format=last)
        half, geometry = weight.detach().bfloat16(), [k, c, 3, 3, *[stride] * 2, *[padding] * 2]
        rest = torch.randn(k), residual, geometry, 3, 0.1
        ops.conv_gemm(x.detach(), ops.conv_gemm_pack(half), *rest)
        ops.conv_winograd(x.detach(), ops.conv_winograd_pack(half, stride), *rest)
        if ops.conv_bf16_amx():
            ops.conv_direct(x.detach(), ops.conv_direct_pack(half), *rest)
            wide = weight.detach().contiguous(memory_format=last)
            ops.conv_direct(x.detach(), ops.conv_direct_train_pack(wide, False), *rest)
            grad = torch.randn(y.shape).to(torch.bfloat16, memory_format=last)
            ops.conv_direct_weight_gradient(x.detach(), grad, stride, padding)

    run_chains("bf16")

    from resfast.ops.norm_act import op as norm_act

    for (n, c, height, width), pool in itertools.product(
        [(3, 64, 9, 7), (2, 33, 4, 6), (5, 24, 5, 5), (1, 130, 2, 3), (40, 96, 6, 6)], (False, True)
    ):
        x = torch.randn(n, c, height, width).to(torch.bfloat16, memory_format=last)
        sizes = norm_act.result_shape(x, pool)
        residual = torch.randn(sizes).to(torch.bfloat16, memory_format=last).requires_grad_()
        for activation, other in itertools.product(norm_act.ACTIVATIONS, (None, residual)):
            weight = torch.randn(c, requires_grad=True)
            y, _, _ = norm_act.batch_norm_act(
                x.requires_grad_(), weight, torch.randn(c), other, activation=activation, pool=pool
            )
            y.backward(torch.randn_like(y))

    from resfast.ops.frozen_conv import op as frozen_conv
    from resfast.ops.global_pool import op as global_pool

    for n, c, height, width, k, side, before, behind in [
        (3, 3, 9, 7, 16, 2, 0, 1), (2, 4, 5, 6, 100, 4, 1, 2), (5, 1, 3, 3, 7, 3, 0, 0),
    ]:
        x = torch.randn(n, c, height, width).to(torch.bfloat16, memory_format=last)
        weight, bias = torch.randn(k, c, side, side), torch.randn(k, requires_grad=True)
        for activation in norm_act.ACTIVATIONS:
            y = frozen_conv.frozen_conv_act(
                x, weight, bias, before=before, after=behind, activation=activation
            )
            y.backward(torch.randn_like(y))
    for shape, kind in itertools.product(
        [(3, 64, 4, 4), (2, 33, 3, 5), (5, 7, 1, 1)], ("max", "avg", "both")
    ):
        x = torch.randn(shape).to(torch.bfloat16, memory_format=last).requires_grad_()
        y = global_pool.global_pool(x, kind)
        y.backward(torch.randn_like(y))
print(digest.hexdigest())
"""


def run_cases(tmp_path: Path, *arguments: str, **environment: str) -> str:
    """Runs CASES on two threads, so that kernels divide their work; the digest of the results."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run(
        [sys.executable, "-c", CASES, *arguments],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout.strip()


@needs_extension
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set elsewhere"
)
def test_every_instruction_set_gives_the_same_results(tmp_path):
    digests = {
        run_cases(tmp_path, ATEN_CPU_CAPABILITY=name) for name in ("default", "avx2", "avx512")
    }
    assert len(digests) == 1
    assert re.fullmatch(r"[0-9a-f]{64}", digests.pop())


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_stay_inside_their_memory_and_have_no_undefined_behaviour(
    built, sanitizers, tmp_path
):
    if not sanitizers:
        pytest.skip("the C++ compiler is no g++ with sanitizers")
    with zipfile.ZipFile(built[2]) as archive:
        (name,) = [name for name in archive.namelist() if "/_C." in name]
        library = archive.extract(name, tmp_path)
    run_cases(
        tmp_path,
        library,
        RESFAST_EXTENSION="0",  # the sanitized kernels take the place of the installed ones
        LD_PRELOAD=" ".join(sanitizers),
        ASAN_OPTIONS="detect_leaks=0",
    )


# -- arguments ---------------------------------------------------------------------------------


def valid_arguments() -> dict[str, object]:
    """Arguments of the operator, by name, that it takes."""
    return {
        "images": torch.zeros(5, 4, 6, 3, dtype=torch.uint8),
        "indices": torch.tensor([4, 0]),
        "offset": torch.zeros(3),
        "scale": torch.ones(3),
        "shift": torch.zeros(5, 2, dtype=torch.int32),
        "flip": torch.zeros(5, dtype=torch.bool),
        "affine": None,
        "color": torch.eye(3, 4).repeat(5, 1, 1),
        "cutout": torch.zeros(5, 4, dtype=torch.int32),
        "partner": torch.tensor([1, 2]),
        "weight": torch.ones(2),
        "box": torch.zeros(2, 4, dtype=torch.int32),
        "zero_padding": False,
        "dtype": torch.float32,
        "check": True,
    }


def affine(value: float) -> torch.Tensor:
    return torch.eye(2, 3).repeat(5, 1, 1).index_fill(2, torch.tensor([2]), value)


BAD = [
    {"images": torch.zeros(5, 4, 6, 3)},
    {"images": torch.zeros(5, 4, 6, dtype=torch.uint8)},
    {"images": torch.zeros(0, 4, 6, 3, dtype=torch.uint8)},
    {"images": torch.zeros(5, 4, 6, 5, dtype=torch.uint8)},
    {"images": torch.zeros(5, 3, 4, 6, dtype=torch.uint8).permute(0, 2, 3, 1)},
    {"dtype": torch.float64},
    {"dtype": torch.uint8},
    {"indices": torch.zeros(2)},
    {"indices": torch.zeros(2, dtype=torch.int32)},
    {"indices": torch.zeros(4, dtype=torch.int64)[::2]},
    {"offset": torch.zeros(4)},
    {"scale": torch.zeros(3, dtype=torch.float16)},
    {"shift": torch.zeros(5, 2, dtype=torch.int64)},
    {"shift": torch.zeros(2, 2, dtype=torch.int32)},
    {"flip": torch.zeros(5, dtype=torch.uint8)},
    {"color": torch.zeros(5, 3, 3)},
    {"cutout": torch.zeros(4, 5, dtype=torch.int32).T},
    {"partner": torch.zeros(3, dtype=torch.int64)},
    {"weight": None},
    {"box": torch.zeros(2, 4)},
    {"affine": affine(0)},
    {"indices": torch.tensor([0, 5])},
    {"indices": torch.tensor([-1, 7])},
    {"partner": torch.tensor([0, -(2**40)])},
    {"weight": torch.tensor([0.5, 1.5])},
    {"weight": torch.tensor([-0.25, 0.5])},
    {"weight": torch.tensor([float("nan"), 0.5])},
    {"shift": torch.tensor([[4, 0]] * 5, dtype=torch.int32)},
    {"shift": torch.tensor([[0, -6]] * 5, dtype=torch.int32)},
    {"affine": affine(-4.5), "shift": None, "flip": None},
    {"affine": affine(64), "shift": None, "flip": None},
    {"affine": affine(float("nan")), "shift": None, "flip": None},
]


@needs_extension
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: next(iter(bad)))
def test_operator_says_the_same_of_bad_arguments_as_the_python_check(bad):
    arguments = {**valid_arguments(), **bad}
    with pytest.raises((TypeError, ValueError)) as expected:
        check_arguments(**arguments)
    with pytest.raises(RuntimeError) as found:
        torch.ops.resfast.augment(*arguments.values())
    assert str(found.value).splitlines()[0] == str(expected.value)


@needs_extension
def test_values_of_rows_that_are_not_in_the_batch_are_not_checked():
    arguments = valid_arguments()
    arguments["shift"][3] = 99
    result = torch.ops.resfast.augment(*arguments.values())
    assert result.shape == (2, 3, 4, 6)
    assert result.is_contiguous(memory_format=torch.channels_last)


@needs_extension
def test_index_out_of_range_is_found_without_check():
    for name in ("indices", "partner"):
        arguments = {**valid_arguments(), name: torch.tensor([0, 5]), "check": False}
        with pytest.raises(RuntimeError, match="5 is out of range for 5 images; expected 0 to 4"):
            torch.ops.resfast.augment(*arguments.values())


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_floats_are_rounded_as_torch_rounds_them(dtype):
    """One pixel of value 1 and offset 0, so that the result is `scale` itself."""
    bits = torch.arange(0, 2**31, 2**31 // 99_991, dtype=torch.int64)
    bits = torch.cat([bits, *(torch.arange(0x38000000, 0x39000000, 97) + step for step in (0, 1))])
    bits = torch.cat([bits, (torch.arange(0, 2**15) << 16) + 0x8000])  # ties of bfloat16
    bits = torch.cat([bits, (torch.arange(0x1C000, 0x23E00) << 13) + 0x1000])  # and of float16
    values = bits[bits < 0x7F800000].to(torch.int32).view(torch.float32)
    values = torch.cat([values, -values])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    values = values[order[:80_000]].view(-1, 4)
    image = torch.ones(1, 1, 1, 4, dtype=torch.uint8)
    index, zero, nothing = torch.zeros(1, dtype=torch.int64), torch.zeros(4), [None] * 8
    for scale in values:
        found = torch.ops.resfast.augment(image, index, zero, scale, *nothing, False, dtype, False)
        assert torch.equal(found.flatten(), scale.to(dtype)), scale


@needs_extension
def test_philox_operator_refuses_bad_arguments():
    indices = torch.arange(4)
    for arguments, message in (
        ((indices.int(), 0, 0, 0), "indices are torch.int32; expected torch.int64"),
        ((indices[None], 0, 0, 0), r"indices are \[1, 4\]; expected \[B\]"),
        ((indices[::2], 0, 0, 0), "indices are not contiguous"),
        ((indices, 0, 2**32, 0), "epoch 4294967296 is out of range"),
        ((indices, 0, 0, -1), "stream -1 is out of range"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.resfast.philox(*arguments)


def test_left_out_at_run_time_on_request_and_said_once(tmp_path):
    code = """
import torch
from resfast.ops import extension
from resfast.ops.augment import op as augment
from resfast.ops.philox import op as philox
assert extension.MISSING == "RESFAST_EXTENSION is 0"
for _ in range(2):
    philox.philox(torch.arange(3), seed=0, epoch=0, stream=0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RESFAST_EXTENSION": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("replaced by slower PyTorch code: RESFAST_EXTENSION is 0") == 1


assert augment.SCHEMA.count("?") == 8  # what `nothing` and `valid_arguments` above rely on
