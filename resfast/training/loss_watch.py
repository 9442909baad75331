"""Follows the loss while an epoch goes on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_POLL_STEPS = 8


class LossWatch:
    """Follows the loss of the latest steps without making the host wait for the device.

    On the CPU every value is known at once. On CUDA the values are copied to pinned memory in the
    background; a copy that has not arrived yet is polled again at a later step.

    Args:
        losses: mean loss of each step, float32 ``[steps]``, filled as the epoch goes on.
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
        """Latest loss, correct predictions so far, and the number of steps that they cover."""
        if not self.asynchronous:
            return float(self.losses[step]), int(self.correct), step + 1
        if self.pending is not None and self.event.query():
            self.last, self.correct_so_far = float(self.host[0]), int(self.host[1])
            self.known_steps, self.pending = self.pending, None
        if self.pending is None and step % _POLL_STEPS == 0:
            # A NaN or infinity anywhere so far makes the sum so.
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
