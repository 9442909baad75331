"""Trains one epoch, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from resfast.layers.norm import train_mode
from resfast.training import stopping
from resfast.training.clock import Clock, copy_to_host
from resfast.training.display import Display
from resfast.training.loss_watch import LossWatch, first_non_finite
from resfast.training.plan import epoch_order
from resfast.training.recorder import Recorder, TrainedEpoch
from resfast.training.session import Session
from resfast.training.signals import Interrupted, StopSignals
from resfast.training.state import TrainingState


def train_epoch(
    session: Session,
    state: TrainingState,
    recorder: Recorder,
    signals: StopSignals,
    display: Display,
    after_step: Callable[[int, Tensor], None] | None,
) -> TrainedEpoch:
    """Trains the state's epoch from its first step to its end, or until the time limit.

    If the time limit ends the epoch early, ``state.stopped`` and ``state.first_step`` are set.

    Args:
        session: the training.
        state: progress of the training.
        recorder: holds earlier epochs that are not recorded yet.
        signals: requests to stop, checked after each step.
        display: shows the progress of each step.
        after_step: called after each step with its number (from 0, over the whole run) and its
            images.

    Raises:
        NonFiniteLossError: the loss is infinite or NaN.
        Interrupted: a signal arrived; the run was saved.
    """
    epoch, plan = state.epoch, session.plan.epochs[state.epoch]
    schedule, metrics = session.schedule, session.step_metrics
    state.begin_epoch(epoch)
    watch = LossWatch(metrics.losses, metrics.correct)
    train_mode(session.step.model)
    seconds_before, clock = state.epoch_seconds, Clock(session.device)
    if not state.first_step:
        _choose_images(session, state)
    trained, lr = state.first_step, _last_rate(session, state)
    for step, images in enumerate(_steps(session, state), state.first_step):
        trained, lr = step + 1, schedule.lr
        state.rates.append(lr)
        loss, correct, known_steps = watch.poll(step)
        if known_steps and not math.isfinite(loss):
            recorder.settle()
            bad = first_non_finite(metrics.losses[:trained])
            raise state.non_finite(f"the loss is {loss}", epoch, bad)
        schedule.step(plan.first_step + step)
        state.epoch_seconds = seconds_before + clock.so_far()
        display.step(
            plan.first_step + trained,
            epoch,
            loss,
            correct / plan.images_in(known_steps) if known_steps else math.nan,
            lr,
            plan.images_in(trained) / state.epoch_seconds,
        )
        if after_step is not None:
            after_step(plan.first_step + step, images)
        if signals.received is not None:
            state.epoch_seconds = seconds_before + clock.stop()[0]()
            stop_if_asked(state, recorder, signals, trained)
        if trained < len(plan.batches) and stopping.out_of_time(
            state, display, state.epoch_seconds
        ):
            state.first_step = trained
            break
    measured = _measured(session)
    losses = copy_to_host(metrics.losses[:trained])
    total_correct = copy_to_host(metrics.correct)
    seconds, done = clock.stop()  # queued after the copies: once it is read, they are done
    return TrainedEpoch(
        epoch,
        trained,
        lr,
        losses,
        total_correct,
        lambda: seconds_before + seconds(),
        done,
        measured,
    )


def restored_epoch(session: Session, state: TrainingState) -> TrainedEpoch:
    """The trained part of an epoch, for a run that was restored within it and trains no more."""
    steps, metrics = state.first_step, session.step_metrics
    lr = _last_rate(session, state)
    losses, correct = metrics.losses[:steps].cpu(), metrics.correct.cpu()
    seconds = state.epoch_seconds
    return TrainedEpoch(
        state.epoch, steps, lr, losses, correct, lambda: seconds, lambda: True, _measured(session)
    )


def _measured(session: Session) -> Tensor | None:
    """What was measured in each step of the epoch, on the host."""
    probe = session.step.probe
    return None if probe is None else copy_to_host(probe.values())


def _last_rate(session: Session, state: TrainingState) -> float:
    """Learning rate of the epoch's latest step, or of its first if none has been trained."""
    schedule, steps = session.schedule, state.first_step
    if not steps or session.config.optim.schedule == "plateau":
        return schedule.lr
    return schedule.rates(session.plan.epochs[state.epoch].first_step + steps - 1)[0]


def stop_if_asked(
    state: TrainingState, recorder: Recorder, signals: StopSignals, step: int
) -> None:
    """Saves and stops before step ``step`` of the state's epoch if a signal has arrived.

    Raises:
        Interrupted: a signal has arrived.
    """
    if signals.received is not None:
        recorder.settle()
        state.save(state.epoch, step)
        raise Interrupted(state.path, signals.received)


def _choose_images(session: Session, state: TrainingState) -> None:
    """Chooses the epoch's images and their order, if they depend on the losses."""
    if session.step_metrics.image_losses is not None:
        state.order = epoch_order(
            session.plan.epochs[state.epoch].kept,
            session.step_metrics.image_losses,
            count=session.train_batches.count,
            seed=session.config.runtime.seed,
            epoch=state.epoch,
        )


def _steps(session: Session, state: TrainingState) -> Iterator[Tensor]:
    """Trains the rest of the epoch; yields the images of each step after the step."""
    epoch, first_step = state.epoch, state.first_step
    plan, batches, metrics = session.plan.epochs[epoch], session.train_batches, session.step_metrics
    metrics.begin(first_step)
    batches.begin(epoch, first=plan.images_in(first_step), order=state.order)
    for planned in plan.batches[first_step:]:
        session.make_room(planned)
        yield session.step.train_next(batches, metrics, planned.images, planned.pixels)
