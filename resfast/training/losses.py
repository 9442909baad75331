"""Losses of training. A new loss is one entry of ``LOSSES``."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, reduction: str) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)


LOSSES: dict[str, Callable[[Tensor, Tensor, float, str], Tensor]] = {
    "cross_entropy": _cross_entropy,
}
"""Name to a function of logits, float32 ``[B, classes]``, labels, int64 ``[B]`` or the parts of the
classes, float32 ``[B, classes]``, label smoothing and ``mean`` or ``none`` as reduction; it returns
the mean, 0-d, or the loss of each image, ``[B]``."""
