"""Learning rates on the device, where a captured CUDA graph can read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resfast.optim.schedules import Schedule


class RateTable:
    """Learning rates and averaging weight of every step, on the device.

    Args:
        schedule: computes the learning rates.
        optimizer: reads its learning rates from the device from now on.
        average_weights: weight of each step in the averaged network.
        device: where the table is kept.

    Attributes:
        average_weight: averaging weight of the current step, float32 0-d.
        tensors: everything that changes from step to step.
    """

    def __init__(
        self,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer,
        average_weights: Sequence[float],
        device: torch.device,
    ) -> None:
        self.schedule, self.optimizer = schedule, optimizer
        weights = torch.tensor(average_weights)[:, None]
        self.rows = torch.cat([schedule.table(), weights], 1).to(device)
        self.row = torch.zeros_like(self.rows[0])
        self.next = torch.zeros(1, dtype=torch.int64, device=device)
        self.tensors = [self.row, self.next]
        self.average_weight = self.row[-1]
        self._next_on_host = 0
        self.attach()

    def attach(self) -> None:
        """Makes the optimizer read its learning rates from the device."""
        self.schedule.updates_groups = False
        for group, rate in zip(self.optimizer.param_groups, self.row, strict=False):
            group["lr"] = rate

    def detach(self) -> None:
        """Lets the schedule write learning rates as numbers again."""
        self.schedule.updates_groups = True
        self.schedule.rewrite()

    def seek(self, step: int) -> None:
        """Sets the next row, without a copy to the device if it already is the next one."""
        step = min(step, len(self.rows) - 1)
        if step != self._next_on_host:
            self.next.fill_(step)
        self._next_on_host = step + 1

    def advance(self) -> None:
        """Reads the next row; part of a captured step."""
        torch.index_select(self.rows, 0, self.next, out=self.row[None])
        self.next += 1
