"""Compiles and loads kernels on dummy data before the training clock starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from resfast import runtime
from resfast.data.batch import BatchSource
from resfast.errors import ResfastError
from resfast.layers.norm import train_mode
from resfast.training.display import Display
from resfast.training.evaluator import blank_batch
from resfast.training.session import Session
from resfast.training.step import TrainStep
from resfast.training.step_graphs import generators_restored
from resfast.training.step_kinds import StepKind
from resfast.training.step_metrics import StepMetrics

logger = logging.getLogger("resfast")


def warm_up_training(session: Session, display: Display) -> float:
    """On CUDA, produces one batch of each shape to compile kernels; then compiles the step.

    Returns:
        Seconds spent; 0 if an earlier training of the session did it.
    """
    if session.compiled:
        return 0.0
    seconds = _warm_up_batches(session) if session.device.type == "cuda" else 0.0
    return seconds + _compile(session, display)


def _warm_up_batches(session: Session) -> float:
    batches = session.train_batches
    if not batches.capturable:  # reading ahead compiles nothing
        return 0.0
    start = time.perf_counter()
    for images, pixels in session.plan.shapes():
        batches.begin(0)
        batches.next(images, pixels)
    runtime.synchronize(session.device)
    return time.perf_counter() - start


def _compile(session: Session, display: Display) -> float:
    config = session.config
    requested = {config.runtime.compile, config.runtime.cuda_graph}
    if requested == {"off"}:
        return 0.0
    display.say("compiling the training step (up to a minute the first time) …")
    train_mode(session.step.model)
    seconds = 0.0
    source = session.train_batches, session.step_metrics
    for size, pixels in session.plan.shapes():
        images, labels = blank_batch(session, size, pixels)
        if config.data.augment.mixes:
            labels = F.one_hot(labels, len(session.data.classes)).float()
        steps = session.plan.steps_of(size, pixels)
        seconds += warm_up_step(
            session.step,
            images,
            labels,
            fall_back="on" not in requested,
            source=source,
            steps=steps,
        )
        runtime.release_memory(session.device)
    display.say(f"compiled in {seconds:.1f} s")
    return seconds


def warm_up_step(
    step: TrainStep,
    images: Tensor,
    labels: Tensor,
    *,
    fall_back: bool,
    source: tuple[BatchSource, StepMetrics] | None = None,
    steps: Iterable[int] | None = None,
) -> float:
    """Compiles and captures, as the step was asked to, every kind of step on a dummy batch.

    Weights, statistics, generators, the optimizer and the source are left as they were. Call it
    once for each shape of batch.

    Args:
        step: the training step.
        images: ``[B, C, H, W]``, of the shape, dtype and layout to train on.
        labels: int64 ``[B]`` or float32 ``[B, classes]``.
        fall_back: whether to log a warning and continue without compilation or capture if it fails.
        source: source and metrics for :meth:`TrainStep.train_next`; None if the step will be called
            with batches.
        steps: steps of the run whose batches have this shape; by default all.

    Returns:
        Seconds it took.

    Raises:
        ResfastError: compilation or capture failed and ``fall_back`` is False.
    """
    start = time.perf_counter()
    kinds = step.kinds.of_steps(steps)
    for trained in sorted({kind.trains_whitening_bias for kind in kinds}, reverse=True):
        step.kinds.train_whitening_bias(trained)
        _compile_step(step, images, labels, fall_back)
    if step.graphs is not None:
        try:
            for kind in kinds:
                _capture_step(step, kind, images, labels, source)
        except (RuntimeError, OSError) as error:
            if not fall_back:
                raise ResfastError(
                    f"--cuda-graph on is not possible: {_first_line(error)}; use --cuda-graph auto "
                    "to continue without where it fails"
                ) from error
            logger.warning(
                "training continues without a CUDA graph, which failed: %s", _first_line(error)
            )
            step.graphs.close()
            step.graphs = None
    step.kinds.train_whitening_bias(step.kinds.of(step.steps or 0).trains_whitening_bias)
    runtime.synchronize(step.device)
    return time.perf_counter() - start


def _compile_step(step: TrainStep, images: Tensor, labels: Tensor, fall_back: bool) -> None:
    before = [buffer.clone() for buffer in step.model.buffers()]
    with generators_restored(step.device):
        try:
            step.backward(images, labels)
        except (RuntimeError, OSError) as error:  # of a full disk, for example
            if not fall_back:
                raise ResfastError(
                    f"torch.compile failed: {_first_line(error)}; use --compile auto to continue "
                    "without where it fails"
                ) from error
            logger.warning(
                "training continues without torch.compile, which failed: %s", _first_line(error)
            )
            step.run_uncompiled()
    step.optimizer.zero_grad(set_to_none=True)
    for buffer, value in zip(step.model.buffers(), before, strict=True):
        buffer.copy_(value)


def _capture_step(
    step: TrainStep,
    kind: StepKind,
    images: Tensor,
    labels: Tensor,
    source: tuple[BatchSource, StepMetrics] | None,
) -> None:
    step.kinds.train_whitening_bias(kind.trains_whitening_bias)
    if source is None or not source[0].capturable:
        step.graphs.for_batch(kind, images, labels)
    else:
        step.graphs.for_source(kind, *source, len(images), images.shape[3])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
