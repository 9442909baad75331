"""Trains one network from a configuration, and leaves a run's folder behind."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast import __version__, atomic, runtime
from resfast.config.compare import differences
from resfast.config.files import load
from resfast.config.network import network
from resfast.config.schema import Config
from resfast.config.validate import check, check_budget, check_network, size_refused
from resfast.data import batches as feed
from resfast.data.augment import generator, smaller
from resfast.data.dataset import Dataset, Stream
from resfast.data.device_batches import Supply
from resfast.data.sources import open_data
from resfast.errors import NonFiniteLossError, ResfastError
from resfast.inference.fuse import fuse
from resfast.inference.scoring import TTA, Evaluation, evaluate_both
from resfast.layers import whitening
from resfast.layers.conv import set_winograd_tile
from resfast.models.presets import build_model
from resfast.models.resnet import count_parameters
from resfast.models.summary import count_macs
from resfast.optim.optimizers import Schedule, build_optimizer
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.training.display import Display
from resfast.training.plan import Batch, epoch_order, make_plan, weighted_mean
from resfast.training.resolve import resolve
from resfast.training.step import TrainStep
from resfast.training.step_metrics import Marks

_DROPOUT_STREAM = 4
_POLL_STEPS = 8
_WARM_UP_BATCHES = 20
"""So many that test-time augmentation of the least certain has whole batches too."""


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: its folder.
        summary: what ``summary.json`` says.
        model: the trained network in eval mode, on the run's device.
    """

    path: Path
    summary: dict[str, Any]
    model: nn.Module


@dataclass
class Shared:
    """What trainings that differ in their seed alone take over from each other.

    Attributes:
        data: the data set, once it was opened.
        step: the training step, once it was compiled.
        supply: what makes its batches, where the data set lives on the device.
        marks: what its steps leave behind.
    """

    data: Dataset | Stream | None = None
    step: TrainStep | None = None
    supply: Supply | None = None
    marks: Marks | None = None


@dataclass(frozen=True)
class _Score:
    """Result of an evaluation without and with test-time augmentation, and the seconds it took."""

    plain: Evaluation
    augmented: Evaluation
    seconds: float


@dataclass(frozen=True)
class _Ended:
    """A trained epoch that may not be recorded yet.

    Attributes:
        epoch: its number, from 0.
        lr: learning rate at its end.
        losses: of its steps, float32; like ``correct`` only to be read after ``seconds``.
        correct: correct predictions, int64 0-d.
        seconds: what it took; waits for the device.
        done: whether that would not wait.
    """

    epoch: int
    lr: float
    losses: Tensor
    correct: Tensor
    seconds: Callable[[], float]
    done: Callable[[], bool]


