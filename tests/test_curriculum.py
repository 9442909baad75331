"""The plan of a run: sizes of batches and images, images left out, and epochs that are cut."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resfast import runtime
from resfast.cli.train import command_line
from resfast.config import files
from resfast.config.options import phases_text
from resfast.config.schema import Config, DataConfig, OptimConfig
from resfast.config.validate import check
from resfast.data.augment import Augment, order, smaller
from resfast.errors import NonFiniteLossError, ResfastError
from resfast.optim.optimizers import build_optimizer
from resfast.optim.schedules import Schedule
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.training import evaluator
from resfast.training import loop as trainer
from resfast.training.display import Display
from resfast.training.loop import Interrupted, train
from resfast.training.plan import Plan, PlannedBatch, epoch_order, make_plan, weighted_mean
from resfast.training.session import Session
from resfast.training.state import TrainingState
from resfast.training.step import TrainStep
from resfast.training.warm_up import _warm_up_batches
from tests.conftest import change, interrupt_at
from tests.test_training import assert_same_weights


def plan(images: int = 100, image_size: int = 32, **values: object) -> Plan:
    data = {name: values.pop(name) for name in list(values) if hasattr(DataConfig(), name)}
    optim = OptimConfig(**{"epochs": 4, "batch_size": 10, **values})
    return make_plan(Config(data=DataConfig(**data), optim=optim), images, image_size)


# -- the plan -----------------------------------------------------------------------------------


def test_without_a_curriculum_every_epoch_is_the_same_batches():
    made = plan(images=105)
    assert made.uniform
    assert made.progress() is None
    assert made.shapes() == [(10, 32)]
    assert (made.steps, made.images, made.max_steps) == (40, 400, 10)
    expected = tuple(PlannedBatch(10 * step, 10, 32) for step in range(10))
    assert [epoch.batches for epoch in made.epochs] == [expected] * 4
    assert [epoch.first_step for epoch in made.epochs] == [0, 10, 20, 30]


def test_the_last_batch_is_left_out_or_has_the_rest_of_the_images():
    made = plan(images=105, drop_last=False)
    assert made.uniform
    assert [batch.images for batch in made.epochs[0].batches] == [10] * 10 + [5]
    assert made.epochs[3].batches is made.epochs[0].batches
    assert (made.steps, made.images, made.max_steps) == (44, 420, 11)
    assert made.shapes() == [(10, 32), (5, 32)]
    assert made.epochs[0].images_in(10) == 100
    assert made.images_before(1, 11) == 210
    assert plan(images=100, drop_last=False) == plan(images=100)

    varied = plan(images=105, drop_last=False, batch_sizes=((20, 0.5),), epochs=2.5)
    sizes = [[batch.images for batch in epoch.batches] for epoch in varied.epochs]
    assert sizes[0] == [20] * 5 + [5]
    assert sizes[2] == [10] * 6  # up to half of the images
    assert sum(sizes[1]) == 105
    filtered = plan(images=105, drop_last=False, filter_start=0.5, filter_keep=0.5)
    assert [batch.images for batch in filtered.epochs[3].batches] == [10] * 5 + [2]
    with pytest.raises(ResfastError, match="leaves a last batch of 1 of 101 images"):
        plan(images=101, drop_last=False)


def test_rates_change_by_the_same_step_after_an_incomplete_batch_as_after_others():
    """So that milestones in steps and torch's schedulers are met."""
    made = plan(images=105, drop_last=False)
    found = rates(made, schedule="multistep", milestone_steps=(23,), warmup=0.0)
    assert found == pytest.approx([1.0] * 23 + [0.1] * 21)


def test_image_sizes_hold_up_to_their_part_of_the_training():
    made = plan(sizes=((24, 0.5), (28, 0.8)))
    pixels = [batch.pixels for epoch in made.epochs for batch in epoch.batches]
    assert pixels == [24] * 20 + [28] * 12 + [32] * 8
    assert made.shapes() == [(10, 24), (10, 28), (10, 32)]
    assert made.images_by_pixels(4) == {24: 200, 28: 120, 32: 80}
    assert made.images_by_pixels(2, 3) == {24: 200, 28: 30}
    assert made.steps_of(10, 28) == list(range(20, 32))
    assert made.steps_of(10, 20) == []


