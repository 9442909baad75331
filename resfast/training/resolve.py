"""Turns the open values of a configuration into definite ones, and checks all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec

import torch

from resfast import runtime
from resfast.config.network import network
from resfast.config.schema import Config, OptimConfig
from resfast.data.batches import choose_loader
from resfast.data.dataset import Dataset, Stream
from resfast.errors import ResfastError
from resfast.training.plan import check_phases
from resfast.training.step import why_not_captured

SMALL_DATA_IMAGES = 10_000
"""Training sets below this many images get the small values where none were asked for."""
EPOCHS, SMALL_DATA_EPOCHS = 70, 14
BATCH_SIZE, SMALL_DATA_BATCH_SIZE = 128, 64
COMPILE_WORTH_IMAGES = 100_000
"""Under ``compile=auto`` a CPU run that sees fewer images than this is over before compiling
has paid for itself."""


def check(config: Config) -> None:
    """Checks every value that can be checked without data or device.

    Raises:
        ResfastError: the first bad value, what was expected and what to do.
    """
    optim, evaluation, data = config.optim, config.evaluation, config.data

    def need(ok: bool, option: str, value: object, expected: str) -> None:
        if not ok:
            raise ResfastError(f"--{option} {value} is out of range: expected {expected}")

    def at_least(option: str, value: float | None, least: float) -> None:
        if value is not None:
            ok = math.isfinite(value) and value >= least
            need(ok, option, value, f"a number of at least {least}")

    at_least("epochs", optim.epochs, 1)
    at_least("batch-size", optim.batch_size, 1)
    at_least("accumulate", optim.accumulate, 1)
    at_least("weight-decay", optim.weight_decay, 0)
    at_least("head-weight-decay", optim.head_weight_decay, 0)
    at_least("bias-weight-decay", optim.bias_weight_decay, 0)
    at_least("newton-schulz-steps", optim.newton_schulz_steps, 1)
    at_least("whitening-bias-epochs", optim.whitening_bias_epochs, 0)
    at_least("lookahead", optim.lookahead, 0)
    at_least("lookahead-power", optim.lookahead_power, 0)
    at_least("clip-value", optim.clip_value, 0)
    at_least("clip-norm", optim.clip_norm, 0)
    at_least("patience", optim.patience, 0)
    at_least("eval-every", evaluation.eval_every, 0)
    at_least("eval-batch-size", evaluation.eval_batch_size, 1)
    at_least("early-stop", evaluation.early_stop, 0)
    at_least("prefetch", data.prefetch, 1)
    at_least("save-seconds", config.run.save_seconds, 0)
    at_least("runs", config.run.runs, 1)
    if config.run.max_seconds is not None:
        seconds = config.run.max_seconds
        need(0 < seconds < math.inf, "max-seconds", seconds, "a positive number of seconds")
    at_least("threads", config.runtime.threads, 0)
    at_least("seed", config.runtime.seed, 0)
    at_least("param-budget", config.model.param_budget, 0)
    for option in ("lr", "head_lr", "bias_lr"):
        value = getattr(optim, option)
        ok = value is None or 0 < value < math.inf
        need(ok, option.replace("_", "-"), value, "a positive number")
    for option in ("momentum", "sgd_momentum", "label_smoothing", "ema", "lookahead_decay"):
        value = getattr(optim, option)
        ok = value is None or 0 <= value < 1
        need(ok, option.replace("_", "-"), value, "at least 0 and below 1")
    need(0 <= optim.warmup <= 1, "warmup", optim.warmup, "a part of the training, 0 to 1")
    need(0 < optim.start_factor <= 1, "start-factor", optim.start_factor, "above 0, at most 1")
    if optim.schedule == "linear":
        need(0 <= optim.end_factor <= 1, "end-factor", optim.end_factor, "at least 0, at most 1")
    else:
        need(0 < optim.end_factor <= 1, "end-factor", optim.end_factor, "above 0, at most 1")
    need(0 < optim.gamma < 1, "gamma", optim.gamma, "between 0 and 1")
    need(0 <= data.val_fraction < 1, "val-fraction", data.val_fraction, "at least 0 and below 1")
    at_least("hold-out", data.hold_out, 0)
    if not (evaluation.score_test or data.hold_out or data.val_fraction):
        raise ResfastError(
            "--no-score-test leaves nothing to score: hold out images with --hold-out or "
            "--val-fraction"
        )
    for option in ("tta_select", "tta_mirror"):
        part = getattr(evaluation, option)
        expected = "a part of the images, above 0, at most 1"
        need(0 < part <= 1, option.replace("_", "-"), part, expected)
    check_phases(data.sizes, "sizes")
    check_phases(optim.batch_sizes, "batch-sizes")
    need(0 <= data.filter_start <= 1, "filter-start", data.filter_start, "a part, 0 to 1")
    need(0 < data.filter_keep <= 1, "filter-keep", data.filter_keep, "above 0, at most 1")
    if optim.clip_value and optim.clip_norm:
        raise ResfastError("--clip-value and --clip-norm are both set; choose one")
    if optim.ema and optim.lookahead:
        raise ResfastError("--ema and --lookahead are both set; choose one")
    if optim.optimizer != "muon":
        for option, unset in (("normalize_filters", False), ("sgd_momentum", None)):
            if getattr(optim, option) != unset:
                raise ResfastError(
                    f"--{option.replace('_', '-')} is of muon, and the optimizer is "
                    f"{optim.optimizer}; leave it out or choose --optimizer muon"
                )
    if optim.schedule == "multistep" and not optim.milestones:
        raise ResfastError("--schedule multistep needs --milestones, for example 30,60")
    milestones = ",".join(map(str, optim.milestones))
    rising = list(optim.milestones) == sorted({m for m in optim.milestones if m >= 1})
    need(rising, "milestones", milestones, "rising epochs of at least 1")
    if optim.schedule == "multistep" and config.optim.epochs is not None:
        need(
            optim.milestones[-1] < config.optim.epochs,
            "milestones",
            milestones,
            f"epochs before the last of {config.optim.epochs}",
        )
    if evaluation.target is not None:
        need(0 < evaluation.target <= 1, "target", evaluation.target, "an accuracy, 0.94 for 94 %")
    for option in ("tensorboard", "wandb"):
        if getattr(config.run, option) and find_spec(option) is None:
            raise ResfastError(
                f"--{option} needs the package {option}; pip install 'resfast[{option}]'"
            )
    network(config.model)


def resolve(config: Config, data: Dataset | Stream, train_images: int) -> tuple[Config, list[str]]:
    """A configuration without open values, for this data set and this machine.

    Args:
        config: what was asked for.
        data: the data set.
        train_images: images trained on, the held-out part taken off.

    Returns:
        The configuration, and a sentence for each value that was adapted.

    Raises:
        ResfastError: a value that does not fit the data or the machine.
    """
    notes: list[str] = []
    optim, asked = config.optim, config.optim
    small = train_images < SMALL_DATA_IMAGES
    adapted = []
    if optim.epochs is None:
        optim = replace(optim, epochs=SMALL_DATA_EPOCHS if small else EPOCHS)
        adapted += [f"{EPOCHS} epochs to {optim.epochs}"] if small else []
    if optim.batch_size is None:
        batch = min(SMALL_DATA_BATCH_SIZE, train_images) if small else BATCH_SIZE
        optim = replace(optim, batch_size=batch)
        if small:
            # SGD: Goyal et al., arXiv:1706.02677; Adam: Malladi et al., arXiv:2205.10287.
            # Muon's updates have a norm of their own, like Adam's; what it leaves to SGD has not.
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
        options = [o for o in ("epochs", "batch_size") if getattr(asked, o) is None]
        notes.append(
            f"adapted to {train_images:,} training images: {', '.join(adapted)} "
            f"(set {' and '.join('--' + o.replace('_', '-') for o in options)} to choose)"
        )
    device = runtime.resolve_device(config.runtime.device)
    precision = runtime.resolve_precision(config.runtime.precision, device)
    images = round(optim.epochs * train_images)
    compile, why = _resolve_compile(config.runtime.compile, device, images)
    if why:
        notes.append(why)
    cuda_graph, why = _resolve_cuda_graph(config.runtime.cuda_graph, device, precision, optim)
    if why:
        notes.append(why)
    loader = choose_loader(config.data.loader, data, device)
    if loader == "dali":
        for option, given in (
            ("batch-sizes", optim.batch_sizes),
            ("filter-keep", config.data.filter_keep < 1),
        ):
            if given:
                raise ResfastError(
                    f"--{option} needs --loader resident: DALI is told its batches ahead; hold "
                    "the set in memory, or leave the option out"
                )
    return (
        replace(
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
        ),
        notes,
    )


def _scaled(lr: float, batch: int, power: float) -> float:
    return float(f"{lr * (batch / BATCH_SIZE) ** power:.4g}")


def _resolve_compile(asked: str, device: torch.device, images: int) -> tuple[str, str | None]:
    if asked == "off":
        return "off", None
    missing = runtime.compiler_missing(device)
    if missing and asked == "on":
        raise ResfastError(
            f"--compile on is not possible: {missing}; install one or use --compile auto"
        )
    if missing:
        return "off", f"training without torch.compile: {missing}"
    if asked == "auto" and device.type == "cpu" and images < COMPILE_WORTH_IMAGES:
        return "off", (
            f"training without torch.compile: {images:,} images in all are fewer than the "
            f"{COMPILE_WORTH_IMAGES:,} from which compiling pays (--compile on to force it)"
        )
    return asked, None


def _resolve_cuda_graph(
    asked: str, device: torch.device, precision: str, optim: OptimConfig
) -> tuple[str, str | None]:
    if asked == "off":
        return "off", None
    on_cuda = device.type == "cuda"
    reason = f"the device is {device}"
    if on_cuda:
        reason = why_not_captured(optim, runtime.DTYPES[precision])
    if reason and asked == "on":
        raise ResfastError(f"--cuda-graph on is not possible: {reason}; use --cuda-graph auto")
    if reason:
        return "off", f"training without a CUDA graph: {reason}" if on_cuda else None
    return asked, None
