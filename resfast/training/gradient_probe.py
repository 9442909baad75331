"""Measures gradients during training, for ``--record gradients`` and ``--record smoothness``.

Nothing here changes the training: parameters, statistics, gradients and random number generators
are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resfast.errors import ResfastError
from resfast.training.step_graphs import generators_restored

DISTANCES = (0.5, 1.0, 2.0, 4.0)
"""Steps along the gradient of ``smoothness``, in learning rates."""
COLUMNS: dict[str, tuple[str, ...]] = {
    "loss": (),
    "gradients": ("gradient_norm", "gradient_change"),
    "smoothness": ("smoothness", "loss_ahead_min", "loss_ahead_max"),
}
"""Columns that each value of ``--record`` adds to those of every record."""


class GradientProbe:
    """Measures each step of an epoch, after its backward pass and before clipping.

    ``gradients``: Euclidean norm of the gradient of the last layer's weight, and of its difference
    from that of the step before (NaN for the first step of a run).

    ``smoothness``: the effective beta-smoothness of Santurkar et al., "How Does Batch Normalization
    Help Optimization?", arXiv:1805.11604, section 3.1. With parameters w, gradient g of the batch's
    loss at w and learning rate r, it is the largest |g(w - d r g) - g| / |d r g| for d in
    :data:`DISTANCES`, over all trained parameters, on the same batch with the same dropout; and the
    smallest and largest loss at these points. NaN if r or g is 0. It takes five more forward and
    backward passes.

    Args:
        model: the network being trained.
        record: names of :data:`COLUMNS`.
        loss: the mean loss of images and labels as training computes it, with a graph.
        learning_rate: the learning rate of the next step.
        device: device of the network.

    Attributes:
        rows: what was measured in each step of the epoch, float32 ``[columns]`` on the device.

    Raises:
        ResfastError: gradients of a last layer that is frozen or missing.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Sequence[str],
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        learning_rate: Callable[[], float],
        device: torch.device,
    ) -> None:
        self.model, self.record, self.device = model, tuple(record), device
        self._loss, self._learning_rate = loss, learning_rate
        self.rows: list[Tensor] = []
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._weight = layers[-1].weight if layers else None
        if "gradients" in record and (self._weight is None or not self._weight.requires_grad):
            raise ResfastError(
                "--record gradients measures the last dense layer, which is not trained; train it "
                "or leave gradients out"
            )
        shape = () if self._weight is None else self._weight.shape
        self.previous = torch.full(shape, math.nan, device=device)

    def measure(self, images: Tensor, labels: Tensor, scale: float) -> None:
        """Adds the row of a step whose gradients have been computed.

        Args:
            images: its images.
            labels: its labels, as given to ``loss``.
            scale: factor by which the loss was multiplied before the backward pass.
        """
        values: list[Tensor] = []
        if "gradients" in self.record:
            gradient = self._weight.grad.float() / scale
            values += [gradient.norm(), (gradient - self.previous).norm()]
            self.previous.copy_(gradient)
        if "smoothness" in self.record:
            values += self._ahead(images, labels, scale)
        self.rows.append(torch.stack([value.float() for value in values]))

    def _ahead(self, images: Tensor, labels: Tensor, scale: float) -> list[Tensor]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        buffers = list(self.model.buffers())
        kept = [[tensor.detach().clone() for tensor in group] for group in (parameters, buffers)]

        def gradient() -> tuple[Tensor, list[Tensor]]:
            with generators_restored(self.device):
                loss = self._loss(images, labels)
                found = torch.autograd.grad(loss * scale, parameters)
            return loss.detach(), [value / scale for value in found]

        _, base = gradient()
        length, rate = _norm(base), self._learning_rate()
        ratios, losses = [], []
        try:
            for distance in DISTANCES:
                with torch.no_grad():
                    moved = torch._foreach_add(kept[0], base, alpha=-distance * rate)
                    torch._foreach_copy_(parameters, moved)
                loss, there = gradient()
                change = _norm(torch._foreach_sub(there, base))
                ratios.append(change / (distance * rate * length))
                losses.append(loss)
        finally:
            with torch.no_grad():
                for group, values in zip((parameters, buffers), kept, strict=True):
                    for tensor, value in zip(group, values, strict=True):
                        tensor.copy_(value)
        along = torch.stack(losses)
        return [torch.stack(ratios).max(), along.min(), along.max()]

    def values(self) -> Tensor:
        """The rows of the epoch so far, float32 ``[steps, columns]`` on the device."""
        return torch.stack(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to continue within an epoch."""
        return {"previous": self.previous.cpu(), "rows": [row.cpu() for row in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.previous.copy_(state["previous"])
        self.rows = [row.to(self.device) for row in state["rows"]]

    def reset(self) -> None:
        """Forgets everything, for a new training."""
        self.rows = []
        self.previous.fill_(math.nan)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.float().norm() for tensor in tensors]).norm()
