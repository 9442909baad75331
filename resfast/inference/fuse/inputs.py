"""The inputs of a traced network by position and by name: :class:`Inputs`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from torch import Tensor, nn

from resfast.errors import ResfastError

_SIMPLE = (bool, int, float, str)
OTHER = "another value"
"""In place of a default that is not None, a number or a string."""


@dataclass(frozen=True)
class Inputs:
    """How the arguments of the original network become the inputs of the traced one.

    Attributes:
        names: the traced inputs, in order.
        positional: what positional arguments are, in order; with those that are fixed.
        keywords: those of ``names`` that the original takes by keyword only.
        variadic: whether the original takes any number of positional arguments.
        fixed: values of arguments that are part of the graph: their defaults.
    """

    names: tuple[str, ...]
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    variadic: bool
    fixed: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, example: tuple[Any, ...] | None) -> Inputs:
        """Those of the network's forward that the example has; the first one without an example.

        Arguments without a default are always inputs.

        Raises:
            ResfastError: the example has more inputs than the network.
        """
        count = 1 if example is None else len(example)
        names: list[str] = []
        positional: list[str] = []
        keywords: list[str] = []
        fixed: dict[str, Any] = {}
        variadic = False
        for p in inspect.signature(model.forward).parameters.values():
            if p.kind is Parameter.VAR_POSITIONAL:
                variadic = True
                more = [f"{p.name}_{i}" for i in range(count - len(names))]
                names += more
                positional += more
            elif p.kind is not Parameter.VAR_KEYWORD:
                if p.kind is not Parameter.KEYWORD_ONLY:
                    positional.append(p.name)
                if len(names) < count or p.default is Parameter.empty:
                    names.append(p.name)
                    if p.kind is Parameter.KEYWORD_ONLY:
                        keywords.append(p.name)
                else:
                    simple = p.default is None or type(p.default) in _SIMPLE
                    fixed[p.name] = p.default if simple else OTHER
        if len(names) < count and example is not None:
            raise ResfastError(
                f"example has {count} inputs, but {type(model).__name__} takes {len(names)}"
            )
        return cls(tuple(names), tuple(positional), tuple(keywords), variadic, fixed)

    def split(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the original for values of the first inputs."""
        given = list(zip(self.names, values, strict=False))
        positional = tuple(value for name, value in given if name not in self.keywords)
        return positional, {name: value for name, value in given if name in self.keywords}

    def bound(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """The inputs, in order, of a call with the arguments of the original.

        Raises:
            ResfastError: an argument is missing, unknown, given twice, or differs from the default
                that is part of the graph.
        """
        count = len(args)
        if not named and count == len(self.names) and self.names == self.positional[:count]:
            return args
        if count > len(self.positional):
            raise ResfastError(
                f"the network was fused for {len(self.positional)} inputs "
                f"({', '.join(self.positional)}), not {count}; pass all in example="
            )
        given = dict(zip(self.positional, args, strict=False))
        for name, value in named.items():
            if name in given:
                raise ResfastError(f"input {name!r} is given by position and by name")
            given[name] = value
        for name, value in given.items():
            if name in self.fixed:
                self._check_fixed(name, value)
            elif name not in self.names:
                raise ResfastError(
                    f"the network was fused without an input {name!r}, for {', '.join(self.names)}"
                )
        for name in self.names:
            if name not in given:
                raise ResfastError(f"input {name!r} is missing")
        return tuple(given[name] for name in self.names)

    def _check_fixed(self, name: str, value: Any) -> None:
        default = self.fixed[name]
        if default is not OTHER and type(value) is type(default) and value == default:
            return
        raise ResfastError(
            f"the network was fused with the default of {name!r}, which is part of it; give "
            f"{name!r} in example= to make it an input"
        )


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nested structure of lists, tuples and dicts; dicts by sorted name."""
    match value:
        case Tensor():
            yield value
        case list() | tuple():
            for item in value:
                yield from tensors(item)
        case dict():
            for name in sorted(value, key=str):
                yield from tensors(value[name])


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Applies the function to every tensor in lists, tuples, dicts and dataclasses, nested."""
    match value:
        case Tensor():
            return function(value)
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*(map_tensors(function, item) for item in value))
        case list() | tuple():
            return type(value)(map_tensors(function, item) for item in value)
        case dict():
            return type(value)((name, map_tensors(function, item)) for name, item in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(
            value, **{name: map_tensors(function, item) for name, item in fields.items()}
        )
    return value
