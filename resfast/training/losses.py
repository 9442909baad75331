"""Training losses. To add a loss, add an entry to ``LOSSES``."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, reduction: str) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)


LOSSES: dict[str, Callable[[Tensor, Tensor, float, str], Tensor]] = {
    "cross_entropy": _cross_entropy,
}
"""Name to loss function. Arguments: logits, float32 ``[B, classes]``; labels, int64 ``[B]`` or soft
labels, float32 ``[B, classes]``; label smoothing; and the reduction, ``mean`` or ``none``. Returns
the mean, 0-d, or the loss of each image, ``[B]``."""