def test_batch_sizes_hold_up_to_their_part_and_batches_do_not_overlap():
    made = plan(batch_sizes=((5, 0.3), (20, 0.7)), images=103)
    for epoch in made.epochs:
        end = 0
        for batch in epoch.batches:
            assert batch.first == end
            end += batch.images
        assert 0 <= 103 - end < max(batch.images for batch in epoch.batches)
        assert epoch.images == end
    sizes = [[batch.images for batch in epoch.batches] for epoch in made.epochs]
    assert sizes[0] == [5] * 20  # 100 of 103 images
    assert sizes[1] == [5] * 5 + [20] * 3  # up to 0.2 of the epoch
    assert sizes[2] == [20] * 5  # the last begins at 0.78 of the epoch, before 0.8
    assert sizes[3] == [10] * 10
    assert set(made.shapes()) == {(5, 32), (20, 32), (10, 32)}


def test_progress_is_the_part_of_the_images_before_a_step():
    made = plan(batch_sizes=((5, 0.5),))
    progress = made.progress()
    assert len(progress) == made.steps == 60
    assert progress[:3] == [0.0, 5 / 400, 10 / 400]
    assert progress[40:42] == [0.5, 210 / 400]
    assert progress[-1] == 390 / 400


def test_an_epoch_of_a_half_has_the_batches_of_its_first_half():
    made = plan(epochs=2.5, images=110)
    assert [len(epoch.batches) for epoch in made.epochs] == [11, 11, 6]
    assert not made.uniform
    assert made.images_before(2, 3) == 250
    assert made.images_before(3) == made.images == 280
    assert plan(epochs=2.0).uniform


@pytest.mark.parametrize(
    ("start", "lengths"),
    [
        (0.0, [10, 4, 4, 4]),  # the first epoch has no losses to go by
        (0.5, [10, 10, 4, 4]),
        (0.6, [10, 10, 10, 4]),
        (1.0, [10, 10, 10, 10]),
    ],
)
def test_images_are_left_out_from_an_epoch_on(start: float, lengths: list[int]):
    made = plan(filter_start=start, filter_keep=0.45)
    assert [len(epoch.batches) for epoch in made.epochs] == lengths
    assert made.steps == sum(lengths)
    assert made.uniform == (start == 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 101}, "batch size 101 does not fit 100 training images; .*--batch-size "),
        ({"batch_sizes": ((200, 0.5),)}, "batch size 200 .*--batch-sizes between 1 and 100"),
        ({"sizes": ((40, 0.5),)}, "--sizes 40:0.5 has 40 pixels, more than the images' 32"),
        ({"filter_start": 0.5, "filter_keep": 0.05}, "the 5 images that --filter-keep 0.05"),
    ],
)
def test_plans_that_do_not_fit_the_images_are_refused(values: dict, message: str):
    with pytest.raises(ResfastError, match=message):
        plan(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": ((24, 0.8), (28, 0.5))}, "--sizes 24:0.8,28:0.5 .*increasing fractions"),
        ({"sizes": ((24, 1.5),)}, "--sizes 24:1.5"),
        ({"sizes": ((0, 0.5),)}, "--sizes 0:0.5"),
        ({"batch_sizes": ((8, 0.0),)}, "--batch-sizes 8:0"),
        ({"filter_keep": 0.0}, "--filter-keep 0.0 is out of range"),
        ({"filter_start": 2.0}, "--filter-start 2.0 is out of range"),
        ({"score_test": False}, "--no-score-test leaves nothing to score"),
        ({"tta_select": 0.0}, "--tta-select 0.0 is out of range"),
        ({"tta_mirror": 1.5}, "--tta-mirror 1.5 is out of range"),
        ({"hold_out": -1}, "--hold-out -1 is out of range"),
    ],
)
def test_bad_values_are_refused(tiny: Config, values: dict, message: str):
    with pytest.raises(ResfastError, match=message):
        check(change(tiny, **values))


