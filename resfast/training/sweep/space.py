"""The file of a sweep: base options, objective, pruner, and a range for each field searched."""

from __future__ import annotations

import math
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pydantic

from resfast.config.files import describe
from resfast.config.recipes.conditions import GROUP_OF
from resfast.config.recipes.family import with_values
from resfast.config.schema import ADAPTER, Config
from resfast.config.validate import check_fields
from resfast.errors import ResfastError, nearest

Objective = Literal["accuracy", "tta_accuracy", "loss"]
Pruner = Literal["median", "halving", "hyperband", "none"]
Kind = Literal["float", "int", "categorical"]
DIRECTIONS: dict[str, str] = {
    "accuracy": "maximize",
    "tta_accuracy": "maximize",
    "loss": "minimize",
}
"""Objective to direction. All are measured on held-out images, never on the test images."""

_NOT_SEARCHED = {
    **dict.fromkeys(("data", "data_dir", "skip_corrupt", "classes"), "trials need the same data"),
    **dict.fromkeys(
        ("val_fraction", "hold_out", "score_test"),
        "trials are compared on the same held-out images",
    ),
    "seed": "the best seed is luck; use train --runs for several seeds",
    "param_budget": "it is the constraint; put --param-budget into options",
    **dict.fromkeys(("device", "threads", "tune_allocator"), "it does not belong to the result"),
}
"""Fields that cannot be searched, and why."""
_KEYS = ("options", "objective", "direction", "pruner", "startup_trials", "warmup_epochs", "seed")
_PARAMETER_KEYS = ("type", "low", "high", "log", "step", "choices")


