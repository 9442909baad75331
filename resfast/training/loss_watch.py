"""Follows the loss during an epoch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_POLL_STEPS = 8


class LossWatch:
    """Follows the latest loss without making the host wait for the device.

    On the CPU every value is known at once. On CUDA the values are copied to pinned memory in the
    background; a copy still in flight is polled again at a later step.

    Args:
        losses: mean loss of each step, float32 ``[steps]``, filled during the epoch.
        correct: correct predictions so far, int64 0-d.
    """

    def __init__(self, losses: Tensor, correct: Tensor) -> None:
        self.losses, self.correct = losses, correct
        self.asynchronous = losses.is_cuda
        self.last, self.correct_so_far, self.known_steps = math.nan, 0, 0
        if self.asynchronous:
            self.host = torch.empty(2, dtype=torch.float64).pin_memory()
            self.event = torch.cuda.Event()
            self.pending: int | None = None

    def poll(self, step: int) -> tuple[float, int, int]:
        """Latest known loss and correct predictions, and the number of steps that they cover."""
        if not self.asynchronous:
            return float(self.losses[step]), int(self.correct), step + 1
        if self.pending is not None and self.event.query():
            self.last, self.correct_so_far = float(self.host[0]), int(self.host[1])
            self.known_steps, self.pending = self.pending, None
        if self.pending is None and step % _POLL_STEPS == 0:
            # Makes the loss NaN if any loss so far is NaN or infinite.
            loss = self.losses[step] + 0 * self.losses[: step + 1].sum()
            values = torch.stack([loss.double(), self.correct.double()])
            self.host.copy_(values, non_blocking=True)
            self.event.record()
            self.pending = step + 1
        return self.last, self.correct_so_far, self.known_steps


def first_non_finite(losses: Tensor) -> int:
    """Index of the first loss that is infinite or NaN, or of the last loss."""
    bad = (~torch.isfinite(losses)).nonzero()
    return int(bad[0]) if len(bad) else len(losses) - 1
