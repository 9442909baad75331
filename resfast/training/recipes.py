"""Named configurations. Each is data, readable at a glance; compare two with ``diff``."""

from __future__ import annotations

from resfast.data.augment import Augment
from resfast.errors import ResfastError, nearest
from resfast.training.config import Config, DataConfig, ModelConfig, OptimConfig

FIVE_MILLION = 5_000_000

RECIPES: dict[str, Config] = {
    "default": Config(
        recipe="default",
        model=ModelConfig(model="resnet-2111", param_budget=FIVE_MILLION),
        data=DataConfig(augment=Augment(crop=4, flip="alternating")),
        optim=OptimConfig(
            optimizer="sgd",
            lr=0.125,
            momentum=0.9,
            weight_decay=5e-4,
            schedule="onecycle",
            anneal="linear",
            warmup=0.2,
            start_factor=0.1,
            end_factor=0.001,
            label_smoothing=0.1,
            ema=0.995,
        ),
    ),
    # The first report's own settings; the batch size is ours.
    "report-onecycle": Config(
        recipe="report-onecycle",
        model=ModelConfig(model="resnet-2111", param_budget=FIVE_MILLION),
        data=DataConfig(augment=Augment(crop=4, flip="random")),
        optim=OptimConfig(
            epochs=70,
            batch_size=512,
            optimizer="adam",
            lr=0.01,
            momentum=0.9,
            weight_decay=1e-6,
            decay_norm_bias=True,
            schedule="onecycle",
            anneal="cos",
            cycle_momentum=True,
            warmup=0.3,
            start_factor=0.04,
            end_factor=4e-6,
            clip_value=0.1,
        ),
    ),
}
"""Recipe name to configuration."""

SUMMARIES = {
    "default": "SGD (Nesterov), one-cycle, alternating flip, label smoothing, averaged weights",
    "report-onecycle": "the first report's settings: Adam, one-cycle to 0.01, clip 0.1, 70 epochs",
}


def recipe(name: str) -> Config:
    """A recipe by name.

    Raises:
        ResfastError: an unknown name, with the nearest known one.
    """
    if name not in RECIPES:
        raise ResfastError(
            f"unknown recipe {name!r}{nearest(name, RECIPES)} (known: {', '.join(RECIPES)})"
        )
    return RECIPES[name]
