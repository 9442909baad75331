"""Averages of the weights over training: exponential moving average and Lookahead.

An average moves towards the trained network by a weight w per step:
``average <- average + w (trained - average)``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from resfast.config.schema import OptimConfig


def ema_weight(decay: float, updates: int) -> float:
    """Weight of the next update of an exponential moving average, after ``updates`` earlier ones.

    1 - min(decay, (1 + updates) / (10 + updates)), and 1 for the first update. The memory is short
    early on so that the average forgets the random initialisation (TensorFlow's
    ``ExponentialMovingAverage`` with ``num_updates``).
    """
    return 1 - min(decay, (1 + updates) / (10 + updates)) if updates else 1.0


def lookahead_weight(config: OptimConfig, done: int, total: int) -> float:
    """How far Lookahead's slow weights move after ``done`` of ``total`` steps, 0 to 1.

    1 - decay^k (done / total)^power, with k = ``lookahead`` steps between two updates: the slow
    weights copy the trained ones at first and average strongly at the end (Jordan,
    arXiv:2404.00498, section 3.4, with power 3 and decay 0.95). Power 0 gives the constant
    weight 1 - decay^k of Zhang et al., arXiv:1907.08610.
    """
    decay = config.lookahead_decay**config.lookahead
    return 1 - decay * (done / total) ** config.lookahead_power


def moves_lookahead(config: OptimConfig, done: int, total: int) -> bool:
    """Whether the slow weights are updated after ``done`` of ``total`` steps: every ``lookahead``
    steps, and after the last."""
    return bool(config.lookahead) and (done % config.lookahead == 0 or done == total)


class Average:
    """A copy of a network whose parameters and buffers are averages of the trained ones.

    Integer buffers, such as batch norm's ``num_batches_tracked``, are copied.

    Args:
        model: the network being trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.module = copy.deepcopy(model)
        """The averaged network."""

    def restart(self) -> None:
        """Makes the average equal to the trained network."""
        for average, trained in zip(_tensors(self.module), _tensors(self.model), strict=True):
            average.copy_(trained)

    @torch.no_grad()
    def move(self, weight: float | Tensor, *, write_back: bool = False) -> None:
        """Updates the average without synchronizing with the device.

        Args:
            weight: 0 to 1, a number or a float32 0-d tensor on the device.
            write_back: whether to copy the average back to the trained network, as Lookahead does.
        """
        averages, trained = [], []
        for average, value in zip(_tensors(self.module), _tensors(self.model), strict=True):
            if value.is_floating_point():
                averages.append(average)
                trained.append(value)
            else:
                average.copy_(value)
        if isinstance(weight, Tensor):
            steps = torch._foreach_sub(trained, averages)
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(averages, steps)
        elif weight == 1:
            torch._foreach_copy_(averages, trained)
        else:
            torch._foreach_lerp_(averages, trained, weight)
        if write_back:
            torch._foreach_copy_(trained, averages)

    def state_dict(self, updates: int) -> dict[str, Any]:
        """The averaged network, in the format of ``torch.optim.swa_utils.AveragedModel``."""
        state = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        return {"n_averaged": torch.tensor(updates), **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state returned by :meth:`state_dict`."""
        prefix = "module."
        self.module.load_state_dict(
            {name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)}
        )


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(parameter.detach() for parameter in model.parameters()), *model.buffers()]
