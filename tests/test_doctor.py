"""``python -m resfast.doctor``: every line is printed, whatever is broken."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from resfast.cli.doctor import environment, kernels
from resfast.cli.doctor import main as doctor
from resfast.cli.doctor.kernels import covers
from resfast.cli.doctor.line import Line, Options, dotted
from resfast.cli.doctor.main import examine, probe
from resfast.ops import extension

ROOT = Path(__file__).resolve().parents[1]


def run_doctor(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "resfast.doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def the_line(name: str, options: Options | None = None) -> Line:
    (line,) = probe(name, options or Options())
    return line


# -- the command -------------------------------------------------------------------------------


def test_a_real_run_finds_everything_needed_and_is_quick():
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_doctor("--data", "digits", "--json")
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    lines = {line["name"]: line for line in found["lines"]}
    assert set(doctor.PROBES) - {"CUDA device"} <= set(lines)
    assert {line["state"] for line in found["lines"]} <= {"ok", "missing"}
    assert torch.__version__ in lines["torch"]["text"]
    assert lines["C++ kernels"]["state"] == "ok"
    # Processor time: other programs may run at the same time.
    assert end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime < 15


def test_a_line_for_people_says_state_name_finding_and_what_to_do():
    assert str(Line("nvcc", "missing", "not found", "set CUDA_HOME")) == (
        "missing  nvcc          not found → set CUDA_HOME"
    )


def test_absent_data_that_was_asked_for_is_a_problem(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", {"data": None})
    assert doctor.main(["--data", f"folder:{tmp_path / 'no-such'}"]) == 1
    line = capsys.readouterr().out
    assert line.startswith("problem  data")
    assert "does not exist" in line


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", "signal 6"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import time; time.sleep(60)", "did not answer within"),
        ("raise OSError('libcuda.so is not there')", "OSError: libcuda.so is not there"),
    ],
)
def test_a_library_that_crashes_hangs_or_fails_costs_one_line(code, message, tmp_path, monkeypatch):
    folder = tmp_path / "nvidia" / "dali"
    folder.mkdir(parents=True)
    (tmp_path / "nvidia" / "__init__.py").touch()
    (folder / "__init__.py").write_text(f"print('noise')\n{code}\n")
    # Quick probes around the broken one.
    monkeypatch.setattr(doctor, "PROBES", dict.fromkeys(("resfast", "DALI", "Python")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, broken, last = examine(Options(), time_limit_s=5 if "sleep" in code else 60)
    assert (first.state, last.state) == ("ok", "ok")
    assert (broken.name, broken.state) == ("DALI", "problem")
    assert message in broken.text


def test_without_torch_every_line_is_still_there(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = {line.name: line for line in examine(Options())}
    assert list(lines) == list(doctor.PROBES)
    assert lines["Python"].state == "ok"
    assert lines["torch"].state == "problem"
    assert lines["CPU"] == Line("CPU", "missing", "not checked: module torch is not installed")


# -- single probes -----------------------------------------------------------------------------


def test_needed_packages_are_those_that_the_package_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {Requirement(line).name for line in project["dependencies"]}
    elsewhere = {"torch", "triton", "nvidia-dali-cuda130"}  # have lines of their own
    assert set(environment.REQUIRED.values()) == declared - elsewhere
    assert project["requires-python"] == f">={dotted(environment.PYTHON)}"
    assert f"torch>={dotted(environment.TORCH)}" in project["dependencies"]


def test_absent_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(environment, "installed", lambda name: name not in ("PIL", "tyro", "onnx"))
    line = the_line("packages")
    assert (line.state, line.todo) == ("problem", "pip install pillow tyro")
    line = the_line("optional")
    assert line.state == "missing"
    assert line.text.startswith("not installed: onnx (")


@pytest.mark.parametrize(("version", "state"), [("2.10.1+cu126", "problem"), ("2.11.0", "ok")])
def test_a_torch_that_is_too_old_is_a_problem(version, state, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    line = the_line("torch")
    assert line.state == state
    assert version in line.text


@pytest.mark.parametrize(
    ("missing", "state"),
    [
        ("/x/_C.so cannot be loaded (undefined symbol: abc)", "problem"),
        ("they were not built when resfast was installed", "missing"),
        ("RESFAST_EXTENSION is 0", "missing"),
    ],
)
def test_broken_kernels_are_a_problem_and_absent_ones_are_not(missing, state, monkeypatch):
    monkeypatch.setattr(extension, "MISSING", missing)
    line = the_line("C++ kernels")
    assert line.state == state
    assert missing in line.text
    assert "pip install" in line.todo


@pytest.mark.parametrize(
    ("name", "versions", "state", "text"),
    [
        ("_C.abi3.so", "2.17 2.2.5 2.9", "ok", "all later ones; for Linux with glibc 2.17"),
        ("_C.abi3.so", "2.34 2.17", "missing", "all later ones; for Linux with glibc 2.34"),
        ("_C.cpython-311-x86_64-linux-gnu.so", "2.17", "missing", "is for this Python alone"),
        ("_C.abi3.dylib", "", "ok", "all later ones"),
    ],
)
def test_where_else_the_kernels_run_is_said(name, versions, state, text, tmp_path, monkeypatch):
    names = b"".join(b"\0GLIBC_" + version.encode() for version in versions.split())
    (tmp_path / name).write_bytes(b"\x7fELF" + names + b"\0GLIBCXX_3.4.29\0")
    monkeypatch.setattr(kernels, "PACKAGE", tmp_path)
    monkeypatch.setattr(extension, "MISSING", None)
    line = the_line("portability")
    assert (line.state, bool(line.todo)) == (state, state == "missing")
    assert text in line.text
    monkeypatch.setattr(extension, "MISSING", "they were not built")
    assert the_line("portability").state == "missing"


class Gpu:
    """Stands in for ``torch.cuda`` with one device."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, index: int = 0) -> tuple[int, int]:
        return self.capability

    def get_device_properties(self, index: int) -> types.SimpleNamespace:
        major, minor = self.capability
        return types.SimpleNamespace(name="NVIDIA H200", major=major, minor=minor)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 130 * 2**30, 139 * 2**30


