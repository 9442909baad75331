"""Modules that compute in another way because their class is replaced by a subclass of it.

The module remains the same object with the same tensors, hooks and attributes; only its
``__class__`` changes, as in ``torch.nn.utils.parametrize``. The subclass has the name of the
original class. A pickle of the module is one of the original, which loads without resfast;
``copy.deepcopy`` keeps the subclass. :func:`restore` gives the original classes back.
"""

from __future__ import annotations

import copy
import copyreg
import types
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks

_MARK = "_resfast_replaces"
"""Attribute of the classes of :func:`subclass`: the original class."""


def subclass(kind: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    """A class of modules that replaces another one.

    Args:
        kind: the original class, the only base of the new one.
        namespace: methods that differ.

    Raises:
        TypeError: the class cannot have such a subclass.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        reduced = kind.__reduce_ex__(self, protocol)  # type: ignore[call-arg]
        makers = (copyreg.__newobj__, copyreg._reconstructor)  # type: ignore[attr-defined]
        if isinstance(reduced, tuple) and reduced[0] in makers and reduced[1][0] is type(self):
            return makers[1], (kind, object, None), *reduced[2:]
        return reduced

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    names["__reduce_ex__"] = reduce
    names[_MARK] = kind
    if not hasattr(kind, "__deepcopy__"):
        names["__deepcopy__"] = deepcopy
    return types.new_class(
        kind.__name__, (kind,), exec_body=lambda body: body.update(names | namespace)
    )


def replace_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Gives a module a class of :func:`subclass`, made for the class that it has.

    Raises:
        TypeError: the objects of the two classes differ in memory.
    """
    object.__setattr__(module, "__class__", kind)


def is_replaced(module: nn.Module) -> bool:
    """Whether the module's class is one of :func:`subclass`."""
    return _MARK in vars(type(module))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was replaced."""
    return vars(type(module)).get(_MARK, type(module))


def restore(model: nn.Module) -> int:
    """Gives the modules of a network their original classes; returns how many were replaced."""
    found = [module for module in model.modules() if is_replaced(module)]
    for module in found:
        object.__setattr__(module, "__class__", original_class(module))
    return len(found)


def observed(module: nn.Module) -> bool:
    """Whether hooks, forward or backward, of the module or of all modules run with its call."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )
