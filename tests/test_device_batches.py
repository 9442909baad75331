"""Batches made on the device, step metrics kept there, and runs that make use of both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from resfast.config.schema import Config
from resfast.cuda_graph import CudaGraph
from resfast.data.augment import POLICIES, Augment, parse_augment, smaller
from resfast.data.batch import Batch
from resfast.data.device_batches import DeviceBatches
from resfast.data.resident import ResidentLoader
from resfast.errors import NonFiniteLossError
from resfast.runs import folder as records
from resfast.training import epoch as epoch_module
from resfast.training import loop as trainer
from resfast.training import resolve
from resfast.training.clock import Clock
from resfast.training.loop import Shared, train
from resfast.training.loss_watch import LossWatch
from resfast.training.recorder import Recorder
from resfast.training.state import TrainingState
from resfast.training.step_metrics import StepMetrics
from tests.conftest import change, interrupt_at
from tests.test_training import assert_same_weights, weights
from tests.triton_code import compiled, interpreted, triton_kernels

COUNT, CLASSES, SIZE = 23, 5, 12
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
EVERYTHING = "strong,crop=3,cutout=2,hue=0.1,noise=0.1,mixup=0.3,cutmix=1"


def make(
    augment: str = "standard,crop=3,cutout=2", *, pictures: int = 0, **options: object
) -> ResidentLoader:
    generator = torch.Generator().manual_seed(pictures)
    images = torch.randint(0, 256, (COUNT, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    labels = torch.arange(COUNT) % CLASSES
    values = {"batch_size": 6, "augment": parse_augment(augment), "classes": CLASSES, **options}
    return ResidentLoader(images, labels, MEAN, STD, **values)


def whole_epoch(batches: DeviceBatches, epoch: int) -> list[Batch]:
    batches.begin(epoch)
    return [batches.next(6, SIZE) for _ in range(COUNT // 6)]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(found, expected, strict=True):
        for name, value in batch._asdict().items():
            assert torch.equal(value, getattr(other, name)), name


@pytest.mark.parametrize(
    "policy",
    ["none", EVERYTHING, *(f"{name},crop=3,cutout=2" for name in POLICIES if name != "none")],
)
def test_it_makes_the_batches_of_the_loader(policy: str):
    loader = make(policy)
    batches = DeviceBatches(loader)
    for epoch in (3, 0, 1):  # each replaces the random parameters of the one before
        assert_same(whole_epoch(batches, epoch), list(loader.epoch(epoch)))


def test_nothing_moves_from_epoch_to_epoch():
    batches = DeviceBatches(make(EVERYTHING), resize_by="crop")
    loader = batches.loader
    before = [tensor.data_ptr() for tensor in (*batches.tensors, loader.images, loader.labels)]
    parts = {f.name for p in (batches._params.augment, batches._params.mix) for f in fields(p)}
    assert parts == {
        *("shift", "flip", "affine", "color", "cutout", "noise"),
        "partner",
        "weight",
        "box",
    }
    assert len(batches.tensors) == 3 + len(parts) - 2  # `affine` here, so no `shift` and `flip`
    first = whole_epoch(batches, 0)
    batches.loader.copy_from(make(EVERYTHING, pictures=1, seed=9))
    second = whole_epoch(batches, 0)
    assert [t.data_ptr() for t in (*batches.tensors, loader.images, loader.labels)] == before
    assert not torch.equal(first[0].images, second[0].images)
    assert_same(second, list(make(EVERYTHING, pictures=1, seed=9).epoch(0)))


def test_batches_of_any_sizes_and_order_are_made_of_the_same_images():
    loader = make()
    alone = {}
    order = loader.order(2).tolist()
    images = torch.cat([batch.images for batch in loader.epoch(2)])
    for index, image in zip(order, images, strict=False):
        alone[index] = image
    chosen = torch.tensor([index for index in (4, 22, 0, 7, 9, 13, 2, 5) if index in alone])
    batches = DeviceBatches(loader)
    batches.begin(2, order=chosen)
    made = [batches.next(size, SIZE) for size in (3, 1, len(chosen) - 4)]
    assert torch.equal(torch.cat([batch.indices for batch in made]), chosen)
    assert torch.equal(torch.cat([batch.labels for batch in made]), chosen % CLASSES)
    images = torch.cat([batch.images for batch in made])
    for index, image in zip(chosen.tolist(), images, strict=True):
        assert torch.equal(image, alone[index])
    batches.begin(2, order=chosen, first=3)
    assert torch.equal(batches.next(1, SIZE).images, made[1].images)


@pytest.mark.parametrize("by", ["resize", "crop"])
def test_smaller_batches_are_those_of_the_host(by: str):
    loader = make(seed=4)
    batches = DeviceBatches(loader, resize_by=by)
    for epoch in (0, 2):
        batches.begin(epoch)
        for step, batch in enumerate(loader.epoch(epoch)):
            expected = smaller(batch.images, 8, by=by, seed=4, epoch=epoch, first=6 * step)
            found = batches.next(6, 8).images
            assert found.shape == (6, 3, 8, 8)
            assert torch.equal(found, expected)


def test_after_the_last_image_comes_the_first():
    loader = make()
    batches = DeviceBatches(loader)
    batches.begin(0, first=20)
    order = loader.order(0)
    assert torch.equal(batches.next(6, SIZE).indices, torch.cat([order[20:], order[:3]]))


def test_metrics_are_kept_for_each_step_and_image():
    metrics = StepMetrics(3, 5, torch.device("cpu"))
    metrics.begin()
    indices = [torch.tensor([4, 1]), torch.tensor([0, 3])]
    metrics.add(torch.tensor(2.0), torch.tensor(1), torch.tensor([1.5, 2.5]), indices[0])
    metrics.add(torch.tensor(3.0), torch.tensor(2), torch.tensor([2.0, 4.0]), indices[1])
    assert metrics.losses.tolist() == [2, 3, 0]
    assert int(metrics.correct) == 3
    assert metrics.image_losses.tolist() == [2.0, 2.5, math.inf, 4.0, 1.5]
    metrics.begin(2)  # an epoch is resumed
    metrics.add(torch.tensor(5.0), torch.tensor(0), torch.tensor([7.0]), torch.tensor([2]))
    assert metrics.losses.tolist() == [2, 3, 5]
    assert int(metrics.correct) == 3
    metrics.begin()
    assert (metrics.losses.tolist(), int(metrics.correct)) == ([0, 0, 0], 0)
    assert metrics.image_losses.tolist() == [2.0, 2.5, 7.0, 4.0, 1.5]
    metrics.reset()
    assert metrics.image_losses.tolist() == [math.inf] * 5


KERNELS = ("interpreter", pytest.param("cuda", marks=pytest.mark.gpu))


def kernels_of(where: str) -> tuple[ModuleType, str]:
    """The Triton kernels of the bookkeeping, and the device of their arguments."""
    if where == "interpreter":
        return interpreted("batching"), "cpu"
    return triton_kernels("batching"), "cuda"


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("images", [5, 600])
def test_the_kernel_takes_the_next_images(where: str, images: int):
    module, device = kernels_of(where)
    order = torch.randperm(700).to(device)
    labels = torch.randint(10, (700,)).to(device)
    position = torch.tensor([650]).to(device)
    found = module.next_batch(order, labels, position, images, 690)
    positions = (650 + torch.arange(images).to(device)) % 690
    expected = order[positions], labels[order[positions]], positions
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)
    assert position.tolist() == [650 + images]


@pytest.mark.parametrize("where", KERNELS)
@pytest.mark.parametrize("images", [0, 3, 600])
def test_the_kernel_records_a_step(where: str, images: int):
    module, device = kernels_of(where)
    start, expected = (StepMetrics(4, 700 if images else 0, torch.device("cpu")) for _ in range(2))
    of_batch = torch.rand(images), torch.randperm(700)[:images]
    given = torch.tensor(2.5), torch.tensor(3), *(of_batch if images else (None, None))
    for metrics in (start, expected):
        metrics.begin(4)  # one too many
    kept = [t.to(device) for t in (start.losses, start.correct, start._step)]
    image_losses = None if start.image_losses is None else start.image_losses.to(device)
    module.record_step(*kept, image_losses, *(None if t is None else t.to(device) for t in given))
    expected.add(*given)
    others = expected.losses, expected.correct, expected._step
    for value, other in zip(kept, others, strict=True):
        assert torch.equal(value.cpu(), other)
    if images:
        assert torch.equal(image_losses.cpu(), expected.image_losses)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_the_architecture(capability: int):
    module = triton_kernels("batching")
    types = dict.fromkeys(("losses", "image_losses", "loss", "batch_losses"), "*fp32")
    types |= dict.fromkeys(("images", "count", "steps"), "i32")
    absent = dict.fromkeys(("image_losses", "batch_losses", "indices"))
    for kernel, missing in (
        (module._next_kernel, {}),
        (module._record_kernel, {}),
        (module._record_kernel, absent),
    ):
        constants = {"BLOCK": module.BLOCK, **missing}
        own = {name: types.get(name, "*i64") for name in kernel.arg_names if name not in constants}
        assert compiled(kernel, own, constants, capability).asm["cubin"]


# -- a run that makes its batches within the captured step ----------------------------------------

RUN = {
    "sizes": ((8, 0.4),),
    "batch_sizes": ((6, 0.3),),
    "filter_start": 0.5,
    "filter_keep": 0.5,
    "epochs": 3.5,
    "augment": Augment(crop=1, mixup=0.2),
}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take captured steps, whose graph is a call on the CPU."""
    monkeypatch.setattr(resolve, "_resolve_cuda_graph", lambda *args: ("on", None))


