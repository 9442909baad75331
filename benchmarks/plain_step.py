"""A training step as an ordinary script writes it, in plain PyTorch: what resfast is timed against.

It has nothing against it: the same network, ``channels_last``, bf16 autocast and torch.compile, one
batch made beforehand (so no augmentation), no averaged weights, no label smoothing, no schedule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import resfast


def with_plain_convolutions(model: nn.Module) -> nn.Module:
    """The same, its convolutions PyTorch's own and not of resfast's class."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    return model


def build(device: torch.device, batch_size: int) -> Callable[[], None]:
    """The script up to its training loop.

    Args:
        device: where it trains.
        batch_size: images a step.

    Returns:
        A function that trains by one batch.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    model = with_plain_convolutions(resfast.create_model())
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    compiled = torch.compile(model)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()

    return step