@pytest.mark.parametrize(
    ("record", "state", "message"),
    [
        ({"architectures": ["8.0", "9.0a"], "nvcc": "13.2", "cutlass": True}, "ok", "with CUTLASS"),
        ({"architectures": ["8.0+PTX"], "nvcc": "13.2", "cutlass": False}, "ok", "8.0+PTX"),
        (
            {"architectures": ["8.0", "8.6"], "nvcc": "13.2"},
            "problem",
            "not for this machine's 9.0a",
        ),
        ({"nvcc": "13.2"}, "problem", "cannot be read (KeyError"),
        (None, "problem", "cannot be read (FileNotFoundError"),
    ],
)
def test_cuda_kernels_must_be_built_for_the_device(record, state, message, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "PACKAGE", tmp_path)
    monkeypatch.setattr(torch, "cuda", Gpu((9, 0)))
    monkeypatch.setattr(extension, "CUDA_MISSING", None)
    if record is not None:
        (tmp_path / "_CUDA.json").write_text(json.dumps(record))
    line = the_line("CUDA kernels")
    assert line.state == state
    assert message in line.text
    assert bool(line.todo) == (state != "ok")


@pytest.mark.parametrize(
    ("missing", "gpu", "state", "message"),
    [
        ("/x/_CUDA.so cannot be loaded (no libcudart)", False, "problem", "no libcudart"),
        ("they were not built when", False, "missing", "not needed without a GPU: they were"),
        ("they were not built when", True, "missing", "cuDNN is used instead: they were"),
        ("RESFAST_CUDA is 0", True, "missing", "RESFAST_CUDA is 0"),
    ],
)
def test_cuda_kernels_that_are_not_there(missing, gpu, state, message, monkeypatch):
    monkeypatch.setattr(extension, "CUDA_MISSING", missing)
    if gpu:
        monkeypatch.setattr(torch, "cuda", Gpu((9, 0)))
    line = the_line("CUDA kernels")
    assert line.state == state
    assert message in line.text
    assert bool(line.todo) == (gpu or state == "problem")


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (12, 0), False),
        ("sm_90", (9, 0), False),
    ],
)
def test_which_devices_an_architecture_runs_on(architecture, capability, runs):
    assert covers(architecture, capability) == runs


def test_a_gpu_that_works_is_described(monkeypatch):
    one = torch.ones(1)
    monkeypatch.setattr(torch, "cuda", Gpu((9, 0)))
    monkeypatch.setattr(torch, "ones", lambda *size, device: one)
    line = the_line("CUDA device")
    assert (line.name, line.state) == ("cuda:0", "ok")
    assert "NVIDIA H200, compute capability 9.0, 130.0 of 139.0 GiB free" in line.text


def test_a_gpu_that_fails_is_a_problem(monkeypatch):
    def fail(*size: int, device: str) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(torch, "cuda", Gpu((5, 0)))
    monkeypatch.setattr(torch, "ones", fail)
    line = the_line("CUDA device")
    assert line.state == "problem"
    assert line.text == "NVIDIA H200 does not work: no kernel image is available"


