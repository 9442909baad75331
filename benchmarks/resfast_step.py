"""A training step of resfast as a run takes it: batch made and augmented, then trained on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

import resfast
from resfast import runtime
from resfast.data.loader import ResidentLoader
from resfast.training.optim import Schedule, build_optimizer
from resfast.training.step import TrainStep

IMAGES, EPOCHS = 50_000, 70


def build(device: torch.device, batch_size: int) -> Callable[[], None]:
    """What a run of the default recipe sets up before its first step.

    Args:
        device: where it trains.
        batch_size: images a step.

    Returns:
        A function that trains by one batch.
    """
    config = resfast.recipe("default")
    runtime.prepare(
        device,
        threads=config.runtime.threads,
        tf32=config.runtime.tf32,
        tuned_allocator=config.runtime.tune_allocator,
    )
    torch.manual_seed(0)
    loader = ResidentLoader(
        torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8),
        torch.randint(0, 10, (IMAGES,)),
        torch.full((3,), 0.5),
        torch.full((3,), 0.25),
        batch_size=batch_size,
        augment=config.data.augment,
        classes=10,
        device=device,
        dtype=torch.bfloat16,
    )
    model = resfast.create_model(config.model.model)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim)
    schedule = Schedule(optimizer, config.optim, EPOCHS, len(loader))
    train = TrainStep(
        model, optimizer, config.optim, device=device, dtype=torch.bfloat16, compile=True
    )
    batches = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
    train.warm_up(*next(batches), fall_back=False)
    steps = itertools.count()

    def step() -> None:
        train(*next(batches))
        schedule.step(next(steps))

    return step
