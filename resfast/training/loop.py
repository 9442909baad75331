"""Trains one network from a configuration, and writes the folder of the run.

The loop is here; each of its parts is a module of this package: ``session`` builds what is trained,
``state`` is its progress, ``epoch`` trains one epoch, ``evaluator`` scores, ``recorder`` writes
rows, ``stopping`` decides when to stop, and ``finish`` writes the result.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resfast import atomic, runtime
from resfast.config.compare import check_same
from resfast.config.recipes import decide
from resfast.config.schema import Config
from resfast.config.validate import check, check_network
from resfast.data.dataset import Dataset, Stream
from resfast.data.sources import open_data
from resfast.errors import ResfastError
from resfast.inference.scoring import Evaluation
from resfast.runs import folder as records
from resfast.runs.find import with_single_runs
from resfast.runs.lock import locked_folder
from resfast.runs.summary import RunSummary
from resfast.training import saved_state
from resfast.training.display import Display
from resfast.training.epoch import restored_epoch, stop_if_asked, train_epoch
from resfast.training.evaluator import Evaluator, Score
from resfast.training.finish import finish
from resfast.training.recorder import Recorder, TrainedEpoch
from resfast.training.session import Session, Shared, open_session
from resfast.training.signals import Interrupted, StopSignals
from resfast.training.state import TrainingState
from resfast.training.stopping import is_finished
from resfast.training.warm_up import warm_up_training

__all__ = ["Interrupted", "Result", "Shared", "open_configured_data", "train"]


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: folder of the run.
        summary: accuracies, seconds and more; it is saved as ``summary.json``.
        model: the trained network in eval mode, on the run's device.
    """

    path: Path
    summary: RunSummary
    model: nn.Module


def train(
    config: Config | None = None,
    *,
    resume: str | Path | None = None,
    shared: Shared | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
    after_evaluation: Callable[[int, Evaluation], None] | None = None,
    started: float | None = None,
) -> Result:
    """Trains one network.

    Args:
        config: what to train; :data:`resfast.config.recipes.RECIPES` has complete ones. With
            ``resume`` it may be left out, and otherwise must agree with the run's own, except that
            it may have more epochs.
        resume: the folder of a run to continue.
        shared: filled by the first of several trainings, used by the others.
        after_step: called after each step with its number (from 0, over the whole run) and its
            images.
        after_evaluation: called after each regular evaluation with the number of epochs trained and
            the result; what it raises ends the training.
        started: ``time.perf_counter()`` when the command began (None: now).

    Returns:
        The finished run.

    Raises:
        ResfastError: bad input, or files that cannot be read or written.
        NonFiniteLossError: the loss became infinite or NaN.
        Interrupted: SIGINT or SIGTERM came; the run was saved and can be resumed.
    """
    started = time.perf_counter() if started is None else started
    display, shared = Display(), shared or Shared()
    path = None if resume is None else Path(resume)
    with contextlib.ExitStack() as locks:
        if path is not None and path.is_dir():
            locks.enter_context(locked_folder(path))
        session, state = _opened(config, path, shared, display, started, locks)
        return _train(
            session,
            state,
            display,
            new=path is None,
            after_step=after_step,
            after_evaluation=after_evaluation,
        )


def _opened(
    config: Config | None,
    path: Path | None,
    shared: Shared,
    display: Display,
    started: float,
    locks: contextlib.ExitStack,
) -> tuple[Session, TrainingState]:
    """The parts of a training and its state, in a folder that this process has locked."""
    config, saved, is_extended = _start(config, path, display)
    if shared.data is None:
        check_network(config)
        shared.data = open_configured_data(config, display.say)
    session = open_session(config, shared, display, saved=saved)
    evaluator = Evaluator(session)
    new = path is None
    if path is None:
        path = records.run_folder(session.config, config.model.model)
        locks.enter_context(locked_folder(path))
    if is_extended:
        (path / records.SUMMARY).unlink(missing_ok=True)  # before the run is longer than its result
    records.write_config(path, session.config)
    state = TrainingState(session, evaluator, path, started)
    if not new:
        atomic.remove_stale(path, older_than_s=0)  # left by a save that was killed
    if saved is not None:
        state.restore(saved)
        if is_extended:
            display.say(
                f"continuing {path} to {session.config.optim.epochs:g} epochs: the learning rate "
                f"is that of the whole schedule from here on, {session.schedule.lr:g}"
            )
    return session, state


def open_configured_data(config: Config, report: Callable[[str], None]) -> Dataset | Stream:
    """Opens the data set of a configuration.

    Args:
        config: names the data set, its image size and the device.
        report: called with a line of text for each notable step.

    Raises:
        ResfastError: data that is missing, damaged or laid out differently.
    """
    return open_data(
        config.data.data,
        data_dir=config.data.data_dir,
        image_size=config.data.image_size,
        skip_corrupt=config.data.skip_corrupt,
        loader=config.data.loader,
        device=runtime.resolve_device(config.runtime.device),
        report=report,
        classes=config.data.classes,
    )


