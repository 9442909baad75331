"""Several runs with the compiled step reused, their statistics, limits and timing."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import resfast
from resfast.cli.train import main
from resfast.config import files
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.runs.statistics import p_value, statistics
from resfast.training import loop as trainer
from resfast.training import seeds as runs
from resfast.training import stopping, warm_up
from resfast.training.evaluator import Evaluator
from resfast.training.step import TrainStep
from tests.conftest import TINY_OPTIONS, change, interrupt_at
from tests.test_training import assert_same_weights


@pytest.fixture
def several(tiny: Config) -> Config:
    """Three runs of the tiny network, with everything that a run carries from step to step."""
    return change(tiny, runs=3, seed=5, dropout=0.1, head=(6,))


def alone(config: Config, seed: int) -> trainer.Result:
    return trainer.train(change(config, runs=1, seed=seed, name=f"alone{seed}", target=None))


@pytest.mark.parametrize(("compile", "seeds"), [("off", (5, 6, 7)), ("on", (5, 6))])
def test_every_seed_ends_with_the_bits_of_the_same_seed_alone(
    several: Config, compile: str, seeds: tuple[int, ...]
):
    several = change(several, compile=compile, epochs=2, runs=len(seeds))
    result = runs.train(several)
    for seed in seeds:
        ours = json.loads((result.path / f"seed{seed}" / records.SUMMARY).read_text())
        theirs = alone(several, seed)
        assert_same_weights(result.path / f"seed{seed}", theirs.path)
        for key in ("test_accuracy", "tta_accuracy", "best_accuracy", "test_loss", "confusion"):
            assert ours[key] == theirs.summary[key], key


SPEEDNET = {
    **{"model": "speednet", "convolutions": (2, 1), "channels": (8, 16), "blocks": (), "head": ()},
    **{"stem": None, "dropout": None, "optimizer": "muon", "ema": 0.0, "lookahead": 3},
    **{"whitening_bias_epochs": 1.5, "normalize_filters": True, "schedule": "linear"},
    **{"sizes": ((12, 0.5),), "filter_start": 0.5, "filter_keep": 0.5, "epochs": 2.5},
}
"""Everything of the speed recipes at once."""


@pytest.mark.parametrize(
    "values",
    [
        SPEEDNET,
        {"ema": 0.0, "optimizer": "muon", "lookahead": 2, "weight_decay": 1e-3},
        {"optimizer": "adamw", "lr": 0.01},
        {"schedule": "plateau", "patience": 0, "warmup": 0.2},
        {"precision": "fp16"},
        {"precision": "bf16", "augment": resfast.data.augment.POLICIES["strong"]},
    ],
)
def test_nothing_of_a_run_reaches_the_next_one(several: Config, values: dict):
    several = change(several, runs=2, **values)
    result = runs.train(several)
    assert_same_weights(result.path / "seed6", alone(several, 6).path)


def test_the_step_is_compiled_once(several: Config, monkeypatch: pytest.MonkeyPatch):
    compiled = []
    warm_up_step = warm_up.warm_up_step

    def counting(step: TrainStep, *args: object, **kwargs: object) -> float:
        compiled.append(id(step))
        return warm_up_step(step, *args, **kwargs)

    monkeypatch.setattr(warm_up, "warm_up_step", counting)
    result = runs.train(change(several, compile="on", epochs=1))
    assert len(compiled) == 1
    seconds = [row.compile_seconds for row in result.summary.each]
    assert seconds[0] > 0
    assert seconds[1:] == [0, 0]


def test_the_common_summary_has_the_statistics_of_the_runs(several: Config):
    result = resfast.train(change(several, target=0.7, eval_every=0))
    summary = json.loads((result.path / records.SUMMARY).read_text())
    each = [json.loads((result.path / f"seed{s}" / records.SUMMARY).read_text()) for s in (5, 6, 7)]
    accuracies = [run["tta_accuracy"] for run in each]
    assert summary["accuracies"] == accuracies
    assert summary["seeds"] == [5, 6, 7]
    assert summary["accuracy"] == "tta_accuracy"
    found = statistics(accuracies)
    assert (summary["mean"], summary["sd"]) == (found.mean, found.sd)
    assert summary["confidence_interval"] == [found.low, found.high]
    assert summary["p_value"] == p_value(accuracies, 0.7)
    timed = [run["timed_seconds"] for run in each]
    assert summary["seconds"]["timed"]["mean"] == pytest.approx(statistics(timed).mean)
    assert summary["seconds"]["timed"]["sd"] == pytest.approx(statistics(timed).sd)
    assert summary["total_seconds"] >= sum(run["total_seconds"] for run in each)
    assert "whitening" in summary["timing_rule"]
    assert all(run["epochs"] == 3 for run in each)  # the target is no early stop here
    assert replace(result.summary, total_seconds=summary["total_seconds"]) == summary
    text = runs.headline(result.summary)
    assert f"{found.mean:.2%}" in text
    assert "p = " in text


def test_without_test_time_augmentation_the_plain_accuracy_counts(several: Config):
    result = runs.train(change(several, runs=2, tta="none", epochs=1))
    assert result.summary.accuracy == "test_accuracy"
    first = result.summary.each[0]
    assert result.summary.accuracies[0] == first.test_accuracy


def test_the_headline_names_test_time_augmentation_only_where_there_is_some(tiny: Config):
    for tta in ("none", "flip"):
        summary = runs.train(change(tiny, name=tta, epochs=1, tta=tta)).summary
        first = runs.headline(summary).splitlines()[0]
        plain = f"test accuracy {summary.test_accuracy:.2%}"
        augmented = f", with test-time augmentation (flip) {summary.tta_accuracy:.2%}"
        assert first == (plain if tta == "none" else plain + augmented)


def test_stopping_keeps_what_is_there_and_resuming_goes_on(
    several: Config, monkeypatch: pytest.MonkeyPatch
):
    whole = runs.train(change(several, name="whole"))
    interrupt_at(monkeypatch, 12 + 5)  # of 12 steps each
    with pytest.raises(trainer.Interrupted) as stopped:
        runs.train(several)
    monkeypatch.undo()
    path = stopped.value.path
    assert path == several.run.out / "tiny"
    summary = json.loads((path / records.SUMMARY).read_text())
    assert (summary["finished"], summary["runs"], summary["sd"]) == (1, 3, None)
    before = summary["total_seconds"]
    result = runs.train(resume=path)
    assert result.summary.accuracies == whole.summary.accuracies
    assert result.summary.total_seconds > before
    for seed in (5, 6, 7):
        assert_same_weights(path / f"seed{seed}", whole.path / f"seed{seed}")


def test_resuming_with_more_runs_adds_them(several: Config):
    first = runs.train(change(several, runs=2, epochs=1))
    kept = (first.path / "seed5" / records.WEIGHTS).stat().st_mtime_ns
    more = runs.train(change(files.load(first.path / "config.json"), runs=4), resume=first.path)
    assert more.summary.seeds == (5, 6, 7, 8)
    assert more.summary.accuracies[:2] == first.summary.accuracies
    assert (first.path / "seed5" / records.WEIGHTS).stat().st_mtime_ns == kept


def test_resuming_finished_runs_gives_their_result_again(several: Config):
    first = runs.train(change(several, runs=2, epochs=1))
    (first.path / "seed7").mkdir()  # of a run that was killed as it began
    again = runs.train(resume=first.path)
    assert again.summary.accuracies == first.summary.accuracies
    more = runs.train(change(files.load(first.path / "config.json"), runs=3), resume=first.path)
    assert more.summary.finished == 3


def test_an_old_config_is_of_one_run(several: Config, tmp_path: Path):
    values = json.loads(files.to_json(several))
    del values["run"]["runs"], values["run"]["max_seconds"]
    old = files.from_json(json.dumps(values), "old")
    assert (old.run.runs, old.run.max_seconds) == (1, None)


def test_bad_runs_are_named(several: Config, tmp_path: Path):
    with pytest.raises(ResfastError, match="--runs 0 is out of range"):
        runs.train(change(several, runs=0))
    with pytest.raises(ResfastError, match="--runs 3 is more than one training"):
        trainer.train(several)
    done = runs.train(change(several, runs=2, epochs=1))
    saved = files.load(done.path / "config.json")
    with pytest.raises(ResfastError, match=r"lr was 0\.05 and is now 0\.2"):
        runs.train(change(saved, lr=0.2), resume=done.path)
    with pytest.raises(ResfastError, match=r"lr was 0\.05 and is now 0\.2, momentum was 0\.9 and"):
        runs.train(change(saved, lr=0.2, momentum=0.8), resume=done.path)
    with pytest.raises(ResfastError, match="--runs 2 does not fit"):
        runs.train(saved, resume=done.path / "seed5")
    file = done.path / "seed5" / records.SUMMARY
    summary = json.loads(file.read_text())
    for content, reason in (
        ({}, "run: Field required"),
        (summary | {"seed": "five"}, "seed: Input should be a valid integer"),
        (summary | {"tta_accuracy": None}, "has no accuracy"),
        (summary | {"timed_seconds": None}, "has no timed_seconds"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ResfastError, match=f"{reason}.*delete it to evaluate"):
            runs.train(resume=done.path)
    file.unlink()
    assert runs.train(resume=done.path).summary.accuracies == done.summary.accuracies


def test_the_command_trains_several_and_prints_what_they_say(
    image_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = [*TINY_OPTIONS, "--data", f"folder:{image_tree}", "--data-dir", str(tmp_path)]
    options += ["--out", str(tmp_path / "runs"), "--epochs", "2", "--name", "many"]
    assert main([*options, "--runs", "2", "--target", "0.5", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "seed 4 (2 of 2)" in out
    assert "95% confidence interval of the mean" in out
    assert "p = " in out or "target" in out
    path = tmp_path / "runs" / "many"
    assert out.splitlines()[-1] == str(path)
    assert {f.name for f in path.iterdir()} == {"config.json", "summary.json", "seed3", "seed4"}
    assert main(["--resume", str(path), "--runs", "3"]) == 0
    assert "3 of 3 runs" in capsys.readouterr().out


# -- timing and limits ----------------------------------------------------------------------------


def test_timed_seconds_are_those_that_the_rule_counts(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    evaluated = []
    evaluate = Evaluator.evaluate

    def watching(self: Evaluator, tta: str, *batches: object):
        score = evaluate(self, tta, *batches)
        evaluated.append((tta, score.seconds))
        return score

    monkeypatch.setattr(Evaluator, "evaluate", watching)
    summary = trainer.train(tiny).summary
    assert [tta for tta, _ in evaluated] == ["none", "none", "flip"]
    assert summary.final_eval_seconds == evaluated[-1][1]
    assert summary.eval_seconds == pytest.approx(sum(seconds for _, seconds in evaluated))
    parts = (summary.whitening_seconds, summary.train_seconds, summary.final_eval_seconds)
    assert summary.timed_seconds == pytest.approx(sum(parts))
    assert summary.total_seconds > summary.timed_seconds
    assert summary.timing_rule == records.TIMING_RULE

    evaluated.clear()
    held = change(tiny, name="held", eval_every=0, val_fraction=0.25)
    summary = trainer.train(held).summary
    assert [tta for tta, _ in evaluated] == ["flip", "flip"]  # held-out images, then the test set
    assert summary.final_eval_seconds == evaluated[1][1]


def test_evaluation_only_at_the_end_leaves_the_result_as_it_is(tiny: Config):
    often = trainer.train(change(tiny, name="often"))
    once = trainer.train(change(tiny, eval_every=0))
    rows = [json.loads(line) for line in (once.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval_accuracy"] is None for row in rows] == [True, True, False]
    assert_same_weights(often.path, once.path)
    assert once.summary.tta_accuracy == often.summary.tta_accuracy


def test_a_command_counts_from_the_start_of_its_process():
    from resfast.cli.train import _process_seconds

    if not os.path.exists("/proc/self/stat"):
        pytest.skip("only Linux tells")
    assert 0 < _process_seconds() < 24 * 3600


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_limit_of_seconds_stops_cleanly_and_more_of_them_go_on(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, step: int
):
    tiny = change(tiny, dropout=0.1)
    whole = trainer.train(change(tiny, name="whole"))
    real, done = stopping.out_of_time, 0

    def out_of_time(state: object, display: object, epoch_seconds: float) -> bool:
        return real(state, display, 1e9 if done >= step else epoch_seconds)

    def after(number: int, images: torch.Tensor) -> None:
        nonlocal done
        done = number + 1

    monkeypatch.setattr(stopping, "out_of_time", out_of_time)
    stopped = trainer.train(change(tiny, max_seconds=1e6), after_step=after)
    monkeypatch.undo()
    assert stopped.summary.stopped == "max_seconds"
    assert stopped.summary.epochs == step // 4
    assert stopped.summary.best_accuracy >= 0
    cut = _rows(stopped.path)
    assert len(cut) == math.ceil(step / 4)
    if step % 4:  # the epoch that was cut short has a row of its own
        assert (cut[-1]["epoch"], cut[-1]["eval_set"]) == (step // 4 + 1, "test")
        assert cut[-1]["eval_accuracy"] == stopped.summary.test_accuracy
    assert (stopped.path / records.BEST).exists()
    state = checkpoint.load_state(stopped.path / records.CHECKPOINT)
    assert (state["epoch"], state["step"]) == divmod(step, 4)
    saved = files.load(stopped.path / "config.json")
    if step % 4:
        losses, images = state["losses"][: step % 4], 12 * (step % 4)
        assert cut[-1]["train_loss"] == pytest.approx(float(losses.double().mean()))
        assert cut[-1]["train_accuracy"] == int(state["correct"]) / images
        assert cut[-1]["images_per_second"] == pytest.approx(images / cut[-1]["train_seconds"])
        trainer.train(change(saved, max_seconds=1e-9), resume=stopped.path)  # still out of time
        assert _untimed(_rows(stopped.path)) == _untimed(cut)
    more = trainer.train(change(saved, max_seconds=2e6), resume=stopped.path)
    assert more.summary.stopped is None
    assert_same_weights(more.path, whole.path)
    assert _untimed(_rows(more.path)) == _untimed(_rows(whole.path))


def _untimed(rows: list[dict]) -> list[dict]:
    timed = {"train_seconds", "eval_seconds", "images_per_second"}
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / records.METRICS).read_text().splitlines()]


def test_the_learning_rate_of_a_row_is_that_of_its_last_step(tiny: Config):
    result = trainer.train(change(tiny, schedule="linear", warmup=0.0, end_factor=0.0))
    # 12 steps fall from 0.05 to 0; the epochs end after 4, 8 and 12 of them.
    expected = [0.05 * (1 - step / 12) for step in (3, 7, 11)]
    assert [row["lr"] for row in _rows(result.path)] == pytest.approx(expected)


def test_a_limit_that_is_over_at_once_still_gives_a_whole_result(tiny: Config):
    result = trainer.train(change(tiny, max_seconds=1e-9))
    assert result.summary.stopped == "max_seconds"
    assert result.summary.epochs == 0
    assert result.summary.train_seconds > 0
    again = trainer.train(resume=result.path)
    assert again.summary.test_accuracy == result.summary.test_accuracy
    with pytest.raises(ResfastError, match="max-seconds 0 is out of range"):
        trainer.train(change(tiny, max_seconds=0, name="zero"))


def test_peak_memory_is_recorded(tiny: Config):
    assert trainer.train(change(tiny, epochs=1)).summary.peak_memory_bytes > 50e6


@pytest.mark.gpu
def test_on_cuda_every_seed_ends_with_the_accuracy_of_the_same_seed_alone(several: Config):
    several = change(several, device="cuda", precision="fp32", tf32=False, epochs=6)
    result = runs.train(several)
    for row in result.summary.each:
        theirs = alone(several, row.seed).summary
        assert row.tta_accuracy == pytest.approx(theirs.tta_accuracy, abs=0.1)
    shutil.rmtree(result.path)
