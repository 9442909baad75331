"""Results of ``benchmarks.peers`` as rows, tables and a plot of ``benchmarks.bench_report``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench_report, peer_worker, peers
from benchmarks.peers import Row

CASE = [
    Row("resfast", "resnet18", 8, "fp32", [90.0, 110.0, 100.0], 1e-6, 800),
    Row("torch.compile", "resnet18", 8, "fp32", [80.0, 70.0, 90.0], 2e-6, 900),
    Row("OpenVINO", "resnet18", 8, "fp32", [120.0, 125.0, 130.0], 3e-6, 700),
    Row("ONNX Runtime", "resnet18", 8, "fp32", missing="not installed: pip install onnxruntime"),
]


def test_speeds_are_relative_to_the_fastest_other_library_losses_included() -> None:
    report = peers.report(CASE)
    ours, compiled, openvino = report.rows
    assert {row.baseline for row in report.rows} == {"OpenVINO"}
    assert ours.ratio == pytest.approx(100 / 125)
    assert ours.ratio_range == pytest.approx((90 / 120, 110 / 125))
    assert (compiled.ratio, openvino.ratio) == (pytest.approx(80 / 125), 1)
    assert (ours.images_per_second, ours.seconds) == (100, 0.08)
    assert (ours.kind, ours.device, ours.rounds) == ("peer", "cpu", 3)
    (skipped,) = report.skipped
    assert (skipped.name, skipped.reason) == ("ONNX Runtime", CASE[3].missing)


@pytest.mark.parametrize("dtype", peer_worker.DTYPES)
def test_every_dtype_that_can_be_timed_is_a_row(dtype: str) -> None:
    (row,) = peers.report([Row("resfast", "resnet18", 1, dtype, [1.0], 0.0, 1)]).rows
    assert row.dtype == dtype


def test_without_another_library_there_is_no_ratio() -> None:
    report = peers.report([CASE[0], CASE[3]])
    assert [row.ratio for row in report.rows] == [None]


def test_rows_are_read_again_and_drawn(tmp_path: Path) -> None:
    written = peers.report(CASE)
    path = tmp_path / "peers.json"
    path.write_bytes(bench_report.encoded(written))
    report = bench_report.load([path])
    assert report == written
    _, page, *plots = bench_report.write(report, tmp_path / "out", "all")
    assert [plot.name for plot in plots] == ["all-speedup.png"]
    text = page.read_text()
    assert "0.80 × OpenVINO (0.75 to 0.88)" in text
    assert CASE[3].missing in text[text.index("## Not measured") :]


def test_the_command_leaves_rows_and_reasons(tmp_path: Path) -> None:
    """A library that cannot run a case, here ONNX Runtime in bfloat16, does not stop the others."""
    path = tmp_path / "peers.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--peers", "resfast,ONNX Runtime"]
    command += ["--models", "resnet-member1m", "--batches", "2", "--dtypes", "bf16", "--turns", "2"]
    done = subprocess.run(
        [*command, "--seconds", "0.05", "--json", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    (row,) = content["rows"]
    assert (row["name"], row["batch"], row["rounds"]) == ("resfast", 2, 2)
    assert row["relative_error"] < 0.05
    (skipped,) = content["skipped"]
    assert "bfloat16" in skipped["reason"]
    assert "images/s" in done.stdout
