"""When training stops: after the last epoch, at a target, without progress, or at a time limit."""

from __future__ import annotations

from resfast.training.display import Display
from resfast.training.state import TrainingState


def is_finished(state: TrainingState, display: Display) -> bool:
    """Whether training is over; an early stop is displayed and recorded in ``stopped``."""
    evaluation = state.session.config.evaluation
    if evaluation.target is not None and state.best >= evaluation.target:
        display.say(
            f"target {evaluation.target:.2%} reached: {state.best:.2%} of the "
            f"{state.evaluator.evaluated_on} images after {state.best_epoch} epochs"
        )
        state.stopped = "target"
        return True
    if evaluation.early_stop and state.evaluations_since_best >= evaluation.early_stop:
        display.say(f"no better accuracy for {state.evaluations_since_best} evaluations: stopping")
        state.stopped = "early_stop"
        return True
    if state.epoch >= len(state.session.plan.epochs):
        return True
    return out_of_time(state, display, state.epoch_seconds if state.first_step else 0.0)


def out_of_time(state: TrainingState, display: Display, epoch_seconds: float) -> bool:
    """Whether ``--max-seconds`` is reached, ``epoch_seconds`` into the epoch; displays it."""
    limit = state.session.config.run.max_seconds
    seconds = state.whitening_seconds + state.train_seconds + epoch_seconds
    if limit is None or seconds < limit:
        return False
    display.say(
        f"limit of {limit:g} seconds of training reached: stopping; continue with --resume "
        f"{state.path} and a higher --max-seconds"
    )
    state.stopped = "max_seconds"
    return True
