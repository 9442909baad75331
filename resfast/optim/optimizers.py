"""Parameter groups and optimizers of a run. A new optimizer is one entry of ``OPTIMIZERS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from resfast.config.schema import OptimConfig
from resfast.errors import ResfastError
from resfast.optim.muon import Muon

WHITENING_BIAS = "whitening.bias"
"""Name of the parameter that is trained for ``whitening_bias_epochs``."""


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The non-empty groups of parameters that share learning rate, momentum and weight decay.

    In this order: convolution filters; weights of dense layers, in the first group if they have
    the same values; norm parameters and biases, which are not decayed by default (He et al., "Bag
    of Tricks", arXiv:1812.01187, section 3.1); the bias of the whitening layer. Frozen parameters
    are left out. A whitening bias that is never trained is frozen here.

    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay`` and ``name`` (``filters``, ``head``,
        ``biases`` or ``whitening_bias``), and with Muon also ``muon`` and ``momentum``.
    """
    values = group_values(config)
    members: dict[str, list[nn.Parameter]] = {name: [] for name in values}
    separate_head = config.optimizer == "muon" or values["head"] != values["filters"]
    for name, parameter in model.named_parameters():
        if name == WHITENING_BIAS:
            parameter.requires_grad_(parameter.requires_grad and config.whitening_bias_epochs > 0)
        if not parameter.requires_grad:
            continue
        if name == WHITENING_BIAS:
            group = "whitening_bias"
        elif parameter.ndim < 2:
            group = "biases"
        else:
            group = "head" if separate_head and parameter.ndim < 4 else "filters"
        members[group].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members[name], "name": name} | values[name] for name in members if members[name]
    ]
    if config.optimizer == "muon":
        sgd_momentum = config.momentum if config.sgd_momentum is None else config.sgd_momentum
        for options in groups:
            options["muon"] = options["name"] == "filters"
            options["momentum"] = config.momentum if options["muon"] else sgd_momentum
    return groups


def group_values(config: OptimConfig) -> dict[str, dict[str, float]]:
    """Peak learning rate and weight decay of each group of :func:`parameter_groups`, by name."""

    def value_or(value: float | None, default: float) -> float:
        return default if value is None else value

    bias_decay = config.weight_decay if config.decay_norm_bias else 0.0
    filters = {"lr": config.lr, "weight_decay": config.weight_decay}
    head = {
        "lr": value_or(config.head_lr, config.lr),
        "weight_decay": value_or(config.head_weight_decay, config.weight_decay),
    }
    biases = {
        "lr": value_or(config.bias_lr, config.lr),
        "weight_decay": value_or(config.bias_weight_decay, bias_decay),
    }
    return {"filters": filters, "head": head, "biases": biases, "whitening_bias": dict(biases)}


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a run: one of torch's fused implementations, or :class:`Muon`.

    Freezes a whitening bias that is never trained.

    Raises:
        ResfastError: ``model`` has no trainable parameter, or no whitening bias although
            ``whitening_bias_epochs`` is set.
    """
    if config.whitening_bias_epochs and WHITENING_BIAS not in dict(model.named_parameters()):
        raise ResfastError(
            f"--whitening-bias-epochs {config.whitening_bias_epochs:g} needs a whitening first "
            "layer, which this model does not have; omit the option or choose another model"
        )
    groups = parameter_groups(model, config)
    if not groups:
        raise ResfastError("the model has no trainable parameters; unfreeze at least one")
    return OPTIMIZERS[config.optimizer](groups, config)


def _muon(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return Muon(
        groups,
        config.lr,
        newton_schulz_steps=config.newton_schulz_steps,
        normalize_filters=config.normalize_filters,
    )


def _sgd(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    momentum = config.momentum
    nesterov = config.nesterov and momentum > 0
    return torch.optim.SGD(groups, config.lr, momentum=momentum, nesterov=nesterov, fused=True)


def _adam(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, config.lr, betas=(config.momentum, 0.999), fused=True)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, config.lr, betas=(config.momentum, 0.999), fused=True)


def _adagrad(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(groups, config.lr, foreach=True)


def _adadelta(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adadelta(groups, config.lr, foreach=True)


def _rmsprop(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, config.lr, foreach=True)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "muon": _muon,
    "adagrad": _adagrad,
    "adadelta": _adadelta,
    "rmsprop": _rmsprop,
}
"""Constructors by value of ``--optimizer``, called with :func:`parameter_groups` and the config."""
