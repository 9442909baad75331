"""Learning rate schedules. A new curve from the peak to the end is one entry of ``CURVES``."""

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
    """Learning rate (and for one-cycle momentum) over a run.

    A pure function of the step: all groups of the optimizer follow the same curve from their own
    peak, but for the whitening bias, whose rate falls linearly from its peak to 0 over
    ``whitening_bias_epochs`` (airbench94_muon). One-cycle: Smith & Topin, arXiv:1708.07120.
    Warm-up: linear, for every schedule. Plateau goes on by accuracies once the warm-up is over.

    Args:
        optimizer: the optimizer to steer.
        config: which schedule.
        epochs: epochs of the run.
        steps_per_epoch: batches in each.
        progress: where steps are not all alike, for each step the part of the training that lies
            before it, rising from 0 and below 1; then ``steps_per_epoch`` is not used.
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
        """The step to come."""
        self.steers_groups = True
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
        return sum(self._place(step) < end * self.total - 1e-6 for step in range(self.total))

    def rates(self, step: int) -> list[float]:
        """The learning rate of each group in a step (from 0, over the whole run)."""
        out = []
        steps = self.whitening_bias_steps
        for name, peak in zip(self.names, self.peaks, strict=True):
            if name == "whitening_bias":
                out.append(peak * max(0.0, 1 - step / steps) if steps else 0.0)
            else:
                out.append(self._rate(peak, self._place(step)))
        return out

    def table(self) -> Tensor:
        """:meth:`rates` of every step, float32 ``[total, groups]``."""
        return torch.tensor([self.rates(step) for step in range(self.total)])

    def _place(self, step: int) -> float:
        return step if self.progress is None else self.progress[step] * self.total

    def _rate(self, peak: float, place: float) -> float:
        config = self.config
        if config.schedule == "onecycle":
            # In torch's own order of operations, so that the bits are those of OneCycleLR.
            first = peak / (1 / config.start_factor)
            last = first / (config.start_factor / config.end_factor)
            return self._one_cycle(place, first, peak, last)
        if place < self.warmup:
            done = place / self.warmup
            return peak * (config.start_factor + (1 - config.start_factor) * done)
        if config.schedule == "multistep":
            for milestone in config.milestones:
                if place >= milestone * self.total / self.epochs:
                    peak *= config.gamma
            return peak
        done = (place - self.warmup) / max(self.total - self.warmup, 1)
        curve = CURVES.get(config.schedule)
        return peak if curve is None else curve(peak, peak * config.end_factor, done)

    def _one_cycle(self, place: float, first: float, peak: float, last: float) -> float:
        anneal = _ANNEAL[self.config.anneal]
        total = max(self.total, 2)
        turn = self.config.warmup * total - 1
        if turn > 0 and place <= turn:
            return anneal(first, peak, place / turn)
        return anneal(peak, last, (place - turn) / (total - 1 - turn))

    def reset(self) -> None:
        """Begins anew."""
        self.position = 0
        if self.plateau is not None:
            self.plateau._reset()
        if self.steers_groups:
            self.rewrite()

    def rewrite(self) -> None:
        """Writes the values of the step to come into the optimizer's groups."""
        step = min(self.position, self.total - 1)
        for group, rate in zip(self.optimizer.param_groups, self.rates(step), strict=True):
            group["lr"] = rate
        if self.config.schedule == "onecycle" and self.config.cycle_momentum:
            ends = _MAX_MOMENTUM, _BASE_MOMENTUM, _MAX_MOMENTUM
            momentum = self._one_cycle(self._place(step), *ends)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum

    def step(self, step: int) -> None:
        """Moves on after batch ``step`` (from 0, over the whole run)."""
        if step + 1 >= self.total:
            return
        self.position = step + 1
        if self.plateau is not None and self.position > self.warmup:
            return  # the warm-up is over: only the plateau moves the rate from here
        if self.steers_groups:
            self.rewrite()

    def evaluated(self, accuracy: float, epochs: int = 1) -> None:
        """Tells the plateau schedule an accuracy.

        Args:
            accuracy: of the evaluation.
            epochs: epochs since the last evaluation. The patience counts all of them.
        """
        if self.plateau is not None:
            self.plateau.num_bad_epochs += epochs - 1  # a better accuracy sets it to 0
            self.plateau.step(accuracy)

    @property
    def lr(self) -> float:
        """The learning rate of the next step, of the first group."""
        if self.plateau is not None:
            return float(self.optimizer.param_groups[0]["lr"])
        return self.rates(self.position)[0]

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on (plain numbers and containers)."""
        return {
            "position": self.position,
            "plateau": self.plateau.state_dict() if self.plateau else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state of :meth:`state_dict`, the optimizer's being loaded already."""
        if "position" in state:
            self.position = state["position"]
        elif state["per_batch"] is not None:  # of version 0.1
            self.position = state["per_batch"]["last_epoch"]
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
        elif self.steers_groups:
            self.rewrite()


def _linear(start: float, end: float, done: float) -> float:
    return (end - start) * done + start


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2.0 * (1 + math.cos(math.pi * done))


_ANNEAL: dict[str, Callable[[float, float, float], float]] = {"cos": _cosine, "linear": _linear}
CURVES = {"cosine": _cosine, "linear": _linear}
"""Value of ``--schedule`` to the learning rate after the warm-up: a function of the peak, the last
rate and the part of the steps that is done. Those without an entry hold the peak."""
