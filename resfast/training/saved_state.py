"""Reads the checkpoint of a run: the newest undamaged one, of the types that training expects.

What is checked here needs no network: that every value has its type, and that the state belongs to
the run's configuration. :mod:`resfast.training.state` compares it with the network and the plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired

import pydantic
import torch
from torch import Tensor
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from resfast.config.compare import differences
from resfast.config.files import describe, from_json
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.models.imported import is_imported
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.training.plan import Plan
from resfast.training.step import TrainStep

DAMAGED = "checkpoint-damaged.pt"
"""A damaged checkpoint is kept under this name."""
_TYPES = pydantic.ConfigDict(arbitrary_types_allowed=True, strict=True, extra="allow")


class _Training(TypedDict):
    """State of :class:`resfast.training.step.TrainStep`."""

    __pydantic_config__ = _TYPES  # type: ignore[misc]

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    steps: NotRequired[int | None]


class _State(TypedDict):
    """State of :class:`resfast.training.state.TrainingState`. What may be missing is newer."""

    __pydantic_config__ = _TYPES  # type: ignore[misc]

    config: NotRequired[str]
    code: NotRequired[str | None]
    data: str
    epochs: NotRequired[int | float]
    epoch: int
    step: int
    training: _Training
    schedule: dict[str, Any]
    losses: Tensor
    correct: Tensor
    image_losses: NotRequired[Tensor | None]
    rates: NotRequired[Tensor]
    pseudo: NotRequired[dict[str, Any] | None]
    probe: NotRequired[dict[str, Any] | None]
    order: NotRequired[Tensor | None]
    epoch_seconds: float
    history: str
    best: list[Any]
    seconds: dict[str, float]
    peak_memory: NotRequired[int]
    loader: dict[str, Any]
    generator: Tensor
    cuda_generator: Tensor | None


_ADAPTER = pydantic.TypeAdapter(_State)
_FREE = {
    "epochs",  # more are allowed
    *("device", "precision", "compile", "cuda_graph", "tf32", "tune_allocator", "loader"),
    *("data", "classes", "init_from", "teacher", "unlabelled", "pseudo_from"),
}
"""Fields in which ``config.json`` may differ from the checkpoint: what the machine decides, and
paths, since data may move and its content is compared by a digest."""


def read(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The latest checkpoint of a run, or the one before if that is damaged.

    A damaged one is renamed to :data:`DAMAGED`, so that the next one does not replace the last good
    one.

    Args:
        path: folder of the run.
        say: called with a line if the older one is used.

    Raises:
        ResfastError: no checkpoint can be read; it says why the latest cannot.
    """
    latest, previous = path / records.CHECKPOINT, path / records.PREVIOUS
    if not latest.exists() and previous.exists():  # killed while one replaced the other
        return read_file(previous)
    try:
        return read_file(latest)
    except ResfastError as error:
        if not previous.exists():
            raise
        try:
            state = read_file(previous)
        except ResfastError:
            raise error from None
        latest.replace(path / DAMAGED)
        say(
            f"{error}; continuing from {previous.name} (after {state['epoch']} epochs), and "
            f"keeping the other as {DAMAGED}"
        )
        return state


def read_file(file: Path) -> dict[str, Any]:
    """The state in a checkpoint.

    Raises:
        ResfastError: it is missing or damaged, or a value is missing or of another type.
    """
    state = checkpoint.load_state(file)
    try:
        _ADAPTER.validate_python(state)
        if [type(value) for value in state["best"]] != [float, int, int]:
            raise ValueError(f"best: {state['best']} is not an accuracy and two numbers")
        if not isinstance(json.loads(state["history"]), list):
            raise ValueError("history: it is not a list")
        for name in ("epoch", "step"):
            if state[name] < 0:
                raise ValueError(f"{name}: {state[name]} is below 0")
    except pydantic.ValidationError as error:
        raise _unexpected(file, describe(error)) from None
    except ValueError as error:
        raise _unexpected(file, str(error)) from None
    return state


