"""Which images of a training set are held out for validation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resfast.errors import ResfastError


def split_validation(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Stratified random split of the images into training and validation.

    The same ``seed`` gives the same split.

    Args:
        labels: int64 ``[N]``.
        fraction: fraction held out for validation: ``round(N * fraction)`` images, and of each
            class its share rounded up or down.
        seed: seed of the split.

    Returns:
        ``(train_indices, val_indices)``, sorted int64 on the CPU.

    Raises:
        ResfastError: ``fraction`` is out of range, or one part would be empty.
    """
    if not 0 < fraction < 1:
        raise ResfastError(
            f"validation fraction {fraction} is out of range, expected more than 0 and less than 1"
            ": choose, for example, 0.1"
        )
    labels = labels.cpu()
    total = round(len(labels) * fraction)
    if not 0 < total < len(labels):
        raise ResfastError(
            f"validation fraction {fraction} of {len(labels)} images leaves training or validation "
            "empty, at least one image in each was expected: choose another fraction or more images"
        )
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    shares = [len(indices) * fraction for indices in members]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for indices, count in zip(members, counts, strict=True):
        chosen[indices[torch.randperm(len(indices), generator=generator)[:count]]] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """The first images of each class, the same number of each.

    Args:
        labels: int64 ``[N]``.
        count: number of images. It is rounded down to a multiple of the number of classes; a class
            with fewer images gives all of them.

    Returns:
        Their indices, sorted int64 on the CPU.

    Raises:
        ResfastError: fewer images than classes.
    """
    labels = labels.cpu()
    classes = labels.unique()
    if count < len(classes):
        raise ResfastError(
            f"--max-images {count} is less than one image for each of {len(classes)} classes: "
            f"choose at least {len(classes)}"
        )
    each = count // len(classes)
    members = [torch.nonzero(labels == label).flatten()[:each] for label in classes]
    return torch.cat(members).sort().values


def split_last(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Holds out the last ``count / classes`` images of each class.

    Args:
        labels: int64 ``[N]``.
        count: images to hold out, a multiple of the number of classes.

    Returns:
        ``(train_indices, val_indices)``, sorted int64 on the CPU.

    Raises:
        ResfastError: ``count`` is not a multiple of the number of classes, or would leave a class
            without training images.
    """
    labels = labels.cpu()
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    per_class, rest = divmod(count, len(members))
    if rest or per_class < 1:
        nearest = max(1, round(count / len(members))) * len(members)
        raise ResfastError(
            f"--hold-out {count} cannot be divided equally among {len(members)} classes: choose a "
            f"multiple of {len(members)}, for example {nearest}"
        )
    smallest = min(map(len, members))
    if per_class >= smallest:
        raise ResfastError(
            f"--hold-out {count} takes {per_class} images of each class, but the smallest has "
            f"{smallest}: choose at most {(smallest - 1) * len(members)}"
        )
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat([indices[-per_class:] for indices in members])] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
