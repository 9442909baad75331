"""What the inference benchmarks time, and the report of all benchmarks."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import resfast
from benchmarks import bench_report, inference
from benchmarks.bench_report import load, tables, write
from benchmarks.inference import Case, Layer
from resfast.errors import ResfastError
from resfast.models.presets import preset
from resfast.ops.conv.op import ConvBiasAct

ROOT = Path(__file__).resolve().parents[1]
SMALL = Case(Layer(16, 24, 3, 2, 8), 2, "fp32", "cpu")


# -- what is timed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", inference.MODELS)
def test_layers_are_the_convolutions_that_the_fused_network_calls(name: str) -> None:
    model = resfast.create_model(name).eval()
    fused = resfast.fuse(model, torch.float32, example=torch.zeros(1, 3, 32, 32))
    called: list[Layer] = []

    def note(conv: ConvBiasAct, inputs: tuple[torch.Tensor, ...]) -> None:
        k, c, side, _ = conv.weight.shape
        assert conv.padding == [side // 2] * 2
        relu, residual = conv.activation == "relu", len(inputs) == 2
        called.append(Layer(c, k, side, conv.stride[0], inputs[0].shape[2], residual, relu))

    for module in fused.modules():
        if isinstance(module, ConvBiasAct):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        fused(torch.zeros(1, 3, 32, 32))
    assert sorted(called, key=str) == sorted(inference.layers(preset(name)), key=str)


@torch.no_grad()
def test_operations_and_bytes_are_those_of_the_shapes() -> None:
    layer = Layer(16, 24, 3, 2, 9, residual=False)
    output, flops, size = inference.reference(*inference.build(Case(layer, 5, "bf16", "cpu")))
    assert output.shape == (5, 24, 5, 5)
    assert flops == 2 * 5 * 24 * 5 * 5 * 16 * 3 * 3
    assert size == 2 * (5 * 16 * 9 * 9 + 24 * 16 * 3 * 3 + 5 * 24 * 5 * 5)
    residual = Layer(16, 24, 1, 1, 9, residual=True)
    *_, more = inference.reference(*inference.build(Case(residual, 5, "fp32", "cpu")))
    assert more == 4 * (5 * 16 * 9 * 9 + 24 * 16 + 2 * 5 * 24 * 9 * 9)

    _, whole, _ = inference.reference(*inference.build(Case("resnet18", 1, "bf16", "cpu")))
    parts = [
        2 * shape.out_channels * math.ceil(shape.size / shape.stride) ** 2
        * shape.in_channels * shape.kernel**2
        for shape in inference.layers(preset("resnet18"))
    ]  # fmt: skip
    assert whole == sum(parts) + 2 * 512 * 10


@torch.no_grad()
@pytest.mark.parametrize("what", ["resnet-2111", Layer(16, 24, 3, 2, 8, residual=False)])
def test_folding_leaves_no_batch_norm_and_the_same_result(what: str | Layer) -> None:
    module, inputs = inference.build(Case(what, 2, "fp32", "cpu"))
    folded = inference.fold(module)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    torch.testing.assert_close(folded(*inputs), module(*inputs), rtol=1e-3, atol=1e-4)


def test_cases_hold_what_has_targets_and_each_has_its_baseline() -> None:
    cpu = {case: case.target for case in inference.cases("cpu") if case.target}
    if {case.dtype for case in inference.cases("cpu")} != {"fp32"}:
        assert {case.batch: target for case, target in cpu.items()} == {1: 1.2, 64: 1.4, 512: 1.4}
    cuda = inference.cases("cuda")
    targets = {case.batch: case.target for case in cuda if case.target}
    assert targets == {1: 1.5, 512: 1.15, 2048: 1.15}
    half = [case.what for case in cuda if case.matmul_target]
    assert half
    assert all(layer.kernel == 3 and layer.in_channels >= 64 for layer in half)
    for case in (*inference.cases("cpu"), *cuda):
        assert case.baseline in case.variants
        assert inference.OURS in case.variants
    assert len(set(map(str, cuda))) == len(cuda)


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "ROUND_SECONDS", {"cpu": 1e-9})
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = inference.take_turns(calls, "cpu", seconds=0.0)
    assert "".join(order).endswith("abc" * 5)
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", 5)
    assert all(value > 0 for seconds in times.values() for value in seconds)
    assert len(inference.take_turns(calls, "cpu", seconds=60)["a"]) == 15
    assert inference.take_turns({}, "cpu", seconds=1) == {}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference.runtime, "compiler_missing", lambda device: "no compiler here")
    monkeypatch.setattr(inference.runtime, "prepare", lambda *args, **kwargs: None)
    monkeypatch.setattr(inference, "ROUND_SECONDS", {"cpu": 1e-4})
    monkeypatch.setattr(inference, "CASE_SECONDS", {"layer": 0.0, "model": 0.0})


def test_a_case_is_checked_and_timed(no_compiler: None) -> None:
    measured = inference.measure(SMALL)
    assert measured.missing == {inference.TUNED: "no compiler here"}
    assert not measured.failed
    assert set(measured.seconds) == {inference.FOLDED, inference.OURS}
    assert max(measured.errors.values()) < inference.MAX_ERROR_FP32
    assert measured.ratios(inference.OURS) is None  # the baseline is missing


@pytest.mark.parametrize("wrong", [lambda out: out + 1, lambda out: out[:1], lambda out: out / 0])
def test_a_variant_that_computes_something_else_fails_alone(
    wrong: Callable[[torch.Tensor], torch.Tensor],
    no_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = inference.variant

    def variant(name: str, *args: Any) -> Callable:
        run = build(name, *args)
        return run if name == inference.OURS else lambda *inputs: wrong(run(*inputs))

    monkeypatch.setattr(inference, "variant", variant)
    measured = inference.measure(SMALL)
    assert set(measured.seconds) == {inference.OURS}
    with pytest.raises(inference.BadOutputError, match="eager, folded has a relative error of"):
        raise measured.failed[inference.FOLDED]


def test_ratios_are_taken_turn_by_turn() -> None:
    times = {inference.TUNED: [2.0, 3.0], inference.OURS: [1.0, 4.0]}
    measured = inference.Measured(SMALL, 1, 1, seconds=times)
    assert measured.ratios(inference.OURS) == [2.0, 0.75]
    assert measured.ratios(inference.TUNED) == [1.0, 1.0]
    assert measured.ratios(inference.EAGER) is None


def test_the_benchmark_reports_the_times_it_measured(tmp_path: Path) -> None:
    result = tmp_path / "bench.json"
    command = [
        *(sys.executable, "-m", "pytest", "benchmarks/test_inference.py", "-p", "no:cacheprovider"),
        *("-q", "--benchmark-only", f"--benchmark-json={result}"),
        *("-k", "conv1x1-256-512 and batch1- and cpu and not compile"),
    ]  # fmt: skip
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(result.read_text())["benchmarks"]
    rows = load([result]).rows
    assert [row.name for row in rows][-1] == "resfast"
    for row, entry in zip(rows, entries, strict=True):
        assert row.case == "conv1x1-256-512-s2-8px"
        assert row.flops == 2 * 512 * 4 * 4 * 256
        assert 5 <= row.rounds <= 15
        assert len(set(entry["stats"]["data"])) > 1
        assert row.images_per_second == pytest.approx(1 / row.seconds)
    assert f"{rows[-1].images_per_second:,.0f} images/s" in done.stdout


# -- the report ------------------------------------------------------------------------------------


def benchmark(test: str, median: float, **info: Any) -> dict[str, Any]:
    """An entry of pytest-benchmark's file, with what is not read as well."""
    stats = {"min": 0.9 * median, "median": median, "iqr": 0.1 * median, "rounds": 5, "data": [1]}
    base = {"processor": "CPU X, 2 threads", "torch": "2.15.0", "python": "3.11", "threads": 2}
    return {
        "name": f"test[{test}]",
        "group": info.pop("group", None),
        "param": test,
        "stats": stats,
        "extra_info": {**base, **info},
        "options": {},
    }


