"""``make gpu-report``: no part stops another, and results are kept."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import bench_report, gpu_report, small_kernels
from benchmarks.gpu_report import PARTS, Outcome, Report, Step, report_on
from resfast.ops.conv import reference as conv_reference
from resfast.runs import folder as records
from tests.conftest import example_summary

ROOT = Path(__file__).resolve().parents[1]


def python(part: str, code: str, **options: object) -> Step:
    return Step(part, part, [sys.executable, "-c", code], **options)


def run_steps(
    tmp_path: Path, *todo: Step, minutes: float = 5, peers: Sequence[Path] = ()
) -> tuple[bool, dict]:
    """Whether none failed, and the JSON that was written; the page must be there too."""
    record = {"name": "cpu", "command": "", "commit": None, "dirty": False, "seconds": 0.0}
    record |= {"machine": {"processor": "CPU"}, "date": "2026-11-21"}
    outcomes = [Outcome(step.part, step.name, " ".join(step.command), {}) for step in todo]
    report = Report("cpu", tmp_path, tmp_path, peers, record, outcomes)
    fine = report_on(todo, report, minutes)
    written = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    assert (tmp_path / "cpu.md").read_text(encoding="utf-8").startswith("# cpu\n")
    return fine, written


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# -- steps that go wrong -----------------------------------------------------------------------


def test_a_step_that_fails_stops_no_other(tmp_path):
    fine, written = run_steps(
        tmp_path,
        python("build", "print('begun'); raise SystemExit('nvcc is broken | here')"),
        python("doctor", 'print(\'{"ok": true, "lines": []}\')', read=gpu_report._read_doctor),
        python("tests", "import os; os.kill(os.getpid(), 11)"),
        Step("training", "training", [str(tmp_path / "no-such-program")]),
    )
    assert not fine
    assert written["state"] == "done"
    failed, good, crashed, absent = written["steps"]
    assert [step["status"] for step in written["steps"]] == ["failed", "ok", "failed", "failed"]
    assert (failed["exit_code"], failed["tail"]) == (1, ["begun", "nvcc is broken | here"])
    assert good["result"] == {"ok": True, "lines": [], "said": "no problem"}
    assert good["tail"] == []
    assert crashed["why"] == "signal 11"
    assert "cannot be started" in absent["why"]
    page = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert "nvcc is broken | here" in page
    assert "begun" in (tmp_path / "cpu.log").read_text(encoding="utf-8")


def test_garbage_for_results_is_a_failure_of_that_step_alone(tmp_path):
    garbage = "import sys; sys.stdout.buffer.write(b'\\xff\\x00\\x1b[31m~~~~ {not json\\n' * 20000)"
    results = tmp_path / "tests.xml"
    results.write_text("<testsuites><testcase")
    fine, written = run_steps(
        tmp_path,
        python("doctor", garbage, read=gpu_report._read_doctor),
        python("doctor", "print([{'lines': 3}])", read=gpu_report._read_doctor),
        python("doctor", "print('[3]')", read=gpu_report._read_doctor),
        python("doctor", "print('{\"lines\": [{}]}')", read=gpu_report._read_doctor),
        python("tests", "pass", read=partial(gpu_report._read_tests, results)),
        python("training", "pass", read=partial(gpu_report._read_training, tmp_path / "absent")),
        python("benchmarks", "print('fine')"),
    )
    assert not fine
    *bad, good = written["steps"]
    assert {step["status"] for step in bad} == {"failed"}
    assert good["status"] == "ok"
    errors = [re.search("cannot be read: ([A-Za-z]+)", step["why"])[1] for step in bad]
    kinds = ["JSONDecodeError"] * 2 + ["TypeError"] * 2 + ["ParseError", "ResfastError"]
    assert errors == kinds
    tail = written["steps"][0]["tail"]
    assert len(tail) == gpu_report.TAIL_LINES
    assert set("".join(tail)) <= set("\ufffd~ {not json")


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_step_out_of_time_ends_with_all_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "GRACE_S", 0.5)
    begin = time.monotonic()
    fine, written = run_steps(
        tmp_path, python("build", STUBBORN), python("training", "print(1)"), minutes=0.1
    )
    assert time.monotonic() - begin < 20
    assert not fine
    slow, quick = written["steps"]
    assert (slow["status"], slow["exit_code"], quick["status"]) == ("timed out", -9, "ok")
    assert not alive(int(slow["tail"][0]))


EPOCH = {
    **{"epoch": 3, "lr": 0.1, "train_loss": 1.5, "train_accuracy": 0.5, "eval_set": "test"},
    **{"eval_loss": None, "eval_accuracy": None, "images_per_second": 96.0},
    **{"train_seconds": 0.5, "eval_seconds": 0.0},
}


def test_what_a_training_found_is_read(tmp_path):
    summary = example_summary(data="digits", test_accuracy=0.75, epochs=3, train_seconds=1.5)
    records.write_summary(tmp_path, summary)
    found = gpu_report._read_training(tmp_path, "")
    assert found["said"] == "digits: 75.00% after 3 epochs in 1.5 s (96 images/s)"
    assert found["params"] == summary.params
    (tmp_path / "summary.json").write_text("{}")
    read = partial(gpu_report._read_training, tmp_path)
    _, written = run_steps(tmp_path, python("training", "", read=read))
    (step,) = written["steps"]
    assert step["status"] == "failed"
    assert "summary.json: run: Field required" in step["why"]


def test_a_step_out_of_time_may_write_down_what_it_has(tmp_path):
    code = (
        "import pathlib, time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n"
        f"    pathlib.Path({str(tmp_path / 'metrics.jsonl')!r}).write_text({json.dumps(EPOCH)!r})"
    )
    read = partial(gpu_report._read_training, tmp_path)
    _, written = run_steps(tmp_path, python("training", code, read=read), minutes=0.1)
    assert written["steps"][0]["status"] == "timed out"
    assert written["steps"][0]["result"]["last_epoch"] == EPOCH
    assert "epoch 3 was the last" in (tmp_path / "cpu.md").read_text(encoding="utf-8")


def test_what_a_step_leaves_running_ends_with_it(tmp_path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    _, written = run_steps(tmp_path, python("tests", code + "; raise SystemExit(1)"))
    wait_for(lambda: not alive(int(written["steps"][0]["tail"][0])))


def test_time_is_kept_for_the_later_steps(tmp_path):
    todo = [python(part, "pass") for part in PARTS]
    todo[3:4] = [replace(todo[3], name=name) for name in ("test_inference.py", "test_other.py")]
    _, written = run_steps(tmp_path, *todo, minutes=10)
    limits = [step["limit_seconds"] for step in written["steps"]]
    reserved = [600 * share for share in gpu_report.RESERVED]
    reserved[3:4] = [reserved[3] * 5 / 6, reserved[3] / 6]
    for index, limit in enumerate(limits):
        allowed = limit + gpu_report.GRACE_S
        most = 600 - gpu_report.CLOSING_S - sum(reserved[index + 1 :])
        assert reserved[index] < allowed <= most + 0.1
    # What one step leaves is there for the next one.
    assert limits == sorted(limits)


def test_a_step_that_no_time_is_left_for_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "RESERVED", (0.0, *gpu_report.RESERVED[1:-1], 0.99))
    fine, written = run_steps(tmp_path, python("build", "print(1)"), python("training", "print(2)"))
    first, last = written["steps"]
    assert not fine
    assert (first["status"], first["why"]) == ("timed out", "no time was left for it")
    assert first["exit_code"] is None
    assert last["status"] == "ok"


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (python("tests", "import no_such_module_1"), "there is no module no_such_module_1"),
        (
            Step("tests", "tests", [sys.executable, "-m", "no_such_2"]),
            "there is no module no_such_2",
        ),
        (
            python("tests", "raise SystemExit(1)", needs=["no_such_3"]),
            "there is no module no_such_3",
        ),
        (python("tests", "raise SystemExit(1)", skip="there is no CUDA device"), "no CUDA device"),
    ],
)
def test_a_step_that_cannot_run_here_is_skipped_with_its_reason(step, why, tmp_path):
    fine, written = run_steps(tmp_path, step)
    assert fine
    assert written["steps"][0]["status"] == "skipped"
    assert why in written["steps"][0]["why"]


SOME_TESTS = """
import time, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_elsewhere(): pytest.skip("DALI is not installed")
def test_slow(): time.sleep(600)
"""


def test_the_tests_that_ran_count_where_the_time_ran_out(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(SOME_TESTS)
    step = gpu_report._pytest("tests", file, tmp_path, "not gpu")
    _, written = run_steps(tmp_path, step, minutes=0.3)
    (one,) = written["steps"]
    assert one["status"] == "timed out"
    assert (one["result"]["passed"], one["result"]["skipped"]) == (1, 1)
    assert one["result"]["failures"] == ["test_bad: assert 1 == 2"]
    page = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert "after 8 s; 1 passed, 1 failed, 1 skipped |" in page
    assert "test_some.py:6: KeyboardInterrupt" in page
    assert "- `test_some.py` test_bad: assert 1 == 2" in page


def test_a_failing_test_that_speaks_of_a_module_is_not_skipped(tmp_path):
    code = "print(\"No module named 'no_such_4'\"); raise SystemExit(1)"
    _, written = run_steps(tmp_path, python("tests", code, read=lambda output: {"passed": 3}))
    assert written["steps"][0]["status"] == "failed"


# -- interruptions -----------------------------------------------------------------------------

WITH_STEPS = """
import sys
from benchmarks import gpu_report as g
steps = [
    g.Step("build", "first", [sys.executable, "-c", "print('done')"]),
    g.Step("tests", "second", ["sh", "-c", "echo $$ > pid; sleep 600"]),
    g.Step("training", "third", [sys.executable, "-c", "pass"]),
]
g.steps = lambda options, work: steps
g.ROOT = g.Path.cwd()
sys.exit(g.main(["--out", "out"]))
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_report_that_is_killed_keeps_what_it_had(signum, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_STEPS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    try:
        process.send_signal(signum)
        code = process.wait(30)
        (path,) = (tmp_path / "out").glob("*.json")
        written = json.loads(path.read_text(encoding="utf-8"))
        statuses = [step["status"] for step in written["steps"]]
        if signum == signal.SIGKILL:
            assert statuses == ["ok", "running", "pending"]
            assert written["state"] == "running"
        else:
            assert code == 130
            assert statuses == ["ok", "interrupted", "pending"]
            assert written["state"] == "interrupted"
            wait_for(lambda: not alive(child))
        assert path.with_suffix(".md").read_text(encoding="utf-8").count("first") == 1
        assert [file for file in path.parent.iterdir() if file.suffix == ".tmp"] == []
    finally:
        if alive(child):
            os.killpg(child, signal.SIGKILL)


# -- the steps themselves ----------------------------------------------------------------------


def options(**values: object) -> argparse.Namespace:
    given = {"data": "digits", "data_dir": Path("data"), "recipe": "default", "epochs": None}
    return argparse.Namespace(**{**given, "parts": PARTS, **values})


def test_without_a_gpu_the_cpu_parts_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = gpu_report.steps(options(), tmp_path)
    assert list(dict.fromkeys(step.part for step in found)) == list(PARTS)
    run = {(step.part, step.name) for step in found if not step.skip}
    assert {("build", "C++ kernels"), ("doctor", "doctor"), ("training", "default")} <= run
    assert {part for part, _ in run} == {"build", "doctor", "benchmarks", "training"}
    assert {step.skip for step in found if step.skip} == {"there is no CUDA device"}
    benchmarks = [step.command for step in found if step.part == "benchmarks"]
    assert all(command[command.index("-m", 2) + 1] == "not gpu" for command in benchmarks)


def test_on_a_gpu_everything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_report, "_sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    found = gpu_report.steps(options(data=f"folder:{tmp_path}"), tmp_path)
    assert not any(step.skip for step in found)
    assert [step.name for step in found if step.part == "build"] == ["C++ kernels", "CUDA kernels"]
    tests = {step.name for step in found if step.part == "tests"}
    assert {"ops/test_augment.py", "test_fuse.py", "test_training.py"} <= tests
    assert "test_config.py" not in tests
    first, *_ = benchmarks = [step for step in found if step.part == "benchmarks"]
    assert {step.env["RESFAST_BENCH_DATA"] for step in benchmarks} == {str(tmp_path)}
    names = {path.name for path in (ROOT / "benchmarks").glob("test_*.py")}
    assert {step.name for step in benchmarks} == names
    assert first.name == "test_inference.py" or "test_inference.py" not in names
    tools = {step.name: step for step in found if step.part == "sanitizer"}
    assert list(tools) == ["memcheck", "racecheck"]
    command = list(tools["racecheck"].command)
    assert command[:3] == ["/cuda/bin/compute-sanitizer", "--tool", "racecheck"]
    assert command[-3:] == [sys.executable, "-m", "benchmarks.small_kernels"]


@pytest.mark.parametrize("place", ["path", "home", "nvidia/cu13", None])
def test_compute_sanitizer_is_found_where_it_is(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    package = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(gpu_report, "find_spec", lambda name: package)
    if place is None:
        assert gpu_report._sanitizer() is None
        return
    program = tmp_path / place / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    assert gpu_report._sanitizer() == str(program)


def test_only_the_chosen_parts_are_there(tmp_path):
    found = gpu_report.steps(options(parts=["doctor", "training"]), tmp_path)
    assert [step.part for step in found] == ["doctor", "training"]


SOME_BENCHMARKS = """
def test_layer(benchmark):
    info = {"kind": "layer", "case": "conv3x3", "name": "resfast", "batch": 8, "dtype": "bf16"}
    benchmark.extra_info.update(info, processor="NVIDIA H200", flops=10**6, bytes=10**4)
    benchmark.pedantic(sum, args=([1] * 1000,), rounds=3)
"""
PEERS = [
    {
        "name": "peer",
        "source": "a letter",
        "hardware": "NVIDIA H200",
        "case": "conv3x3",
        "batch": 8,
        "dtype": "bf16",
        "seconds": 1e-5,
    }
]


def test_benchmarks_and_the_results_of_peers_are_in_the_tables(tmp_path):
    (tmp_path / "test_some.py").write_text(SOME_BENCHMARKS)
    (tmp_path / "peers.json").write_text(json.dumps(PEERS))
    (tmp_path / "killed.benchmark.json").write_text('{"benchmarks": [{"na')
    (tmp_path / "none.benchmark.json").touch()  # what pytest-benchmark leaves where none ran
    results = f"--benchmark-json={tmp_path / 'some.benchmark.json'}"
    step = gpu_report._pytest("benchmarks", tmp_path / "test_some.py", tmp_path, "not gpu", results)
    fine, written = run_steps(tmp_path, step, peers=[tmp_path / "peers.json"])
    assert fine, written
    assert [row["name"] for row in written["rows"]] == ["resfast", "peer"]
    (error,) = written["benchmark_errors"]
    assert "killed.benchmark.json is not JSON" in error
    page = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert "conv3x3" in page
    assert "a letter" in page
    for plot in tmp_path.glob("cpu-*.png"):
        assert f"({plot.name})" in page
    # Rows of a report are results that later reports can be given.
    assert len(bench_report.load([tmp_path / "cpu.json"]).rows) == 2


JUNIT = """<testsuites><testsuite>
<testcase name="test_a[cuda]"/>
<testcase name="test_b"><failure message="assert 1 == 2&#10;more">text</failure></testcase>
<testcase name="test_c"><error message="CUDA error: out of memory"/></testcase>
<testcase name="test_d"><skipped message="DALI is not installed"/></testcase>
</testsuite></testsuites>"""


def test_junit_files_are_counted_and_failures_named(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(JUNIT)
    assert gpu_report._read_tests(path, "") == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["test_b: assert 1 == 2", "test_c: CUDA error: out of memory"],
        "skip_reasons": ["DALI is not installed"],
        "said": "1 passed, 2 failed, 1 skipped",
    }


@pytest.mark.parametrize(
    ("summary", "found"),
    [
        ("ERROR SUMMARY: 0 errors", "0 errors"),
        ("ERROR SUMMARY: 1 error", "1 error"),
        ("RACECHECK SUMMARY: 2 hazards displayed (1 error)", "2 hazards displayed (1 error)"),
    ],
)
def test_the_summaries_under_compute_sanitizer_are_read(summary, found):
    output = f"========= COMPUTE-SANITIZER\n93 launches, 0 wrong\n========= {summary}\n"
    assert gpu_report._read_sanitizer(output) == {"said": f"93 launches, 0 wrong; {found}"}
    with pytest.raises(ValueError, match="without a summary"):
        gpu_report._read_sanitizer("93 launches, 0 wrong\n")


# -- the kernels under compute-sanitizer ---------------------------------------------------------

PYTHON_TYPES = {
    "Tensor": torch.Tensor,
    "Optional[Tensor]": torch.Tensor,
    "List[int]": list,
    "str": str,
    "float": float,
    "int": int,
    "bool": bool,
}


@functools.cache
def schema_types(name: str) -> list[type]:
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").rglob("*.cu")))
    text = re.sub(r'"\s*"', "", sources)
    (schema,) = re.findall(rf'm\.def\(\s*"({name}\(.+?)"', text)
    expected = torch._C.parse_schema(f"resfast::{schema}").arguments
    return [PYTHON_TYPES[str(argument.type)] for argument in expected]


def check_schema(name: str, arguments: tuple) -> None:
    """That a call is one of the operator that the CUDA source defines."""
    types = schema_types(name)
    assert len(arguments) == len(types), name
    for value, kind in zip(arguments, types, strict=True):
        assert type(value) is kind, (name, value)


class FakeKernels:
    """The operators as the reference computes them, with the calls that were made."""

    def __init__(self, error: float = 0.0) -> None:
        self.calls: list[tuple] = []
        self.error = error

    def conv2d_cuda_candidates(self, *arguments):
        check_schema("conv2d_cuda_candidates", arguments)
        return [0, 1, 4, 1, 4, 3, 4, 6]

    def conv2d_hopper_configs(self, x, weight, *geometry):
        check_schema("conv2d_hopper_configs", (x, weight, *geometry))
        assert x.dtype in (torch.bfloat16, torch.float16)
        return [] if x.shape[1] % 8 or weight.shape[0] % 8 else [1, 0]

    def basic_block_cuda_candidates(self, *arguments):
        check_schema("basic_block_cuda_candidates", arguments)
        return [5, 1, 7, 2]

    def conv2d_cuda(self, *arguments):
        check_schema("conv2d_cuda", arguments)
        self.calls.append(("conv", arguments[0].dtype, *arguments[-3:]))
        return conv_reference.conv2d_bias_act(*arguments[:-3]) + self.error

    def conv2d_hopper(self, *arguments):
        check_schema("conv2d_hopper", arguments)
        self.calls.append(("hopper", arguments[0].dtype, arguments[-1]))
        return conv_reference.conv2d_bias_act(*arguments[:-1]) + self.error

    def basic_block_cuda(self, x, weight1, bias1, weight2, bias2, act, slope, *variant):
        check_schema("basic_block_cuda", (x, weight1, bias1, weight2, bias2, act, slope, *variant))
        self.calls.append(("block", x.dtype, *variant))
        for weight, bias, residual in ((weight1, bias1, None), (weight2, bias2, x)):
            x = conv_reference.conv2d_bias_act(
                x, weight, bias, residual, [1, 1], [1, 1], act, slope
            )
        return x + self.error


def test_every_kernel_is_launched_and_right_ones_pass(capsys):
    kernels = FakeKernels()
    assert small_kernels.run("cpu", kernels) == 0
    half = {torch.bfloat16, torch.float16}
    conv = {call[1:] for call in kernels.calls if call[0] == "conv"}
    both = [(dtype, False) for dtype in half | {torch.float32}] + [(torch.float32, True)]
    variants = [(0, 1), (4, 1), (4, 6)]  # of several splits one
    assert conv == {(dtype, *variant, tf32) for dtype, tf32 in both for variant in variants}
    hopper = {call[1:] for call in kernels.calls if call[0] == "hopper"}
    assert hopper == {(dtype, config) for dtype in half for config in (0, 1)}
    block = {call[1:] for call in kernels.calls if call[0] == "block"}
    assert block == {(dtype, *variant) for dtype in half for variant in ((5, 1), (7, 2))}
    assert capsys.readouterr().out == f"{len(kernels.calls)} launches, 0 wrong\n"


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_kernel_with_a_wrong_result_is_named(error, capsys):
    kernels = FakeKernels(error)
    assert small_kernels.run("cpu", kernels) == len(kernels.calls)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("conv2d_cuda bf16 [2, 64, 9, 7] to 64, 3x3, stride 1, tile 0, 1 spl")
    assert lines[-1] == f"{len(kernels.calls)} launches, {len(kernels.calls)} wrong"


@pytest.mark.gpu
def test_every_kernel_is_right_on_small_maps():
    if not hasattr(torch.ops.resfast, "conv2d_cuda"):
        pytest.skip("the CUDA kernels are not built")
    assert small_kernels.run("cuda", torch.ops.resfast) == 0


def test_without_a_gpu_the_small_kernels_say_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert small_kernels.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "folder:/no/such/folder"], "does not exist"),
        (["--data", "cifar"], "did you mean 'cifar10'"),
        (["--out", "/dev/null/reports"], "cannot create the folder"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(gpu_report, "run", lambda *args: pytest.fail("a step was run"))
    assert gpu_report.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--epochs", "0"], ["--parts", "tset"]])
def test_values_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_report.options_of(arguments)
    assert arguments[1] in capsys.readouterr().err


def test_names_say_processor_and_date_and_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report.runtime, "describe", lambda device: "NVIDIA H200, 3 threads")
    name = gpu_report._new_name(tmp_path)
    assert name.startswith("nvidia-h200-20")
    (tmp_path / f"{name}.json").touch()
    assert gpu_report._new_name(tmp_path) == f"{name}-2"