class Interrupted(KeyboardInterrupt):
    """A run stopped by a signal after saving; ``path`` is its folder."""

    def __init__(self, path: Path, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.path, self.signum = path, signum


def train(
    config: Config | None = None,
    *,
    resume: str | Path | None = None,
    shared: Shared | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
    started: float | None = None,
) -> Result:
    """Trains one network.

    Args:
        config: what to train; :data:`resfast.config.recipes.RECIPES` has complete ones. With
            ``resume`` it may be left out, and otherwise must agree with the run's own.
        resume: the folder of a run to go on with.
        shared: filled by the first of several trainings, used by the others.
        after_step: called after each step with its number (from 0, over the whole run) and its
            images.
        started: ``time.perf_counter()`` when the command began (None: now).

    Returns:
        The finished run.

    Raises:
        ResfastError: bad input, or files that cannot be read or written.
        NonFiniteLossError: the loss became infinite or NaN.
        Interrupted: SIGINT or SIGTERM came; the run was saved and can be resumed.
    """
    started = time.perf_counter() if started is None else started
    display = Display()
    shared = shared or Shared()
    state: dict[str, Any] | None = None
    path: Path | None = None
    if resume is not None:
        path = Path(resume)
        if not path.is_dir():
            raise ResfastError(f"there is no run {path}; expected the folder of a run to resume")
        if (path / records.CHECKPOINT).exists():
            state = checkpoint.load_state(path / records.CHECKPOINT)
        else:
            display.say(f"{path} has no checkpoint yet: starting from its beginning")
        config = _resumed(load(path / records.CONFIG), config, path)
    elif config is None:
        raise ResfastError("train needs a configuration or a run to resume")
    check(config)
    if config.run.runs > 1:
        raise ResfastError(
            f"--runs {config.run.runs} is more than one training; call resfast.train for several"
        )
    if shared.data is None:
        check_network(config)
        shared.data = open_data(
            config.data.data,
            data_dir=config.data.data_dir,
            image_size=config.data.image_size,
            skip_corrupt=config.data.skip_corrupt,
            loader=config.data.loader,
            device=runtime.resolve_device(config.runtime.device),
            report=display.say,
        )
    run = _Run(config, shared, display, path, state)
    run.started, run.after_step = started, after_step
    return run.train()


def _resumed(saved: Config, given: Config | None, path: Path) -> Config:
    if given is None:
        return saved
    differing = differences(saved, given)
    if differing:
        listed = ", ".join(
            f"{name} was {before!r} and is now {now!r}" for name, (before, now) in differing.items()
        )
        raise ResfastError(
            f"cannot resume {path} with another configuration: {listed}; leave those options out, "
            "or start a new run"
        )
    return replace(
        saved,
        run=given.run,
        data=replace(saved.data, data_dir=given.data.data_dir, prefetch=given.data.prefetch),
        runtime=replace(saved.runtime, threads=given.runtime.threads),
    )


class _Run:
    """State of one training."""

    def __init__(
        self,
        config: Config,
        shared: Shared,
        display: Display,
        path: Path | None,
        state: dict[str, Any] | None,
    ) -> None:
        data = shared.data
        assert data is not None
        self.display, self.data = display, data
        train_source, val_source, self.test_source = feed.split_sources(
            data, config.data.val_fraction, config.runtime.seed, config.data.hold_out
        )
        config, notes = resolve(config, data, feed.count(train_source))
        for note in notes if shared.step is None else ():
            display.say(note)
        self.config = config
        self.device = torch.device(config.runtime.device)
        self.dtype = runtime.DTYPES[config.runtime.precision]
        runtime.prepare(
            self.device,
            threads=config.runtime.threads,
            tf32=config.runtime.tf32,
            tuned_allocator=config.runtime.tune_allocator,
        )
        self.pipeline = {"prefetch": config.data.prefetch, "threads": config.runtime.threads}
        mean, std = feed.mean_std(
            train_source, data.image_size, device=self.device, **self.pipeline
        )
        self.mean, self.std = mean, std
        self.loader = feed.train_loader(
            train_source,
            mean,
            std,
            loader=config.data.loader,
            image_size=data.image_size,
            batch_size=config.optim.batch_size,
            augment=config.data.augment,
            classes=len(data.classes),
            seed=config.runtime.seed,
            device=self.device,
            dtype=self.dtype,
            **self.pipeline,
        )
        self.plan = make_plan(config, self.loader.count, data.image_size)
        held_out = val_source is not None
        self.val = self._batches(val_source if held_out else self.test_source)
        self.evaluated_on = "val" if held_out else "test"

        torch.manual_seed(config.runtime.seed)
        model = build_model(network(config.model), len(data.classes), data.image_size)
        self.params = count_parameters(model)
        check_budget(config.model, self.params)
        if config.model.zero_init_residual:
            model.zero_init_residual()
        self.macs = count_macs(model, data.image_size)
        self.macs_by_pixels = {data.image_size: self.macs} | self._macs_of_sizes(model)
        model = model.to(self.device, memory_format=torch.channels_last)
        set_winograd_tile(model, config.runtime.winograd_tile)
        self.train_source = train_source
        whitening_seconds = self._whiten(model) if state is None else 0.0
        self.compiled = shared.step is not None
        if shared.step is None:
            optimizer = build_optimizer(model, config.optim)
            schedule = Schedule(
                optimizer,
                config.optim,
                config.optim.epochs,
                len(self.loader),
                self.plan.progress(),
            )
            shared.step = TrainStep(
                model,
                optimizer,
                config.optim,
                device=self.device,
                dtype=self.dtype,
                compile=config.runtime.compile != "off",
                schedule=schedule,
                captured=config.runtime.cuda_graph != "off",
                image_losses=self._filters,
            )
            images = self.loader.count if self._filters else 0
            shared.marks = Marks(self.plan.most_steps, images, self.device)
            if config.data.loader == "resident":
                shared.supply = Supply(self.loader, resize_by=config.data.resize_by)
        else:
            shared.step.reset(model.state_dict())
            shared.marks.reset()
            if shared.supply is not None:
                shared.supply.loader.take_over(self.loader)
                self.loader = shared.supply.loader
        self.step, self.schedule = shared.step, shared.step.schedule
        self.supply, self.marks = shared.supply, shared.marks

        self.epoch, self.first_step = 0, 0
        self.shape: tuple[int, int] | None = None
        """Images and pixels of the latest batch."""
        self.order: Tensor | None = None
        """Of the epoch at hand, where it depends on the losses of images."""
        self.ended: list[_Ended] = []
        """Epochs that wait to be recorded."""
        self.history: list[dict[str, Any]] = []
        self.best, self.best_epoch, self.since_best = -1.0, 0, 0
        self.epoch_seconds = 0.0
        self.final: _Score | None = None
        """Of the network as it is, on the images that it is evaluated on while it is trained."""
        self.seconds = {
            "whitening": whitening_seconds,
            "train": 0.0,
            "compile": 0.0,
            "eval": 0.0,
            "total": 0.0,
        }
        self.peak_before = 0
        """Most bytes that earlier sessions of a resumed run used."""
        self.started = time.perf_counter()
        self.after_step: Callable[[int, Tensor], None] | None = None
        self.stopped: str | None = None
        self.saved_at, self.saved_epoch = time.monotonic(), None
        self.stop_signal: int | None = None

        self.new = path is None
        self.path = records.run_folder(config, config.model.model) if path is None else path
        records.write_config(self.path, config)
        if not self.new:
            atomic.remove_stale(self.path, older_than_s=0)  # of a save that a kill cut short
        if state is not None:
            self._restore(state)

    @property
    def _filters(self) -> bool:
        """Whether some epoch leaves out images."""
        return any(epoch.kept < self.loader.count for epoch in self.plan.epochs)

    # -- state ---------------------------------------------------------------------------------

    def _save(self, epoch: int, step: int) -> None:
        """Saves the state to go on with batch ``step`` of ``epoch``, unless it is damaged."""
        self._settle()
        for name, value in self.step.model.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise self._non_finite(f"weights {name} are not finite", epoch, step)
        state = {
            "data": self.data.digest,
            "epoch": epoch,
            "step": step,
            "training": self.step.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self.marks.losses.cpu(),
            "correct": self.marks.correct.cpu(),
            "image_losses": (
                None if self.marks.image_losses is None else self.marks.image_losses.cpu()
            ),
            "order": None if self.order is None or not step else self.order.cpu(),
            "epoch_seconds": self.epoch_seconds,
            "history": json.dumps(self.history),
            "best": [self.best, self.best_epoch, self.since_best],
            "seconds": self.seconds | {"total": self._total_seconds()},
            "peak_memory": self._peak_memory(),
            "loader": self.loader.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generator": (
                torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            ),
        }
        checkpoint.save_state(self.path / records.CHECKPOINT, state)
        self.saved_at, self.saved_epoch = time.monotonic(), epoch

    def _restore(self, state: dict[str, Any]) -> None:
        if state["data"] != self.data.digest:
            raise ResfastError(
                f"cannot resume {self.path}: data {self.data.name} is not what it was trained on "
                "(its content changed); restore it or start a new run"
            )
        self.epoch, self.first_step = state["epoch"], state["step"]
        self.step.load_state_dict(state["training"])
        self.schedule.load_state_dict(state["schedule"])
        self.loader.load_state_dict(state["loader"])
        self.marks.losses.copy_(state["losses"])
        self.marks.correct.copy_(state["correct"])
        if self.marks.image_losses is not None:
            self.marks.image_losses.copy_(state["image_losses"])
            self.order = None if state["order"] is None else state["order"].to(self.device)
        self.epoch_seconds = state["epoch_seconds"]
        self.history = json.loads(state["history"])
        self.best, self.best_epoch, self.since_best = state["best"]
        self.seconds |= state["seconds"]
        self.peak_before = state.get("peak_memory", 0)  # older ones do not say
        self.generators = state["generator"], state["cuda_generator"]
        self.saved_epoch = self.epoch
        records.write_metrics(self.path, self.history)

    def _non_finite(self, what: str, epoch: int, step: int) -> NonFiniteLossError:
        good = (
            "no checkpoint was saved before"
            if self.saved_epoch is None
            else f"the last good checkpoint is {self.path / records.CHECKPOINT} "
            f"(after {self.saved_epoch} epochs)"
        )
        steps = len(self.plan.epochs[min(epoch, len(self.plan.epochs) - 1)].batches)
        return NonFiniteLossError(
            f"{what} at epoch {epoch + 1}, step {step + 1} of {steps}, learning rate "
            f"{self.schedule.lr:g}; {good}; try a lower --lr or --clip-norm 1"
        )

    # -- training ------------------------------------------------------------------------------

    def train(self) -> Result:
        config, display = self.config, self.display
        self.loggers = records.Loggers(self.path, config)
        finished = self._over()
        if finished:
            display.say(f"{self.path} is already trained; evaluating it")
        else:
            self._announce()
            if self.device.type == "cuda":
                self._warm_up_loader()
            self._compile()
        self._warm_up_evaluation()
        with display, _Signals(self):
            if not finished:
                display.start(len(self.plan.epochs), self.plan.steps, self.evaluated_on)
            while not finished:
                self._train_epoch(self.epoch)
                if self.stopped is not None:
                    self._save(self.epoch, self.first_step)
                    break
                self._end_epoch(self.epoch)
                self.epoch, self.first_step = self.epoch + 1, 0
                finished = self._over()
                if finished or self._save_due():
                    self._save(self.epoch, 0)
                if not finished:
                    self._stop_if_asked(0)
        if self.first_step:  # out of time within an epoch
            self.final = self._evaluate(self.val, config.evaluation.tta)
            self._keep_best(self.final.plain.accuracy, self.epoch)
        summary = self._finish()
        self.loggers.close(summary)
        model = self.step.evaluated_model.eval()
        return Result(self.path, summary, model)

    def _announce(self) -> None:
        config, images = self.config, self.loader.count
        self.display.say(
            f"{'resuming ' if not self.new else ''}{self.path}: {config.model.model} "
            f"({self.params:,} parameters), {self.data.name} ({images:,} images), "
            f"{config.runtime.device} ({runtime.describe(self.device)}), "
            f"{config.runtime.precision}, batch {config.optim.batch_size}, "
            f"epochs {config.optim.epochs}"
        )

    def _compile(self) -> None:
        asked = {self.config.runtime.compile, self.config.runtime.cuda_graph}
        if asked == {"off"} or self.compiled:
            return
        self.display.say("compiling the training step (up to a minute the first time) …")
        self.step.model.train()
        seconds = 0.0
        for batch, size in self.plan.shapes():
            images, labels = self._blank(batch, size)
            if self.config.data.augment.mixes:
                labels = F.one_hot(labels, len(self.data.classes)).float()
            source = None if self.supply is None else (self.supply, self.marks)
            steps = self.plan.steps_of(batch, size)
            seconds += self.step.warm_up(
                images, labels, fall_back="on" not in asked, source=source, steps=steps
            )
            runtime.release_memory(self.device)
        self.seconds["compile"] += seconds
        self.display.say(f"compiled in {seconds:.1f} s")

    def _blank(self, batch: int, pixels: int) -> tuple[Tensor, Tensor]:
        """A dummy batch of images and labels, on the device."""
        images = torch.zeros((batch, 3, pixels, pixels), device=self.device, dtype=self.dtype)
        labels = torch.zeros(batch, dtype=torch.int64, device=self.device)
        return images.contiguous(memory_format=torch.channels_last), labels

    def _blank_source(self, count: int) -> feed.Resident:
        """Dummy images and labels as a data set has them."""
        size = self.data.image_size
        return torch.zeros(count, size, size, 3, dtype=torch.uint8), torch.zeros(count).long()

    def _warm_up_loader(self) -> None:
        """Makes a batch of each shape that is thrown away, where its kernels get compiled."""
        if self.compiled or self.supply is None:
            return
        start = time.perf_counter()
        for batch, pixels in self.plan.shapes():
            self.supply.begin(0)
            self.supply.take(batch, pixels)
        runtime.synchronize(self.device)
        self.seconds["compile"] += time.perf_counter() - start

    def _warm_up_evaluation(self) -> None:
        """Evaluates dummy images, where the first evaluation times kernels or loads them."""
        if self.compiled or not (self.config.evaluation.fuse or self.device.type == "cuda"):
            return
        size, pixels = self.config.evaluation.eval_batch_size, self.data.image_size
        before = self.seconds["eval"]
        if self.device.type == "cuda":  # kernels are loaded when they are first used
            whole, rest = divmod(self.val.count, size)
            count = min(whole, _WARM_UP_BATCHES) * size + rest
            todo = [(self._batches(self._blank_source(count)), self.config.evaluation.tta)]
        else:
            counts = [self.val.count]
            if self.config.evaluation.score_test:
                counts.append(feed.count(self.test_source))
            parts = self.config.evaluation.tta_select, self.config.evaluation.tta_mirror
            counts += [math.ceil(count * part) for count in counts for part in parts]
            sizes = {min(size, count) for count in counts}
            sizes |= {count % size for count in counts} - {0}
            todo = [([self._blank(n, pixels)], "flip") for n in sorted(sizes, reverse=True)]
        for batches, tta in todo:
            self.seconds["compile"] += self._evaluate(batches, tta).seconds
        self.seconds["eval"] = before

    def _steps(self, epoch: int) -> Iterator[Tensor]:
        """Trains what the plan says of an epoch, from the step to begin with.

        Yields:
            after each step its images.
        """
        plan, by = self.plan.epochs[epoch], self.config.data.resize_by
        batches = plan.batches[self.first_step :]
        self.marks.begin(self.first_step)
        if self.supply is not None:
            first = plan.images_in(self.first_step)
            self.supply.begin(epoch, order=self.order, first=first)
            for batch in batches:
                self._make_room(batch)
                yield self.step.take(self.supply, self.marks, batch.images, batch.pixels)
            return
        made = self.loader.epoch(epoch, self.first_step)
        place = {"seed": self.config.runtime.seed, "epoch": epoch}
        for batch, (images, labels) in zip(batches, made, strict=False):
            self._make_room(batch)
            images = smaller(images, batch.pixels, by=by, first=batch.first, **place)
            self.marks.add(*self.step(images, labels), None, None)
            yield images

    def _make_room(self, batch: Batch) -> None:
        """Before batches of another shape: memory in pieces of the old one's sizes is no use."""
        if self.shape != (batch.images, batch.pixels):
            self.shape = batch.images, batch.pixels
            runtime.release_memory(self.device)

    def _choose_images(self, epoch: int) -> None:
        """Which images an epoch is of, in which order."""
        if self.marks.image_losses is not None:
            self.order = epoch_order(
                self.plan.epochs[epoch].kept,
                self.marks.image_losses,
                count=self.loader.count,
                seed=self.config.runtime.seed,
                epoch=epoch,
            )

    def _train_epoch(self, epoch: int) -> None:
        plan = self.plan.epochs[epoch]
        steps = len(plan.batches)
        if self.first_step:  # only a restored run starts inside an epoch
            torch.set_rng_state(self.generators[0])
            if self.generators[1] is not None:
                torch.cuda.set_rng_state(self.generators[1], self.device)
        else:
            self.epoch_seconds = 0.0
            torch.manual_seed(
                generator(self.config.runtime.seed, _DROPOUT_STREAM, epoch).initial_seed()
            )
        watch = _LossWatch(self.marks.losses, self.marks.correct)
        self.step.model.train()
        before, self.clock = self.epoch_seconds, _Clock(self.device)
        if not self.first_step:
            self._choose_images(epoch)
        for step, images in enumerate(self._steps(epoch), self.first_step):
            lr = self.schedule.lr
            last_loss, correct_so_far, known = watch.poll(step)
            if known and not math.isfinite(last_loss):
                self._settle()
                bad = self._first_bad(self.marks.losses[: step + 1])
                raise self._non_finite(f"the loss is {last_loss}", epoch, bad)
            self.schedule.step(plan.first_step + step)
            self.epoch_seconds = before + self.clock.so_far()
            self.display.step(
                plan.first_step + step + 1,
                epoch,
                last_loss,
                correct_so_far / plan.images_in(known) if known else math.nan,
                lr,
                plan.images_in(step + 1) / self.epoch_seconds,
            )
            if self.after_step is not None:
                self.after_step(plan.first_step + step, images)
            if self.stop_signal is not None:
                self.epoch_seconds = before + self.clock.stop()[0]()
                self._stop_if_asked(step + 1)
            if step + 1 < steps and self._out_of_time(self.epoch_seconds):
                self.first_step = step + 1
                break
        losses, correct = _on_host(self.marks.losses[:steps]), _on_host(self.marks.correct)
        seconds, done = self.clock.stop()  # behind the copies, which are there when it was read
        self.ended.append(
            _Ended(epoch, self.schedule.lr, losses, correct, lambda: before + seconds(), done)
        )
        if self.stopped is not None:  # within the epoch
            this = self.ended.pop()
            self._settle()
            self._check(this)
            self.epoch_seconds = this.seconds()

    def _first_bad(self, losses: Tensor) -> int:
        bad = (~torch.isfinite(losses)).nonzero()
        return int(bad[0]) if len(bad) else len(losses) - 1

    def _check(self, ended: _Ended) -> None:
        """Waits for the end of an epoch; an error where a loss is not finite."""
        ended.seconds()
        if not bool(torch.isfinite(ended.losses).all()):
            bad = self._first_bad(ended.losses)
            raise self._non_finite(f"the loss is {float(ended.losses[bad])}", ended.epoch, bad)

    def _waits(self, epoch: int) -> bool:
        """Whether the host must know of an epoch's end before the next begins."""
        return (
            self.device.type != "cuda"
            or self._evaluates(epoch)
            or self.config.run.max_seconds is not None
            or self.stop_signal is not None
            or self._save_due()
        )

    def _evaluates(self, epoch: int) -> bool:
        """Whether an epoch is followed by an evaluation."""
        every = self.config.evaluation.eval_every
        return self._is_last(epoch) or bool(every and (epoch + 1) % every == 0)

    def _epochs_since_evaluation(self, epoch: int) -> int:
        """Epochs from the last regular evaluation before ``epoch`` to its end."""
        every = self.config.evaluation.eval_every
        return epoch % every + 1 if every else epoch + 1

    def _is_last(self, epoch: int) -> bool:
        return epoch + 1 == len(self.plan.epochs)

    def _save_due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.config.run.save_seconds

    def _end_epoch(self, epoch: int) -> None:
        """Evaluates and records a trained epoch, at once or when the device is done with it."""
        if not self._waits(epoch):
            self._settle(wait=False)
            return
        this = self.ended.pop()
        self._settle()
        self._check(this)
        result: Evaluation | None = None
        eval_seconds = 0.0
        self.final = None
        if self._evaluates(epoch):
            asked = self.config.evaluation.tta
            tta = asked if self._is_last(epoch) else "none"
            score = self._evaluate(self.val, tta)
            result, eval_seconds = score.plain, score.seconds
            self.final = score if tta == asked else None
            self.schedule.evaluated(result.accuracy, self._epochs_since_evaluation(epoch))
            self._keep_best(result.accuracy, epoch)
        self._record(replace(this, lr=self.schedule.lr), result, eval_seconds)

    def _settle(self, *, wait: bool = True) -> None:
        """Records the epochs that wait to be, all or those that the device is done with."""
        while self.ended and (wait or self.ended[0].done()):
            self._check(self.ended[0])
            self._record(self.ended.pop(0))

    def _record(
        self, ended: _Ended, result: Evaluation | None = None, eval_seconds: float = 0.0
    ) -> None:
        """Adds the row of an epoch, with its evaluation if there was one."""
        plan, seconds = self.plan.epochs[ended.epoch], ended.seconds()
        self.seconds["train"] += seconds
        row = {
            "epoch": ended.epoch + 1,
            "lr": ended.lr,
            "train_loss": weighted_mean(ended.losses, plan.batches),
            "train_accuracy": int(ended.correct) / plan.images,
            "eval_set": self.evaluated_on,
            "eval_loss": result and result.loss,
            "eval_accuracy": result and result.accuracy,
            "images_per_second": plan.images / seconds,
            "train_seconds": seconds,
            "eval_seconds": eval_seconds,
        }
        self.history.append(row)
        records.write_metrics(self.path, self.history)
        self.loggers.log(row)
        seen = plan.first_image + plan.images
        spent = self.seconds["train"] + self.seconds["eval"]
        self.display.epoch(row, spent * (self.plan.images - seen) / seen)

    def _over(self) -> bool:
        """Whether an end was reached: target, patience, epochs or time; says which."""
        target, patience = self.config.evaluation.target, self.config.evaluation.early_stop
        if target is not None and self.best >= target:
            self.display.say(
                f"target {target:.2%} reached: {self.best:.2%} of the {self.evaluated_on} images "
                f"after {self.best_epoch} epochs"
            )
            self.stopped = "target"
            return True
        if patience and self.since_best >= patience:
            self.display.say(f"no better accuracy for {self.since_best} evaluations: stopping")
            self.stopped = "early_stop"
            return True
        if self.epoch >= len(self.plan.epochs):
            return True
        return self._out_of_time(self.epoch_seconds if self.first_step else 0.0)

    def _out_of_time(self, epoch_seconds: float) -> bool:
        """Whether the limit of time is reached, ``epoch_seconds`` into the epoch; says so."""
        limit = self.config.run.max_seconds
        seconds = self.seconds["whitening"] + self.seconds["train"] + epoch_seconds
        if limit is None or seconds < limit:
            return False
        self.display.say(
            f"limit of {limit:g} seconds of training reached: stopping; go on with --resume "
            f"{self.path} --max-seconds and a higher one"
        )
        self.stopped = "max_seconds"
        return True

    def _total_seconds(self) -> float:
        return self.seconds["total"] + time.perf_counter() - self.started

    def _peak_memory(self) -> int:
        return max(self.peak_before, runtime.peak_memory(self.device))

    def _keep_best(self, accuracy: float, epoch: int) -> None:
        if accuracy <= self.best:
            self.since_best += 1
            return
        self.best, self.best_epoch, self.since_best = accuracy, epoch + 1, 0
        self._save_weights(records.BEST)

    def _macs_of_sizes(self, model: nn.Module) -> dict[int, int]:
        """Multiply-accumulates an image at each of the sizes that it is trained at first."""
        sizes = self.config.data.sizes
        try:
            return {pixels: count_macs(model, pixels) for pixels, _ in sizes}
        except RuntimeError as error:
            raise size_refused(sizes, error) from None

    def _whiten(self, model: nn.Module) -> float:
        """Computes the frozen first layer of a network that has one; the seconds it took."""
        if not whitening.needed(model):
            return 0.0
        blank = self._blank_source(min(self.config.evaluation.eval_batch_size, whitening.IMAGES))
        # Loads libraries and compiles kernels, which does not count.
        whitening.prepare_model(copy.deepcopy(model), self._batches(blank, torch.float32))
        start = time.perf_counter()
        some = feed.spread(self.train_source, whitening.IMAGES)
        whitening.prepare_model(model, self._batches(some, torch.float32))
        runtime.synchronize(self.device)
        return time.perf_counter() - start

    def _save_weights(self, name: str) -> None:
        checkpoint.save_weights(
            self.path / name,
            self.step.evaluated_model,
            self.config,
            self.data.classes,
            self.mean,
            self.std,
        )

    def _batches(
        self, source: feed.Source, dtype: torch.dtype | None = None
    ) -> feed.EvaluationBatches:
        return feed.EvaluationBatches(
            source,
            self.mean,
            self.std,
            image_size=self.data.image_size,
            batch_size=self.config.evaluation.eval_batch_size,
            device=self.device,
            dtype=dtype or self.dtype,
            classes=len(self.data.classes),
            **self.pipeline,
        )

    def _evaluate(self, batches: Iterable[tuple[Tensor, Tensor]], tta: TTA) -> _Score:
        start = time.perf_counter()
        runtime.release_memory(self.device)
        model, dtype = self.step.evaluated_model, self.dtype
        if self.config.evaluation.fuse:
            model, dtype = self._fused(model), torch.float32  # it needs no autocast
        plain, augmented = evaluate_both(
            model,
            batches,
            dtype=dtype,
            tta=tta,
            tta_select=self.config.evaluation.tta_select,
            tta_mirror=self.config.evaluation.tta_mirror,
        )
        self.shape = None  # the next batch makes room again
        seconds = time.perf_counter() - start
        self.seconds["eval"] += seconds
        return _Score(plain, augmented, seconds)

    def _fused(self, model: nn.Module) -> nn.Module:
        was_training = model.training
        example, _ = self._blank(1, self.data.image_size)
        try:
            fused = fuse(model.eval(), self.dtype, example=example)
            set_winograd_tile(fused, self.config.runtime.winograd_tile)
            return fused
        finally:
            model.train(was_training)

    def _stop_if_asked(self, step: int) -> None:
        if self.stop_signal is not None:
            self._save(self.epoch, step)
            raise Interrupted(self.path, self.stop_signal)

    # -- result --------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        runtime.release_memory(self.device)
        config, data = self.config, self.data
        self._save_weights(records.WEIGHTS)
        tta = config.evaluation.tta
        if self.final is None:
            self.final = self._evaluate(self.val, tta)
        held_out = self.final if self.evaluated_on == "val" else None
        test, tested = (None, None) if held_out else (self.val, self.final)
        if held_out and config.evaluation.score_test:
            test = self._batches(self.test_source)
            tested = self._evaluate(test, tta)
        main = tested or self.final
        epochs = len(self.history)
        seen = self.plan.images_before(self.epoch, self.first_step)
        train_seconds = self.seconds["train"] + (self.epoch_seconds if self.first_step else 0.0)
        summary = {
            "run": self.path.name,
            "recipe": config.recipe,
            "model": config.model.model,
            "params": self.params,
            "macs": self.macs,
            "macs_by_pixels": {str(size): macs for size, macs in self.macs_by_pixels.items()},
            "train_macs": sum(
                images * self.macs_by_pixels[pixels]
                for pixels, images in self.plan.images_by_pixels(
                    self.epoch, self.first_step
                ).items()
            ),
            "epochs": epochs,
            "data": data.name,
            "data_digest": data.digest,
            "train_images": self.loader.count,
            "test_images": test.count if test else 0,
            "test_accuracy": tested and tested.plain.accuracy,
            "test_loss": tested and tested.plain.loss,
            "tta": tta,
            "tta_select": config.evaluation.tta_select,
            "tta_mirror": config.evaluation.tta_mirror,
            "tta_accuracy": tested and tested.augmented.accuracy,
            "val_images": self.val.count if held_out else 0,
            "val_accuracy": held_out and held_out.plain.accuracy,
            "val_tta_accuracy": held_out and held_out.augmented.accuracy,
            "best_accuracy": self.best,
            "best_epoch": self.best_epoch,
            "best_on": self.evaluated_on,
            "scored_on": "test" if tested else "val",
            "per_class_accuracy": dict(zip(data.classes, main.plain.per_class, strict=True)),
            "confusion": main.plain.confusion.tolist(),
            "whitening_seconds": self.seconds["whitening"],
            "train_seconds": train_seconds,
            "final_eval_seconds": main.seconds,
            "timed_seconds": self.seconds["whitening"] + train_seconds + main.seconds,
            "compile_seconds": self.seconds["compile"],
            "eval_seconds": self.seconds["eval"],
            "total_seconds": self._total_seconds(),
            "timing_rule": records.TIMING_RULE,
            "peak_memory_bytes": self._peak_memory(),
            "stopped": self.stopped,
            "images_per_second": seen / train_seconds,
            "loader": config.data.loader,
            "augment": str(config.data.augment),
            "device": runtime.describe(self.device),
            "device_type": self.device.type,
            "precision": config.runtime.precision,
            "compile": config.runtime.compile,
            "batch_size": config.optim.batch_size,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "torch": torch.__version__,
            "resfast": __version__,
            **records.circumstances(),
            "seed": config.runtime.seed,
        }
        records.write_summary(self.path, summary)
        from resfast.runs import plots  # matplotlib is slow to import

        plots.save_curves(self.path / records.CURVES, self.history, self.path.name)
        plots.save_confusion(self.path / records.CONFUSION, main.plain.confusion, data.classes)
        return summary