def test_a_captured_run_does_what_a_plain_one_does(tiny: Config, captured: None):
    config = change(tiny, **RUN)
    captured_run = train(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "_resolve_cuda_graph", lambda *args: ("off", None))
        plain_run = train(change(config, name="plain"))
    for name, value in weights(plain_run.path).items():
        torch.testing.assert_close(weights(captured_run.path)[name], value, rtol=1e-3, atol=1e-4)
    for row, other in zip(whole_rows(captured_run.path), whole_rows(plain_run.path), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert row["train_accuracy"] == pytest.approx(other["train_accuracy"], abs=0.05)


def test_a_second_seed_uses_the_graphs_of_the_first(
    tiny: Config, captured: None, monkeypatch: pytest.MonkeyPatch
):
    config = change(tiny, **RUN)
    other = replace(config, runtime=replace(config.runtime, seed=5))
    alone = train(change(other, name="alone"))
    shared = Shared()
    train(config, shared=shared)

    def late(*_: object, **__: object) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr(CudaGraph, "__init__", late)
    second = train(change(other, name="second"), shared=shared)
    assert_same_weights(alone.path, second.path)


@pytest.mark.parametrize("step", [11, 12, 13])  # in epochs of chosen images; the end of one
def test_a_captured_run_goes_on_where_it_was_stopped(
    step: int, tiny: Config, captured: None, monkeypatch: pytest.MonkeyPatch
):
    config = change(tiny, **RUN)
    whole = train(change(config, name="whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(trainer.Interrupted) as stopped:
            train(change(config, name="stopped"))
    assert_same_weights(whole.path, train(resume=stopped.value.path).path)


# -- epochs whose end the host does not wait for ---------------------------------------------------


def late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets runs continue without waiting, as on CUDA; returns how many were pending per record."""
    waiting: list[int] = []
    stop, record, decide = Clock.stop, Recorder.record, trainer._must_wait

    def stopped(self: Clock):
        return stop(self)[0], lambda: False

    def recorded(self: Recorder, *args: object) -> None:
        waiting.append(len(self.pending))
        record(self, *args)

    def must_wait(state: TrainingState, *args: object) -> bool:
        state.session.device = torch.device("cuda")
        try:
            return decide(state, *args)
        finally:
            state.session.device = torch.device("cpu")

    monkeypatch.setattr(trainer, "_must_wait", must_wait)
    monkeypatch.setattr(Clock, "stop", stopped)
    monkeypatch.setattr(Recorder, "record", recorded)
    return waiting


def whole_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / records.METRICS).read_text().splitlines()]


def rows(path: Path) -> list[dict]:
    taken = {"train_seconds", "eval_seconds", "images_per_second"}
    return [{k: v for k, v in row.items() if k not in taken} for row in whole_rows(path)]


@pytest.mark.parametrize("every", [0, 3])
def test_epochs_are_recorded_late_where_nothing_hangs_on_them(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, every: int
):
    config = change(tiny, **RUN | {"epochs": 5}, eval_every=every, save_seconds=600)
    at_once = train(change(config, name="at-once"))
    waiting = late(monkeypatch)
    result = train(config)
    assert waiting == ([3, 2, 1, 0, 0] if every == 0 else [1, 0, 0, 0, 0])
    assert rows(result.path) == rows(at_once.path)
    assert_same_weights(result.path, at_once.path)
    seconds = [row["train_seconds"] for row in whole_rows(result.path)]
    assert result.summary.train_seconds == pytest.approx(sum(seconds))


def test_nothing_is_late_under_a_limit_of_time_or_with_a_save(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    waiting = late(monkeypatch)
    train(change(tiny, eval_every=0, save_seconds=0))
    train(change(tiny, name="limited", eval_every=0, save_seconds=600, max_seconds=600.0))
    assert waiting == [0] * 6


@pytest.mark.parametrize("step", [7, 9])  # the last step of an epoch, and one within
def test_a_stopped_run_has_recorded_all(tiny: Config, monkeypatch: pytest.MonkeyPatch, step: int):
    config = change(tiny, eval_every=0, save_seconds=600)
    whole = train(change(config, name="whole"))
    with monkeypatch.context() as patch:
        late(patch)
        interrupt_at(patch, step)
        with pytest.raises(trainer.Interrupted) as stopped:
            train(config)
        assert rows(stopped.value.path) == rows(whole.path)[: step // 4]
        resumed = train(resume=stopped.value.path)
    assert rows(resumed.path) == rows(whole.path)
    assert_same_weights(whole.path, resumed.path)


def test_losses_are_copied_before_the_clock_is_read(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    """The reading of the clock is what the host waits for on CUDA."""
    log: list[str] = []

    def logged(call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> object:
            log.append(call.__name__)
            return call(*args)

        return run

    for owner, name in ((epoch_module, "copy_to_host"), (Clock, "stop")):
        monkeypatch.setattr(owner, name, logged(getattr(owner, name)))
    train(change(tiny, epochs=2))
    assert log == ["copy_to_host", "copy_to_host", "stop"] * 2


def test_a_loss_that_becomes_nan_names_its_own_epoch(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    late(monkeypatch)
    add, calls = StepMetrics.add, []

    def spoil(self: StepMetrics, loss: Tensor, *rest: object) -> None:
        calls.append(0)
        add(self, loss * math.nan if len(calls) == 6 else loss, *rest)

    monkeypatch.setattr(StepMetrics, "add", spoil)
    monkeypatch.setattr(LossWatch, "poll", lambda self, step: (math.nan, 0, 0))
    with pytest.raises(NonFiniteLossError, match="the loss is nan at epoch 2, step 2 of 4"):
        train(change(tiny, eval_every=0, save_seconds=600))


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["resize", "crop"])
def test_no_step_of_a_run_waits_for_the_device(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, by: str
):
    config = change(tiny, **RUN, resize_by=by, device="cuda", precision="bf16", cuda_graph="on")
    config = change(config, epochs=6, eval_every=0, save_seconds=600, compile="on")
    expected = train(change(config, name="expected"))

    def strict(part: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            never = True
            if part is end_epoch:
                state, _, signals, trained = args
                never = not trainer._must_wait(state, signals, trained.epoch)
            torch.cuda.set_sync_debug_mode("error" if never else "default")
            try:
                return part(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    end_epoch = trainer._end_epoch
    monkeypatch.setattr(trainer, "train_epoch", strict(trainer.train_epoch))
    monkeypatch.setattr(trainer, "_end_epoch", strict(end_epoch))
    result = train(config)
    assert [row["epoch"] for row in rows(result.path)] == [1, 2, 3, 4, 5, 6]
    assert result.summary.train_seconds > 0
    for name, value in weights(expected.path).items():
        torch.testing.assert_close(weights(result.path)[name], value, rtol=5e-2, atol=2e-2)
