"""Learning rate schedules. A new decay curve is one entry of ``CURVES``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from resfast.config.schema import OptimConfig
from resfast.optim.optimizers import group_values

_BASE_MOMENTUM, _MAX_MOMENTUM = 0.85, 0.95


class Schedule:
    """Learning rate (and momentum, for one-cycle) over a run.

    A pure function of the step: every parameter group follows the same curve from its own peak,
    except the whitening bias, whose rate falls linearly from its peak to 0 over
    ``whitening_bias_epochs`` (airbench94_muon). The warm-up is linear, except that one-cycle
    (Smith & Topin, arXiv:1708.07120) uses ``config.anneal`` both ways. After the warm-up,
    ``plateau`` depends on the accuracies instead of the step.

    Args:
        optimizer: the optimizer whose learning rates are set.
        config: selects the schedule.
        epochs: epochs of the run.
        steps_per_epoch: batches per epoch.
        progress: if steps differ in size, the fraction of the training done before each step,
            increasing from 0 and below 1; ``steps_per_epoch`` is then ignored.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig,
        epochs: float,
        steps_per_epoch: int,
        progress: Sequence[float] | None = None,
    ) -> None:
        self.optimizer, self.config, self.epochs = optimizer, config, epochs
        self.total = len(progress) if progress is not None else round(epochs * steps_per_epoch)
        self.progress = progress
        self.position = 0
        """The next step."""
        self.updates_groups = True
        """Whether :meth:`step` writes the rates into the optimizer's groups."""
        values = group_values(config)
        self.names = [group["name"] for group in optimizer.param_groups]
        self.peaks = [values[name]["lr"] for name in self.names]
        self.warmup = min(round(config.warmup * self.total), self.total - 1)
        self.whitening_bias_steps = self._whitening_bias_steps()
        self.plateau: ReduceLROnPlateau | None = None
        self.rewrite()
        if config.schedule == "plateau":
            self.plateau = ReduceLROnPlateau(
                optimizer,
                mode="max",
                factor=config.gamma,
                patience=config.patience,
                min_lr=[peak * config.end_factor for peak in self.peaks],
            )

    def _whitening_bias_steps(self) -> int:
        end = self.config.whitening_bias_epochs / self.epochs
        return sum(self._scaled_step(step) < end * self.total - 1e-6 for step in range(self.total))

    def rates(self, step: int) -> list[float]:
        """The learning rate of each group in ``step``, counted from 0 over the whole run."""
        out = []
        steps = self.whitening_bias_steps
        for name, peak in zip(self.names, self.peaks, strict=True):
            if name == "whitening_bias":
                out.append(peak * max(0.0, 1 - step / steps) if steps else 0.0)
            else:
                out.append(self._rate(peak, self._scaled_step(step)))
        return out

    def table(self) -> Tensor:
        """:meth:`rates` of every step, float32 ``[total, groups]``."""
        return torch.tensor([self.rates(step) for step in range(self.total)])

    def _scaled_step(self, step: int) -> float:
        return step if self.progress is None else self.progress[step] * self.total

    def _rate(self, peak: float, position: float) -> float:
        config = self.config
        if config.rate_per_epoch:
            steps = self.total / self.epochs
            position = int(position / steps + 1e-6) * steps
        if config.schedule == "onecycle":
            # The same order of operations as torch's OneCycleLR, for bit-identical rates.
            first = peak / (1 / config.start_factor)
            last = first / (config.start_factor / config.end_factor)
            return self._one_cycle(position, first, peak, last)
        if position < self.warmup:
            done = position / self.warmup
            return peak * (config.start_factor + (1 - config.start_factor) * done)
        if config.schedule == "multistep":
            for milestone in config.milestones:
                if position >= milestone * self.total / self.epochs:
                    peak *= config.gamma
            for milestone in config.milestone_steps:
                if position >= milestone:
                    peak *= config.gamma
            return peak
        length = self.total * ((config.schedule_epochs or self.epochs) / self.epochs)
        done = min(1.0, (position - self.warmup) / max(length - self.warmup, 1))
        curve = CURVES.get(config.schedule)
        return peak if curve is None else curve(peak, peak * config.end_factor, done)

    def _one_cycle(self, position: float, first: float, peak: float, last: float) -> float:
        anneal = _ANNEAL[self.config.anneal]
        total = max(self.total, 2)
        peak_position = self.config.warmup * total - 1
        if peak_position > 0 and position <= peak_position:
            return anneal(first, peak, position / peak_position)
        return anneal(peak, last, (position - peak_position) / (total - 1 - peak_position))

    def reset(self) -> None:
        """Restarts from the first step."""
        self.position = 0
        if self.plateau is not None:
            self.plateau._reset()
        if self.updates_groups:
            self.rewrite()

    def rewrite(self) -> None:
        """Writes the values of the next step into the optimizer's groups."""
        step = min(self.position, self.total - 1)
        for group, rate in zip(self.optimizer.param_groups, self.rates(step), strict=True):
            group["lr"] = rate
        if self.config.schedule == "onecycle" and self.config.cycle_momentum:
            ends = _MAX_MOMENTUM, _BASE_MOMENTUM, _MAX_MOMENTUM
            momentum = self._one_cycle(self._scaled_step(step), *ends)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum

    def step(self, step: int) -> None:
        """Advances to the step after ``step``, counted from 0 over the whole run."""
        if step + 1 >= self.total:
            return
        self.position = step + 1
        if self.plateau is not None and self.position > self.warmup:
            return  # after the warm-up only ReduceLROnPlateau changes the rate
        if self.updates_groups:
            self.rewrite()

    def seek(self, step: int) -> None:
        """Makes ``step`` the next one, or the last of the run if it is after that."""
        self.position = min(step, self.total - 1)
        if self.updates_groups and self.plateau is None:
            self.rewrite()

    def evaluated(self, accuracy: float, epochs: int = 1) -> None:
        """Passes an accuracy to the plateau schedule; other schedules ignore it.

        Args:
            accuracy: accuracy of the evaluation.
            epochs: epochs since the last evaluation, all of which count towards the patience.
        """
        if self.plateau is not None:
            self.plateau.num_bad_epochs += epochs - 1  # reset to 0 by a better accuracy
            self.plateau.step(accuracy)

    @property
    def lr(self) -> float:
        """The first group's learning rate in the next step."""
        if self.plateau is not None:
            return float(self.optimizer.param_groups[0]["lr"])
        return self.rates(self.position)[0]

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume, in plain numbers and containers."""
        return {
            "position": self.position,
            "plateau": self.plateau.state_dict() if self.plateau else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state returned by :meth:`state_dict`; load the optimizer's state first."""
        if "position" in state:
            self.position = state["position"]
        elif state["per_batch"] is not None:  # a checkpoint of version 0.1
            self.position = state["per_batch"]["last_epoch"]
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
        elif self.updates_groups:
            self.rewrite()


def _linear(start: float, end: float, done: float) -> float:
    return (end - start) * done + start


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2.0 * (1 + math.cos(math.pi * done))


_ANNEAL: dict[str, Callable[[float, float, float], float]] = {"cos": _cosine, "linear": _linear}
CURVES = {"cosine": _cosine, "linear": _linear}
"""Learning rate after the warm-up by value of ``--schedule``: a function of the peak, the final
rate and the fraction of the steps done. Schedules without an entry hold the peak."""
