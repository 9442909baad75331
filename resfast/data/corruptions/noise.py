"""Corruptions of single pixels: Gaussian, shot and impulse noise."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def gaussian_noise(images: Tensor, severity: int, random: Generator) -> Tensor:
    """Normal noise."""
    deviation = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return images + deviation * torch.randn(images.shape, generator=random)


def shot_noise(images: Tensor, severity: int, random: Generator) -> Tensor:
    """Poisson noise of that many photons at full brightness."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return torch.poisson(images * photons, generator=random) / photons


def impulse_noise(images: Tensor, severity: int, random: Generator) -> Tensor:
    """Salt and pepper, in each channel on its own."""
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    drawn = torch.rand(images.shape, generator=random)
    noisy = torch.where(drawn < amount / 2, 0.0, images)
    return torch.where((drawn >= amount / 2) & (drawn < amount), 1.0, noisy)