def network(name: str, median: float, batch: int = 64, **info: Any) -> dict[str, Any]:
    speed = {"images_per_second": batch / median, "flops": batch * 10**9, "device": "cpu"}
    base = {"kind": "model", "case": "resnet-2111", "batch": batch, "dtype": "bf16"}
    return benchmark(name, median, name=name, **{**base, **speed, **info})


TUNED = {"baseline": "compile max-autotune"}
BENCHMARKS = [
    benchmark("m", 0.1, kind="machine", case="matmul", name="matmul", dtype="bf16", flops=10**11),
    benchmark("c", 0.1, kind="machine", case="copy", name="copy", bytes=9 * 10**9),
    network("eager", 0.08, ratio=0.5, ratio_range=[0.4, 0.6], **TUNED),
    network("compile max-autotune", 0.04, ratio=1.0, ratio_range=[1.0, 1.0], **TUNED),
    network("resfast", 0.03, ratio=1.31, ratio_range=[1.2, 1.5], target=1.4, **TUNED),
    network("resfast", 0.001, 1, ratio=1.25, ratio_range=[1.2, 1.3], target=1.2, **TUNED),
    network(
        "resfast", 0.02, 512, case="conv3x3-64-64-s1-32px-relu", kind="layer", bytes=10**8,
        ratio=2.0, matmul_target=0.6, flops=2 * 10**9, **TUNED,
    ),
    network("cuDNN", 0.02, 512, case="conv3x3-64-64-s1-32px-relu", kind="layer", bytes=10**8,
            flops=2 * 10**9, ratio=None),
    benchmark("resfast", 1.7, group="a training step", images_per_second=300,
              speed_relative_to_plain=1.23, peak_gpu_mib=None),
]  # fmt: skip
PEERS = [
    {"name": "Peer|A", "source": "their paper", "hardware": "CPU X, 2 threads", "batch": 64,
     "case": "resnet-2111", "dtype": "bf16", "images_per_second": 3200, "note": "not read"},
    {"name": "Peer B", "source": "their log", "hardware": "GPU Z", "batch": 64,
     "case": "resnet-2111", "dtype": "bf16", "seconds": 0.002},
]  # fmt: skip


