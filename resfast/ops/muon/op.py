"""What Muon does on the CPU, beside two products of matrices.

``resfast::nesterov_`` and ``resfast::move_filters_`` are a pass over memory each (and another for a
norm), where PyTorch's operators are eight. ``resfast::newton_schulz_product(Tensor gram, int steps,
bool normalize, float a, float b, float c) -> Tensor``, on processors with AVX-512, takes the
symmetric ``X X^T``, float32 ``[n, n]``, where ``normalize`` divides X by its Frobenius norm first,
and gives the float32 ``[n, n]`` by which X is to be multiplied for ``steps`` iterations of
a x + b x^3 + c x^5.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from resfast.ops import extension

LEAST_NORM = 1e-7
"""By which a norm is replaced that is smaller."""


def _nesterov(buffer: Tensor, grad: Tensor, update: Tensor, momentum: float) -> None:
    buffer.mul_(momentum).add_(grad)
    update.copy_(grad.add(buffer, alpha=momentum))


def _move_filters(
    weight: Tensor, update: Tensor, size: float, keep: float, normalize: bool
) -> None:
    if normalize:
        keep = keep * math.sqrt(len(weight)) / max(float(weight.norm()), LEAST_NORM)
    weight.mul_(keep).sub_(update.float(), alpha=size)


# buffer <- momentum buffer + grad; update <- grad + momentum buffer. All of one shape, dense and in
# one memory order, but grad, which may be in another; float32, and update maybe bfloat16.
extension.define(
    "nesterov_",
    "nesterov_(Tensor(a!) buffer, Tensor grad, Tensor(b!) update, float momentum) -> ()",
    cpu=_nesterov,
)
# weight <- keep weight - size update, where normalize first brings weight to the Frobenius norm
# sqrt(K) of K filters. Of one shape, dense and in one memory order; float32, and update maybe
# bfloat16.
extension.define(
    "move_filters_",
    "move_filters_(Tensor(a!) weight, Tensor update, float size, float keep, bool normalize) -> ()",
    cpu=_move_filters,
)


@functools.cache
def has_newton_schulz_product() -> bool:
    """Whether the operator is there and runs on this processor."""
    built = hasattr(torch.ops.resfast, "newton_schulz_supported")  # only for x86-64
    return built and torch.ops.resfast.newton_schulz_supported()
