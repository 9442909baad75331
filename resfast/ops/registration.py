"""How an operator of ``torch.ops.resfast`` is declared: one call of :func:`register` in its op.py.

Operators that only these call, such as ``conv_gemm``, have schema and kernels in C++ (csrc/).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from resfast.ops import extension

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
    """Defines an operator and its kernels. Every op.py gives the arguments in this order.

    Args:
        schema: name, arguments and results, as ``torch.library.define`` writes them.
        cpu: the kernel for the CPU; ``None`` if the extension registers one in C++
            (:func:`fallback`).
        cuda: the kernel for CUDA; ``None`` if there is none.
        fake: shapes, dtypes and strides of the result without its values, for ``torch.compile``;
            ``None`` for an operator without a result.
        setup_context: saves what ``backward`` needs, as in ``torch.library.register_autograd``.
        backward: the gradients of the inputs; ``None`` for an operator that is not differentiable.
        opaque: whether ``torch.compile`` must not trace the Python kernels, as it may where a graph
            breaks. That costs a call about a microsecond.
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
    """A kernel for the CPU in PyTorch, for an operator that has one in C++.

    Returns:
        ``None`` with the extension, whose kernel is registered in C++; without it the kernel, which
        logs the reason at the first call of any.
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
