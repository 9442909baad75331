"""The end of a run: final weights and evaluation, summary and plots."""

from __future__ import annotations

from typing import Any

import torch

from resfast import __version__, runtime
from resfast.runs import folder as records
from resfast.training.evaluator import Score
from resfast.training.session import Session
from resfast.training.state import TrainingState


def finish(
    session: Session,
    state: TrainingState,
    final: Score | None,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """Scores a trained network, and writes its weights, summary and plots.

    Args:
        session: the training.
        state: how far it came.
        final: of the network as it is on the evaluator's images; None where it is to be made.
        history: rows to plot.

    Returns:
        What ``summary.json`` says.
    """
    runtime.release_memory(session.device)
    config, evaluator = session.config, state.evaluator
    state.save_weights(records.WEIGHTS)
    tta = config.evaluation.tta
    if final is None:
        final = evaluator.evaluate(tta)
    held_out = final if evaluator.evaluated_on == "val" else None
    test, tested = (None, None) if held_out else (evaluator.batches, final)
    if held_out and config.evaluation.score_test:
        test = session.batches(session.test_source)
        tested = evaluator.evaluate(tta, test)
    main = tested or final
    summary = (
        _identity(session, state)
        | {
            "test_images": test.count if test else 0,
            "test_accuracy": tested and tested.plain.accuracy,
            "test_loss": tested and tested.plain.loss,
            "tta": tta,
            "tta_select": config.evaluation.tta_select,
            "tta_mirror": config.evaluation.tta_mirror,
            "tta_accuracy": tested and tested.augmented.accuracy,
            "val_images": evaluator.batches.count if held_out else 0,
            "val_accuracy": held_out and held_out.plain.accuracy,
            "val_tta_accuracy": held_out and held_out.augmented.accuracy,
            "best_accuracy": state.best,
            "best_epoch": state.best_epoch,
            "best_on": evaluator.evaluated_on,
            "scored_on": "test" if tested else "val",
            "per_class_accuracy": dict(
                zip(session.data.classes, main.plain.per_class, strict=True)
            ),
            "confusion": main.plain.confusion.tolist(),
        }
        | _seconds(session, state, main)
        | _circumstances(session)
    )
    records.write_summary(state.path, summary)
    from resfast.runs import plots  # matplotlib is slow to import

    plots.save_curves(state.path / records.CURVES, history, state.path.name)
    plots.save_confusion(state.path / records.CONFUSION, main.plain.confusion, session.data.classes)
    return summary


def _identity(session: Session, state: TrainingState) -> dict[str, Any]:
    """What was trained, on what, how far."""
    config, data = session.config, session.data
    images_by_pixels = session.plan.images_by_pixels(state.epoch, state.first_step)
    return {
        "run": state.path.name,
        "recipe": config.recipe,
        "model": config.model.model,
        "params": session.parameters,
        "macs": session.macs,
        "macs_by_pixels": {str(size): macs for size, macs in session.macs_by_pixels.items()},
        "train_macs": sum(
            images * session.macs_by_pixels[pixels] for pixels, images in images_by_pixels.items()
        ),
        "epochs": len(state.history),
        "data": data.name,
        "data_digest": data.digest,
        "train_images": session.loader.count,
    }


def _seconds(session: Session, state: TrainingState, main: Score) -> dict[str, Any]:
    """Where the time went; see :data:`resfast.runs.folder.TIMING_RULE`."""
    train_seconds = state.training_seconds
    seen = session.plan.images_before(state.epoch, state.first_step)
    return {
        "whitening_seconds": state.whitening_seconds,
        "train_seconds": train_seconds,
        "final_eval_seconds": main.seconds,
        "timed_seconds": state.whitening_seconds + train_seconds + main.seconds,
        "compile_seconds": state.compile_seconds,
        "eval_seconds": state.evaluator.seconds,
        "total_seconds": state.total_seconds,
        "timing_rule": records.TIMING_RULE,
        "peak_memory_bytes": state.peak_memory,
        "stopped": state.stopped,
        "images_per_second": seen / train_seconds,
    }


def _circumstances(session: Session) -> dict[str, Any]:
    """How and where it ran."""
    config = session.config
    return {
        "loader": config.data.loader,
        "augment": str(config.data.augment),
        "device": runtime.describe(session.device),
        "device_type": session.device.type,
        "precision": config.runtime.precision,
        "compile": config.runtime.compile,
        "batch_size": config.optim.batch_size,
        "mean": session.mean.tolist(),
        "std": session.std.tolist(),
        "torch": torch.__version__,
        "resfast": __version__,
        **records.circumstances(),
        "seed": config.runtime.seed,
    }