def _train(
    session: Session,
    state: TrainingState,
    display: Display,
    *,
    new: bool,
    after_step: Callable[[int, Tensor], None] | None,
    after_evaluation: Callable[[int, Evaluation], None] | None,
) -> Result:
    loggers = records.Loggers(state.path, session.config)
    recorder, evaluator = Recorder(state, display, loggers), state.evaluator
    finished = is_finished(state, display)
    if finished:
        display.say(f"{state.path} is already trained; evaluating it")
    else:
        _announce(session, state.path, display, new)
        state.compile_seconds += warm_up_training(session, display)
    state.compile_seconds += evaluator.warm_up()
    final: Score | None = None
    trained: TrainedEpoch | None = None
    with display, StopSignals(display.say) as signals:
        if not finished:
            epochs, steps = len(session.plan.epochs), session.plan.steps
            display.start(epochs, steps, evaluator.evaluated_on)
        while not finished:
            trained = train_epoch(session, state, recorder, signals, display, after_step)
            if state.stopped is not None:  # within the epoch
                recorder.settle()
                recorder.check(trained)
                state.epoch_seconds = trained.seconds()
                state.save(state.epoch, state.first_step)
                break
            final = _end_epoch(state, recorder, signals, trained, after_evaluation)
            state.epoch, state.first_step = state.epoch + 1, 0
            finished = is_finished(state, display)
            if finished or state.save_due():
                recorder.settle()
                state.save(state.epoch, 0)
            if not finished:
                stop_if_asked(state, recorder, signals, 0)
    history = state.history
    if state.first_step:  # out of time within an epoch
        final = evaluator.evaluate(session.config.evaluation.tta)
        state.evaluated(final.plain.accuracy, state.epoch)
        trained = trained or restored_epoch(session, state)
        history = recorder.partial(trained, final.plain, final.seconds)
    summary = finish(session, state, final, history)
    loggers.close(summary)
    return Result(state.path, summary, session.step.evaluated_model.eval())


def _start(
    config: Config | None, path: Path | None, display: Display
) -> tuple[Config, dict[str, Any] | None, bool]:
    """The checked configuration of a run, its saved state, and whether it has more epochs now."""
    state: dict[str, Any] | None = None
    is_extended = False
    if path is not None:
        if not path.is_dir():
            raise ResfastError(f"there is no run {path}; expected the folder of a run to resume")
        if records.has_checkpoint(path):
            state = saved_state.read(path, display.say)
        else:
            display.say(f"{path} has no checkpoint yet: starting from its beginning")
        before = records.config_of(path)
        if state is not None:
            saved_state.check_belongs(state, before, path)
        config = _resumed(before, config, path)
        is_extended = config.optim.epochs != before.optim.epochs
    elif config is None:
        raise ResfastError("train needs a configuration or a run to resume")
    else:
        config = decide(with_single_runs(config, display.say))
    check(config)
    if config.run.runs > 1:
        raise ResfastError(
            f"--runs {config.run.runs} is more than one training; call resfast.train for several"
        )
    return config, state, is_extended


def _resumed(saved: Config, given: Config | None, path: Path) -> Config:
    if given is None:
        return saved
    check_same(saved, given, path)
    return replace(
        saved,
        run=given.run,
        optim=replace(saved.optim, epochs=given.optim.epochs),
        data=replace(saved.data, data_dir=given.data.data_dir, prefetch=given.data.prefetch),
        runtime=replace(saved.runtime, threads=given.runtime.threads),
    )


def _announce(session: Session, path: Path, display: Display, new: bool) -> None:
    config = session.config
    display.say(
        f"{'' if new else 'resuming '}{path}: {config.model.model} "
        f"({session.parameters:,} parameters), {session.data.name} "
        f"({session.train_batches.count:,} images), {config.runtime.device} "
        f"({runtime.describe(session.device)}), {config.runtime.precision}, "
        f"batch {config.optim.batch_size}, epochs {config.optim.epochs}"
    )


def _end_epoch(
    state: TrainingState,
    recorder: Recorder,
    signals: StopSignals,
    trained: TrainedEpoch,
    after_evaluation: Callable[[int, Evaluation], None] | None,
) -> Score | None:
    """Evaluates and records a trained epoch, at once or when the device has finished it.

    Returns:
        The final score if this was the last epoch or no test-time augmentation is asked for; None
        otherwise.
    """
    if not _must_wait(state, signals, trained.epoch):
        recorder.pending.append(trained)
        recorder.settle(wait=False)
        return None
    recorder.settle()
    recorder.check(trained)
    if not _is_evaluated(state, trained.epoch):
        recorder.record(trained)
        return None
    asked = state.session.config.evaluation.tta
    tta = asked if _is_last(state, trained.epoch) else "none"
    score = state.evaluator.evaluate(tta)
    epochs = _epochs_since_evaluation(state, trained.epoch)
    state.session.schedule.evaluated(score.plain.accuracy, epochs)
    state.evaluated(score.plain.accuracy, trained.epoch)
    recorder.record(trained, score.plain, score.seconds)
    if after_evaluation is not None:
        after_evaluation(trained.epoch + 1, score.plain)
    return score if tta == asked else None


def _must_wait(state: TrainingState, signals: StopSignals, epoch: int) -> bool:
    """Whether the host must wait for the end of an epoch before the next one begins."""
    return (
        state.session.device.type != "cuda"
        or _is_evaluated(state, epoch)
        or state.session.config.run.max_seconds is not None
        or signals.received is not None
        or state.save_due()
    )


def _is_evaluated(state: TrainingState, epoch: int) -> bool:
    """Whether an epoch is followed by an evaluation."""
    every = state.session.config.evaluation.eval_every
    return _is_last(state, epoch) or bool(every and (epoch + 1) % every == 0)


def _epochs_since_evaluation(state: TrainingState, epoch: int) -> int:
    """Epochs from the last regular evaluation before ``epoch`` to its end."""
    every = state.session.config.evaluation.eval_every
    return epoch % every + 1 if every else epoch + 1


def _is_last(state: TrainingState, epoch: int) -> bool:
    return epoch + 1 == len(state.session.plan.epochs)
