"""Random parameters of MixUp and CutMix, and the labels of mixed images."""

from __future__ import annotations

import torch
from torch import Tensor

from resfast.data.augment.geometry import boxes
from resfast.data.augment.policy import Augment
from resfast.data.augment.streams import MIX, PARTNER, below
from resfast.ops.augment.op import MixParams
from resfast.ops.philox.op import philox, uniform

_QUANTILES = 4096
_TABLES: dict[tuple[float, str], Tensor] = {}
"""Quantiles of Beta(alpha, alpha) by alpha and device."""


def sample_mix(
    augment: Augment,
    indices: Tensor,
    *,
    count: int,
    size: tuple[int, int],
    seed: int,
    epoch: int,
) -> MixParams | None:
    """Draws the MixUp or CutMix parameters of one batch, without synchronizing with the device.

    The partner of an image may be any image of the data set and depends on (seed, epoch, index).
    The choice between MixUp and CutMix, lambda and the box are shared by the batch and depend on
    (seed, epoch, first index of the batch).

    Args:
        augment: the policy.
        indices: int64 ``[B]``, the batch's indices into the data set.
        count: images in the data set, below 2^31.
        size: height and width of the images, in pixels.
        seed: seed of the run.
        epoch: epoch, from 0.

    Returns:
        One row per entry of ``indices``, on its device; None if the policy does not mix images.

    Raises:
        TypeError: ``indices`` is not int64.
        ValueError: ``count`` or ``epoch`` is out of range.
    """
    batch = len(indices)
    if not augment.mixes:
        return None
    partner = _partners(indices, count=count, seed=seed, epoch=epoch)
    weight, box = _weights_and_boxes(augment, indices[:1], size=size, seed=seed, epoch=epoch)
    return MixParams(partner, weight.expand(batch).contiguous(), box.expand(batch, 4).contiguous())


def sample_mixes(
    augment: Augment, indices: Tensor, *, size: tuple[int, int], seed: int, epoch: int
) -> MixParams | None:
    """:func:`sample_mix` for all batches of an epoch at once; ``indices`` covers all images.

    Returns:
        One row per image of the data set: its partner, and the weight and box of a batch that
        starts with it, for :meth:`~resfast.ops.augment.op.MixParams.of_batch`.
    """
    if not augment.mixes:
        return None
    return MixParams(
        _partners(indices, count=len(indices), seed=seed, epoch=epoch),
        *_weights_and_boxes(augment, indices, size=size, seed=seed, epoch=epoch),
    )


def mixed_labels(
    labels: Tensor, partner_labels: Tensor, label_weights: Tensor, classes: int
) -> Tensor:
    """Soft labels of mixed images: the weight of each class, float32 ``[B, classes]``.

    Args:
        labels: int64 ``[B]``, of the images.
        partner_labels: int64 ``[B]``, of the images they are mixed with.
        label_weights: float32 ``[B]``, weight of ``labels``, from
            :meth:`~resfast.ops.augment.op.MixParams.label_weights`.
        classes: number of classes.
    """
    class_indices = torch.arange(classes, device=labels.device)
    weights = label_weights[:, None]
    own, partner = labels[:, None] == class_indices, partner_labels[:, None] == class_indices
    return own * weights + partner * (1 - weights)


def _partners(indices: Tensor, *, count: int, seed: int, epoch: int) -> Tensor:
    """Index of the image that each image is mixed with, int64 ``[B]``."""
    if not 1 <= count < 2**31:
        raise ValueError(f"count {count} is out of range; expected 1 to 2^31 - 1")
    return below(philox(indices, seed=seed, epoch=epoch, stream=PARTNER)[0], count)


def _weights_and_boxes(
    augment: Augment, firsts: Tensor, *, size: tuple[int, int], seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """Weight ``[F]`` and box ``[F, 4]`` of the batches that start with the images ``firsts``."""
    words = philox(firsts, seed=seed, epoch=epoch, stream=MIX)
    probability = uniform(words[1])
    weight = torch.ones_like(probability)
    box = torch.zeros((len(probability), 4), dtype=torch.int32, device=firsts.device)
    if augment.cutmix:
        side = (1 - _beta(probability, augment.cutmix)).sqrt()
        height, width = ((side * pixels).round().to(torch.int64) for pixels in size)
        box = boxes(words[2], words[3], height, width, size)
    if augment.mixup:
        weight = _beta(probability, augment.mixup)
    if augment.mixup and augment.cutmix:
        cuts = words[0] < 2**31
        weight = torch.where(cuts, 1.0, weight)
        box = torch.where(cuts[:, None], box, 0)
    return weight, box


def _beta(probability: Tensor, alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at ``probability``, which is float32 in [0, 1)."""
    table = _beta_quantiles(alpha, probability.device)
    position = probability * _QUANTILES
    index = position.long()
    low = table[index]
    return low + (table[index + 1] - low) * (position - index)


def prepare_mixing(augment: Augment, device: torch.device | str = "cpu") -> None:
    """Makes the tables that a policy's MixUp and CutMix need, so that a compiler finds them."""
    for alpha in filter(None, (augment.mixup, augment.cutmix)):
        _beta_quantiles(alpha, torch.device(device))


def _beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at steps of 1 / 4096, float32 ``[4097]``."""
    table = _TABLES.get((alpha, str(device)))
    if table is not None:
        return table
    from scipy.special import betaincinv

    steps = torch.arange(_QUANTILES + 1, dtype=torch.float64) / _QUANTILES
    table = torch.from_numpy(betaincinv(alpha, alpha, steps.numpy())).float().to(device)
    return _TABLES.setdefault((alpha, str(device)), table)
