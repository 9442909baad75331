"""Types of options: their ranges, and the notation of those that are not one plain value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import pydantic
import tyro

from resfast.data.augment import Augment, parse_augment
from resfast.errors import ResfastError


@dataclass(frozen=True)
class Expected:
    """Describes the accepted values in error messages, where the bounds alone are unclear."""

    text: str


# Ranges. resfast.config.validate checks them and writes the error message.
NonNegativeInt = Annotated[int, pydantic.Field(ge=0)]
PositiveInt = Annotated[int, pydantic.Field(ge=1)]
NonNegative = Annotated[float, pydantic.Field(ge=0)]
Positive = Annotated[float, pydantic.Field(gt=0)]
AtLeastOne = Annotated[float, pydantic.Field(ge=1)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
PositiveFraction = Annotated[float, pydantic.Field(gt=0, le=1)]
BelowOne = Annotated[float, pydantic.Field(ge=0, lt=1)]
OpenFraction = Annotated[float, pydantic.Field(gt=0, lt=1)]
Accuracy = Annotated[float, pydantic.Field(gt=0, le=1), Expected("an accuracy, 0.94 for 94 %")]


def _text_option(
    metavar: str, parse: Callable[[str], Any], kind: type, show: Callable[[Any], str]
) -> tyro.constructors.PrimitiveConstructorSpec:
    """A one-argument option: ``parse`` reads it or raises ValueError, ``show`` prints it."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda argument: parse(argument[0]),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [show(value)],
    )


def choice(kind: Any) -> tyro.constructors.PrimitiveConstructorSpec:
    """An option that is None or one of the values of ``kind``, a Literal or bool.

    tyro keeps the choices of ``Literal[...] | None`` in a set, so its own messages list them in an
    order that changes from run to run.
    """
    values = {str(value): value for value in (get_args(kind) or (True, False))}
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{None,{','.join(values)}}}",
        instance_from_str=lambda argument: values.get(argument[0]),
        is_instance=lambda value: value is None or value in values.values(),
        str_from_instance=lambda value: [str(value)],
        choices=("None", *values),
    )


def _int_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part != "")
    except ValueError:
        raise ValueError(f"{text!r} is not a comma-separated list of whole numbers") from None


IntList = Annotated[
    tuple[int, ...],
    _text_option("N,N,…", _int_list, tuple, lambda values: ",".join(map(str, values))),
]
"""``2,1,1,1`` on the command line, a tuple of integers in Python."""


def _float_list(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part != "")
    except ValueError:
        raise ValueError(f"{text!r} is not a comma-separated list of numbers") from None


def _name_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


NameList = Annotated[
    tuple[str, ...], _text_option("NAME,NAME,…", _name_list, tuple, lambda names: ",".join(names))
]
"""``stem,stages.0`` on the command line, a tuple of strings in Python."""


def _floats_option() -> tyro.constructors.PrimitiveConstructorSpec:
    def show(values: tuple[float, ...]) -> str:
        return ",".join(f"{value:g}" for value in values)

    return _text_option("X,X,X", _float_list, tuple, show)


Means = Annotated[
    tuple[Annotated[float, pydantic.Field(ge=0, le=1)], ...],
    _floats_option(),
    Expected("three numbers from 0 to 1, as pixels / 255 have"),
]
Deviations = Annotated[
    tuple[Annotated[float, pydantic.Field(gt=0, le=1)], ...],
    _floats_option(),
    Expected("three numbers above 0 and at most 1, as pixels / 255 have"),
]
"""``0.49,0.48,0.45`` on the command line."""

OptionalBool = Annotated[bool | None, choice(bool)]

Phases = tuple[tuple[PositiveInt, PositiveFraction], ...]
"""Values, each with the fraction of training, 0 to 1, up to which it applies."""


def _phases(text: str) -> Phases:
    try:
        items = (part.split(":") for part in text.split(",") if part != "")
        return tuple((int(value), float(end)) for value, end in items)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a list of VALUE:FRACTION such as 24:0.5,28:0.8"
        ) from None


def phases_text(phases: Phases) -> str:
    """Phases in the notation of the command line."""
    return ",".join(f"{value}:{end:g}" for value, end in phases)


PhaseList = Annotated[
    Phases,
    _text_option("N:FRACTION,…", _phases, tuple, phases_text),
    Expected(
        "VALUE:FRACTION,… with whole values of at least 1 and increasing fractions of training, "
        "above 0 and at most 1"
    ),
]
"""``24:0.5,28:0.8`` on the command line, ``((24, 0.5), (28, 0.8))`` in Python."""


def _augment(text: str) -> Augment:
    try:
        return parse_augment(text)
    except ResfastError as error:
        raise ValueError(str(error)) from None


AugmentOption = Annotated[Augment, _text_option("POLICY", _augment, Augment, str)]
"""``standard,mixup=0.2`` on the command line, an ``Augment`` in Python."""
