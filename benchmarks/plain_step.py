"""The training step of an ordinary, well-written PyTorch script, which resfast is compared with.

It has every advantage: the same network, ``channels_last``, bf16 autocast and torch.compile, and a
fixed batch (no augmentation), no averaged weights, no label smoothing and no schedule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import resfast
from resfast.config.network import network
from resfast.models.presets import build_model
from resfast.ops.frozen_conv import op as frozen_conv
from resfast.ops.norm_act import op as norm_act


def with_plain_convolutions(model: nn.Module) -> nn.Module:
    """The same model, with resfast's convolutions turned into ``nn.Conv2d``."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    return model


def build(device: torch.device, batch_size: int, recipe: str) -> Callable[[], None]:
    """Sets up the script; run it in a process of its own, because it changes global settings.

    Args:
        device: where to train.
        batch_size: images per step.
        recipe: the recipe whose network is trained.

    Returns:
        A function that trains on one batch.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    # Use PyTorch's norms, activations and whitening convolution, too.
    norm_act.available = lambda device: False
    frozen_conv.AVAILABLE = False
    model = with_plain_convolutions(build_model(network(resfast.recipe(recipe).model), 10))
    model = model.to(device, memory_format=torch.channels_last)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
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