def test_options_are_read_printed_back_and_saved():
    line = "--sizes 24:0.5,28:0.8 --batch-sizes 256:0.3 --epochs 5.5 --resize-by crop"
    _, config = command_line(line.split())
    assert config.data.sizes == ((24, 0.5), (28, 0.8))
    assert config.optim.batch_sizes == ((256, 0.3),)
    assert phases_text(config.data.sizes) == "24:0.5,28:0.8"
    assert files.from_json(files.to_json(config), "test") == config
    assert config.optim.epochs == 5.5
    _, whole = command_line(["--epochs", "5"])
    assert files.from_json(files.to_json(whole), "test").optim.epochs == 5
    assert '"epochs": 5,' in files.to_json(whole)


def test_a_malformed_list_of_phases_ends_the_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises((SystemExit, ResfastError)):
        command_line(["--sizes", "24-0.5"])


def test_a_configuration_from_before_loads_with_todays_values():
    old = json.loads(files.to_json(Config()))
    for name in ("sizes", "resize_by", "filter_start", "filter_keep", "hold_out"):
        del old["data"][name]
    del old["optim"]["batch_sizes"]
    for name in ("tta_select", "tta_mirror", "score_test", "fuse"):
        del old["evaluation"][name]
    assert files.from_json(json.dumps(old), "old") == Config()


# -- learning rates -------------------------------------------------------------------------------


def rates(made: Plan, **values: object) -> list[float]:
    config = OptimConfig(epochs=4, batch_size=10, lr=1.0, **values)
    model = torch.nn.Linear(2, 2)
    steps = len(made.epochs[0].batches)
    schedule = Schedule(build_optimizer(model, config), config, 4, steps, made.progress())
    found = []
    for step in range(made.steps):
        found.append(schedule.lr)
        schedule.step(step)
    return found


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "linear"])
def test_the_rate_follows_the_images_whatever_the_batches(schedule: str):
    values = {"schedule": schedule, "warmup": 0.0, "anneal": "linear", "end_factor": 0.01}
    uniform = rates(plan(), **values)
    split = plan(batch_sizes=((5, 0.5),))
    varying = rates(split, **values)
    assert len(varying) == 60
    # Two batches of 5 begin where one of 10 did; a schedule of 60 steps ends a little later than
    # one of 40.
    for step in range(20):
        assert varying[2 * step] == pytest.approx(uniform[step], abs=0.03)
    for step in range(20, 40):
        assert varying[20 + step] == pytest.approx(uniform[step], abs=0.03)
    assert varying[-1] < 0.05


# -- smaller images -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32, 24), (32, 32, 17), (20, 28, 20), (16, 16, 8)])
def test_resizing_is_antialiased_bilinear(shape: tuple[int, int, int]):
    height, width, pixels = shape
    images = torch.randn(5, 3, height, width).contiguous(memory_format=torch.channels_last)
    ours = smaller(images, pixels, by="resize", seed=0, epoch=0, first=0)
    size = (pixels, pixels)
    theirs = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_resizing_in_bfloat16_is_that_in_float32_rounded():
    images = torch.randn(4, 3, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)
    options = {"by": "resize", "seed": 0, "epoch": 0, "first": 0}
    ours = smaller(images, 24, **options)
    assert ours.dtype == torch.bfloat16
    exact = smaller(images.float(), 24, **options)
    torch.testing.assert_close(ours.float(), exact, rtol=0.02, atol=0.02)


def test_images_of_that_size_stay_as_they_are():
    images = torch.randn(2, 3, 8, 8)
    for by in ("resize", "crop"):
        assert smaller(images, 8, by=by, seed=0, epoch=0, first=0) is images
    with pytest.raises(ValueError, match="pixels is 9"):
        smaller(images, 9, by="resize", seed=0, epoch=0, first=0)


def test_crops_are_windows_drawn_by_the_place_in_the_epoch():
    images = torch.randn(40, 3, 12, 10).contiguous(memory_format=torch.channels_last)
    options = {"by": "crop", "seed": 3, "epoch": 2}
    crops = smaller(images, 8, first=0, **options)
    assert crops.shape == (40, 3, 8, 8)
    assert crops.is_contiguous(memory_format=torch.channels_last)
    windows = set()
    for image, crop in zip(images, crops, strict=True):
        found = [
            (y, x)
            for y in range(5)
            for x in range(3)
            if torch.equal(image[:, y : y + 8, x : x + 8], crop)
        ]
        assert len(found) == 1
        windows.add(found[0])
    assert len(windows) > 10  # of 15
    assert torch.equal(smaller(images[7:], 8, first=7, **options), crops[7:])
    other = smaller(images, 8, by="crop", seed=3, epoch=3, first=0)
    assert not torch.equal(other, crops)


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["resize", "crop"])
def test_smaller_images_on_cuda_are_those_of_the_cpu_and_nothing_waits(by: str):
    images = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    options = {"by": by, "seed": 3, "epoch": 2, "first": 128}
    on_cuda = images.cuda()
    smaller(on_cuda, 24, **options)  # weights are made and kernels compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = smaller(on_cuda, 24, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 0 if by == "crop" else 1e-2  # TF32
    torch.testing.assert_close(ours.cpu(), smaller(images, 24, **options), rtol=0, atol=tolerance)


