"""Writes the rows of metrics.jsonl, as soon as the device has finished an epoch or later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resfast.inference.scoring import Evaluation
from resfast.runs import folder as records
from resfast.runs.epoch_row import EpochRow
from resfast.training.display import Display
from resfast.training.loss_watch import first_non_finite
from resfast.training.plan import weighted_mean
from resfast.training.state import TrainingState
from resfast.training.step_records import StepRecords


@dataclass(frozen=True)
class TrainedEpoch:
    """A trained epoch, or the first part of one.

    Attributes:
        epoch: its index, from 0.
        steps: number of steps trained, at most those of the epoch.
        lr: learning rate of the last step.
        losses: float32 ``[steps]``, in nats; call ``seconds`` before reading this or ``correct``.
        correct: number of correct predictions, int64 0-d.
        seconds: waits until the device has finished the steps; returns how long they took.
        done: returns whether the device has finished the steps, without waiting.
        measured: what :class:`~resfast.training.gradient_probe.GradientProbe` measured, float32
            ``[steps, columns]``; None if nothing.
    """

    epoch: int
    steps: int
    lr: float
    losses: Tensor
    correct: Tensor
    seconds: Callable[[], float]
    done: Callable[[], bool]
    measured: Tensor | None = None


class Recorder:
    """Writes a row for each trained epoch and passes it to the display and the loggers.

    Args:
        state: the rows are appended to its history.
        display: shows the rows.
        loggers: TensorBoard and Weights & Biases.

    Attributes:
        pending: trained epochs that are not recorded yet.
    """

    def __init__(self, state: TrainingState, display: Display, loggers: records.Loggers) -> None:
        self.state, self.display, self.loggers = state, display, loggers
        self.pending: list[TrainedEpoch] = []
        names = state.session.config.run.record
        self.steps = StepRecords(state.path, names) if names else None

    def settle(self, *, wait: bool = True) -> None:
        """Records all pending epochs or, without ``wait``, those that the device has finished."""
        while self.pending and (wait or self.pending[0].done()):
            self.check(self.pending[0])
            self.record(self.pending.pop(0))

    def check(self, trained: TrainedEpoch) -> None:
        """Waits for the end of an epoch.

        Raises:
            NonFiniteLossError: a loss is not finite.
        """
        trained.seconds()
        if not bool(torch.isfinite(trained.losses).all()):
            bad = first_non_finite(trained.losses)
            loss = float(trained.losses[bad])
            raise self.state.non_finite(f"the loss is {loss}", trained.epoch, bad)

    def record(
        self, trained: TrainedEpoch, result: Evaluation | None = None, eval_seconds: float = 0.0
    ) -> None:
        """Records a whole epoch, with its evaluation if there was one."""
        state, plan = self.state, self.state.session.plan
        row = self._row(trained, result, eval_seconds)
        state.train_seconds += row.train_seconds
        state.history.append(row)
        records.write_metrics(state.path, state.history)
        self._record_steps(trained)
        self.loggers.log(row)
        seen = plan.epochs[trained.epoch].first_image + plan.epochs[trained.epoch].images
        spent = state.train_seconds + state.evaluator.seconds
        self.display.epoch(row, spent * (plan.images - seen) / seen)

    def partial(
        self, trained: TrainedEpoch, result: Evaluation, eval_seconds: float
    ) -> list[EpochRow]:
        """Writes the row of an epoch that the time limit cut short.

        The row is not added to the state's history: a resumed run records the whole epoch instead.

        Returns:
            The history and that row.
        """
        history = [*self.state.history, self._row(trained, result, eval_seconds)]
        records.write_metrics(self.state.path, history)
        self._record_steps(trained)
        return history

    def _record_steps(self, trained: TrainedEpoch) -> None:
        if self.steps is None:
            return
        first = self.state.session.plan.epochs[trained.epoch].first_step
        columns = [self.state.rates[first : first + trained.steps], trained.losses.tolist()]
        if trained.measured is not None:
            columns += trained.measured.T.tolist()
        self.steps.add(first, trained.epoch, zip(*columns, strict=True))

    def _row(
        self, trained: TrainedEpoch, result: Evaluation | None, eval_seconds: float
    ) -> EpochRow:
        plan, seconds = self.state.session.plan.epochs[trained.epoch], trained.seconds()
        images = plan.images_in(trained.steps)
        return EpochRow(
            epoch=trained.epoch + 1,
            lr=trained.lr,
            train_loss=weighted_mean(trained.losses, plan.batches[: trained.steps]),
            train_accuracy=int(trained.correct) / images,
            eval_set=self.state.evaluator.evaluated_on,
            eval_loss=None if result is None else result.loss,
            eval_accuracy=None if result is None else result.accuracy,
            images_per_second=images / seconds,
            train_seconds=seconds,
            eval_seconds=eval_seconds,
        )
