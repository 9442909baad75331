"""Whitening filters for a first convolution, computed from patches of training images.

The filters are the eigenvectors of the patch covariance, each divided by the square root of its
eigenvalue, so their outputs are uncorrelated with unit variance. Each is used with both signs,
because an activation suppresses one half. The filters are frozen during training. Sources: Page,
"How to Train Your ResNet 8: Bag of tricks" (myrtle.ai, 2019), section on PCA whitening; Jordan,
"94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resfast.errors import ResfastError

IMAGES = 5_000
"""Number of training images that the filters are computed from."""
EPS = 5e-4
"""Added to the eigenvalues, so that directions without variance are not amplified."""
_ZERO_VARIANCE = 1e-8
"""Eigenvalues below this fraction of the largest count as zero, as between grey channels."""
_CHUNK = 250


def whitening_weight(
    images: Tensor | Iterable[Tensor], kernel: int, *, width: int = 0, eps: float = EPS
) -> Tensor:
    """The weight of a whitening convolution.

    Args:
        images: ``[N, C, H, W]``, normalized (the covariance is taken about zero), or batches of
            them; every position gives a patch. Sums are in float64.
        kernel: height and width of a patch, in pixels.
        width: number of eigenvectors to keep, largest eigenvalues first; 0 for all
            ``C * kernel**2``.
        eps: added to the eigenvalues.

    Returns:
        float32 ``[2 * width, C, kernel, kernel]`` on the device of the images: eigenvectors divided
        by ``sqrt(eigenvalue + eps)``, in descending order of eigenvalue, then the same negated.
        Signs are chosen so that the entry of largest magnitude is positive. Eigenvectors of zero
        eigenvalues, as between the channels of grey images, are replaced by repeating the first.

    Raises:
        ResfastError: no image, images smaller than a patch, a value that is not finite, or a width
            out of range.
    """
    batches = [images] if isinstance(images, Tensor) else images
    total, patches = None, 0
    for batch in batches:
        for part in batch.split(_CHUNK):
            if min(part.shape[2:]) < kernel:
                raise ResfastError(
                    f"images of {part.shape[2]}x{part.shape[3]} pixels are smaller than a patch of "
                    f"{kernel}x{kernel}; use larger images or a smaller --whitening-kernel"
                )
            # [C * kernel * kernel, N * P * Q], in the order of a convolution's weight
            flat = part.double().unfold(2, kernel, 1).unfold(3, kernel, 1)
            flat = flat.permute(1, 4, 5, 0, 2, 3).reshape(part.shape[1] * kernel**2, -1)
            product = flat @ flat.T
            total = product if total is None else total + product
            patches += flat.shape[1]
    if total is None or not patches:
        raise ResfastError("whitening needs at least one training image, but there are none")
    if not bool(torch.isfinite(total).all()):
        raise ResfastError("whitening needs finite images, but some values are infinite or NaN")
    size = len(total)
    if not 0 <= width <= size:
        raise ResfastError(
            f"whitening width {width} is out of range: expected 1 to {size}, or 0 for all"
        )
    values, vectors = torch.linalg.eigh((total / patches).cpu())
    keep = width or size
    values, vectors = values.flip(0)[:keep].clamp(min=0), vectors.flip(1)[:, :keep].T
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    filters = vectors * largest.sign() / (values + eps).sqrt()[:, None]
    # A channel without variance, or of amplified rounding errors, would harm the batch norms after
    # this layer.
    nonzero = int((values >= _ZERO_VARIANCE * values[0]).sum())
    filters = filters[torch.arange(keep) % nonzero].view(keep, -1, kernel, kernel)
    return torch.cat([filters, -filters]).float().to(total.device)


def needed(model: nn.Module) -> bool:
    """Whether the network has a whitening layer for :func:`prepare_model` to compute."""
    return isinstance(getattr(model, "whitening", None), nn.Conv2d)


def prepare_model(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Computes the weight of a network's ``whitening`` layer from training images.

    Networks without one are left unchanged, and ``batches`` is not read. It is part of the training
    and of its time. A pure function of the images; a resumed run restores the weight from its
    checkpoint.

    Args:
        model: a network on the device of the images.
        batches: normalized images ``[B, C, H, W]``, preferably float32, and labels; the first
            :data:`IMAGES` images are used.

    Raises:
        ResfastError: as :func:`whitening_weight`.
    """
    if not needed(model):
        return
    conv = model.whitening
    width = conv.out_channels // 2
    with torch.no_grad():
        images = _first_images(batches)
        conv.weight.copy_(whitening_weight(images, conv.kernel_size[0], width=width))


def _first_images(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterable[Tensor]:
    remaining = IMAGES
    for images, _ in batches:
        yield images[:remaining]
        remaining -= len(images)
        if remaining <= 0:
            return