@dataclass(frozen=True)
class Parameter:
    """A field that is searched.

    Attributes:
        name: of the field of the configuration.
        kind: ``float``, ``int`` or ``categorical``.
        low: least value of a number.
        high: greatest value of a number.
        log: whether it is searched on a logarithmic scale.
        step: distance between values; None for any.
        choices: of ``categorical``: text that names it to value.
    """

    name: str
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: Mapping[str, Any] | None = None

    def suggest(self, trial: Any) -> Any:
        """The value of this field in a trial of Optuna."""
        if self.kind == "categorical":
            assert self.choices is not None
            return self.choices[trial.suggest_categorical(self.name, list(self.choices))]
        if self.kind == "int":
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(
                self.name, int(self.low), int(self.high), log=self.log, step=step
            )
        return trial.suggest_float(self.name, self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Space:
    """What a sweep searches.

    Attributes:
        options: base options of every trial, as on the command line of ``train``.
        parameters: the fields that are searched.
        objective: what is optimized, on held-out images.
        pruner: what stops trials that are worse than others at the same epoch.
        startup_trials: trials that are never pruned.
        warmup_epochs: first epochs of a trial, in which it is not pruned.
        seed: of the sampler.
        text: of the file.
    """

    options: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    objective: Objective
    pruner: Pruner
    startup_trials: int
    warmup_epochs: int
    seed: int
    text: str

    @property
    def direction(self) -> str:
        """``maximize`` or ``minimize``."""
        return DIRECTIONS[self.objective]


@dataclass(frozen=True)
class _File:
    """The file before its parameters are checked against the base configuration."""

    settings: Mapping[str, Any]
    space: Mapping[str, Any]
    text: str


def read_options(path: Path) -> tuple[tuple[str, ...], _File]:
    """The base options of a sweep's file, and the rest for :func:`read_space`.

    Raises:
        ResfastError: it cannot be read, is not TOML, or has an unknown key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise ResfastError(
            f"cannot read {path}: {error.strerror}; expected the TOML file of a sweep"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ResfastError(f"{path}: {error}; expected a sweep as TOML") from None
    space = values.pop("space", None)
    if not isinstance(space, dict) or not space:
        raise ResfastError(
            f"{path} has no table [space]; expected a line for each option to search, such as "
            "lr = {low = 0.01, high = 1, log = true}"
        )
    _check_keys(values, _KEYS, str(path))
    options = values.get("options", "")
    if isinstance(options, str):
        try:
            options = shlex.split(options)
        except ValueError as error:
            raise ResfastError(f"{path}: options: {error}; expected train's options") from None
    if not isinstance(options, list) or not all(isinstance(part, str) for part in options):
        raise ResfastError(f"{path}: options is {options!r}; expected text, as after resfast train")
    return tuple(options), _File(values, space, text)


def read_space(path: Path, options: tuple[str, ...], rest: _File, base: Config) -> Space:
    """The space of a sweep, checked against its base configuration.

    Args:
        path: the file, for error messages.
        options: what :func:`read_options` returned.
        rest: the same.
        base: the configuration that the options describe.

    Raises:
        ResfastError: an unknown field, a value of the wrong type or out of range, or bounds in the
            wrong order.
    """
    settings = rest.settings
    objective = _choice(settings, "objective", get_args(Objective), "accuracy", path)
    direction = settings.get("direction", DIRECTIONS[objective])
    if direction != DIRECTIONS[objective]:
        raise ResfastError(
            f"{path}: direction is {direction!r}, but the objective {objective} is to "
            f"{DIRECTIONS[objective]}; leave it out"
        )
    parameters = tuple(
        _parameter(base, name.replace("-", "_"), values, f"{path}: space.{name}")
        for name, values in rest.space.items()
    )
    names = [parameter.name for parameter in parameters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ResfastError(
            f"{path}: space has {twice[0]} twice, with - and with _; leave one of them out"
        )
    return Space(
        options=options,
        parameters=parameters,
        objective=objective,  # type: ignore[arg-type]
        pruner=_choice(settings, "pruner", get_args(Pruner), "median", path),  # type: ignore[arg-type]
        startup_trials=_whole(settings, "startup_trials", 5, path),
        warmup_epochs=_whole(settings, "warmup_epochs", 1, path),
        seed=_whole(settings, "seed", 0, path),
        text=rest.text,
    )


def _check_keys(values: Iterable[str], known: tuple[str, ...], where: str) -> None:
    for name in values:
        if name not in known:
            raise ResfastError(
                f"{where}: unknown key {name!r}{nearest(name, known)} (known: {', '.join(known)})"
            )


def _choice(
    settings: Mapping[str, Any], name: str, known: tuple[str, ...], usual: str, path: Path
) -> str:
    value = settings.get(name, usual)
    if value not in known:
        hint = nearest(str(value), known)
        raise ResfastError(f"{path}: {name} is {value!r}; choose {', '.join(known)}{hint}")
    return value


def _whole(settings: Mapping[str, Any], name: str, usual: int, path: Path) -> int:
    value = settings.get(name, usual)
    if type(value) is not int or value < 0:
        raise ResfastError(f"{path}: {name} is {value!r}; expected a whole number of at least 0")
    return value


def _parameter(base: Config, name: str, values: Any, where: str) -> Parameter:
    if name not in GROUP_OF:
        raise ResfastError(f"{where}: no option {name!r}{nearest(name, sorted(GROUP_OF))}")
    if name in _NOT_SEARCHED:
        raise ResfastError(f"{where} cannot be searched: {_NOT_SEARCHED[name]}")
    if not isinstance(values, dict):
        raise ResfastError(
            f"{where} is {values!r}; expected {{low = …, high = …}} or {{choices = […]}}"
        )
    _check_keys(values, _PARAMETER_KEYS, where)
    kind = values.get("type", "categorical" if "choices" in values else None)
    if kind is not None and kind not in get_args(Kind):
        raise ResfastError(f"{where}: type is {kind!r}; choose {', '.join(get_args(Kind))}")
    if kind == "categorical":
        return _categorical(base, name, values, where)
    return _numeric(base, name, kind, values, where)


def _categorical(base: Config, name: str, values: dict[str, Any], where: str) -> Parameter:
    if extra := sorted(values.keys() - {"type", "choices"}):
        raise ResfastError(f"{where}: {extra[0]} does not go with choices; leave one of them out")
    choices = values.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ResfastError(f"{where}: choices is {choices!r}; expected a list of two or more")
    found: dict[str, Any] = {}
    for given in choices:
        label = _label(given)
        if label in found:
            raise ResfastError(f"{where}: the choice {label} is given twice; leave one out")
        value = checked_value(base, name, given, where)
        if value in found.values():
            raise ResfastError(f"{where}: the choice {label} is given twice; leave one out")
        found[label] = value
    return Parameter(name, "categorical", choices=found)


def _label(value: Any) -> str:
    """A choice as text, as on the command line."""
    if isinstance(value, list):
        return ",".join(map(_label, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _numeric(
    base: Config, name: str, kind: Kind | None, values: dict[str, Any], where: str
) -> Parameter:
    if "choices" in values:
        raise ResfastError(f"{where}: choices do not go with type {kind}; leave one of them out")
    for key in ("low", "high"):
        value = values.get(key)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ResfastError(
                f"{where}: {key} is {value!r}; expected a number, or choices = […] for other values"
            )
    low, high, log, step = (
        values["low"],
        values["high"],
        values.get("log", False),
        values.get("step"),
    )
    if not isinstance(log, bool):
        raise ResfastError(f"{where}: log is {log!r}; expected true or false")
    numbers = _number_types(name)
    if not numbers:
        raise ResfastError(f"{where}: {name} is not a number; expected {{choices = […]}}")
    whole = type(low) is int and type(high) is int
    if kind is None:
        kind = "int" if numbers == {int} or (whole and int in numbers) else "float"
    if kind == "float" and float not in numbers:
        raise ResfastError(f"{where}: {name} is a whole number; expected type int")
    if kind == "int" and not whole:
        raise ResfastError(f"{where}: low {low} and high {high} must be whole numbers for type int")
    if not low < high:
        raise ResfastError(f"{where}: low {low} is not below high {high}; exchange or change them")
    if log and low <= 0:
        raise ResfastError(f"{where}: low {low} has no logarithm; expected above 0, or log = false")
    if step is not None and (type(step) not in (int, float) or not 0 < step <= high - low):
        raise ResfastError(f"{where}: step is {step!r}; expected above 0, at most high - low")
    if step is not None and (log or (kind == "int" and type(step) is not int)):
        need = "no step with log = true" if log else "a whole number"
        raise ResfastError(f"{where}: step is {step!r}; expected {need}")
    for value in (low, high):
        checked_value(base, name, value, where)
    return Parameter(name, kind, low, high, log, step)


def _hint(name: str) -> Any:
    return get_type_hints(type(getattr(Config(), GROUP_OF[name])), include_extras=True)[name]


def _number_types(name: str) -> set[type]:
    """``int`` and ``float`` as far as the type of a field has them; none for lists and flags."""

    def walk(hint: Any) -> Iterable[type]:
        if hint in (int, float):
            yield hint
        elif getattr(hint, "__origin__", None) is not tuple:
            for member in get_args(hint):
                if not isinstance(member, (str, int, float)) or isinstance(member, type):
                    yield from walk(member)

    return set(walk(_hint(name)))


def checked_value(base: Config, name: str, given: Any, where: str) -> Any:
    """A value of TOML as the value of a field.

    Text is read as on the command line where the option has a notation of its own: ``"2,1,1"`` for
    blocks, ``"crop=4,flip=random"`` for an augmentation. A list is one of numbers.

    Args:
        base: a configuration, whose other values are left as they are.
        name: of the field.
        given: the value.
        where: place in the file, for error messages.

    Raises:
        ResfastError: the wrong type, or out of range.
    """
    value = given
    if isinstance(given, str) and (parse := _notation(_hint(name))) is not None:
        try:
            value = parse([given])
        except ValueError as error:
            raise ResfastError(f"{where}: {error}") from None
    changed = with_values(base, {name: value})
    group = GROUP_OF[name]
    values = asdict(changed)
    try:
        found = getattr(getattr(ADAPTER.validate_python(values), group), name)
    except pydantic.ValidationError as error:
        try:  # which has better words for what is out of range
            check_fields(changed)
        except ResfastError as better:
            raise ResfastError(f"{where}: {better}") from None
        raise ResfastError(f"{where}: {describe(error)}") from None
    mismatched = isinstance(value, bool) != isinstance(found, bool)
    if mismatched or (isinstance(value, str) and isinstance(found, (int, float))):
        expected = "true or false" if isinstance(found, bool) else "a number"
        raise ResfastError(f"{where}: {given!r} is not a value of {name}; expected {expected}")
    return found


def _notation(hint: Any) -> Any:
    """The function that reads a field's own notation; None for plain values."""
    for part in (hint, *get_args(hint)):
        for extra in getattr(part, "__metadata__", ()):
            if (parse := getattr(extra, "instance_from_str", None)) is not None:
                return None if getattr(extra, "choices", None) else parse
    return None


def without_test_images(config: Config) -> Config:
    """The configuration of a trial: scored on held-out images alone.

    Raises:
        ResfastError: it holds out none.
    """
    if not (config.data.val_fraction or config.data.hold_out):
        raise ResfastError(
            "a sweep compares its trials on held-out images, and options hold out none; add "
            "--val-fraction 0.1 or --hold-out to options"
        )
    if config.run.runs > 1:
        raise ResfastError(f"--runs {config.run.runs} is not for a sweep; leave it out of options")
    return replace(config, evaluation=replace(config.evaluation, score_test=False))