@pytest.fixture
def result(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    commit = {"id": "0123456789abcdef", "dirty": True}
    file = {"benchmarks": BENCHMARKS, "commit_info": commit, "datetime": "2026-11-20T10:00:00+00"}
    path.write_text(json.dumps(file))
    return path


def given(tmp_path: Path, content: object, name: str = "peers.json") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(page: str, *parts: str) -> list[list[str]]:
    """Cells of the rows of tables that hold all ``parts``."""
    found = [line for line in page.splitlines() if all(part in line for part in parts)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found]


def test_rows_are_tidy(result: Path) -> None:
    rows = load([result]).rows
    assert len(rows) == len(BENCHMARKS)
    row = next(row for row in rows if row.name == "resfast" and row.batch == 64)
    assert row.hardware == "CPU X, 2 threads"
    assert (row.seconds, row.iqr_seconds, row.rounds) == (0.03, pytest.approx(0.003), 5)
    assert row.tflops == pytest.approx(64e9 / 0.03 / 1e12)
    assert (row.ratio, row.ratio_range, row.target) == (1.31, (1.2, 1.5), 1.4)
    assert row.commit == "0123456789ab+"
    assert row.date == "2026-11-20"
    assert row.versions == "torch 2.15.0, python 3.11"
    step = next(row for row in rows if row.kind == "other")
    assert (step.case, step.name, step.images_per_second) == ("a training step", "resfast", 300)
    assert step.figures == {"speed_relative_to_plain": 1.23}


def test_page_has_targets_speeds_and_parts_of_the_machine(result: Path) -> None:
    page = tables(load([result]), {"speedup": "s.png", "roofline": "r.png"})
    assert [row[-1] for row in lines(page, "1.31 times compile")] == ["missed by 0.09"]
    assert [row[-1] for row in lines(page, "1.25 times compile")] == ["reached"]
    # 2 GFLOP in 20 ms are 0.1 TFLOP/s; the best product took 90 ms for 100 GFLOP: 1.11 TFLOP/s.
    assert [row[-1] for row in lines(page, "0.09 of a matrix product")] == ["missed by 0.51"]
    (cells,) = lines(page, "CPU X", "| 64 |", "| resfast |", "2,133")
    assert cells[4:] == [
        "2,133", "30", "3", "2.13", "192%", "1.31 × compile max-autotune (1.20 to 1.50)"
    ]  # fmt: skip
    (cells,) = lines(page, "cuDNN")
    assert cells[-2:] == ["9%", ""]  # no baseline, no ratio
    (cells,) = lines(page, "a training step")
    assert cells[-2:] == ["300", "speed_relative_to_plain 1.23"]
    (cells,) = lines(page, "0123456789ab+")
    assert cells[1:4] == ["1,111", "", "100"]
    assert "![Speed-up](s.png)" in page
    assert "![Roofline](r.png)" in page
    assert page.index("batch") < page.index("## Networks") < page.index("## Layers")


def test_results_of_others_stand_in_the_same_table_and_are_marked(
    result: Path, tmp_path: Path
) -> None:
    report = load([result, given(tmp_path, PEERS)])
    page = tables(report)
    table = page[page.index("### resnet-2111") : page.index("## Layers")]
    (cells,) = lines(table, "their paper")
    assert cells[3] == r"Peer\|A (given: their paper)"
    assert cells[4] == "3,200"
    assert cells[-1] == "2.00 × compile max-autotune"  # 40 ms on the same hardware against 20
    (cells,) = lines(table, "their log")
    assert (cells[0], cells[4], cells[-1]) == ("GPU Z", "32,000", "")
    assert not lines(page[page.index("## Machine") :], "GPU Z")


def test_written_rows_are_read_again_and_a_later_file_counts(result: Path, tmp_path: Path) -> None:
    report = load([result, given(tmp_path, PEERS)])
    data, page, *plots = write(report, tmp_path / "new" / "folder", "all")
    assert load([data]).rows == report.rows
    assert page.read_text().startswith("# Benchmarks, 2026-11-20\n")
    assert [plot.name for plot in plots] == ["all-speedup.png", "all-roofline.png"]
    for plot in plots:
        with Image.open(plot) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors()) > 10  # something is drawn
        assert f"]({plot.name})" in page.read_text()
    again = json.loads(result.read_text())
    again["benchmarks"] = [network("resfast", 0.015)]
    newer = load([data, given(tmp_path, again, "newer.json")])
    assert len(newer.rows) == len(report.rows)
    assert {row.seconds for row in newer.rows if row.batch == 64 and row.name == "resfast"} == {
        0.015
    }


