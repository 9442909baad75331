"""Self-supervised pre-training: Barlow Twins, with a linear classifier trained along.

Source: Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
arXiv:2103.03230. The network's own last layer learns to classify its features, but its gradients
stop there: the network does not learn from labels, and its accuracy is that of a linear probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from resfast.models.resnet import ResNet
from resfast.models.speednet import SpeedNet
from resfast.models.vgg import VGG
from resfast.runs.checkpoint import PROJECTOR
from resfast.training.losses import Criterion


def add_projector(model: nn.Module, sizes: Sequence[int]) -> None:
    """Gives a network the layers whose outputs the loss compares.

    Args:
        model: the network.
        sizes: outputs of each dense layer; all but the last are followed by batch norm and ReLU.
    """
    widths = [model.last_layer.in_features, *sizes]
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer, bias=False), nn.BatchNorm1d(outer), nn.ReLU()]
    model.add_module(PROJECTOR, nn.Sequential(*layers[:-2]))


def two_headed(model: ResNet | VGG | SpeedNet) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What a training step computes of images ``[2 B, C, H, W]``, two views one after the other.

    Returns:
        A function of the images that returns the logits of the first views, ``[B, classes]``, from
        features without gradients, and the projections of all, ``[2 B, D]``.
    """

    def outputs(images: Tensor) -> tuple[Tensor, Tensor]:
        features = model.embed(images)
        logits = model.classify(features[: len(images) // 2].detach())
        return logits, model.get_submodule(PROJECTOR)(features)

    return outputs


def barlow_twins(loss: Criterion, redundancy_weight: float) -> Criterion:
    """The loss of pre-training: that of the projections, and that of the classifier.

    Args:
        loss: of the logits and labels.
        redundancy_weight: lambda of the paper.
    """

    def criterion(
        images: Tensor, logits: Tensor, labels: Tensor, reduction: str, projections: Tensor
    ) -> Tensor:
        first, second = projections.chunk(2)
        twins = barlow_twins_loss(first, second, redundancy_weight)
        return twins + loss(images, logits, labels, reduction)

    return criterion


def barlow_twins_loss(first: Tensor, second: Tensor, redundancy_weight: float) -> Tensor:
    """Equation 1 of the paper, divided by the number of dimensions.

    ``(sum_i (1 - c_ii)^2 + lambda sum_(i != j) c_ij^2) / D``, with the cross-correlation c of the
    dimensions over the batch.

    Args:
        first: projections of the first views, float32 ``[B, D]``.
        second: of the second, float32 ``[B, D]``.
        redundancy_weight: lambda.

    Returns:
        float32 0-d.
    """
    one, two = (
        (values - values.mean(0)) / (values.var(0, correction=0) + 1e-5).sqrt()
        for values in (first, second)
    )
    correlation = one.T @ two / len(one)
    diagonal = correlation.diagonal()
    on = (1 - diagonal).square().sum()
    off = correlation.square().sum() - diagonal.square().sum()
    return (on + redundancy_weight * off) / len(diagonal)
