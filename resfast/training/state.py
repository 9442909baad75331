"""The progress of a training: counters, best accuracy, seconds, and its checkpoint."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resfast import runtime
from resfast.config.files import to_json
from resfast.config.paths import absolute_paths
from resfast.errors import NonFiniteLossError, ResfastError
from resfast.models.imported import source_digest
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.runs.epoch_row import EpochRow, row_of_values, row_values
from resfast.training.evaluator import Evaluator
from resfast.training.saved_state import check_fits
from resfast.training.session import Session


class TrainingState:
    """The progress of a training, which checkpoints save.

    Args:
        session: the training.
        evaluator: its seconds are saved with the state.
        path: folder of the run.
        started: ``time.perf_counter()`` when the command began.

    Attributes:
        epoch: the next epoch to train, from 0.
        first_step: its first step to train; above 0 if the epoch was interrupted.
        order: int64, images of the current epoch if they depend on the losses, otherwise None.
        rates: learning rate of each step so far, NaN where an older version did not save it.
        history: a row for each recorded epoch.
        best: best accuracy so far, below 0 before the first evaluation.
        best_epoch: number of epochs trained when it was reached.
        evaluations_since_best: number of evaluations since then.
        epoch_seconds: seconds of training in the current epoch.
        train_seconds: seconds of training in the recorded epochs.
        compile_seconds: seconds of compilation and warm-up.
        whitening_seconds: seconds to compute the frozen first layer.
        stopped: why training ended before its last epoch, or None.
    """

    def __init__(self, session: Session, evaluator: Evaluator, path: Path, started: float) -> None:
        self.session, self.evaluator, self.path = session, evaluator, path
        self.epoch, self.first_step = 0, 0
        self.order: Tensor | None = None
        self.rates: list[float] = []
        self.history: list[EpochRow] = []
        self.best, self.best_epoch, self.evaluations_since_best = -1.0, 0, 0
        self.epoch_seconds = self.train_seconds = self.compile_seconds = 0.0
        self.whitening_seconds = session.whitening_seconds
        self.stopped: str | None = None
        self._started, self._seconds_before = started, 0.0
        self._peak_before = 0
        self._saved_at, self._saved_epoch = time.monotonic(), None
        self._generators: tuple[Tensor, Tensor | None] | None = None

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds of all sessions of the run."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def peak_memory(self) -> int:
        """Peak memory in bytes over all sessions of the run."""
        return max(self._peak_before, runtime.peak_memory(self.session.device))

    @property
    def training_seconds(self) -> float:
        """Seconds of training, including an epoch that ended early."""
        return self.train_seconds + (self.epoch_seconds if self.first_step else 0.0)

    def save_due(self) -> bool:
        """Whether ``--save-seconds`` seconds have passed since the last checkpoint."""
        seconds = time.monotonic() - self._saved_at
        return seconds >= self.session.config.run.save_seconds

    def save(self, epoch: int, step: int) -> None:
        """Saves the state before step ``step`` of ``epoch``.

        Raises:
            NonFiniteLossError: weights are not finite; the previous checkpoint is kept.
            ResfastError: the checkpoint cannot be written.
        """
        session = self.session
        for name, value in session.step.model.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise self.non_finite(f"weights {name} are not finite", epoch, step)
        metrics, on_cuda = session.step_metrics, session.device.type == "cuda"
        seconds = {
            "whitening": self.whitening_seconds,
            "train": self.train_seconds,
            "compile": self.compile_seconds,
            "eval": self.evaluator.seconds,
            "total": self.total_seconds,
        }
        state = {
            "config": to_json(absolute_paths(session.config)),
            "code": source_digest(session.config.model.model),
            "data": session.data.digest,
            "epochs": session.config.optim.epochs,
            "epoch": epoch,
            "step": step,
            "training": session.step.state_dict(),
            "schedule": session.schedule.state_dict(),
            "losses": metrics.losses.cpu(),
            "correct": metrics.correct.cpu(),
            "image_losses": None if metrics.image_losses is None else metrics.image_losses.cpu(),
            "rates": torch.tensor(self.rates, dtype=torch.float64),
            "pseudo": None if session.pseudo is None else session.pseudo.state_dict(),
            "probe": None if session.step.probe is None else session.step.probe.state_dict(),
            "order": None if self.order is None or not step else self.order.cpu(),
            "epoch_seconds": self.epoch_seconds,
            "history": json.dumps([row_values(row) for row in self.history]),
            "best": [self.best, self.best_epoch, self.evaluations_since_best],
            "seconds": seconds,
            "peak_memory": self.peak_memory,
            "loader": session.train_batches.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(session.device) if on_cuda else None,
        }
        checkpoint.save_state(
            self.path / records.CHECKPOINT, state, keep=self.path / records.PREVIOUS
        )
        self._saved_at, self._saved_epoch = time.monotonic(), epoch

    def restore(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`save` wrote, by this run or by the same one with fewer epochs.

        Raises:
            ResfastError: the state is of another data set or network, or the run stopped within an
                epoch that has other batches with more epochs.
        """
        session, metrics = self.session, self.session.step_metrics
        if state["data"] != session.data.digest:
            raise ResfastError(
                f"cannot resume {self.path}: data {session.data.name} is not what it was trained "
                "on (its content changed); restore the data or start a new run"
            )
        if state.get("code") != source_digest(session.config.model.model):
            raise ResfastError(
                f"cannot resume {self.path}: the code of {session.config.model.model}, or of a "
                "file that it imports, has changed; restore it, or start a new run with "
                f"--init-from {self.path}"
            )
        self.epoch, self.first_step = state["epoch"], state["step"]
        plan, epochs = session.plan, session.config.optim.epochs
        if self.first_step and not plan.uniform and state.get("epochs", epochs) != epochs:
            raise ResfastError(
                f"cannot resume {self.path} with --epochs {epochs}: it stopped within an epoch, "
                "and its sizes depend on the number of epochs; finish it first with --resume alone"
            )
        check_fits(state, session.step, plan, self.path)
        session.step.load_state_dict(state["training"])
        session.schedule.load_state_dict(state["schedule"])
        # Of this plan, which may be longer than the one that was saved.
        session.step.steps = plan.steps_before(self.epoch, self.first_step)
        session.schedule.seek(session.step.steps)
        rates = state.get("rates")  # missing in older checkpoints
        self.rates = [math.nan] * session.step.steps if rates is None else rates.tolist()
        if session.step.probe is not None and state.get("probe") is not None:
            session.step.probe.load_state_dict(state["probe"])
        session.train_batches.load_state_dict(state["loader"])
        if self.first_step:
            metrics.losses.copy_(state["losses"])
        metrics.correct.copy_(state["correct"])
        if metrics.image_losses is not None:
            metrics.image_losses.copy_(state["image_losses"])
            self.order = None if state["order"] is None else state["order"].to(session.device)
        self.epoch_seconds = state["epoch_seconds"]
        source = f"the history in {self.path / records.CHECKPOINT}"
        self.history = [row_of_values(values, source) for values in json.loads(state["history"])]
        self.best, self.best_epoch, self.evaluations_since_best = state["best"]
        seconds = state["seconds"]
        # Older versions did not save the seconds of whitening.
        self.whitening_seconds = seconds.get("whitening", self.whitening_seconds)
        self.train_seconds, self.compile_seconds = seconds["train"], seconds["compile"]
        self.evaluator.seconds, self._seconds_before = seconds["eval"], seconds["total"]
        self._peak_before = state.get("peak_memory", 0)  # missing in older checkpoints
        self._generators = state["generator"], state["cuda_generator"]
        self._saved_epoch = self.epoch
        records.write_metrics(self.path, self.history)

    def begin_epoch(self, epoch: int) -> None:
        """Seeds the generators of a new epoch, or restores those saved within an epoch."""
        if not self.first_step:
            self.epoch_seconds = 0.0
            if self.session.step.probe is not None:
                self.session.step.probe.rows.clear()
            self.session.seed_epoch(epoch)
            return
        assert self._generators is not None  # only a restored run begins within an epoch
        torch.set_rng_state(self._generators[0])
        if self._generators[1] is not None:
            torch.cuda.set_rng_state(self._generators[1], self.session.device)

    def evaluated(self, accuracy: float, epoch: int) -> None:
        """Updates the best accuracy and saves its weights."""
        if accuracy <= self.best:
            self.evaluations_since_best += 1
            return
        self.best, self.best_epoch, self.evaluations_since_best = accuracy, epoch + 1, 0
        self.save_weights(records.BEST)

    def save_weights(self, name: str) -> None:
        """Writes the evaluated weights to a file in the run's folder."""
        session = self.session
        checkpoint.save_weights(
            self.path / name,
            session.step.evaluated_model,
            session.config,
            session.data.classes,
            session.mean,
            session.std,
        )

    def non_finite(self, what: str, epoch: int, step: int) -> NonFiniteLossError:
        """The error for a loss or weights that are not finite at a step of an epoch."""
        epochs = self.session.plan.epochs
        last_checkpoint = (
            "no checkpoint was saved before"
            if self._saved_epoch is None
            else f"the last good checkpoint is {self.path / records.CHECKPOINT} "
            f"(after {self._saved_epoch} epochs)"
        )
        steps = len(epochs[min(epoch, len(epochs) - 1)].batches)
        return NonFiniteLossError(
            f"{what} at epoch {epoch + 1}, step {step + 1} of {steps}, learning rate "
            f"{self.session.schedule.lr:g}; {last_checkpoint}; try a lower --lr or --clip-norm 1"
        )
