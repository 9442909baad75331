"""Checks of a configuration that need neither data nor a device.

The range of a single option is declared on its field in :mod:`resfast.config.schema`; rules that
relate several options are the functions below. What depends on the data set or the machine is
checked in :mod:`resfast.training.resolve`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, get_args, get_type_hints

import pydantic
import torch

from resfast.config.network import network
from resfast.config.options import (
    Deviations,
    Expected,
    Means,
    PhaseList,
    Phases,
    PositiveFraction,
    phases_text,
)
from resfast.config.schema import ADAPTER, Config, ModelConfig, TransferConfig
from resfast.data.sources import known_classes
from resfast.errors import ResfastError, nearest
from resfast.models.imported import is_imported
from resfast.models.presets import build_model
from resfast.models.resnet import count_parameters

_RANGE_ERRORS = {
    "finite_number",
    "greater_than",
    "greater_than_equal",
    "int_from_float",
    "less_than",
    "less_than_equal",
}
_MIN_CLASSES = 2
RECORDED = ("loss", "gradients", "smoothness")
"""Values of ``--record``."""


def check(config: Config) -> None:
    """Checks every value that can be checked without data, a device or a built network.

    Raises:
        ResfastError: names the first bad value, what was expected and what to do.
    """
    check_fields(config)
    _check_scoring(config)
    _check_normalization(config)
    _check_phases(config.data.sizes, "sizes")
    _check_phases(config.optim.batch_sizes, "batch-sizes")
    _check_optimizer(config)
    _check_schedule(config)
    _check_loggers(config)
    _check_record(config)
    _check_transfer(config)
    network(config.model)


def check_fields(config: Config) -> None:
    """Checks each value by itself against the type and range of its field.

    Raises:
        ResfastError: names the first bad value and what was expected.
    """
    try:
        ADAPTER.validate_python(asdict(config))
    except pydantic.ValidationError as error:
        raise ResfastError(_message(config, error)) from None


def _message(config: Config, error: pydantic.ValidationError) -> str:
    """What is wrong with the first bad field."""
    errors = error.errors()
    group, *path = errors[0]["loc"]
    if not path or not isinstance(path[0], str):
        return f"{group}: {errors[0]['msg']}"
    name = path[0]
    option, value = "--" + name.replace("_", "-"), getattr(getattr(config, group), name)
    types = {e["type"] for e in errors if e["loc"][:2] == (group, name)}
    if types <= _RANGE_ERRORS:
        hint = _hints(type(getattr(config, group)))[name]
        shown = value
        if isinstance(value, tuple):
            phases = name in ("sizes", "batch_sizes")
            shown = phases_text(value) if phases else ",".join(map(str, value))
        return _out_of_range(option, shown, expectation(hint))
    return f"{option} {value!r} is invalid: {errors[0]['msg']}"


def _out_of_range(option: str, value: object, expected: str) -> str:
    return f"{option} {value} is out of range: expected {expected}"


@cache
def _hints(group: type) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def expectation(hint: Any) -> str:
    """The range that a field's type declares, in words."""
    bounds: dict[str, float] = {}
    for part in _metadata(hint):
        if isinstance(part, Expected):
            return part.text
        for constraint in getattr(part, "metadata", ()):
            for bound in ("ge", "gt", "le", "lt"):
                value = getattr(constraint, bound, None)
                if value is not None:
                    bounds.setdefault(bound, value)
    match bounds:
        case {"ge": low, "lt": high}:
            return f"at least {low} and below {high}"
        case {"ge": low, "le": high}:
            return f"at least {low}, at most {high}"
        case {"gt": low, "le": high}:
            return f"above {low}, at most {high}"
        case {"gt": low, "lt": high}:
            return f"between {low} and {high}"
        case {"ge": low}:
            return f"a number of at least {low}"
        case {"gt": 0}:
            return "a positive number"
    return "a finite number"


def _metadata(hint: Any) -> Iterator[Any]:
    """The metadata of ``Annotated`` on a type and on the members of a union."""
    yield from getattr(hint, "__metadata__", ())
    for member in get_args(hint):
        yield from getattr(member, "__metadata__", ())


def _check_phases(phases: Phases, option: str) -> None:
    if not all(before < after for before, after in pairwise(end for _, end in phases)):
        raise ResfastError(
            _out_of_range(f"--{option}", phases_text(phases), expectation(PhaseList))
        )


