from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import resfast
from resfast import atomic, runtime
from resfast.cli.doctor.line import cores
from resfast.cli.train import main
from resfast.config import files
from resfast.config.network import network
from resfast.config.schema import Config, ModelConfig, OptimConfig
from resfast.data.resident import resident_batches
from resfast.errors import NonFiniteLossError, ResfastError
from resfast.inference.scoring import evaluate, predict
from resfast.models.resnet import ResNet
from resfast.ops.conv_train import op as conv_train
from resfast.optim.schedules import Schedule
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.training import resolve
from resfast.training.loop import train
from resfast.training.step import TrainStep
from resfast.training.warm_up import warm_up_step
from tests.conftest import TINY_OPTIONS, change, worker_count

LIMIT_SECONDS = 180

SUMMARY_KEYS = {
    *("params", "macs", "epochs", "data", "train_images", "test_accuracy", "tta_accuracy"),
    *("best_accuracy", "train_seconds", "compile_seconds", "eval_seconds", "images_per_second"),
    *("device", "torch", "threads", "versions", "date", "seed"),
}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(path / records.WEIGHTS).tensors


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_run_learns_and_leaves_its_whole_folder(tiny: Config):
    result = train(change(tiny, epochs=8))
    assert {file.name for file in result.path.iterdir()} == {
        *("config.json", "metrics.jsonl", "summary.json", "checkpoint.pt"),
        "checkpoint-previous.pt",
        *("model.safetensors", "best.safetensors", "curves.png", "confusion.png"),
    }
    summary = json.loads((result.path / "summary.json").read_text())
    assert summary == result.summary
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["test_accuracy"] >= 0.9
    assert summary["epochs"] == 8
    assert summary["train_images"] == 48
    assert summary["compile_seconds"] == 0
    assert sum(map(sum, summary["confusion"])) == 16
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["eval_accuracy"] == pytest.approx(summary["test_accuracy"])
    for plot in ("curves.png", "confusion.png"):
        assert (result.path / plot).read_bytes().startswith(b"\x89PNG")


def test_the_saved_configuration_has_no_open_values_and_repeats_the_run(tiny: Config):
    first = train(tiny)
    saved = files.load(first.path / "config.json")
    assert saved.optim.epochs == 3
    assert saved.runtime.device == "cpu"
    assert saved.runtime.precision == "fp32"
    second = train(change(saved, name="again"))
    assert_same_weights(first.path, second.path)


def test_another_seed_gives_another_network(tiny: Config):
    first = train(tiny)
    second = train(change(tiny, name="other", seed=1))
    found = weights(first.path)
    name = next(name for name, value in found.items() if value.ndim == 4)
    assert not torch.equal(found[name], weights(second.path)[name])


def test_weights_file_alone_rebuilds_the_network(tiny: Config):
    result = train(tiny)
    file = checkpoint.load_weights(result.path / records.WEIGHTS)
    model = ResNet(network(file.config.model), len(file.classes))
    model.load_state_dict(file.tensors)
    assert file.classes == ("left", "right")
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    ours = predict(model.eval(), images, file.mean, file.std)
    torch.testing.assert_close(ours, predict(result.model, images, file.mean, file.std))


def test_train_mean_and_std_are_saved(tiny: Config):
    result = train(tiny)
    data = resfast.load_dataset(tiny.data.data, data_dir=tiny.data.data_dir, image_size=16)
    pixels = data.train_images.double().view(-1, 3) / 255
    assert result.summary.mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-6)
    assert result.summary.std == pytest.approx(pixels.std(0).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({"normalize": False}, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
        ({"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}, [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]),
        ({"std": (0.2, 0.3, 0.25)}, None, [0.2, 0.3, 0.25]),
    ],
)
def test_given_normalization_is_used_and_saved(
    tiny: Config, options: dict[str, Any], mean: list[float] | None, std: list[float]
):
    own = resfast.load(train(change(tiny, epochs=1, name="own")).path)
    run = train(change(tiny, epochs=1, **options))
    loaded = resfast.load(run.path)
    assert loaded.mean.tolist() == pytest.approx(own.mean.tolist() if mean is None else mean)
    assert loaded.std.tolist() == pytest.approx(std)
    assert resfast.evaluate(run.path).accuracy == pytest.approx(run.summary.test_accuracy)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "plateau", "multistep", "constant"])
