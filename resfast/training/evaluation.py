"""Accuracy, loss and confusion matrix of a network on a labelled set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast.data.loader import resident_batches

TTA = Literal["none", "flip", "shift"]


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        accuracy: part of the images classified correctly, 0 to 1.
        loss: mean cross-entropy, in nats.
        confusion: int64 ``[classes, classes]`` on the CPU, true class by predicted class.
    """

    accuracy: float
    loss: float
    confusion: Tensor

    @property
    def per_class(self) -> list[float]:
        """Accuracy of each true class (NaN for a class without images)."""
        return (self.confusion.diagonal().double() / self.confusion.sum(1)).tolist()


def predict(
    model: nn.Module,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    batch_size: int = 1000,
    dtype: torch.dtype = torch.float32,
    tta: TTA = "none",
) -> Tensor:
    """Logits of every image.

    Args:
        model: a network in eval mode, on the device of ``images``.
        images: uint8 ``[N, H, W, C]``.
        mean: float32 ``[C]`` in units of pixel / 255.
        std: float32 ``[C]``, likewise.
        batch_size: images a step.
        dtype: compute dtype under autocast.
        tta: ``flip`` averages the logits of each image and its mirror; ``shift`` averages those
            (weight 1/2) and the same two of the image moved by one pixel up-left and down-right
            (Jordan, arXiv:2404.00498, section 3.5).

    Returns:
        float32 ``[N, classes]`` on the same device.
    """
    device = images.device
    out = []
    with torch.inference_mode():
        unlabelled = torch.empty(len(images), 0, device=device)
        for batch, _ in resident_batches(
            images, unlabelled, mean, std, batch_size=batch_size, dtype=dtype
        ):
            out.append(_logits(model, batch, dtype, tta))
    return torch.cat(out)


def _logits(model: nn.Module, batch: Tensor, dtype: torch.dtype, tta: TTA) -> Tensor:
    with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
        if tta == "none":
            return model(batch).float()
        logits = _mirrored(model, batch)
        if tta == "shift":
            height, width = batch.shape[2:]
            padded = F.pad(batch, (1, 1, 1, 1), mode="reflect")
            padded = padded.contiguous(memory_format=torch.channels_last)
            moved = [padded[:, :, s : s + height, s : s + width] for s in (0, 2)]
            moved = [m.contiguous(memory_format=torch.channels_last) for m in moved]
            logits = logits / 2 + (_mirrored(model, moved[0]) + _mirrored(model, moved[1])) / 4
        return logits


def _mirrored(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch).float() + model(batch.flip(3)).float()) / 2


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    tta: TTA = "none",
) -> Evaluation:
    """Scores a network.

    Args:
        model: a network on the device of the batches; put in eval mode for the call, and back.
        batches: normalized images ``[B, C, H, W]`` in ``dtype`` and labels int64 ``[B]``, at least
            one batch.
        dtype: compute dtype under autocast.
        tta: as of :func:`predict`.
    """
    was_training = model.training
    model.eval()
    confusion = loss = None
    try:
        with torch.inference_mode():
            for images, labels in batches:
                logits = _logits(model, images, dtype, tta)
                classes = logits.shape[1]
                if confusion is None:
                    confusion = labels.new_zeros(classes * classes)
                    loss = logits.new_zeros((), dtype=torch.float64)
                confusion += torch.bincount(
                    labels * classes + logits.argmax(1), minlength=classes * classes
                )
                loss += F.cross_entropy(logits, labels, reduction="sum")
    finally:
        model.train(was_training)
    confusion = confusion.view(classes, classes).cpu()
    count = int(confusion.sum())
    return Evaluation(
        accuracy=int(confusion.diagonal().sum()) / count,
        loss=loss.item() / count,
        confusion=confusion,
    )