def test_only_torch_is_needed_to_begin(tmp_path):
    code = "import sys\nfrom benchmarks import gpu_report\n"
    code += (
        "heavy = {'tyro', 'pydantic', 'matplotlib', 'pytest', 'torchvision', 'PIL', 'sklearn'}\n"
    )
    code += "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_real_report_on_this_machine(image_tree, tmp_path):
    """Doctor and a training, in a checkout that is not installed, called from elsewhere."""
    arguments = ["--parts", "doctor", "training", "--data", f"folder:{os.path.relpath(image_tree)}"]
    arguments += ["--epochs", "1", "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_report", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    checked, trained = written["steps"]
    assert written["state"] == "done"
    assert checked["result"]["ok"]
    assert (trained["status"], trained["exit_code"]) == ("ok", 0)
    assert 0 <= trained["result"]["test_accuracy"] <= 1
    assert trained["command"].startswith("python -m resfast.train")
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| training | default | ok |" in page
    assert "% after 1 epochs" in page
    text = page + path.read_text(encoding="utf-8")
    assert not any(str(folder) in text for folder in (ROOT, tmp_path, image_tree, sys.prefix))
    assert "resfast.doctor --json" in path.with_suffix(".log").read_text(encoding="utf-8")


WITHOUT = """
import importlib.machinery

find = importlib.machinery.PathFinder.find_spec
gone = {"tyro", "pydantic", "setuptools", "pytest_benchmark", "hypothesis", "matplotlib"}


def find_spec(name, *args):
    return None if name.partition(".")[0] in gone else find(name, *args)


importlib.machinery.PathFinder.find_spec = find_spec
"""


def test_what_is_not_installed_is_a_reason_to_skip_and_never_a_crash(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    arguments = ["--parts", "build", "benchmarks", "training", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_report", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    why = {(step["part"], step["status"]): step["why"] for step in written["steps"]}
    assert why["build", "skipped"] in ("there is no module setuptools", "there is no CUDA device")
    assert why["benchmarks", "skipped"] == "there is no module pytest_benchmark"
    assert why["training", "skipped"] == "there is no module tyro"
    assert {step["status"] for step in written["steps"]} == {"skipped"}
    assert written["benchmark_errors"] == ["ModuleNotFoundError: No module named 'pydantic'"]
