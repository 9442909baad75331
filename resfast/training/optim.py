"""Optimizers and learning rate schedules of a run, built from torch's own."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from resfast.training.config import OptimConfig


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_norm_bias: bool
) -> list[dict[str, Any]]:
    """Two groups: what is decayed, and norm parameters and biases, which are not by default.

    Source: He et al., "Bag of Tricks", arXiv:1812.01187, section 3.1.
    """
    weights, others = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (weights if parameter.ndim > 1 else others).append(parameter)
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": weight_decay if decay_norm_bias else 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a run, in torch's fused implementation (one kernel for all parameters)."""
    groups = parameter_groups(model, config.weight_decay, config.decay_norm_bias)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, config.lr, betas=(config.momentum, 0.999), fused=True)


class Schedule:
    """Learning rate (and for one-cycle momentum) over a run.

    One-cycle: Smith & Topin, arXiv:1708.07120. Warm-up: linear, for every schedule.

    Args:
        optimizer: the optimizer to steer.
        config: which schedule.
        epochs: epochs of the run.
        steps_per_epoch: batches in each.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig,
        epochs: int,
        steps_per_epoch: int,
    ) -> None:
        self.optimizer = optimizer
        self.total = epochs * steps_per_epoch
        warmup = min(round(config.warmup * self.total), self.total - 1)
        self.plateau: lr_scheduler.ReduceLROnPlateau | None = None
        self.per_batch: lr_scheduler.LRScheduler | None
        if config.schedule == "onecycle":
            self.per_batch = lr_scheduler.OneCycleLR(
                optimizer,
                config.lr,
                total_steps=max(self.total, 2),
                pct_start=config.warmup,
                anneal_strategy=config.anneal,
                cycle_momentum=config.cycle_momentum,
                div_factor=1 / config.start_factor,
                final_div_factor=config.start_factor / config.end_factor,
            )
            return
        later: lr_scheduler.LRScheduler | None = None
        if config.schedule == "cosine":
            later = lr_scheduler.CosineAnnealingLR(
                optimizer, max(self.total - warmup, 1), eta_min=config.lr * config.end_factor
            )
        elif config.schedule == "multistep":
            steps = [m * steps_per_epoch - warmup for m in config.milestones]
            later = lr_scheduler.MultiStepLR(optimizer, [max(s, 0) for s in steps], config.gamma)
        elif config.schedule == "plateau":
            self.plateau = lr_scheduler.ReduceLROnPlateau(
                optimizer,
                mode="max",
                factor=config.gamma,
                patience=config.patience,
                min_lr=config.lr * config.end_factor,
            )
        if warmup:
            rise = lr_scheduler.LinearLR(optimizer, config.start_factor, total_iters=warmup)
            later = later or lr_scheduler.ConstantLR(optimizer, factor=1.0)
            self.per_batch = lr_scheduler.SequentialLR(optimizer, [rise, later], [warmup])
        else:
            self.per_batch = later
        self.warmup = warmup

    def step(self, step: int) -> None:
        """Moves on after batch ``step`` (from 0, over the whole run)."""
        if self.per_batch is None or step + 1 >= self.total:
            return
        if self.plateau is not None and step + 1 > self.warmup:
            return  # the warm-up is over: only the plateau moves the rate from here
        with warnings.catch_warnings():
            # SequentialLR passes an epoch to its members, which torch itself deprecates; a scaler
            # that skips the first step makes torch think that the order of calls is wrong.
            warnings.filterwarnings("ignore", message=".*epoch parameter in `scheduler.step.*")
            warnings.filterwarnings("ignore", message=".*`lr_scheduler.step\\(\\)` before.*")
            self.per_batch.step()

    def evaluated(self, accuracy: float) -> None:
        """Tells the plateau schedule an accuracy."""
        if self.plateau is not None:
            self.plateau.step(accuracy)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on (plain numbers and containers)."""
        return {
            "per_batch": self.per_batch.state_dict() if self.per_batch else None,
            "plateau": self.plateau.state_dict() if self.plateau else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state of :meth:`state_dict`."""
        if self.per_batch is not None:
            self.per_batch.load_state_dict(state["per_batch"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