def _check_scoring(config: Config) -> None:
    data = config.data
    if not (config.evaluation.score_test or data.hold_out or data.val_fraction):
        raise ResfastError(
            "--no-score-test leaves nothing to score: hold out images with --hold-out or "
            "--val-fraction"
        )


def _check_normalization(config: Config) -> None:
    data = config.data
    for name, values, hint in (("mean", data.mean, Means), ("std", data.std, Deviations)):
        text = ",".join(f"{value:g}" for value in values)
        if values and not data.normalize:
            raise ResfastError(f"--{name} {text} and --no-normalize exclude each other; choose one")
        if len(values) not in (0, 3):
            raise ResfastError(_out_of_range(f"--{name}", text, expectation(hint)))


def _check_optimizer(config: Config) -> None:
    optim = config.optim
    for first, second in (("clip_value", "clip_norm"), ("ema", "lookahead")):
        if getattr(optim, first) and getattr(optim, second):
            options = " and ".join("--" + name.replace("_", "-") for name in (first, second))
            raise ResfastError(f"{options} are both set; choose one")
    if not optim.nesterov and optim.optimizer != "sgd":
        raise ResfastError(
            f"--no-nesterov is an option of sgd, but the optimizer is {optim.optimizer}; leave it "
            "out or choose --optimizer sgd"
        )
    if optim.cycle_momentum and optim.optimizer in ("adagrad", "adadelta", "rmsprop"):
        raise ResfastError(
            f"--cycle-momentum needs an optimizer with momentum, which {optim.optimizer} is not; "
            "leave it out"
        )
    if optim.optimizer == "muon":
        return
    for name, unset in (("normalize_filters", False), ("sgd_momentum", None)):
        if getattr(optim, name) != unset:
            raise ResfastError(
                f"--{name.replace('_', '-')} is an option of muon, but the optimizer is "
                f"{optim.optimizer}; leave it out or choose --optimizer muon"
            )


def _check_schedule(config: Config) -> None:
    optim = config.optim
    if optim.schedule not in ("linear", "cosine") and optim.end_factor == 0:
        expected = expectation(PositiveFraction)
        raise ResfastError(_out_of_range("--end-factor", optim.end_factor, expected))
    milestones = ",".join(map(str, optim.milestones))
    if optim.schedule == "multistep" and not (optim.milestones or optim.milestone_steps):
        raise ResfastError(
            "--schedule multistep needs --milestones, for example 30,60, or --milestone-steps"
        )
    if optim.milestones and optim.milestone_steps:
        raise ResfastError("--milestones and --milestone-steps are both set; choose one")
    if list(optim.milestone_steps) != sorted({m for m in optim.milestone_steps if m >= 1}):
        steps = ",".join(map(str, optim.milestone_steps))
        expected = "increasing steps of at least 1"
        raise ResfastError(_out_of_range("--milestone-steps", steps, expected))
    if optim.schedule_epochs and optim.schedule not in ("linear", "cosine"):
        raise ResfastError(
            f"--schedule-epochs is an option of cosine and linear, but the schedule is "
            f"{optim.schedule}; leave it out"
        )
    if optim.rate_per_epoch and optim.schedule == "plateau":
        raise ResfastError("--rate-per-epoch does nothing with --schedule plateau; leave it out")
    if list(optim.milestones) != sorted({m for m in optim.milestones if m >= 1}):
        expected = "increasing epochs of at least 1"
        raise ResfastError(_out_of_range("--milestones", milestones, expected))
    epochs = optim.epochs
    late = bool(optim.milestones) and epochs is not None and optim.milestones[-1] >= epochs
    if optim.schedule == "multistep" and late:
        expected = f"epochs below --epochs {epochs}"
        raise ResfastError(_out_of_range("--milestones", milestones, expected))


def _check_transfer(config: Config) -> None:
    transfer, usual = config.transfer, TransferConfig()
    for name, source in (
        ("distill_temperature", "teacher"),
        ("distill_weight", "teacher"),
        ("pseudo_from", "unlabelled"),
        ("pseudo_threshold", "unlabelled"),
        ("unlabelled", "pseudo_from"),
    ):
        if getattr(transfer, name) != getattr(usual, name) and getattr(transfer, source) is None:
            options = ["--" + option.replace("_", "-") for option in (name, source)]
            raise ResfastError(f"{options[0]} needs {options[1]}; give both or leave it out")
    _check_pretraining(config)


