"""Declares the operators of ``torch.ops.resfast``: one call of :func:`register` in each op.py.

Operators that are called only by these, such as ``conv_gemm``, are declared in C++ (csrc/).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from . import extension

logger = logging.getLogger("resfast")

_LIBRARY = torch.library.Library("resfast", "FRAGMENT")
_has_warned = False


def register(
    schema: str,
    *,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    opaque: bool = False,
) -> None:
    """Defines an operator and its kernels. Every op.py passes the arguments in this order.

    Args:
        schema: name, arguments and results, in the notation of ``torch.library.define``.
        cpu: the kernel for the CPU; ``None`` if the extension registers one in C++
            (:func:`fallback`).
        cuda: the kernel for CUDA; ``None`` if there is none.
        fake: returns a result of the right shape, dtype and strides without values, for
            ``torch.compile``; ``None`` for an operator without a result.
        setup_context: saves what ``backward`` needs, as in ``torch.library.register_autograd``.
        backward: the gradients of the inputs; ``None`` for an operator that is not differentiable.
        opaque: whether ``torch.compile`` must not trace into the Python kernels, which it may do
            at graph breaks. This costs about a microsecond per call.
    """
    name = schema.partition("(")[0]
    qualified = f"resfast::{name}"
    _LIBRARY.define(schema)
    for device, kernel in (("cpu", cpu), ("cuda", cuda)):
        if kernel is None:
            continue
        if opaque:
            torch.library.register_kernel(qualified, device, kernel, lib=_LIBRARY)
        else:
            _LIBRARY.impl(name, kernel, device.upper())
    if fake is not None:
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_LIBRARY
        )


def fallback(kernel: Callable[..., Any]) -> Callable[..., Any] | None:
    """The PyTorch kernel for the CPU of an operator that also has one in C++.

    Returns:
        ``None`` if the extension is loaded, which registers the C++ kernel. Otherwise the PyTorch
        kernel; the first call of any such kernel logs why.
    """
    if extension.MISSING is None:
        return None

    def warn_and_call(*args: Any, **kwargs: Any) -> Any:
        global _has_warned
        if not _has_warned:
            _has_warned = True
            logger.warning(
                "the C++ kernels are replaced by slower PyTorch code: %s", extension.MISSING
            )
        return kernel(*args, **kwargs)

    return warn_and_call
