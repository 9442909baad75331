"""Scores the network of a run during and after training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resfast import runtime
from resfast.data import batches as feed
from resfast.inference.fuse import fuse
from resfast.inference.scoring import TTA, Evaluation, evaluate_both
from resfast.layers.conv import set_winograd_tile
from resfast.runs.stored import EvaluatedOn
from resfast.training.session import Session, blank_source

_WARM_UP_BATCHES = 20
"""Enough for whole batches of the least confident images in test-time augmentation."""


@dataclass(frozen=True)
class Score:
    """Result of an evaluation.

    Attributes:
        plain: without test-time augmentation.
        augmented: with it.
        seconds: duration of both.
    """

    plain: Evaluation
    augmented: Evaluation
    seconds: float


class Evaluator:
    """Evaluates the network of a training: the averaged weights if there are any.

    Args:
        session: the training.

    Attributes:
        batches: the held-out images, or the test images if none are held out.
        evaluated_on: ``val`` if ``batches`` are held-out images, otherwise ``test``.
        seconds: duration of all evaluations so far.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        held_out = session.val_source is not None
        self.batches = session.batches(session.val_source if held_out else session.test_source)
        self.evaluated_on: EvaluatedOn = "val" if held_out else "test"
        self.seconds = 0.0

    def evaluate(self, tta: TTA, batches: Iterable[tuple[Tensor, Tensor]] | None = None) -> Score:
        """Scores the network.

        Args:
            tta: test-time augmentation of :attr:`Score.augmented`.
            batches: images and labels (None: :attr:`batches`).
        """
        session, evaluation = self.session, self.session.config.evaluation
        start = time.perf_counter()
        runtime.release_memory(session.device)
        model, dtype = session.step.evaluated_model, session.dtype
        if evaluation.fuse:
            model, dtype = self._fused(model), torch.float32  # fused networks need no autocast
        plain, augmented = evaluate_both(
            model,
            self.batches if batches is None else batches,
            dtype=dtype,
            tta=tta,
            tta_select=evaluation.tta_select,
            tta_mirror=evaluation.tta_mirror,
        )
        session.batch_shape = None  # makes the next training batch release cached memory
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return Score(plain, augmented, seconds)

    def _fused(self, model: nn.Module) -> nn.Module:
        was_training = model.training
        example, _ = blank_batch(self.session, 1, self.session.data.image_size)
        try:
            fused = fuse(model.eval(), self.session.dtype, example=example)
            set_winograd_tile(fused, self.session.config.runtime.winograd_tile)
            return fused
        finally:
            model.train(was_training)

    def warm_up(self) -> float:
        """Evaluates dummy images if the first evaluation would otherwise measure or load kernels.

        Returns:
            Seconds spent; they do not count as evaluation.
        """
        session, evaluation = self.session, self.session.config.evaluation
        on_cuda = session.device.type == "cuda"
        if session.compiled or not (evaluation.fuse or on_cuda):
            return 0.0
        seconds_before, seconds = self.seconds, 0.0
        for batches, tta in self._blank_on_cuda() if on_cuda else self._blank_on_cpu():
            seconds += self.evaluate(tta, batches).seconds
        self.seconds = seconds_before
        return seconds

    def _blank_on_cuda(self) -> list[tuple[Iterable[tuple[Tensor, Tensor]], TTA]]:
        """Batches like those to be evaluated: kernels are loaded on first use."""
        evaluation = self.session.config.evaluation
        whole, rest = divmod(self.batches.count, evaluation.eval_batch_size)
        count = min(whole, _WARM_UP_BATCHES) * evaluation.eval_batch_size + rest
        blank = blank_source(count, self.session.data.image_size)
        return [(self.session.batches(blank), evaluation.tta)]

    def _blank_on_cpu(self) -> list[tuple[Iterable[tuple[Tensor, Tensor]], TTA]]:
        """One batch of each size to be evaluated: kernels are chosen by size."""
        session, evaluation = self.session, self.session.config.evaluation
        size = evaluation.eval_batch_size
        counts = [self.batches.count]
        if evaluation.score_test:
            counts.append(feed.count(session.test_source))
        fractions = evaluation.tta_select, evaluation.tta_mirror
        counts += [math.ceil(count * part) for count in counts for part in fractions]
        sizes = {min(size, count) for count in counts}
        sizes |= {count % size for count in counts} - {0}
        pixels = session.data.image_size
        return [([blank_batch(session, n, pixels)], "flip") for n in sorted(sizes, reverse=True)]


def blank_batch(session: Session, images: int, pixels: int) -> tuple[Tensor, Tensor]:
    """A dummy batch: images ``[B, C, pixels, pixels]`` in the compute dtype, and int64 labels."""
    shape = (images, 3, pixels, pixels)
    blank = torch.zeros(shape, device=session.device, dtype=session.dtype)
    labels = torch.zeros(images, dtype=torch.int64, device=session.device)
    return blank.contiguous(memory_format=torch.channels_last), labels