def _check_pretraining(config: Config) -> None:
    transfer, usual = config.transfer, TransferConfig()
    if transfer.pretrain == "none":
        for name in ("projector", "redundancy_weight"):
            if getattr(transfer, name) != getattr(usual, name):
                raise ResfastError(
                    f"--{name.replace('_', '-')} needs --pretrain barlow_twins; leave it out"
                )
        return
    if is_imported(config.model.model):
        raise ResfastError(
            f"--pretrain needs a network of this project, whose features it can take, but "
            f"{config.model.model!r} is made elsewhere; choose another --model (--list)"
        )
    for option, is_set in (
        ("--accumulate", config.optim.accumulate > 1),
        ("--filter-keep", config.data.filter_keep < 1),
        ("--augment mixup and cutmix", config.data.augment.mixes),
        ("--teacher", transfer.teacher is not None),
        ("--compile on", config.runtime.compile == "on"),
        ("--cuda-graph on", config.runtime.cuda_graph == "on"),
    ):
        if is_set:
            raise ResfastError(
                f"{option} cannot be combined with --pretrain {transfer.pretrain}, whose loss "
                "compares whole batches of two views; leave it out"
            )
    if not transfer.projector or min(transfer.projector) < 1:
        sizes = ",".join(map(str, transfer.projector)) or "(none)"
        raise ResfastError(f"--projector {sizes} is out of range: expected sizes of at least 1")


def _check_record(config: Config) -> None:
    for name in config.run.record:
        if name not in RECORDED:
            raise ResfastError(
                f"--record {name} is unknown{nearest(name, RECORDED)}; choose from "
                f"{','.join(RECORDED)}"
            )


def _check_loggers(config: Config) -> None:
    for name in ("tensorboard", "wandb"):
        if getattr(config.run, name) and find_spec(name) is None:
            raise ResfastError(f"--{name} needs the package {name}; pip install 'resfast[{name}]'")


def check_network(config: Config) -> None:
    """Builds the network to check its parameter count and the image sizes that it accepts.

    The number of classes of a folder or of shards is unknown until it is opened. Parameters are
    then counted for two classes, the minimum; training counts them again.

    Raises:
        ResfastError: a network above the budget, or an image size that does not fit the images or
            the network.
    """
    data = config.data
    check_sizes(data.sizes, data.image_size)
    # Not on the meta device: its first use takes seconds for imports.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        classes = known_classes(data.data) or _MIN_CLASSES
        model = build_model(network(config.model), classes, data.image_size).eval()
        check_budget(config.model, count_parameters(model))
        for size, _ in data.sizes:
            try:
                model(torch.zeros(1, 3, size, size))
            except RuntimeError as error:
                raise size_refused(data.sizes, error) from None


def check_sizes(sizes: Phases, image_size: int) -> None:
    """Checks that no phase of ``--sizes`` is larger than the images.

    Args:
        sizes: the phases.
        image_size: height and width of the images, in pixels.

    Raises:
        ResfastError: a phase is larger.
    """
    for size, _ in sizes:
        if size > image_size:
            raise ResfastError(
                f"--sizes {phases_text(sizes)} has {size} pixels, more than the images' "
                f"{image_size}: choose sizes up to {image_size}"
            )


def size_refused(sizes: Phases, error: RuntimeError) -> ResfastError:
    """The error for a phase of ``--sizes`` that the network cannot take."""
    return ResfastError(
        f"--sizes {phases_text(sizes)}: the network cannot take that size "
        f"({next(iter(str(error).splitlines()), error)}); choose larger ones"
    )


def check_budget(config: ModelConfig, parameters: int) -> None:
    """Checks a parameter count against ``--param-budget``.

    Raises:
        ResfastError: the network has more parameters than the budget allows.
    """
    if config.param_budget and parameters > config.param_budget:
        raise ResfastError(
            f"model {config.model} has {parameters:,} parameters, above the budget of "
            f"{config.param_budget:,}; choose a smaller model (--list) or --param-budget 0 for none"
        )
