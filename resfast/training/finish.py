"""The end of a run: final weights and evaluation, summary and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from resfast import __version__, runtime
from resfast.runs import folder as records
from resfast.runs.epoch_row import EpochRow
from resfast.runs.summary import RunSummary
from resfast.training.evaluator import Score
from resfast.training.session import Session
from resfast.training.state import TrainingState


def finish(
    session: Session, state: TrainingState, final: Score | None, history: Sequence[EpochRow]
) -> RunSummary:
    """Scores a trained network, and writes its weights, summary and plots.

    Args:
        session: the training.
        state: its final state.
        final: score of the trained network on the evaluator's images; None to evaluate it here.
        history: rows to plot.

    Returns:
        The result of the run, as ``summary.json`` has it.

    Raises:
        ResfastError: a file cannot be written.
    """
    runtime.release_memory(session.device)
    evaluator, tta = state.evaluator, session.config.evaluation.tta
    state.save_weights(records.WEIGHTS)
    if final is None:
        final = evaluator.evaluate(tta)
    if evaluator.evaluated_on == "test":
        summary = _summary(session, state, final, evaluator.batches.count, None)
        scored = final
    elif session.config.evaluation.score_test:
        test = session.batches(session.test_source)
        scored = evaluator.evaluate(tta, test)
        summary = _summary(session, state, scored, test.count, final)
    else:
        summary = _summary(session, state, None, 0, final)
        scored = final
    records.write_summary(state.path, summary)
    if not session.config.run.plots:
        return summary
    from resfast.runs import plots  # matplotlib is slow to import

    confusion, classes = scored.plain.confusion, session.data.classes
    rates = _rates_by_epoch(session, state)
    plots.save_curves(state.path / records.CURVES, history, state.path.name, rates)
    plots.save_confusion(state.path / records.CONFUSION, confusion, classes)
    return summary


def _rates_by_epoch(session: Session, state: TrainingState) -> list[tuple[float, float]]:
    """Epochs trained after each step, and the learning rate of the step."""
    ends = [
        number + (step + 1) / len(epoch.batches)
        for number, epoch in enumerate(session.plan.epochs)
        for step in range(len(epoch.batches))
    ]
    return list(zip(ends, state.rates, strict=False))


def _summary(
    session: Session,
    state: TrainingState,
    tested: Score | None,
    test_images: int,
    held_out: Score | None,
) -> RunSummary:
    """The result of a run, of which the test images, the images held out, or both were scored."""
    config, data, evaluator = session.config, session.data, state.evaluator
    scored = tested or held_out
    assert scored is not None  # finish scores at least one of them
    images_by_pixels = session.plan.images_by_pixels(state.epoch, state.first_step)
    seen = session.plan.images_before(state.epoch, state.first_step)
    train_seconds = state.training_seconds
    now = records.circumstances()
    return RunSummary(
        run=state.path.name,
        recipe=config.recipe,
        model=config.model.model,
        params=session.parameters,
        macs=session.macs,
        macs_by_pixels=dict(session.macs_by_pixels),
        train_macs=sum(
            images * session.macs_by_pixels[pixels] for pixels, images in images_by_pixels.items()
        ),
        epochs=len(state.history),
        data=data.name,
        data_digest=data.digest,
        train_images=session.train_batches.count,
        test_images=test_images,
        test_accuracy=tested and tested.plain.accuracy,
        test_loss=tested and tested.plain.loss,
        tta=config.evaluation.tta,
        tta_select=config.evaluation.tta_select,
        tta_mirror=config.evaluation.tta_mirror,
        tta_accuracy=tested and tested.augmented.accuracy,
        val_images=evaluator.batches.count if held_out else 0,
        val_accuracy=held_out and held_out.plain.accuracy,
        val_tta_accuracy=held_out and held_out.augmented.accuracy,
        best_accuracy=state.best,
        best_epoch=state.best_epoch,
        best_on=evaluator.evaluated_on,
        scored_on="test" if tested else "val",
        per_class_accuracy={
            name: None if math.isnan(value) else value
            for name, value in zip(data.classes, scored.plain.per_class, strict=True)
        },
        confusion=tuple(map(tuple, scored.plain.confusion.tolist())),
        whitening_seconds=state.whitening_seconds,
        train_seconds=train_seconds,
        final_eval_seconds=scored.seconds,
        timed_seconds=state.whitening_seconds + train_seconds + scored.seconds,
        compile_seconds=state.compile_seconds,
        eval_seconds=evaluator.seconds,
        total_seconds=state.total_seconds,
        timing_rule=records.TIMING_RULE,
        peak_memory_bytes=state.peak_memory,
        stopped=state.stopped,
        images_per_second=seen / train_seconds,
        loader=config.data.loader,
        augment=str(config.data.augment),
        device=runtime.describe(session.device),
        device_type=session.device.type,
        precision=config.runtime.precision,
        compile=config.runtime.compile,
        batch_size=config.optim.batch_size,
        mean=tuple(session.mean.tolist()),
        std=tuple(session.std.tolist()),
        torch=str(torch.__version__),
        resfast=__version__,
        threads=now.threads,
        versions=now.versions,
        date=now.date,
        seed=config.runtime.seed,
    )
