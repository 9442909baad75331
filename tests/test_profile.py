"""``--profile``: times of operators, a trace, and the comparison with a matrix product."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from resfast.cli.train import main
from resfast.config.network import network
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.models.presets import build_model
from resfast.models.summary import count_macs
from resfast.training import loop as trainer
from resfast.training import profiling
from resfast.training.loss_watch import LossWatch
from resfast.training.profiling import matmul_flops, profile
from tests.conftest import TINY_OPTIONS, change


def test_a_profile_names_operators_and_writes_a_trace_and_no_run(tiny: Config, tmp_path: Path):
    file = tmp_path / "trace.json"
    found = profile(tiny, file)
    assert not tiny.run.out.exists()
    events = json.loads(file.read_bytes())["traceEvents"]
    steps = sum(event.get("name") == "aten::cross_entropy_loss" for event in events)
    assert steps == 3
    assert found.operators[0].seconds == max(op.seconds for op in found.operators)
    assert sum(op.share for op in found.operators) <= 1 + 1e-9
    assert {"aten::mkldnn_convolution", "aten::convolution_backward"} & {
        op.name for op in found.operators
    }
    model = build_model(network(tiny.model), 2, 16)
    assert (found.images, found.size) == (12, 16)
    assert found.flops == 3 * 2 * count_macs(model, 16) * 12
    assert found.mfu == pytest.approx(found.flops / found.step_seconds / found.matmul_flops)
    assert 0 < found.mfu < 1
    text = str(found)
    assert f"MFU {found.mfu:.1%}" in text
    assert "Winograd needs fewer" in text
    assert found.operators[0].name in text


def test_only_the_steps_that_were_asked_for_are_trained(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    call = profiling._Recorder.__call__

    def watching(self: profiling._Recorder, step: int, images: torch.Tensor) -> None:
        seen.append(step)
        call(self, step, images)

    monkeypatch.setattr(profiling._Recorder, "__call__", watching)
    profile(change(tiny, epochs=50), tmp_path / "trace.json")
    assert seen == list(range(8))


def test_calls_are_counted_a_step(tiny: Config, tmp_path: Path):
    found = profile(tiny, tmp_path / "trace.json")
    calls = {op.name: op.calls for op in found.operators}
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in build_model(
        network(tiny.model), 2, 16).modules())  # fmt: skip
    assert calls["aten::convolution_backward"] == convolutions


def test_the_rate_of_a_matrix_product_is_that_of_its_best_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(profiling._MATRIX_SIZES, "cpu", (8, 16, 32))
    seconds = iter([*[1e-3] * 5, *[2e-3] * 5, *[1.0] * 4, 4e-3])
    monkeypatch.setattr(profiling, "_seconds", lambda call, device: (call(), next(seconds))[1])
    found = matmul_flops(torch.device("cpu"), torch.float32)
    assert found == pytest.approx(2 * 32**3 / 4e-3)


def test_bad_profiles_are_named(tiny: Config, tmp_path: Path):
    with pytest.raises(ResfastError, match="at least 8 training steps, but there are 4"):
        profile(change(tiny, epochs=1), tmp_path / "trace.json")
    with pytest.raises(ResfastError, match="there is no folder"):
        profile(tiny, tmp_path / "missing" / "trace.json")
    with pytest.raises(ResfastError, match="exclude each other"):
        profile(change(tiny, runs=2), tmp_path / "trace.json")
    assert not list(tmp_path.glob("trace*"))


def test_stopping_a_profile_names_no_run_to_go_on_with(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poll = LossWatch.poll

    def stopping(self: LossWatch, step: int):
        signal.raise_signal(signal.SIGINT)
        return poll(self, step)

    monkeypatch.setattr(LossWatch, "poll", stopping)
    with pytest.raises(KeyboardInterrupt) as stopped:
        profile(tiny, tmp_path / "trace.json")
    assert not isinstance(stopped.value, trainer.Interrupted)


def test_the_command_prints_the_profile(
    image_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = [*TINY_OPTIONS, "--data", f"folder:{image_tree}", "--data-dir", str(tmp_path)]
    options += ["--out", str(tmp_path / "runs"), "--epochs", "2"]
    assert main([*options, "--profile", str(tmp_path / "trace.json")]) == 0
    out = capsys.readouterr().out
    assert "ms/step" in out
    assert "MFU" in out
    assert (tmp_path / "trace.json").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.gpu
def test_a_profile_on_cuda_sees_kernels(tiny: Config, tmp_path: Path):
    config = change(tiny, device="cuda", precision="bf16", compile="on", epochs=20)
    found = profile(config, tmp_path / "trace.json")
    assert 0 < found.mfu < 1
    events = json.loads((tmp_path / "trace.json").read_bytes())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