def test_every_optimizer_and_schedule_lowers_the_loss(tiny: Config, optimizer: str, schedule: str):
    lr = 0.05 if optimizer == "sgd" else 0.01
    values = {"optimizer": optimizer, "schedule": schedule, "lr": lr, "milestones": (2,)}
    result = train(change(tiny, **values, warmup=0.2, tta="none"))
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


@pytest.mark.parametrize(
    "values",
    [{"clip_value": 0.1}, {"clip_norm": 1.0}, {"precision": "bf16"}, {"precision": "fp16"}],
)
def test_regularized_and_low_precision_runs_learn(tiny: Config, values: dict):
    result = train(change(tiny, epochs=6, **values))
    assert result.summary.test_accuracy >= 0.8


def test_held_out_images_are_not_trained_on_and_decide_best(tiny: Config):
    result = train(change(tiny, val_fraction=0.25, epochs=4))
    assert result.summary.train_images == 36
    assert result.summary.best_on == "val"
    assert result.summary.test_images == 16
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert {row["eval_set"] for row in rows} == {"val"}
    assert result.summary.best_accuracy == max(row["eval_accuracy"] for row in rows)
    best = checkpoint.load_weights(result.path / records.BEST)
    assert best.tensors.keys() == weights(result.path).keys()


def test_a_target_stops_the_run(tiny: Config):
    result = train(change(tiny, epochs=40, target=0.8))
    assert result.summary.epochs < 40
    assert result.summary.best_accuracy >= 0.8


def test_patience_stops_the_run(tiny: Config):
    result = train(change(tiny, epochs=60, early_stop=2, lr=1e-9))
    assert result.summary.epochs < 60


def test_evaluation_every_other_epoch_leaves_the_others_empty(tiny: Config):
    result = train(change(tiny, eval_every=2))
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval_accuracy"] is None for row in rows] == [True, False, False]


def test_small_data_adapts_visibly_and_explicit_values_stay(
    tiny: Config, capsys: pytest.CaptureFixture[str]
):
    result = train(change(tiny, epochs=1, batch_size=None, lr=0.4))
    saved = files.load(result.path / "config.json")
    assert saved.optim.batch_size == 48
    assert saved.optim.epochs == 1
    assert saved.optim.lr == pytest.approx(0.4 * 48 / 128)
    out = capsys.readouterr().out
    assert "batch size 128 to 48" in out
    assert "set --batch-size to choose" in out


def test_a_batch_larger_than_the_data_is_refused(tiny: Config):
    with pytest.raises(ResfastError, match="batch size 49 does not fit 48 training images"):
        train(change(tiny, batch_size=49))
    assert not tiny.run.out.exists()


def test_an_existing_run_is_never_overwritten(tiny: Config):
    train(change(tiny, epochs=1))
    before = (tiny.run.out / "tiny" / "summary.json").read_bytes()
    with pytest.raises(ResfastError, match="exists; continue it with --resume"):
        train(change(tiny, epochs=1))
    assert (tiny.run.out / "tiny" / "summary.json").read_bytes() == before


def test_tensorboard_events_are_written(tiny: Config):
    result = train(change(tiny, epochs=1, tensorboard=True))
    assert list((result.path / "tensorboard").glob("events*"))


