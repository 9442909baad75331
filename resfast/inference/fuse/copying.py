"""Copies a network without wrappers and computed weights: :func:`copied`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from resfast.errors import ResfastError
from resfast.layers import fused, replaced


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of ``torch.compile``, ``nn.DataParallel`` and the like.

    Raises:
        ResfastError: the wrapper has forward hooks of its own.
    """
    while True:
        if type(model).__module__.startswith("torch._dynamo") and hasattr(model, "_orig_mod"):
            inner = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            return model
        if fused.hooked(model):
            raise ResfastError(
                f"the wrapper {type(model).__name__} has forward hooks; register them on the "
                "network inside it"
            )
        model = inner


class _Detached(TorchFunctionMode):
    """Lets ``copy.deepcopy`` copy tensors with a gradient history, which modules may keep."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            x, memo = args
            if id(x) not in memo:
                memo[id(x)] = x.detach().clone()
            return memo[id(x)]
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module) -> nn.Module:
    """A copy without gradients, wrappers, replaced classes or computed weights.

    The networks inside of wrappers take their place, and parametrized, normed
    (``torch.nn.utils``) and pruned weights are plain ones.
    """
    with _Detached():
        result = copy.deepcopy(model)
    replaced.restore(result)
    for module in list(result.modules()):
        for name, child in module.named_children():
            inner = unwrapped(child)
            if inner is not child:
                module.add_module(name, inner)
    result.requires_grad_(False)
    for module in list(result.modules()):
        if parametrize.is_parametrized(module):
            _set_parametrized(module)
        for key, hook in list(module._forward_pre_hooks.items()):
            name = _computed_by(hook)
            if name is not None:
                hook(module, ())
                del module._forward_pre_hooks[key]
                _set(module, name, getattr(module, name))
    return result


def _set_parametrized(module: nn.Module) -> None:
    # remove_parametrizations would change the class, which the original shares.
    names = list(module.parametrizations)
    values = {name: getattr(module, name) for name in names}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name in names:
        _set(module, name, values[name])


def _computed_by(hook: Any) -> str | None:
    """The name of the weight that a hook of ``torch.nn.utils`` computes, or None."""
    if isinstance(hook, WeightNorm | SpectralNorm):
        return hook.name
    return hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else None


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    vars(module).pop(name, None)
    module._buffers.pop(name, None)
    for suffix in ("_g", "_v", "_orig", "_u"):
        module._parameters.pop(name + suffix, None)
    module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