def test_plots_are_left_out_where_there_is_nothing_to_show(tmp_path: Path) -> None:
    path = given(tmp_path, {"benchmarks": [network("resfast", 0.01)]})
    files = write(load([path]), tmp_path, "few")
    assert [file.name for file in files] == ["few.json", "few.md"]
    assert "![" not in files[1].read_text()


PEER = PEERS[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({"rows": []}, "has no results: expected"),
        ({"format": "other", "rows": []}, "has no results"),
        ([PEER, {**PEER, "batch": 0}], r"row 1, batch: .*greater than 0, not '0'"),
        (
            [{**PEER, "dtype": "int4"}],
            r"row 0, dtype: .*'bf16', 'fp16', 'fp32' or 'int8', not 'int4'",
        ),
        ([{**PEER, "seconds": 1}], "row 0, row: .*exactly one of images_per_second"),
        ([{**PEER, "images_per_second": None}], "row 0, row: .*exactly one of images_per_second"),
        ([{**PEER, "images_per_second": math.inf}], "row 0, images_per_second: .*finite number"),
        ([{k: v for k, v in PEER.items() if k != "source"}], "row 0, source: Field required"),
        ([3], "row 0, row: .*not '3'"),
        ({"benchmarks": [{"name": "test"}]}, "row 0, stats: Field required"),
        ({"benchmarks": [network("resfast", 0.1, ratio="fast")]}, "row 0, ratio: .*'fast'"),
        ({"format": bench_report.FORMAT, "rows": [{"kind": "model", "speed": 1}]}, "row 0, "),
    ],
)
def test_a_bad_file_is_refused_with_row_and_field(
    content: object, message: str, tmp_path: Path
) -> None:
    path = given(tmp_path, content, "bad.json")
    with pytest.raises(ResfastError, match=message) as error:
        load([path])
    assert str(path) in str(error.value)


def test_command_writes_and_says_what_is_wrong(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(bench_report, "RESULTS", tmp_path / "results")
    assert bench_report.main([str(result)]) == 0
    folder = tmp_path / "results" / "2026-11-20-cpu"
    written = capsys.readouterr().out.splitlines()
    assert written == [
        str(folder / f"benchmarks{end}")
        for end in (".json", ".md", "-speedup.png", "-roofline.png")
    ]
    assert all(Path(path).stat().st_size > 0 for path in written)
    assert bench_report.main([str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert bench_report.main([str(given(tmp_path, {"benchmarks": []}))]) == 2
    assert "no rows" in capsys.readouterr().err
    assert bench_report.main([str(result), "--out", str(result)]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_folder_is_named_after_the_gpu(tmp_path: Path) -> None:
    row = network("resfast", 0.1, device="cuda", processor="NVIDIA H200")
    path = given(tmp_path, {"benchmarks": [row], "datetime": "2026-11-21T08:00:00"})
    assert bench_report.default_folder(load([path])).name == "2026-11-21-nvidia-h200"
