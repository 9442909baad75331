"""Switches optimizers of PyTorch to their fused implementation: :func:`fuse_step`."""

from __future__ import annotations

import torch

from resfast.errors import ResfastError

KINDS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers with a fused step on the CPU and CUDA."""


def fuse_step(optimizer: torch.optim.Optimizer) -> str:
    """Makes an optimizer update all parameters of a group in one call.

    The object, its groups and its state remain; each group's ``fused`` becomes True.

    Returns:
        What changed, or why nothing did.
    """
    name = type(optimizer).__name__
    reason = why_not_fused(optimizer)
    if reason is not None:
        return f"{name}: left alone, {reason}"
    for group in optimizer.param_groups:
        group["fused"] = True
    return f"{name}: its step is fused"


def why_not_fused(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer's step is not switched to the fused one, or None if it can be."""
    if type(optimizer) not in KINDS:
        return f"only {', '.join(kind.__name__ for kind in KINDS)} have a fused step"
    if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return "its step is replaced"
    for group in optimizer.param_groups:
        if group.get("fused"):
            return "its step is fused already"
        for option in ("fused", "foreach"):
            if group.get(option) is not None:
                return f"{option}={group[option]} was chosen"
        for option in ("differentiable", "capturable"):
            if group.get(option):
                return f"{option}=True excludes it"
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                return f"a parameter is {parameter.dtype}"
            if parameter.device.type not in ("cpu", "cuda"):
                return f"a parameter is on {parameter.device}"
    return None


def restore_step(optimizer: torch.optim.Optimizer) -> None:
    """Undoes :func:`fuse_step`.

    Raises:
        ResfastError: it is not an optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ResfastError(
            f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
        )
    if type(optimizer) in KINDS:
        for group in optimizer.param_groups:
            group["fused"] = optimizer.defaults.get("fused")
