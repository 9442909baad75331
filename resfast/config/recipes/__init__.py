"""Named configurations. Each is data, readable at a glance; compare two with ``diff``."""

from __future__ import annotations

from dataclasses import replace

from resfast.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
)
from resfast.data.augment import Augment
from resfast.errors import ResfastError, nearest

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
    # Rates and decays of head and biases are those of airbench94_muon, which sums the losses of a
    # batch and scales logits by 1/256, for a mean and for 1/9.
    "fast94": Config(
        recipe="fast94",
        model=ModelConfig(
            model="speednet-94",
            whitening_padding="same",
            head_std=0.035,
            norm_momentum=0.15,
            param_budget=FIVE_MILLION,
        ),
        data=DataConfig(
            augment=Augment(crop=2, flip="alternating"),
            sizes=((16, 0.3), (24, 0.7)),
            filter_start=0.25,
            filter_keep=0.5,
        ),
        optim=OptimConfig(
            epochs=12,
            batch_size=500,
            optimizer="muon",
            lr=0.12,
            head_lr=0.41,
            bias_lr=26.5,
            momentum=0.85,
            sgd_momentum=0.85,
            weight_decay=0.0,
            head_weight_decay=2.4e-3,
            bias_weight_decay=3.8e-5,
            newton_schulz_steps=3,
            normalize_filters=True,
            schedule="linear",
            warmup=0.0,
            end_factor=0.0,
            label_smoothing=0.1,
            whitening_bias_epochs=2.0,
        ),
        evaluation=EvalConfig(
            tta="multi-crop",
            tta_select=0.1,
            tta_mirror=0.4,
            eval_every=0,
            eval_batch_size=500,
            fuse=True,
        ),
        runtime=RuntimeConfig(winograd_tile=4),
    ),
}
"""Recipe name to configuration."""

_FAST94 = RECIPES["fast94"]

RECIPES["fast95"] = replace(
    _FAST94,
    recipe="fast95",
    model=replace(_FAST94.model, model="speednet-96"),
    data=replace(
        _FAST94.data, augment=Augment(crop=4, flip="alternating", cutout=8), filter_keep=0.75
    ),
    optim=replace(_FAST94.optim, epochs=24, whitening_bias_epochs=4.5),
)

# The logits are not scaled down here, so that head and biases take smaller rates.
RECIPES["fast-resnet-2111"] = replace(
    _FAST94,
    recipe="fast-resnet-2111",
    model=ModelConfig(
        model="resnet-2111", activation="gelu", freeze_norm_scale=True, param_budget=FIVE_MILLION
    ),
    data=replace(_FAST94.data, augment=Augment(crop=4, flip="alternating", cutout=8)),
    optim=replace(
        _FAST94.optim,
        epochs=28,
        accumulate=2,
        head_lr=0.03,
        bias_lr=0.4,
        whitening_bias_epochs=0.0,
    ),
)

_FAST_2111 = RECIPES["fast-resnet-2111"]

# With half of the images and cutout of 8x8 it got to know them by heart (98.9 % right).
RECIPES["fast-resnet-2111-70"] = replace(
    _FAST_2111,
    recipe="fast-resnet-2111-70",
    data=replace(
        _FAST_2111.data, augment=Augment(crop=4, flip="alternating", cutout=12), filter_keep=0.75
    ),
    optim=replace(_FAST_2111.optim, epochs=70),
)

RECIPES["fast-resnet-453"] = replace(
    _FAST_2111,
    recipe="fast-resnet-453",
    model=replace(_FAST_2111.model, model="resnet-453"),
    optim=replace(_FAST_2111.optim, epochs=10, accumulate=4),
)

SUMMARIES = {
    "default": "SGD (Nesterov), one-cycle, alternating flip, label smoothing, averaged weights",
    "fast-resnet-2111": "resnet-2111 the way of fast94, for longer",
    "fast-resnet-2111-70": "the same for 70 epochs, with more cutout: the most accurate",
    "fast-resnet-453": "resnet-453 the same way",
    "fast94": "speednet, Muon, growing images, hard ones late: airbench94's accuracy soonest",
    "fast95": "a wider speednet, cutout and more epochs: a point more",
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