def test_a_missing_optional_logger_is_reported_before_training(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("resfast.config.validate.find_spec", lambda name: None)
    with pytest.raises(ResfastError, match=r"pip install 'resfast\[wandb\]'"):
        train(change(tiny, wandb=True))


def test_wandb_gets_the_rows_and_the_summary(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    import types

    class Run:
        def __init__(self) -> None:
            self.rows, self.summary, self.finished = [], {}, False

        def log(self, values: dict, step: int) -> None:
            self.rows.append((step, values))

        def finish(self) -> None:
            self.finished = True

    run = Run()
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()
    module.init = lambda **values: run
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("resfast.config.validate.find_spec", lambda name: object())
    train(change(tiny, wandb=True))
    assert [step for step, _ in run.rows] == [1, 2, 3]
    assert run.summary["epochs"] == 3
    assert run.finished


# -- bad states ---------------------------------------------------------------------------------


def test_a_non_finite_loss_stops_with_the_place_and_the_last_checkpoint(tiny: Config):
    with pytest.raises(NonFiniteLossError) as error:
        train(change(tiny, lr=1e30, schedule="constant", warmup=0.0, epochs=5))
    message = str(error.value)
    for part in ("epoch 1", "step", "learning rate 1e+30", "checkpoint", "--lr"):
        assert part in message
    assert error.value.exit_code == 3


def test_a_non_finite_loss_keeps_the_last_good_checkpoint(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    calls = 0
    step = TrainStep._step

    def poisoned(self: TrainStep, images: torch.Tensor, *args: object):
        nonlocal calls
        calls += 1
        if calls == 7:  # third step of the second epoch
            images = images * float("nan")
        return step(self, images, *args)

    monkeypatch.setattr(TrainStep, "_step", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"epoch 2, step 3 of 4.*after 1 epochs"):
        train(tiny)
    monkeypatch.undo()
    result = train(resume=tiny.run.out / "tiny")
    whole = train(change(tiny, name="whole"))
    assert_same_weights(result.path, whole.path)


def test_exit_codes_of_the_command(image_tree: Path, tmp_path: Path):
    options = [*TINY_OPTIONS, "--data", f"folder:{image_tree}", "--data-dir", str(tmp_path)]
    options += ["--out", str(tmp_path / "runs")]
    assert main([*options, "--epochs", "1", "--name", "good"]) == 0
    bad = [*options, "--epochs", "1", "--name", "bad", "--schedule", "constant"]
    assert main([*bad, "--warmup", "0", "--lr", "1e30"]) == 3
    assert main([*options, "--epochs", "0"]) == 2


def spoil(tree: Path, how: str) -> None:
    if how == "corrupt image":
        (tree / "train" / "left" / "003.png").write_bytes(b"not an image")
    elif how == "empty class":
        for file in (tree / "train" / "left").iterdir():
            file.unlink()
    elif how == "other classes":
        (tree / "test" / "left").rename(tree / "test" / "up")
    elif how == "no test":
        shutil.rmtree(tree / "test")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("corrupt image", "003.png"),
        ("empty class", "left"),
        ("other classes", "up"),
        ("no test", "test"),
    ],
)
def test_a_spoiled_image_folder_stops_the_command_with_2(
    how: str,
    message: str,
    image_tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    tree = shutil.copytree(image_tree, tmp_path / "tree")
    spoil(tree, how)
    options = [*TINY_OPTIONS, "--data", f"folder:{tree}", "--data-dir", str(tmp_path / "data")]
    options += ["--out", str(tmp_path / "runs"), "--epochs", "1"]
    assert main(options) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("resfast: error: ")
    assert message in error[0]
    assert not (tmp_path / "runs").exists()
    if how == "corrupt image":
        assert main([*options, "--skip-corrupt", "--name", "skipped"]) == 0
        summary = json.loads((tmp_path / "runs" / "skipped" / "summary.json").read_text())
        assert summary["train_images"] == 47


def test_a_truncated_archive_stops_the_command_with_2(
    image_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    archive = Path(shutil.make_archive(str(tmp_path / "tree"), "xztar", image_tree))
    options = [*TINY_OPTIONS, "--data", f"folder:{archive}", "--data-dir", str(tmp_path / "data")]
    options += ["--out", str(tmp_path / "runs"), "--epochs", "1"]
    assert main([*options, "--name", "whole"]) == 0
    archive.write_bytes(archive.read_bytes()[:-2000])
    assert main([*options, "--name", "cut"]) == 2
    assert archive.name in capsys.readouterr().err
    assert not (tmp_path / "runs" / "cut").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_main_command_reaches_98_percent_on_digits(tmp_path: Path, pytestconfig: pytest.Config):
    """All defaults but for the data: digits, in a size and with shifts that suit them.

    They are of 8x8 pixels, and no digit is the mirror image of itself. Processors without
    instructions for bfloat16 take several times as long.
    """
    limit = min(LIMIT_SECONDS * worker_count(pytestconfig), 400)
    command = [sys.executable, "-m", "resfast.train", "--data", "digits", "--out", str(tmp_path)]
    command += ["--image-size", "12", "--augment", "crop=1", "--epochs", "4"]
    # By all cores, as a user runs it; the other worker's tests are what the limit allows for.
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores())}
    subprocess.run(command, check=True, timeout=limit, env=environment)
    (summary,) = tmp_path.glob("*/summary.json")
    values = json.loads(summary.read_text())
    assert values["test_accuracy"] >= 0.98
    assert values["model"] == "resnet-2111"


def test_a_full_disk_keeps_the_previous_checkpoint(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    whole = train(change(tiny, name="whole"))
    write, saves = atomic.write_bytes, 0

    def full(path: Path, data: bytes, keep: Path | None = None) -> None:
        nonlocal saves
        if path.name == records.CHECKPOINT:
            saves += 1
            if saves == 2:
                monkeypatch.setattr(os, "fsync", raise_full)
        write(path, data, keep)

    def raise_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write_bytes", full)
    with pytest.raises(ResfastError, match=r"No space left.*previous.*is intact.*--resume"):
        train(tiny)
    monkeypatch.undo()
    path = tiny.run.out / "tiny"
    assert checkpoint.load_state(path / records.CHECKPOINT)["epoch"] == 1
    assert not list(path.glob("*.tmp*"))
    train(resume=path)
    assert_same_weights(path, whole.path)


@pytest.mark.parametrize("damage", ["truncate", "garbage", "foreign"])
def test_a_damaged_checkpoint_is_named(tiny: Config, damage: str):
    path = train(change(tiny, epochs=1)).path
    file = path / records.CHECKPOINT
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "garbage":
        file.write_bytes(b"nothing")
    else:
        torch.save({"x": 1}, file)
    with pytest.raises(ResfastError, match=r"checkpoint\.pt"):
        train(resume=path)


def test_resuming_with_another_configuration_names_the_fields(tiny: Config):
    path = train(tiny).path
    saved = files.load(path / "config.json")
    with pytest.raises(ResfastError, match=r"lr was 0\.05 and is now 0\.2"):
        train(change(saved, lr=0.2), resume=path)
    train(change(saved, save_seconds=99.0), resume=path)


def test_resuming_by_command_with_another_option_exits_with_2(
    tiny: Config, capsys: pytest.CaptureFixture[str]
):
    path = train(tiny).path
    assert main(["--resume", str(path), "--lr", "0.2", "--augment", "flip=random"]) == 2
    error = capsys.readouterr().err
    assert "lr was 0.05 and is now 0.2" in error
    assert "augment was 'crop=1' and is now 'flip=random'" in error
    assert main(["--resume", str(path), "--lr", "0.05"]) == 0


def test_resuming_on_other_images_is_refused(tiny: Config, image_tree: Path, tmp_path: Path):
    tree = shutil.copytree(image_tree, tmp_path / "copy")
    path = train(change(tiny, data=f"folder:{tree}")).path
    (tree / "train" / "left" / "000.png").unlink()
    with pytest.raises(ResfastError, match="its content changed"):
        train(resume=path)


def test_resuming_a_finished_run_gives_its_result_again(tiny: Config):
    first = train(tiny)
    before = weights(first.path)
    second = train(resume=first.path)
    assert second.summary.test_accuracy == first.summary.test_accuracy
    assert second.summary.epochs == 3
    for name, value in weights(second.path).items():
        assert torch.equal(value, before[name])


def test_weights_carry_their_metadata_in_the_safetensors_file(tiny: Config):
    path = train(change(tiny, epochs=1)).path
    with safe_open(path / records.WEIGHTS, framework="pt") as file:
        assert {"config", "classes", "mean", "std"} <= set(file.metadata())


# -- evaluation ---------------------------------------------------------------------------------


class Corner(nn.Module):
    """Logits that depend on where an image is bright, so that a mirror or shift shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, -1], x[:, 0, 1, 1]], 1)


def test_test_time_augmentation_averages_mirrors_and_shifts():
    images = torch.randint(0, 256, (3, 6, 6, 3), dtype=torch.uint8)
    mean, std = torch.zeros(3), torch.full((3,), 1 / 255)
    x = images[..., 0].float()
    plain = predict(Corner(), images, mean, std)
    torch.testing.assert_close(plain, torch.stack([x[:, 0, 0], x[:, 0, -1], x[:, 1, 1]], 1))
    flipped = predict(Corner(), images, mean, std, tta="flip")
    expected = (x[:, 0, 0] + x[:, 0, -1]) / 2
    torch.testing.assert_close(flipped[:, 0], expected)
    torch.testing.assert_close(flipped[:, 1], expected)
    shifted = predict(Corner(), images, mean, std, tta="shift")
    # Up-left brings the reflected pixel (1, 1) to the corner, down-right the pixel (1, 1) itself.
    moved = [(x[:, 1, 1] + x[:, 1, -2]) / 2, (x[:, 1, 1] + x[:, 1, -2]) / 2]
    torch.testing.assert_close(shifted[:, 0], expected / 2 + sum(moved) / 4)


def test_evaluation_counts_right_and_wrong_by_class():
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(x[:, 0, 0, 0].round().long(), 3).float()

    images = torch.tensor([0, 0, 1, 2, 2, 2], dtype=torch.uint8)[:, None, None, None]
    images = images.expand(-1, 4, 4, 3).contiguous()
    labels = torch.tensor([0, 1, 1, 2, 2, 0])
    batches = resident_batches(
        images, labels, torch.zeros(3), torch.full((3,), 1 / 255), batch_size=4
    )
    result = evaluate(Fixed(), batches)
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.confusion.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 2]]
    assert result.per_class == pytest.approx([0.5, 0.5, 1.0])


def test_a_batch_size_of_evaluation_does_not_change_the_result(tiny: Config):
    result = train(change(tiny, epochs=1))
    images = torch.randint(0, 256, (10, 16, 16, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(result.summary[key]) for key in ("mean", "std"))
    small = predict(result.model, images, mean, std, batch_size=3)
    torch.testing.assert_close(small, predict(result.model, images, mean, std))


# -- the step -----------------------------------------------------------------------------------


def make_step(compile: bool, **values: object) -> TrainStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, 3, 8, 8))
    config = OptimConfig(lr=0.1, **values)
    from resfast.optim.optimizers import build_optimizer

    return TrainStep(
        model,
        build_optimizer(model, config),
        config,
        device=torch.device("cpu"),
        dtype=torch.float32,
        compile=compile,
    )


def test_warm_up_leaves_weights_statistics_and_generators_alone():
    step = make_step(compile=False)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    generator = torch.get_rng_state()
    warm_up_step(step, torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), fall_back=True)
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in step.model.parameters())
    torch.manual_seed(0)
    assert len(generator) == len(torch.get_rng_state())


def test_a_failing_compiler_falls_back_and_says_so(caplog: pytest.LogCaptureFixture):
    step = make_step(compile=False)

    def broken(images: torch.Tensor, labels: torch.Tensor) -> None:
        raise RuntimeError("no compiler today")

    step._loss = broken
    batch = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ResfastError, match=r"torch.compile failed: no compiler today"):
        warm_up_step(step, *batch, fall_back=False)
    warm_up_step(step, *batch, fall_back=True)
    assert "no compiler today" in caplog.text
    assert torch.isfinite(step(*batch)[0])


def test_averaged_weights_follow_the_formula():
    step = make_step(compile=False, ema=0.5)
    name = "0.weight"
    expected = None
    for done in range(6):
        step(torch.randn(4, 3, 8, 8), torch.randint(3, (4,)))
        weight = step.model.state_dict()[name].clone()
        if expected is None:
            expected = weight
        else:
            expected = expected.lerp(weight, 1 - min(0.5, (1 + done) / (10 + done)))
        torch.testing.assert_close(step.evaluated_model.state_dict()[name], expected)


@pytest.mark.parametrize("kernels", [True, False])
def test_torch_compile_waits_for_runs_that_are_long_enough(kernels: bool):
    cpu, images = torch.device("cpu"), 2_000_000 if kernels else 100_000
    short, note = resolve._resolve_compile("auto", cpu, images - 1, kernels)
    assert short == "off"
    assert f"from {images:,} images in total, and this run has {images - 1:,}" in note
    if runtime.compiler_missing(cpu) is None:
        assert resolve._resolve_compile("auto", cpu, images, kernels) == ("auto", None)
        assert resolve._resolve_compile("on", cpu, 1, kernels) == ("on", None)
    assert resolve._resolve_compile("off", cpu, images, kernels) == ("off", None)


@pytest.mark.parametrize(
    ("options", "covered"),
    [
        ({"model": "resnet-2111"}, True),
        ({"model": "speednet-94"}, True),
        ({"model": "resnet-2111", "norm": "none"}, False),
        ({"model": "vgg-a"}, False),
    ],
)
def test_the_kernels_cover_residual_networks_and_speednets(
    options: dict[str, str], covered: bool, tiny: Config
):
    config = replace(tiny, model=ModelConfig(**options))
    assert resolve._has_kernels(config) == (covered and conv_train.AVAILABLE)


def test_the_compiled_step_equals_the_plain_one():
    plain, compiled = make_step(compile=False), make_step(compile=True)
    for seed in range(3):
        torch.manual_seed(seed)
        images, labels = torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
        ours, theirs = compiled(images, labels), plain(images, labels)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_run_on_cuda_learns(tiny: Config, precision: str):
    config = change(tiny, device="cuda", precision=precision, compile="auto", epochs=8)
    assert train(config).summary.test_accuracy >= 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "standard", "strong", "report-001"])
def test_an_epoch_on_cuda_never_waits_for_the_device(policy: str):
    from resfast.data.augment import parse_augment
    from resfast.data.resident import ResidentLoader

    step = make_step(compile=False, ema=0.9)
    images = torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8)
    loader = ResidentLoader(
        images,
        torch.randint(3, (64,)),
        torch.full((3,), 0.5),
        torch.full((3,), 0.25),
        batch_size=8,
        augment=parse_augment(policy),
        classes=3,
        device="cuda",
    )
    step.model.cuda()
    step.evaluated_model.cuda()
    step.device = torch.device("cuda")
    for epoch in (0, 1):  # the second one has everything compiled and cached
        batches = loader.epoch(epoch)
        step(*next(batches)[:2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(batch.images, batch.labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (0, [5])])
def test_the_plateau_gets_the_epochs_since_the_last_evaluation(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, every: int, expected: list[int]
):
    seen = []
    monkeypatch.setattr(Schedule, "evaluated", lambda self, accuracy, epochs: seen.append(epochs))
    resfast.train(change(tiny, epochs=5, schedule="plateau", eval_every=every))
    assert seen == expected


@pytest.mark.parametrize("schedule", ["onecycle", "linear", "plateau"])
def test_the_learning_rate_of_a_row_is_that_of_the_epoch_s_last_step(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, schedule: str
):
    rates = []
    step = TrainStep.__call__

    def stepped(self: TrainStep, *args: object):
        rates.append(self.schedule.lr)
        return step(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", stepped)
    path = resfast.train(change(tiny, schedule=schedule, patience=0)).path
    rows = [json.loads(line) for line in (path / records.METRICS).read_text().splitlines()]
    assert len(rates) == 12
    assert [row["lr"] for row in rows] == rates[3::4]
