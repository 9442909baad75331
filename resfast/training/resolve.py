"""Fills in the values of a configuration that depend on the data set and the machine."""

from __future__ import annotations

from dataclasses import replace

import torch

from resfast import runtime
from resfast.config.network import network
from resfast.config.paths import absolute_paths
from resfast.config.recipes import decide
from resfast.config.recipes.conditions import SMALL_DATA_IMAGES
from resfast.config.schema import Config, OptimConfig
from resfast.data.batches import choose_loader
from resfast.data.dataset import Dataset, Stream
from resfast.errors import ResfastError
from resfast.models.resnet import ResNetSpec
from resfast.models.speednet import SpeedNetSpec
from resfast.training.step_graphs import why_not_captured

EPOCHS, SMALL_DATA_EPOCHS = 70, 14
"""Epochs of a recipe that gives none, and those for a small training set."""
BATCH_SIZE, SMALL_DATA_BATCH_SIZE = 128, 64
"""Batch size of a recipe that gives none, and that for a small training set."""
COMPILE_WORTH_IMAGES, COMPILE_WORTH_IMAGES_WITH_KERNELS = 100_000, 2_000_000
"""With ``compile=auto``, a CPU run that trains on fewer images than this in total ends before
compilation pays off. Where this project's kernels compute nearly everything, torch.compile makes
steps only 3 to 4 % faster (docs/recipes.md)."""


def resolve(config: Config, data: Dataset | Stream, train_images: int) -> tuple[Config, list[str]]:
    """The configuration with all undecided values set, for this data set and machine.

    Args:
        config: the requested configuration.
        data: the data set.
        train_images: number of training images, without the held-out ones.

    Returns:
        The configuration, with absolute paths so that the run can be used from any folder, and a
        sentence for each choice worth reporting.

    Raises:
        ResfastError: a value that does not fit the data or the machine.
    """
    notes: list[str] = []
    requested, varies = config.optim, "batch_size" in config.undecided
    small = train_images < SMALL_DATA_IMAGES
    adapted = []
    device = runtime.resolve_device(config.runtime.device)
    loader = choose_loader(config.data.loader, data, device)
    if requested.epochs is None:
        epochs = SMALL_DATA_EPOCHS if small else EPOCHS
        config = replace(config, optim=replace(requested, epochs=epochs))
        adapted += [f"{EPOCHS} epochs to {epochs}"] if small else []
    config = decide(config, train_images=train_images, streamed=loader == "dali")
    optim = config.optim
    if varies and optim.batch_size is not None:
        optim = replace(optim, batch_size=min(optim.batch_size, train_images))
        if optim.batch_size != requested.batch_size:
            adapted += [f"batch size {requested.batch_size} to {optim.batch_size}"]
    if optim.batch_size is None:
        batch = min(SMALL_DATA_BATCH_SIZE, train_images) if small else BATCH_SIZE
        optim = replace(optim, batch_size=batch)
        if small:
            # SGD: Goyal et al., arXiv:1706.02677; Adam: Malladi et al., arXiv:2205.10287.
            # The norm of Muon's updates, like Adam's, does not depend on the gradient's; the
            # parameters that Muon leaves to SGD scale as for SGD.
            power = 1.0 if optim.optimizer == "sgd" else 0.5
            others = 1.0 if optim.optimizer == "muon" else power
            lr = _scaled(optim.lr, batch, power)
            adapted += [
                f"batch size {BATCH_SIZE} to {batch}",
                f"learning rate {optim.lr:g} to {lr:g}",
            ]
            rates = {
                name: _scaled(value, batch, others)
                for name in ("head_lr", "bias_lr")
                if (value := getattr(optim, name)) is not None
            }
            optim = replace(optim, lr=lr, **rates)
    if adapted:
        options = [
            o for o in ("epochs", "batch_size") if getattr(requested, o) != getattr(optim, o)
        ]
        notes.append(
            f"adapted to {train_images:,} training images: {', '.join(adapted)} "
            f"(set {' and '.join('--' + o.replace('_', '-') for o in options)} to choose)"
        )
    precision = runtime.resolve_precision(config.runtime.precision, device)
    images = round(optim.epochs * train_images)
    if config.transfer.pretrain != "none":
        compile, cuda_graph = "off", "off"
    else:
        kernels = precision == "bf16" and _has_kernels(config)
        compile, note = _resolve_compile(config.runtime.compile, device, images, kernels)
        if note:
            notes.append(note)
        cuda_graph, note = _resolve_cuda_graph(config, device, precision, optim)
        if note:
            notes.append(note)
    if loader == "dali":
        for option, is_set in (
            ("batch-sizes", optim.batch_sizes),
            ("filter-keep", config.data.filter_keep < 1),
            ("pretrain", config.transfer.pretrain != "none"),
        ):
            if is_set:
                raise ResfastError(
                    f"--{option} needs --loader resident, because DALI prepares batches in "
                    "advance; load the data set into memory, or leave the option out"
                )
    resolved = replace(
        config,
        optim=optim,
        data=replace(config.data, data=data.name, image_size=data.image_size, loader=loader),
        runtime=replace(
            config.runtime,
            device=str(device),
            precision=precision,
            compile=compile,
            cuda_graph=cuda_graph,
        ),
    )
    return absolute_paths(resolved), notes


def _scaled(lr: float, batch: int, power: float) -> float:
    return float(f"{lr * (batch / BATCH_SIZE) ** power:.4g}")


def _has_kernels(config: Config) -> bool:
    """Whether convolutions, norms and activations in bfloat16 on this CPU are our kernels."""
    from resfast.ops.conv_train import op as conv_train

    spec = network(config.model)
    return conv_train.AVAILABLE and (
        isinstance(spec, SpeedNetSpec) or (isinstance(spec, ResNetSpec) and spec.norm == "batch")
    )


def _resolve_compile(
    requested: str, device: torch.device, images: int, kernels: bool
) -> tuple[str, str | None]:
    if requested == "off":
        return "off", None
    missing = runtime.compiler_missing(device)
    if missing and requested == "on":
        raise ResfastError(
            f"--compile on is not possible: {missing}; install one or use --compile auto"
        )
    if missing:
        return "off", f"training without torch.compile: {missing}"
    worth = COMPILE_WORTH_IMAGES_WITH_KERNELS if kernels else COMPILE_WORTH_IMAGES
    if requested == "auto" and device.type == "cpu" and images < worth:
        return "off", (
            f"training without torch.compile: it pays off from {worth:,} images in "
            f"total, and this run has {images:,} (--compile on to force it)"
        )
    return requested, None


def _resolve_cuda_graph(
    config: Config, device: torch.device, precision: str, optim: OptimConfig
) -> tuple[str, str | None]:
    requested = config.runtime.cuda_graph
    if requested == "off":
        return "off", None
    on_cuda = device.type == "cuda"
    reason = f"the device is {device}"
    if on_cuda:
        reason = why_not_captured(optim, runtime.DTYPES[precision])
        if {"gradients", "smoothness"} & set(config.run.record):
            reason = "--record measures gradients between the backward pass and the optimizer"
        if config.transfer.teacher is not None:
            reason = "the teacher of --teacher runs between its parts"
    if reason and requested == "on":
        raise ResfastError(f"--cuda-graph on is not possible: {reason}; use --cuda-graph auto")
    if reason:
        return "off", f"training without a CUDA graph: {reason}" if on_cuda else None
    return requested, None