@pytest.mark.gpu
def test_the_order_on_cuda_is_that_of_the_cpu_and_nothing_waits():
    losses = torch.rand(1000)
    on_cuda = losses.cuda()
    epoch_order(300, on_cuda, count=1000, seed=1, epoch=3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = epoch_order(300, on_cuda, count=1000, seed=1, epoch=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(ours.cpu(), epoch_order(300, losses, count=1000, seed=1, epoch=3))


@pytest.mark.gpu
def test_a_varying_run_on_cuda_learns(tiny: Config):
    config = change(tiny, device="cuda", precision="bf16", compile="auto")
    result = train(change(config, **{**VARYING, "epochs": 8.5}))
    assert result.summary.test_accuracy >= 0.9


# -- the order of an epoch ------------------------------------------------------------------------


def test_the_images_with_the_highest_loss_are_kept_in_the_order_of_the_epoch():
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0))
    found = epoch_order(20, losses, count=50, seed=1, epoch=3)
    assert set(found.tolist()) == set(losses.topk(20).indices.tolist())
    whole = order(50, seed=1, epoch=3, device="cpu").tolist()
    assert found.tolist() == [index for index in whole if index in set(found.tolist())]
    assert torch.equal(epoch_order(50, losses, count=50, seed=1, epoch=3), torch.tensor(whole))


def test_images_without_a_loss_are_kept_first():
    losses = torch.arange(10.0)
    losses[2] = math.inf
    assert set(epoch_order(3, losses, count=10, seed=0, epoch=0).tolist()) == {2, 8, 9}


def test_the_mean_over_steps_is_weighted_by_images():
    values = torch.tensor([1.0, 4.0])
    unequal = [PlannedBatch(0, 10, 8), PlannedBatch(10, 5, 8)]
    assert weighted_mean(values, unequal) == pytest.approx(2.0)
    assert weighted_mean(values, [PlannedBatch(0, 5, 8), PlannedBatch(5, 5, 8)]) == 2.5


# -- training -------------------------------------------------------------------------------------

VARYING = {
    "sizes": ((8, 0.4), (12, 0.7)),
    "batch_sizes": ((6, 0.5),),
    "filter_start": 0.5,
    "filter_keep": 0.6,
    "epochs": 3.5,
    "ema": 0.0,
}


def shapes_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    seen = []
    step = TrainStep._step

    def watched(self: TrainStep, images: torch.Tensor, *args: object):
        seen.append((len(images), images.shape[2]))
        return step(self, images, *args)

    monkeypatch.setattr(TrainStep, "_step", watched)
    return seen


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / records.METRICS).read_text().splitlines()]


