"""How one training step differs from the next, apart from its batch and its learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from resfast.config.schema import OptimConfig
from resfast.optim.averaging import ema_weight, lookahead_weight, moves_lookahead
from resfast.optim.optimizers import WHITENING_BIAS
from resfast.optim.schedules import Schedule


@dataclass(frozen=True)
class StepKind:
    """Which operations a step has: each kind is compiled and captured by itself.

    Attributes:
        trains_whitening_bias: whether the whitening bias gets a gradient.
        moves_average: whether the averaged network is updated.
    """

    trains_whitening_bias: bool
    moves_average: bool


class StepKinds:
    """The kind of every step of a run, and the weight of its average.

    Args:
        config: averaging, and the epochs in which a whitening bias is trained.
        schedule: number of steps; None only without Lookahead and a trained whitening bias.
        model: the network being trained.
    """

    def __init__(self, config: OptimConfig, schedule: Schedule | None, model: nn.Module) -> None:
        self.config, self.schedule = config, schedule
        bias = dict(model.named_parameters()).get(WHITENING_BIAS)
        self._whitening_bias = bias if bias is not None and bias.requires_grad else None

    def of(self, step: int) -> StepKind:
        """The kind of a step, counted from 0."""
        bias = self._whitening_bias is not None and step < self.schedule.whitening_bias_steps
        moves = bool(self.config.ema)
        if self.config.lookahead:
            moves = moves_lookahead(self.config, step + 1, self.schedule.total)
        return StepKind(trains_whitening_bias=bias, moves_average=moves)

    def of_steps(self, steps: Iterable[int] | None = None) -> list[StepKind]:
        """Each kind once, in the order in which ``steps`` need them; None means all steps."""
        if self.schedule is None:
            return [self.of(0)]
        steps = range(self.schedule.total) if steps is None else steps
        return list(dict.fromkeys(self.of(step) for step in steps))

    def average_weight(self, step: int) -> float:
        """How far the average moves after a step, 0 to 1; without an average 0."""
        if self.config.ema:
            return ema_weight(self.config.ema, step)
        if self.config.lookahead:
            return lookahead_weight(self.config, step + 1, self.schedule.total)
        return 0.0

    def average_weights(self) -> list[float]:
        """:meth:`average_weight` of every step."""
        return [self.average_weight(step) for step in range(self.schedule.total)]

    def train_whitening_bias(self, trained: bool) -> None:
        """Lets the whitening bias get a gradient, or freezes it."""
        if self._whitening_bias is not None and self._whitening_bias.requires_grad != trained:
            self._whitening_bias.requires_grad_(trained)
