"""Loss and correct predictions of each step, kept on the device until the epoch is over."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast import runtime


class StepMetrics:
    """Metrics of an epoch's steps, in tensors that never move.

    Args:
        steps: steps of the longest epoch.
        images: images of the data set, whose latest losses are kept; 0 to keep none.
        device: where they are.

    Attributes:
        losses: mean loss of each step, float32 ``[steps]``.
        correct: correct predictions so far, int64 0-d.
        image_losses: latest loss of each image, float32 ``[images]``, infinite at first; None
            where they are not kept.
        tensors: all of these, and the step's number.
    """

    def __init__(self, steps: int, images: int, device: torch.device) -> None:
        self.losses = torch.zeros(steps, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.image_losses = torch.full((images,), math.inf, device=device) if images else None
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self.tensors = [self.losses, self.correct, self._step]
        if self.image_losses is not None:
            self.tensors.append(self.image_losses)

    def reset(self) -> None:
        """Forgets everything, for a new training."""
        self.begin()
        if self.image_losses is not None:
            self.image_losses.fill_(math.inf)

    def begin(self, step: int = 0) -> None:
        """Begins an epoch at ``step``; metrics of the steps before it are kept."""
        self._step.fill_(step)
        if not step:
            self.losses.zero_()
            self.correct.zero_()

    def add(
        self, loss: Tensor, correct: Tensor, image_losses: Tensor | None, indices: Tensor | None
    ) -> None:
        """Records a step; one too many takes the place of the first.

        Args:
            loss: mean loss, 0-d.
            correct: number of correct predictions, 0-d.
            image_losses: loss of each image, ``[B]``; only where losses are kept.
            indices: int64 ``[B]``, the images' places in the data set; only where losses are kept.
        """
        if self.losses.is_cuda and runtime.has_triton():
            from resfast.ops.batching import triton as batching

            kept = self.losses, self.correct, self._step, self.image_losses
            batching.record_step(*kept, loss, correct, image_losses, indices)
            return
        self.losses.index_copy_(0, self._step % len(self.losses), loss[None])
        self.correct += correct
        self._step += 1
        if self.image_losses is not None:
            self.image_losses[indices] = image_losses
