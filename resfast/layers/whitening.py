"""Whitening filters for a first convolution, from the patches of training images.

The eigenvectors of the patches' covariance, each divided by the root of its eigenvalue, put out
values that are uncorrelated and of unit variance; each is there with both signs, so that an
activation loses neither half. The filters stay as they are while the rest is trained. Sources:
Page, "How to Train Your ResNet 8: Bag of tricks" (myrtle.ai, 2019), section on PCA whitening;
Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resfast.errors import ResfastError

IMAGES = 5_000
"""Training images that the filters are computed from."""
EPS = 5e-4
"""Added to the eigenvalues, so that directions without variance are not blown up."""
_NOTHING = 1e-8
"""Part of the largest eigenvalue below which there is no variance, as in grey images."""
_CHUNK = 250


def whitening_weight(
    images: Tensor | Iterable[Tensor], kernel: int, *, width: int = 0, eps: float = EPS
) -> Tensor:
    """The weight of a whitening convolution.

    Args:
        images: ``[N, C, H, W]``, normalized (the covariance is taken about zero), or batches of
            them; patches are one from each position. Sums are in float64.
        kernel: height and width of a patch, in pixels.
        width: eigenvectors kept, those of the largest eigenvalues; 0 for all ``C * kernel**2``.
        eps: added to the eigenvalues.

    Returns:
        float32 ``[2 * width, C, kernel, kernel]`` on the device of the images: eigenvectors divided
        by ``sqrt(eigenvalue + eps)``, by falling eigenvalue, then the same negated. The sign of an
        eigenvector is that which makes its largest entry positive; in place of one without any
        variance, as between the channels of grey images, the first ones are repeated.

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
                    f"images of {part.shape[2]}x{part.shape[3]} pixels have no patch of "
                    f"{kernel}x{kernel}; choose larger images or a smaller --whitening-kernel"
                )
            # [C * kernel * kernel, N * P * Q], in the order of a convolution's weight
            flat = part.double().unfold(2, kernel, 1).unfold(3, kernel, 1)
            flat = flat.permute(1, 4, 5, 0, 2, 3).reshape(part.shape[1] * kernel**2, -1)
            product = flat @ flat.T
            total = product if total is None else total + product
            patches += flat.shape[1]
    if total is None or not patches:
        raise ResfastError("whitening needs training images, and there are none")
    if not bool(torch.isfinite(total).all()):
        raise ResfastError("whitening needs finite images, and some values are infinite or NaN")
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
    # A channel without variance, or of magnified rounding, would spoil the batch norms behind it.
    some = int((values >= _NOTHING * values[0]).sum())
    filters = filters[torch.arange(keep) % some].view(keep, -1, kernel, kernel)
    return torch.cat([filters, -filters]).float().to(total.device)


def needed(model: nn.Module) -> bool:
    """Whether the network has a first convolution that :func:`prepare_model` computes."""
    return isinstance(getattr(model, "whitening", None), nn.Conv2d)


def prepare_model(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Computes what a network takes from the training images before it is trained.

    That is the weight of its first convolution, where it is a frozen ``whitening``; other networks
    are left as they are, and ``batches`` is not looked at. It belongs to the training, and so does
    its time. A pure function of the images; a resumed run has the weight in its checkpoint.

    Args:
        model: a network on the device of the images.
        batches: normalized images ``[B, C, H, W]``, best in float32, and labels; the first
            :data:`IMAGES` images are used.

    Raises:
        ResfastError: as :func:`whitening_weight`.
    """
    if not needed(model):
        return
    conv = model.whitening
    width = conv.out_channels // 2
    with torch.no_grad():
        conv.weight.copy_(whitening_weight(_first(batches), conv.kernel_size[0], width=width))


def _first(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterable[Tensor]:
    left = IMAGES
    for images, _ in batches:
        yield images[:left]
        left -= len(images)
        if left <= 0:
            return
