"""A training step of a resfast run, including the selection and augmentation of its batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch

import resfast
from resfast import runtime
from resfast.config.network import network
from resfast.data.device_batches import DeviceBatches
from resfast.data.resident import ResidentLoader
from resfast.layers.conv import set_winograd_tile
from resfast.models.presets import build_model
from resfast.optim.optimizers import build_optimizer
from resfast.optim.schedules import Schedule
from resfast.training.step import TrainStep
from resfast.training.step_graphs import why_not_captured
from resfast.training.step_metrics import StepMetrics
from resfast.training.warm_up import warm_up_step

IMAGES, EPOCHS = 50_000, 70


def build(device: torch.device, batch_size: int, recipe: str) -> Callable[[], None]:
    """Sets up a run of a recipe at full image size.

    Args:
        device: where to train.
        batch_size: images per step.
        recipe: name of the recipe.

    Returns:
        A function that trains on one batch.
    """
    config = resfast.recipe(recipe)
    optim = replace(config.optim, whitening_bias_epochs=0.0)  # only used in the first epochs
    dtype = torch.bfloat16
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
        dtype=dtype,
    )
    model = build_model(network(config.model), 10)
    set_winograd_tile(model, config.runtime.winograd_tile)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, optim)
    schedule = Schedule(optimizer, optim, EPOCHS, len(loader))
    train = TrainStep(
        model,
        optimizer,
        optim,
        device=device,
        dtype=dtype,
        compile=True,
        schedule=schedule,
        captured=device.type == "cuda" and why_not_captured(optim, dtype) is None,
        image_losses=config.data.filter_keep < 1,
    )
    batches = DeviceBatches(loader, resize_by=config.data.resize_by)
    metrics = StepMetrics(len(loader), IMAGES if config.data.filter_keep < 1 else 0, device)
    pixels = loader.image_size
    batch = batches.next(batch_size, pixels)
    warm_up_step(train, batch.images, batch.labels, fall_back=False, source=(batches, metrics))
    steps = itertools.count()

    def step() -> None:
        number = next(steps)
        if number % len(loader) == 0:
            batches.begin(number // len(loader))
            metrics.begin()
        train.train_next(batches, metrics, batch_size, pixels)
        schedule.step(number)

    return step
