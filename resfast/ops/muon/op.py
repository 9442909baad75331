"""Operators of the optimizer Muon on the CPU, except its two matrix products.

``resfast::nesterov_`` and ``resfast::move_filters_`` need one pass over memory each (and another
for a norm); PyTorch's own operators need eight. ``resfast::newton_schulz_product(Tensor gram, int
steps, bool normalize, float a, float b, float c) -> Tensor``, registered in C++ for processors with
AVX-512, takes the symmetric ``X X^T``, float32 ``[n, n]``, and returns the float32 ``[n, n]``
matrix that multiplies X to perform ``steps`` iterations of a x + b x^3 + c x^5; with ``normalize``,
X is divided by its Frobenius norm first.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..registration import fallback, register

MIN_NORM = 1e-7
"""Norms are clamped to at least this."""


def _nesterov(buffer: Tensor, grad: Tensor, update: Tensor, momentum: float) -> None:
    buffer.mul_(momentum).add_(grad)
    update.copy_(grad.add(buffer, alpha=momentum))


def _move_filters(
    weight: Tensor, update: Tensor, size: float, keep: float, normalize: bool
) -> None:
    if normalize:
        keep = keep * math.sqrt(len(weight)) / max(float(weight.norm()), MIN_NORM)
    weight.mul_(keep).sub_(update.float(), alpha=size)


# buffer <- momentum buffer + grad; update <- grad + momentum buffer. All have the same shape
# and are dense, in the same memory format except grad, which may be in another; float32, update
# also bfloat16.
register(
    "nesterov_(Tensor(a!) buffer, Tensor grad, Tensor(b!) update, float momentum) -> ()",
    cpu=fallback(_nesterov),
)
# weight <- keep weight - size update; with normalize, first scale the weight of K filters to the
# Frobenius norm sqrt(K). Both have the same shape and memory format and are dense; float32, update
# also bfloat16.
register(
    "move_filters_(Tensor(a!) weight, Tensor update, float size, float keep, bool normalize) -> ()",
    cpu=fallback(_move_filters),
)


@functools.cache
def has_newton_schulz_product() -> bool:
    """Whether the operator is built and runs on this processor."""
    built = hasattr(torch.ops.resfast, "newton_schulz_supported")  # only for x86-64
    return built and torch.ops.resfast.newton_schulz_supported()
