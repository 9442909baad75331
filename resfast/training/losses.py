"""Training losses. To add a loss, add an entry to ``LOSSES``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, float, str], Tensor]
Criterion = Callable[..., Tensor]
"""Loss of a training step. Arguments: images ``[B, C, H, W]``; logits, float32 ``[B, classes]``;
labels and reduction as for ``LOSSES``; and other outputs of the step, float32."""


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, reduction: str) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)


def targets(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Labels as class probabilities, smoothed as ``F.cross_entropy`` does.

    Args:
        logits: float32 ``[B, classes]``.
        labels: int64 ``[B]``, or float32 ``[B, classes]``.
        smoothing: probability mass spread evenly over all classes.

    Returns:
        float32 ``[B, classes]``.
    """
    classes = logits.shape[1]
    if labels.ndim == 1:
        labels = (labels[:, None] == torch.arange(classes, device=labels.device)).to(logits.dtype)
    return labels * (1 - smoothing) + smoothing / classes if smoothing else labels


def _elementwise(function: Callable[..., Tensor]) -> Loss:
    """A loss of each logit and its target; the loss of an image is their mean over the classes."""

    def loss(logits: Tensor, labels: Tensor, smoothing: float, reduction: str) -> Tensor:
        values = function(logits, targets(logits, labels, smoothing), reduction="none").mean(1)
        return values if reduction == "none" else values.mean()

    return loss


LOSSES: dict[str, Loss] = {
    "cross_entropy": _cross_entropy,
    "mse": _elementwise(F.mse_loss),
    "smooth_l1": _elementwise(F.smooth_l1_loss),
    "bce_with_logits": _elementwise(F.binary_cross_entropy_with_logits),
}
"""Loss function by value of ``--loss``. Arguments: logits, float32 ``[B, classes]``; labels, int64
``[B]`` or soft labels, float32 ``[B, classes]``; label smoothing; and the reduction, ``mean`` or
``none``. Returns the mean, 0-d, or the loss of each image, ``[B]``."""


def criterion(name: str, smoothing: float) -> Criterion:
    """The loss of logits and labels alone.

    Args:
        name: a key of ``LOSSES``.
        smoothing: of the labels.
    """
    loss = LOSSES[name]
    return lambda images, logits, labels, reduction: loss(logits, labels, smoothing, reduction)