class _Clock:
    """Seconds from its making on; on CUDA, of the device's work that is queued after it."""

    def __init__(self, device: torch.device) -> None:
        self.start = time.perf_counter()
        self.event = _event() if device.type == "cuda" else None

    def so_far(self) -> float:
        """Seconds as the host sees them."""
        return time.perf_counter() - self.start

    def stop(self) -> tuple[Callable[[], float], Callable[[], bool]]:
        """Reads the clock; the first function waits for the reading, the second does not."""
        if self.event is None:
            seconds = self.so_far()
            return lambda: seconds, lambda: True
        start, end = self.event, _event()

        def seconds_between() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1000

        return seconds_between, end.query


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _on_host(values: Tensor) -> Tensor:
    """A copy in the memory of the host; of one from CUDA it may not have arrived yet."""
    if not values.is_cuda:
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


class _LossWatch:
    """Follows the loss of the latest steps without making the host wait for the device.

    On the CPU every value is known at once. On CUDA the values are copied to pinned memory beside
    the work; a copy that has not arrived yet is asked for again at a later step.
    """

    def __init__(self, losses: Tensor, correct: Tensor) -> None:
        self.losses, self.correct = losses, correct
        self.asynchronous = losses.is_cuda
        self.last, self.hits, self.known = math.nan, 0, 0
        if self.asynchronous:
            self.host = torch.empty(2, dtype=torch.float64).pin_memory()
            self.event = torch.cuda.Event()
            self.pending: int | None = None

    def poll(self, step: int) -> tuple[float, int, int]:
        """Latest loss, correct predictions so far, and the number of steps they stand for."""
        if not self.asynchronous:
            return float(self.losses[step]), int(self.correct), step + 1
        if self.pending is not None and self.event.query():
            self.last, self.hits, self.known = float(self.host[0]), int(self.host[1]), self.pending
            self.pending = None
        if self.pending is None and step % _POLL_STEPS == 0:
            # A NaN or infinity anywhere so far makes the sum so.
            loss = self.losses[step] + 0 * self.losses[: step + 1].sum()
            values = torch.stack([loss.double(), self.correct.double()])
            self.host.copy_(values, non_blocking=True)
            self.event.record()
            self.pending = step + 1
        return self.last, self.hits, self.known


class _Signals:
    """Within it, SIGINT and SIGTERM ask the run to save and stop; a second one stops at once."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.before: dict[int, Any] = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.run.stop_signal is not None:
            raise KeyboardInterrupt
        self.run.stop_signal = signum
        self.run.display.say("stopping after this step; once more to stop without saving")

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.before[signum] = signal.signal(signum, self._handle)

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
