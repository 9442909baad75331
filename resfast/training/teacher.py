"""Distillation: a trained network, the teacher, gives the targets of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resfast.config.schema import Config
from resfast.inference.fuse import fuse
from resfast.inference.load import load
from resfast.training.losses import Criterion
from resfast.training.pseudo_labels import check_fits


class Teacher:
    """A fused network whose logits are targets, without gradients.

    Args:
        path: the run.
        config: the configuration of the student's training.
        classes: the student's class names.
        mean: the student's channel means, float32 ``[3]`` in units of pixel / 255.
        std: its standard deviations, float32 ``[3]``.
        device: device of the images.
        dtype: compute dtype.

    Raises:
        ResfastError: the run cannot be loaded, or has other classes or another image size.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        classes: Sequence[str],
        mean: Tensor,
        std: Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        run = load(path, device=str(device))
        check_fits(run, "--teacher", classes, config.data.image_size)
        size = run.image_size
        example = torch.zeros(config.optim.batch_size, 3, size, size, device=device, dtype=dtype)
        self.network = fuse(run.model, dtype, example=example)
        self._mean, self._std = run.mean, run.std
        self._scale = torch.ones(3, 1, 1, device=device)
        self._shift = torch.zeros(3, 1, 1, device=device)
        self.normalized_by(mean, std)

    def normalized_by(self, mean: Tensor, std: Tensor) -> None:
        """Sets how the images will be normalized, each float32 ``[3]`` in units of pixel / 255."""
        mean, std = mean.cpu(), std.cpu()
        self.is_alike = torch.equal(mean, self._mean) and torch.equal(std, self._std)
        self._scale.copy_((std / self._std)[:, None, None])
        self._shift.copy_(((mean - self._mean) / self._std)[:, None, None])

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            images: ``[B, 3, H, W]``, augmented and normalized for the student.

        Returns:
            float32 ``[B, classes]``.
        """
        if not self.is_alike:
            images = images * self._scale + self._shift
        return self.network(images)


class Distillation:
    """A training loss that adds the teacher's softened predictions to the labels.

    ``(1 - weight) * loss(logits, labels) + weight * T^2 * KL(softmax(teacher / T) ||
    softmax(logits / T))``, of Hinton et al., "Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531. T^2 keeps the size of the gradients of the second term independent of T.

    Args:
        loss: the loss with the labels.
        teacher: predicts the same augmented images.
        temperature: T.
        weight: of the second term, 0 to 1.
    """

    def __init__(
        self, loss: Criterion, teacher: Teacher, *, temperature: float, weight: float
    ) -> None:
        self.loss, self.teacher = loss, teacher
        self.temperature, self.weight = temperature, weight

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        soft = soft_target_loss(logits, self.teacher(images), self.temperature)
        soft = soft if reduction == "none" else soft.mean()
        return (1 - self.weight) * self.loss(images, logits, labels, reduction) + self.weight * soft


def soft_target_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(logits / T))`` of each image.

    Args:
        logits: of the student, float32 ``[B, classes]``.
        teacher: of the teacher, float32 ``[B, classes]``.
        temperature: T.

    Returns:
        float32 ``[B]``, in nats.
    """
    target = F.log_softmax(teacher / temperature, 1)
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, 1), target, reduction="none", log_target=True
    )
    return temperature**2 * divergence.sum(1)
