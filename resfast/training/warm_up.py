"""Compiles and loads kernels on dummy data before the training clock starts."""

from __future__ import annotations

import time

import torch.nn.functional as F

from resfast import runtime
from resfast.training.display import Display
from resfast.training.evaluator import blank_batch
from resfast.training.session import Session


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
    session.step.model.train()
    seconds = 0.0
    source = session.train_batches, session.step_metrics
    for size, pixels in session.plan.shapes():
        images, labels = blank_batch(session, size, pixels)
        if config.data.augment.mixes:
            labels = F.one_hot(labels, len(session.data.classes)).float()
        steps = session.plan.steps_of(size, pixels)
        seconds += session.step.warm_up(
            images, labels, fall_back="on" not in requested, source=source, steps=steps
        )
        runtime.release_memory(session.device)
    display.say(f"compiled in {seconds:.1f} s")
    return seconds