def test_a_run_trains_on_the_incomplete_last_batch_too(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    seen = shapes_seen(monkeypatch)
    tiny = change(tiny, batch_size=20, augment=Augment(crop=1, mixup=0.4), accumulate=3)
    for dropped in (True, False):
        seen.clear()
        result = train(change(tiny, drop_last=dropped, name=f"dropped-{dropped}"))
        assert [images for images, _ in seen] == [20, 20, *([] if dropped else [8])] * 3
        assert result.summary.train_macs == result.summary.macs * sum(size for size, _ in seen)
    rows = rows_of(result.path)
    assert all((row["train_accuracy"] * 48) == round(row["train_accuracy"] * 48) for row in rows)
    interrupt_at(monkeypatch, 4)  # before the last batch of the second epoch
    with pytest.raises(Interrupted) as stopped:
        train(change(tiny, drop_last=False))
    monkeypatch.undo()
    assert_same_weights(train(resume=stopped.value.path).path, result.path)


@pytest.mark.parametrize("by", ["resize", "crop"])
def test_a_run_follows_its_plan(tiny: Config, monkeypatch: pytest.MonkeyPatch, by: str):
    seen = shapes_seen(monkeypatch)
    config = change(tiny, **VARYING, resize_by=by)
    result = train(config)
    made = make_plan(config, 48, 16)
    planned = [(b.images, b.pixels) for epoch in made.epochs for b in epoch.batches]
    assert seen == planned
    assert len(set(planned)) >= 3
    assert result.summary.epochs == 4
    assert result.summary.train_macs == sum(
        images * result.summary.macs_by_pixels[pixels] for images, pixels in planned
    )
    rows = rows_of(result.path)
    assert len(rows) == 4
    assert rows[-1]["lr"] < 0.05 * 0.1  # the schedule came to its end


def test_memory_is_given_back_before_batches_of_another_shape_and_around_evaluations(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    step, evaluate = TrainStep._step, evaluator.evaluate_both

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name or str(args[1].shape[3]))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(TrainStep, "_step", noted("", step))
    monkeypatch.setattr(evaluator, "evaluate_both", noted("eval", evaluate))
    monkeypatch.setattr(runtime, "release_memory", noted("free", lambda device: None))
    train(change(tiny, epochs=2, sizes=((12, 0.75),), eval_every=1))
    shown = " ".join(key for key, _ in itertools.groupby(seen))
    assert shown == "free 12 free eval free 12 free 16 free eval free"


def test_a_plan_that_changes_nothing_gives_the_same_bits(tiny: Config):
    plain = train(tiny)
    spelled = train(change(tiny, name="spelled", sizes=((16, 0.5),), batch_sizes=((12, 0.3),)))
    assert_same_weights(plain.path, spelled.path)
    assert rows_of(plain.path)[-1]["train_loss"] == rows_of(spelled.path)[-1]["train_loss"]


@pytest.mark.parametrize(("epoch", "step"), [(0, 3), (1, 6), (2, 1), (3, 0)])
def test_stopping_within_a_varying_run_changes_nothing(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, epoch: int, step: int
):
    tiny = change(tiny, **VARYING, resize_by="crop", augment=Augment(crop=1, mixup=0.4))
    made = make_plan(tiny, 48, 16)
    whole = train(change(tiny, name="whole"))
    interrupt_at(monkeypatch, made.epochs[epoch].first_step + step)
    with pytest.raises(Interrupted) as stopped:
        train(tiny)
    monkeypatch.undo()
    state = checkpoint.load_state(stopped.value.path / records.CHECKPOINT)
    assert (state["epoch"], state["step"]) == (epoch, step + 1)
    result = train(resume=stopped.value.path)
    assert_same_weights(result.path, whole.path)


def test_later_epochs_train_on_the_images_with_the_highest_recorded_loss(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    from resfast.training import epoch as trainer

    given, made = [], trainer.epoch_order

    def watched(kept: int, losses: torch.Tensor, **options: int) -> torch.Tensor:
        given.append((losses.clone(), made(kept, losses, **options)))
        return given[-1][1]

    monkeypatch.setattr(trainer, "epoch_order", watched)
    train(change(tiny, epochs=4, filter_start=0.5, filter_keep=0.5, ema=0.0))
    lengths = [len(indices) for _, indices in given]
    assert lengths == [48, 48, 24, 24]
    assert torch.isinf(given[0][0]).all()
    assert torch.isfinite(given[1][0]).all()
    losses, kept = given[2]
    left_out = sorted(set(range(48)) - set(kept.tolist()))
    assert losses[kept].min() >= losses[left_out].max()
    # An image that was left out keeps its loss, one that was trained on has a new one.
    later = given[3][0]
    assert torch.equal(later[left_out], losses[left_out])
    assert not torch.equal(later[kept], losses[kept])


def test_recorded_losses_are_those_of_the_images(tiny: Config, monkeypatch: pytest.MonkeyPatch):

    expected, recorded = [], []
    step, end = TrainStep._step, trainer._end_epoch

    def watched_step(self: TrainStep, images: torch.Tensor, labels: torch.Tensor, *args: object):
        logits = copy.deepcopy(self.model)(images)
        losses = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
        expected.append(losses.detach())
        return step(self, images, labels, *args)

    def watched_end(state: TrainingState, *args: Any) -> Any:
        recorded.append(state.session.step_metrics.image_losses[state.order])
        return end(state, *args)

    monkeypatch.setattr(TrainStep, "_step", watched_step)
    monkeypatch.setattr(trainer, "_end_epoch", watched_end)
    train(change(tiny, epochs=2, filter_start=0.5, filter_keep=0.5))
    torch.testing.assert_close(recorded[0], torch.cat(expected[:4]))
    torch.testing.assert_close(recorded[1], torch.cat(expected[4:]))


def test_a_streamed_run_follows_sizes_and_a_cut_epoch(tiny: Config):
    pytest.importorskip("nvidia.dali")
    options = {"sizes": ((8, 0.4), (12, 0.7)), "resize_by": "crop", "epochs": 2.5}
    resident = train(change(tiny, name="resident", loader="resident", **options))
    streamed = train(change(tiny, name="streamed", loader="dali", **options))
    assert_same_weights(resident.path, streamed.path)


def test_weights_that_are_not_finite_after_the_last_epoch_are_reported(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):

    end = trainer._end_epoch

    def spoil(state: TrainingState, *args: Any) -> Any:
        score = end(state, *args)
        next(state.session.step.model.parameters()).data.fill_(math.nan)
        return score

    monkeypatch.setattr(trainer, "_end_epoch", spoil)
    with pytest.raises(NonFiniteLossError, match=r"weights .* are not finite"):
        train(change(tiny, epochs=1))


def test_a_second_varying_run_in_one_process_is_that_run_alone(tiny: Config):
    from resfast.training.loop import Shared

    varying = change(tiny, **VARYING, resize_by="crop")
    shared = Shared()
    for seed in (0, 1):
        train(change(varying, name=f"shared{seed}", seed=seed), shared=shared)
        train(change(varying, name=f"alone{seed}", seed=seed))
        assert_same_weights(tiny.run.out / f"shared{seed}", tiny.run.out / f"alone{seed}")


def test_streams_refuse_what_they_cannot_do(tiny: Config):
    for values in ({"batch_sizes": ((6, 0.5),)}, {"filter_keep": 0.5, "filter_start": 0.5}):
        with pytest.raises(ResfastError, match="needs --loader resident"):
            train(change(tiny, loader="dali", **values))


def test_every_shape_is_compiled_before_the_clock(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    from resfast.training import resolve
    from resfast.training import warm_up as warming

    warmed, steps = [], []

    def warm_up(step: TrainStep, images: torch.Tensor, labels: torch.Tensor, **options: Any):
        warmed.append(tuple(images.shape))
        steps.extend(options["steps"])
        return 0.5

    def stop(*args: object) -> None:
        raise RuntimeError("the clock starts")

    monkeypatch.setattr(resolve, "_resolve_compile", lambda *args: ("on", None))
    monkeypatch.setattr(warming, "warm_up_step", warm_up)
    monkeypatch.setattr(trainer, "train_epoch", stop)
    with pytest.raises(RuntimeError, match="the clock starts"):
        train(change(tiny, **VARYING))
    made = make_plan(change(tiny, **VARYING), 48, 16)
    assert len(warmed) >= 3
    assert warmed == [(images, 3, pixels, pixels) for images, pixels in made.shapes()]
    assert sorted(steps) == list(range(made.steps))


def test_warming_up_the_loader_changes_nothing(tiny: Config, monkeypatch: pytest.MonkeyPatch):

    config = change(tiny, **VARYING, resize_by="crop")
    plain = train(config)
    made = []

    def warm_up(session: Session, display: Display) -> float:
        made.append(_warm_up_batches(session))
        return made[-1]

    monkeypatch.setattr(trainer, "warm_up_training", warm_up)
    warmed = train(change(config, name="warmed"))
    assert made[0] > 0
    assert_same_weights(plain.path, warmed.path)


def test_a_network_that_cannot_take_a_size_is_refused(tiny: Config):
    small = {"convolutions": (2, 2), "channels": (8, 8), "blocks": (), "stem": None}
    with pytest.raises(ResfastError, match=r"--sizes 2:0\.5: the network cannot take that size"):
        train(change(tiny, model="speednet", sizes=((2, 0.5),), **small))