@pytest.mark.parametrize(
    ("smi_output", "visible", "cuda", "state"),
    [
        ("", None, "13.2", "missing"),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)\n", None, "13.2", "problem"),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)\n", None, None, "problem"),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)\n", "", "13.2", "missing"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_a_problem(smi_output, visible, cuda, state, monkeypatch):
    def no_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(environment, "output_of", lambda *command: smi_output)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    line = the_line("CUDA device")
    assert line.state == state
    if state == "problem":
        assert ("built for CUDA" if cuda is None else "driver") in line.todo


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_triton_compiles_a_kernel_without_a_gpu(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # which the probe changes
    line = the_line("Triton")
    assert line.state == "ok", line.text
    assert "compiles for sm_" in line.text


def test_without_triton_only_a_gpu_misses_it(monkeypatch):
    monkeypatch.setattr(kernels, "installed", lambda name: name != "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert the_line("Triton").state == "missing"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert the_line("Triton").state == "problem"


def test_the_cache_line_counts_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "made"))
    assert the_line("cache").text.endswith("measured choices: none yet")
    assert not (tmp_path / "not").exists()
    folder = tmp_path / "resfast"
    folder.mkdir()
    (folder / "conv-cpu.json").write_text('{"a": "gemm", "b": "oneDNN"}')
    (folder / "conv-cuda.json").write_text("{")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = the_line("cache")
    assert line.state == "ok"
    assert "2 in conv-cpu.json" in line.text
    assert "conv-cuda.json is unreadable" in line.text


def test_retune_deletes_measured_choices_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "examine", lambda options: [])
    folder = tmp_path / "resfast"
    folder.mkdir()
    for name in ("conv-cpu.json", "network-cpu.json", "other.json"):
        (folder / name).write_text("{}")
    assert doctor.main([]) == 0
    assert len(list(folder.iterdir())) == 3
    assert doctor.main(["--retune"]) == 0
    assert [path.name for path in folder.iterdir()] == ["other.json"]
    assert capsys.readouterr().err.count("deleted ") == 2


def test_a_choice_file_that_cannot_be_deleted_is_an_error(tmp_path, monkeypatch, capsys):
    def refuse(path: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "resfast").mkdir()
    (tmp_path / "resfast" / "conv-cpu.json").write_text("{}")
    monkeypatch.setattr(Path, "unlink", refuse)
    assert doctor.main(["--retune"]) == 2
    assert "cannot delete" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    def refuse(**arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = the_line("cache")
    assert line.state == "missing"
    assert "Permission denied" in line.text


def test_data_is_found_without_reading_it(image_tree, tmp_path):
    line = the_line("data", Options(f"folder:{image_tree}"))
    assert (line.state, line.text) == ("ok", f"{image_tree}, 64 images of 2 classes")
    assert the_line("data", Options("digits")).state == "ok"
    labels = tmp_path / "labels.pt"
    labels.write_bytes(b"")
    for data in (f"cifar10-n:{labels}#worse", f"csv:{tmp_path}"):
        assert the_line("data", Options(data)).state == "ok"
    labels.unlink()
    gone = the_line("data", Options(f"cifar10-c:{tmp_path}/gone"))
    assert gone.state == "problem"
    assert "gone does not exist" in gone.text
    for data, state in (("auto", "missing"), ("cifar100", "problem"), ("cifar", "problem")):
        line = the_line("data", Options(data, str(tmp_path)))
        assert line.state == state, data
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("obstacle", "cutlass", "state", "message"),
    [
        ("there is no nvcc", None, "missing", "cannot be built: there is no nvcc"),
        (None, None, "missing", "13.2.86 (/cuda/bin/nvcc); no CUTLASS"),
        (None, "/cutlass", "ok", "CUTLASS in /cutlass"),
    ],
)
def test_the_line_of_nvcc_is_what_the_build_finds(
    obstacle, cutlass, state, message, tmp_path, monkeypatch
):
    script = tmp_path / "csrc" / "cuda" / "build.py"
    script.parent.mkdir(parents=True)
    found = {
        "obstacle": obstacle,
        "find_nvcc": "/cuda/bin/nvcc",
        "find_cutlass": cutlass,
        "nvcc_version": "13.2.86",
    }
    script.write_text(
        "".join(f"def {name}(*args): return {value!r}\n" for name, value in found.items())
    )
    real = ROOT / "csrc" / "cuda" / "build.py"
    assert all(f"def {name}(" in real.read_text(encoding="utf-8") for name in found)
    monkeypatch.setattr(kernels, "PACKAGE", tmp_path / "resfast")
    line = the_line("nvcc")
    assert line.state == state
    assert message in line.text
    script.unlink()
    assert the_line("nvcc").state == "ok"  # an installed package needs no compiler


def test_more_threads_than_cores_are_remarked_on(monkeypatch):
    monkeypatch.setattr(environment, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    line = the_line("threads")
    assert line.text == "torch uses 8 of 2 cores"
    assert "OMP_NUM_THREADS=2" in line.todo