def check_belongs(state: dict[str, Any], config: Config, path: Path) -> None:
    """Checks that a state was saved with a configuration, or with fewer epochs of the same.

    Args:
        state: the state; those of older versions say nothing about their configuration.
        config: the run's configuration.
        path: folder of the run, for the error message.

    Raises:
        ResfastError: they differ, with both values of each field.
    """
    if "config" not in state:
        return
    saved = from_json(state["config"], f"the configuration in {path / records.CHECKPOINT}")
    differing = {
        name: values
        for name, values in differences(saved, config).items()
        if name not in _FREE and not (name == "model" and all(map(is_imported, values)))
    }
    if differing:
        listed = ", ".join(
            f"{name} is {now!r} in {records.CONFIG} and was {before!r}"
            for name, (before, now) in differing.items()
        )
        raise ResfastError(
            f"the checkpoint of {path} was trained with another configuration: {listed}; restore "
            f"{records.CONFIG} or the checkpoint, or start a new run with --config"
        )


def check_fits(state: dict[str, Any], step: TrainStep, plan: Plan, path: Path) -> None:
    """Checks that a state is one of this network, optimizer and number of steps.

    Args:
        state: the state.
        step: the training step that it will be loaded into.
        plan: the steps of the run.
        path: folder of the run, for the error message.

    Raises:
        ResfastError: a tensor is missing, unknown or of another shape, or the state is at a step
            that the run does not have.
    """
    file, training = path / records.CHECKPOINT, state["training"]
    _check_tensors(step.model.state_dict(), training["model"], file, "weights")
    if (step.average is None) != (training["ema"] is None):
        raise _unexpected(file, "averaged weights are there or missing unlike in the configuration")
    if step.average is not None:
        wanted = step.average.state_dict(0)
        _check_tensors(wanted, training["ema"], file, "averaged weights")
    _check_optimizer(step.optimizer, training["optimizer"], file)
    epoch, first_step = state["epoch"], state["step"]
    epochs, rates = plan.epochs, state.get("rates")
    if epoch > len(epochs) or (first_step and epoch == len(epochs)):
        raise _unexpected(file, f"it is at epoch {epoch + 1} of {len(epochs)}")
    if epoch < len(epochs) and first_step > len(epochs[epoch].batches):
        raise _unexpected(
            file, f"it is at step {first_step} of {len(epochs[epoch].batches)} in epoch {epoch + 1}"
        )
    steps = plan.steps_before(epoch, first_step)
    if rates is not None and rates.shape != (steps,):
        raise _unexpected(file, f"it has {list(rates.shape)} learning rates of {steps} steps")


def _check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], file: Path) -> None:
    """Checks the groups of an optimizer's state, and the shapes of its tensors."""
    try:
        counts = [len(group["params"]) for group in state["param_groups"]]
        values = dict(state["state"])
        wanted = [len(group["params"]) for group in optimizer.param_groups]
        if counts != wanted:
            raise ValueError(f"its groups have {counts} parameters and the run's {wanted}")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in values.get(number, {}).items():
                if isinstance(value, Tensor) and value.shape not in ((), parameter.shape):
                    raise ValueError(
                        f"{name} is {list(value.shape)} for a parameter {list(parameter.shape)}"
                    )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unexpected(file, f"optimizer: {error}") from None


def _check_tensors(
    wanted: dict[str, Tensor], given: dict[str, Tensor], file: Path, what: str
) -> None:
    """Checks the names and shapes of a state dict."""
    for name in [*wanted, *given]:
        if name not in given:
            raise _unexpected(file, f"{what}: {name} is missing")
        if name not in wanted:
            raise _unexpected(file, f"{what}: {name} is not part of the network")
        if given[name].shape != wanted[name].shape:
            raise _unexpected(
                file,
                f"{what}: {name} is {list(given[name].shape)}, in the network "
                f"{list(wanted[name].shape)}",
            )


def _unexpected(file: Path, why: str) -> ResfastError:
    return ResfastError(
        f"checkpoint {file} does not have what a run saves ({why}); expected an unchanged file "
        "written by resfast.train"
    )
