"""Trains one network from a configuration, and leaves a run's folder behind."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast import __version__, atomic, runtime
from resfast.data import feed
from resfast.data.augment import generator
from resfast.data.dataset import Dataset
from resfast.data.stream import Stream, open_data
from resfast.errors import NonFiniteLossError, ResfastError
from resfast.models.resnet import ResNet, count_parameters
from resfast.models.summary import count_macs
from resfast.training import checkpoint, records
from resfast.training.config import Config, differences, load, network
from resfast.training.evaluation import Evaluation, evaluate
from resfast.training.optim import Schedule, build_optimizer
from resfast.training.progress import Display
from resfast.training.resolve import check, resolve
from resfast.training.step import TrainStep

_DROPOUT_STREAM = 4
_POLL_STEPS = 8


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


class Interrupted(KeyboardInterrupt):
    """A run stopped by a signal after saving; ``path`` is its folder."""

    def __init__(self, path: Path, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.path, self.signum = path, signum


def train(config: Config | None = None, *, resume: str | Path | None = None) -> Result:
    """Trains a network.

    Args:
        config: what to train; :data:`resfast.training.recipes.RECIPES` has complete ones. With
            ``resume`` it may be left out, and otherwise must agree with the run's own.
        resume: the folder of a run to go on with.

    Returns:
        The finished run.

    Raises:
        ResfastError: bad input, or files that cannot be read or written.
        NonFiniteLossError: the loss became infinite or NaN.
        Interrupted: SIGINT or SIGTERM came; the run was saved and can be resumed.
    """
    display = Display()
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
    data = open_data(
        config.data.data,
        data_dir=config.data.data_dir,
        image_size=config.data.image_size,
        skip_corrupt=config.data.skip_corrupt,
        loader=config.data.loader,
        device=runtime.resolve_device(config.runtime.device),
        report=display.say,
    )
    return _Run(config, data, display, path, state).train()


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
        data: Dataset | Stream,
        display: Display,
        path: Path | None,
        state: dict[str, Any] | None,
    ) -> None:
        self.display, self.data = display, data
        train_source, val_source, self.test_source = feed.split_sources(
            data, config.data.val_fraction, config.runtime.seed
        )
        config, notes = resolve(config, data, feed.count(train_source))
        for note in notes:
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
        held_out = val_source is not None
        self.val = self._batches(val_source if held_out else self.test_source)
        self.evaluated_on = "val" if held_out else "test"

        torch.manual_seed(config.runtime.seed)
        model = ResNet(network(config.model), len(data.classes))
        budget, self.params = config.model.param_budget, count_parameters(model)
        if budget and self.params > budget:
            raise ResfastError(
                f"model {config.model.model} has {self.params:,} parameters, above the budget of "
                f"{budget:,}; choose a smaller model (--list) or --param-budget 0 for none"
            )
        if config.model.zero_init_residual:
            model.zero_init_residual()
        self.macs = count_macs(model, data.image_size)
        model = model.to(self.device, memory_format=torch.channels_last)
        optimizer = build_optimizer(model, config.optim)
        self.schedule = Schedule(optimizer, config.optim, config.optim.epochs, len(self.loader))
        compiled = config.runtime.compile != "off"
        self.step = TrainStep(
            model, optimizer, config.optim, device=self.device, dtype=self.dtype, compile=compiled
        )

        self.epoch, self.first_step = 0, 0
        self.losses = torch.zeros(len(self.loader), device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.history: list[dict[str, Any]] = []
        self.best, self.best_epoch, self.since_best = -1.0, 0, 0
        self.epoch_seconds = 0.0
        self.last_evaluation: Evaluation | None = None
        self.seconds = {"train": 0.0, "compile": 0.0, "eval": 0.0}
        self.saved_at, self.saved_epoch = time.monotonic(), None
        self.stop_signal: int | None = None

        self.new = path is None
        self.path = records.run_folder(config, config.model.model) if path is None else path
        records.write_config(self.path, config)
        if not self.new:
            atomic.remove_stale(self.path, older_than_s=0)  # of a save that a kill cut short
        if state is not None:
            self._restore(state)

    # -- state ---------------------------------------------------------------------------------

    def _save(self, epoch: int, step: int) -> None:
        """Saves the state to go on with batch ``step`` of ``epoch``, unless it is damaged."""
        for name, value in self.step.model.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise self._non_finite(f"weights {name} are not finite", epoch, step)
        state = {
            "data": self.data.digest,
            "epoch": epoch,
            "step": step,
            "training": self.step.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self.losses.cpu(),
            "correct": self.correct.cpu(),
            "epoch_seconds": self.epoch_seconds,
            "history": json.dumps(self.history),
            "best": [self.best, self.best_epoch, self.since_best],
            "seconds": self.seconds,
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
        self.losses.copy_(state["losses"])
        self.correct.copy_(state["correct"])
        self.epoch_seconds = state["epoch_seconds"]
        self.history = json.loads(state["history"])
        self.best, self.best_epoch, self.since_best = state["best"]
        self.seconds = dict(state["seconds"])
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
        return NonFiniteLossError(
            f"{what} at epoch {epoch + 1}, step {step + 1} of {len(self.loader)}, learning rate "
            f"{self.schedule.lr:g}; {good}; try a lower --lr or --clip-norm 1"
        )

    # -- training ------------------------------------------------------------------------------

    def train(self) -> Result:
        config, display = self.config, self.display
        loggers = records.Loggers(self.path, config)
        finished = self._over()
        if finished:
            display.say(f"{self.path} is already trained; evaluating it")
        else:
            self._announce()
            self._compile()
        with display, _Signals(self):
            if not finished:
                display.start(config.optim.epochs, len(self.loader), self.evaluated_on)
            while not finished:
                self._train_epoch(self.epoch)
                self._end_epoch(self.epoch, loggers)
                self.epoch, self.first_step = self.epoch + 1, 0
                finished = self._over()
                if finished or time.monotonic() - self.saved_at >= config.run.save_seconds:
                    self._save(self.epoch, 0)
                if not finished:
                    self._stop_if_asked(0)
        summary = self._finish()
        loggers.close(summary)
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
        asked = self.config.runtime.compile
        if asked == "off":
            return
        self.display.say("compiling the training step (up to a minute the first time) …")
        size = self.data.image_size
        shape = (self.config.optim.batch_size, 3, size, size)
        images = torch.zeros(shape, device=self.device, dtype=self.dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(shape[0], dtype=torch.int64, device=self.device)
        if self.config.data.augment.mixes:
            labels = F.one_hot(labels, len(self.data.classes)).float()
        self.step.model.train()
        seconds = self.step.warm_up(images, labels, fall_back=asked == "auto")
        self.seconds["compile"] += seconds
        self.display.say(f"compiled in {seconds:.1f} s")

    def _train_epoch(self, epoch: int) -> None:
        steps, batch = len(self.loader), self.config.optim.batch_size
        if self.first_step == 0:
            self.losses.zero_()
            self.correct.zero_()
            self.epoch_seconds = 0.0
        if self.first_step:  # only a restored run starts inside an epoch
            torch.set_rng_state(self.generators[0])
            if self.generators[1] is not None:
                torch.cuda.set_rng_state(self.generators[1], self.device)
        else:
            torch.manual_seed(
                generator(self.config.runtime.seed, _DROPOUT_STREAM, epoch).initial_seed()
            )
        watch = _LossWatch(self.losses, self.correct)
        self.step.model.train()
        before, start = self.epoch_seconds, time.perf_counter()
        for step, (images, labels) in enumerate(
            self.loader.epoch(epoch, self.first_step), self.first_step
        ):
            loss, correct = self.step(images, labels)
            self.losses[step] = loss
            self.correct += correct
            lr = self.schedule.lr
            last_loss, correct_so_far, known = watch.poll(step)
            if known and not math.isfinite(last_loss):
                raise self._non_finite(f"the loss is {last_loss}", epoch, self._first_bad(step))
            self.schedule.step(epoch * steps + step)
            self.epoch_seconds = before + time.perf_counter() - start
            self.display.step(
                epoch * steps + step + 1,
                epoch,
                last_loss,
                correct_so_far / (known * batch) if known else math.nan,
                lr,
                (step + 1) * batch / self.epoch_seconds,
            )
            if self.stop_signal is not None:
                self._stop_if_asked(step + 1)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.epoch_seconds = before + time.perf_counter() - start
        if not bool(torch.isfinite(self.losses).all()):
            bad = self._first_bad(steps - 1)
            raise self._non_finite(f"the loss is {float(self.losses[bad])}", epoch, bad)

    def _first_bad(self, last: int) -> int:
        bad = (~torch.isfinite(self.losses[: last + 1])).nonzero()
        return int(bad[0]) if len(bad) else last

    def _end_epoch(self, epoch: int, loggers: records.Loggers) -> None:
        """Evaluates and records a trained epoch."""
        config, steps = self.config, len(self.loader)
        last = epoch + 1 == config.optim.epochs
        self.seconds["train"] += self.epoch_seconds
        result: Evaluation | None = None
        eval_seconds = 0.0
        if last or (epoch + 1) % config.evaluation.eval_every == 0:
            result, eval_seconds = self._evaluate(self.val, "none")
            self.schedule.evaluated(result.accuracy)
            self._keep_best(result.accuracy, epoch)
        self.last_evaluation = result
        row = {
            "epoch": epoch + 1,
            "lr": self.schedule.lr,
            "train_loss": float(self.losses.mean()),
            "train_accuracy": int(self.correct) / (steps * config.optim.batch_size),
            "eval_set": self.evaluated_on,
            "eval_loss": result and result.loss,
            "eval_accuracy": result and result.accuracy,
            "images_per_second": steps * config.optim.batch_size / self.epoch_seconds,
            "train_seconds": self.epoch_seconds,
            "eval_seconds": eval_seconds,
        }
        self.history.append(row)
        records.write_metrics(self.path, self.history)
        loggers.log(row)
        mean_seconds = (self.seconds["train"] + self.seconds["eval"]) / len(self.history)
        self.display.epoch(row, mean_seconds * (config.optim.epochs - epoch - 1))

    def _over(self) -> bool:
        """Whether the last epoch, the target or the end of patience was reached; says which."""
        target, patience = self.config.evaluation.target, self.config.evaluation.early_stop
        if target is not None and self.best >= target:
            self.display.say(
                f"target {target:.2%} reached: {self.best:.2%} of the {self.evaluated_on} images "
                f"after {self.best_epoch} epochs"
            )
            return True
        if patience and self.since_best >= patience:
            self.display.say(f"no better accuracy for {self.since_best} evaluations: stopping")
            return True
        return self.epoch >= self.config.optim.epochs

    def _keep_best(self, accuracy: float, epoch: int) -> None:
        if accuracy <= self.best:
            self.since_best += 1
            return
        self.best, self.best_epoch, self.since_best = accuracy, epoch + 1, 0
        self._save_weights(records.BEST)

    def _save_weights(self, name: str) -> None:
        checkpoint.save_weights(
            self.path / name,
            self.step.evaluated_model,
            self.config,
            self.data.classes,
            self.mean,
            self.std,
        )

    def _batches(self, source: feed.Source) -> feed.EvaluationBatches:
        return feed.EvaluationBatches(
            source,
            self.mean,
            self.std,
            image_size=self.data.image_size,
            batch_size=self.config.evaluation.eval_batch_size,
            device=self.device,
            dtype=self.dtype,
            classes=len(self.data.classes),
            **self.pipeline,
        )

    def _evaluate(self, batches: feed.EvaluationBatches, tta: str) -> tuple[Evaluation, float]:
        start = time.perf_counter()
        result = evaluate(self.step.evaluated_model, batches, dtype=self.dtype, tta=tta)
        seconds = time.perf_counter() - start
        self.seconds["eval"] += seconds
        return result, seconds

    def _stop_if_asked(self, step: int) -> None:
        if self.stop_signal is not None:
            self._save(self.epoch, step)
            raise Interrupted(self.path, self.stop_signal)

    # -- result --------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        config, data = self.config, self.data
        self._save_weights(records.WEIGHTS)
        test = self.val if self.evaluated_on == "test" else self._batches(self.test_source)
        plain = self.last_evaluation
        if plain is None or self.evaluated_on != "test":
            plain, _ = self._evaluate(test, "none")
        tta = plain
        if config.evaluation.tta != "none":
            tta, _ = self._evaluate(test, config.evaluation.tta)
        epochs = len(self.history)
        seen = epochs * len(self.loader) * config.optim.batch_size
        summary = {
            "run": self.path.name,
            "recipe": config.recipe,
            "model": config.model.model,
            "params": self.params,
            "macs": self.macs,
            "epochs": epochs,
            "data": data.name,
            "data_digest": data.digest,
            "train_images": self.loader.count,
            "test_images": test.count,
            "test_accuracy": plain.accuracy,
            "test_loss": plain.loss,
            "tta": config.evaluation.tta,
            "tta_accuracy": tta.accuracy,
            "best_accuracy": self.best,
            "best_epoch": self.best_epoch,
            "best_on": self.evaluated_on,
            "per_class_accuracy": dict(zip(data.classes, plain.per_class, strict=True)),
            "confusion": plain.confusion.tolist(),
            "train_seconds": self.seconds["train"],
            "compile_seconds": self.seconds["compile"],
            "eval_seconds": self.seconds["eval"],
            "images_per_second": seen / self.seconds["train"],
            "loader": config.data.loader,
            "augment": str(config.data.augment),
            "device": runtime.describe(self.device),
            "precision": config.runtime.precision,
            "compile": config.runtime.compile,
            "batch_size": config.optim.batch_size,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "torch": torch.__version__,
            "resfast": __version__,
            "seed": config.runtime.seed,
        }
        records.write_summary(self.path, summary)
        from resfast import plots  # matplotlib is slow to import

        plots.save_curves(self.path / records.CURVES, self.history, self.path.name)
        plots.save_confusion(self.path / records.CONFUSION, plain.confusion, data.classes)
        return summary


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
