"""Recipes whose values depend on the number of epochs, the network, the data and other options.

A recipe file may have two kinds of tables besides the groups of the configuration:

- ``[by_epochs]``: ``epochs``, a list of increasing lengths, and for each of some fields a list with
  its value at each length. Between lengths, numbers are interpolated linearly in the logarithm of
  the epochs, and other values are those of the nearest length; outside, the nearest length counts.
- ``[when.CONDITION]``: values that replace those while a condition of :data:`CONDITIONS` holds.
  ``unset`` lists fields that become None. Tables apply in their order, and a condition sees the
  values of earlier tables.

Pixels in ``sizes`` and ``augment`` of such a recipe are for its own ``image_size``. They are scaled
to the image size of the run, and sizes that are too small are left out.

The configuration that such a recipe starts with lists these fields in ``undecided`` and has the
values of the groups in the file. :func:`decide` replaces those for which everything they depend on
is known.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic

from resfast.config.files import describe
from resfast.config.options import phases_text
from resfast.config.recipes.conditions import CONDITIONS, GROUP_OF, View, values_of
from resfast.config.schema import ADAPTER, Config
from resfast.data.augment import parse_augment
from resfast.errors import ResfastError, nearest

LEAST_PIXELS = 12
"""Smaller sizes of growing images are left out."""
_DIGITS = 4
"""Significant digits of interpolated values."""

_FIXED = {"model", "epochs", "image_size", "data", "data_dir", "seed"}
"""Fields that the others depend on, or that are not a recipe's to vary."""


@dataclass(frozen=True)
class Family:
    """What the values of a recipe depend on.

    Attributes:
        written: the configuration with the values of the file's groups.
        lengths: increasing numbers of epochs; empty if nothing depends on them.
        by_epochs: field to its values, one for each of ``lengths``.
        when: pairs of a condition and its values, in the order in which they apply.
    """

    written: Config
    lengths: tuple[float, ...] = ()
    by_epochs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    when: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that depend on something, in the order of the dataclasses."""
        named = {*self.by_epochs, *(name for _, values in self.when for name in values)}
        return tuple(name for name in GROUP_OF if name in named)

    def table(self) -> list[str]:
        """The values of ``by_epochs`` as lines of text, then those of each condition."""
        if not self.lengths:
            return []
        rows = [["epochs", *(f"{length:g}" for length in self.lengths)]]
        rows += [[name, *map(_shown, values)] for name, values in self.by_epochs.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        for condition, values in self.when:
            given = ", ".join(f"{name} {_shown(value)}" for name, value in values.items())
            lines.append(f"{CONDITIONS[condition][0]}: {given}")
        return lines

    def at(self, name: str, epochs: float) -> Any:
        """The value of a field of ``by_epochs`` at a number of epochs."""
        return interpolated(self.lengths, self.by_epochs[name], epochs)


def _shown(value: Any) -> str:
    """A value in one line: phases as on the command line, None as ``unset``."""
    if isinstance(value, tuple):
        return phases_text(value) if value else "none"
    return f"{value:g}" if type(value) in (int, float) else "unset" if value is None else str(value)


def interpolated(lengths: tuple[float, ...], values: tuple[Any, ...], epochs: float) -> Any:
    """A value between those given at some lengths.

    Args:
        lengths: increasing numbers of epochs, positive.
        values: the value at each of them: numbers are interpolated linearly in log(epochs), rounded
            to 4 significant digits or, if all are integers, to an integer. Of other values, that of
            the length nearest in log(epochs) is returned, of two equally near ones the shorter's.
        epochs: number of epochs, positive.
    """
    after = bisect_right(lengths, epochs)
    if after in (0, len(lengths)):
        return values[min(after, len(lengths) - 1)]
    low, high = values[after - 1], values[after]
    position = math.log(epochs / lengths[after - 1]) / math.log(lengths[after] / lengths[after - 1])
    if not all(type(value) in (int, float) for value in values):
        return high if position > 0.5 else low
    value = low + position * (high - low)
    if all(type(value) is int for value in values):
        return round(value)
    return float(f"{value:.{_DIGITS}g}")


# -- reading ---------------------------------------------------------------------------------------


def read_family(written: Config, tables: Mapping[str, Any], path: Path) -> Family:
    """The family that the tables ``by_epochs`` and ``when`` of a recipe describe.

    Args:
        written: the configuration in the recipe's groups.
        tables: the tables by name, as TOML; either may be missing.
        path: the recipe's file, for error messages.

    Raises:
        ResfastError: an unknown field or condition, a value of the wrong type or out of range,
            lengths that do not increase, or lists of other lengths.
    """
    by_epochs = _table(tables.get("by_epochs", {}), f"{path}: by_epochs")
    lengths = _lengths(by_epochs, path)
    lists = {}
    for name, values in by_epochs.items():
        if name == "epochs":
            continue
        where = f"{path}: by_epochs.{name}"
        _check_field(name, where)
        if not isinstance(values, list) or len(values) != len(lengths):
            count = len(values) if isinstance(values, list) else "no list of"
            raise ResfastError(
                f"{where} has {count} values for {len(lengths)} lengths; expected one for each of "
                f"by_epochs.epochs"
            )
        lists[name] = tuple(_value(written, name, value, where) for value in values)
    when = []
    for condition, values in _table(tables.get("when", {}), f"{path}: when").items():
        where = f"{path}: when.{condition}"
        if condition not in CONDITIONS:
            raise ResfastError(
                f"{where}: unknown condition{nearest(condition, CONDITIONS)} (known: "
                f"{', '.join(CONDITIONS)})"
            )
        when.append((condition, _condition_values(written, _table(values, where), where)))
    return Family(written, lengths, lists, tuple(when))


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ResfastError(f"{where} is {value!r}; expected a table")
    return value


def _lengths(by_epochs: Mapping[str, Any], path: Path) -> tuple[float, ...]:
    if not by_epochs:
        return ()
    given = by_epochs.get("epochs")
    numbers = isinstance(given, list) and all(type(value) in (int, float) for value in given)
    if not numbers or not given or given[0] < 1 or sorted(set(given)) != given:
        raise ResfastError(
            f"{path}: by_epochs.epochs is {given!r}; expected a list of increasing numbers of "
            "epochs, at least 1"
        )
    return tuple(given)


def _condition_values(written: Config, values: dict[str, Any], where: str) -> dict[str, Any]:
    result = {}
    for name, value in values.items():
        if name == "unset":
            continue
        _check_field(name, f"{where}.{name}")
        result[name] = _value(written, name, value, f"{where}.{name}")
    for name in values.get("unset", ()):
        _check_field(name, f"{where}.unset")
        result[name] = _value(written, name, None, f"{where}.unset")
    return result


def _check_field(name: str, where: str) -> None:
    known = GROUP_OF.keys() - _FIXED
    if name not in known:
        raise ResfastError(
            f"{where}: {name!r} is not a field that can vary{nearest(name, sorted(known))}"
        )


def _value(written: Config, name: str, value: Any, where: str) -> Any:
    """A value of TOML as that of a field."""
    try:
        if name == "augment" and isinstance(value, str):
            value = asdict(parse_augment(value))
        values = asdict(written)
        values[GROUP_OF[name]][name] = value
        return getattr(getattr(ADAPTER.validate_python(values), GROUP_OF[name]), name)
    except pydantic.ValidationError as error:
        raise ResfastError(f"{where}: {describe(error)}; expected a value of {name}") from None
    except ResfastError as error:
        raise ResfastError(f"{where}: {error}") from None


# -- deciding --------------------------------------------------------------------------------------


def decide_by(
    families: Mapping[str, Family],
    config: Config,
    train_images: int | None = None,
    streamed: bool | None = None,
) -> Config:
    """Sets the undecided fields, as :func:`resfast.config.recipes.decide`, which has the families.

    Raises:
        ResfastError: undecided fields of an unknown recipe, or that the recipe does not have.
    """
    if not config.undecided:
        return config
    if config.recipe not in families:
        raise ResfastError(
            f"undecided {', '.join(config.undecided)} of the unknown recipe {config.recipe!r} "
            f"(known: {', '.join(families)})"
        )
    family = families[config.recipe]
    if others := sorted(set(config.undecided) - set(family.fields)):
        raise ResfastError(
            f"undecided has {others[0]!r}, on which nothing depends in the recipe {config.recipe}"
        )
    epochs, usual, current = config.recipe_epochs, values_of(family.written), values_of(config)
    expected, _ = _decided(config, family, config.undecided, epochs)
    own = [
        name
        for name in config.undecided
        if current[name] == expected[name] or (epochs is None and current[name] == usual[name])
    ]
    asked = config.optim.epochs
    if epochs is None and isinstance(asked, (int, float)) and asked >= 1:  # check reports others
        epochs = asked
    values, unknown = _decided(config, family, own, epochs, train_images, streamed)
    undecided = tuple(name for name in own if name in unknown)
    return replace(with_values(config, values), undecided=undecided, recipe_epochs=epochs)


def _decided(
    config: Config,
    family: Family,
    names: Sequence[str],
    epochs: float | None,
    train_images: int | None = None,
    streamed: bool | None = None,
) -> tuple[dict[str, Any], set[str]]:
    """Values of the undecided fields ``names``, and those that may still change.

    As long as a condition is unknown it counts as not met, and fields of ``by_epochs`` have the
    values that are written in the recipe while the number of epochs is unknown.
    """
    view = View(config, names, train_images, streamed)
    usual = values_of(family.written)
    for name in names:
        view.values[name] = usual[name]
        if name in family.by_epochs and epochs is not None:
            view.values[name] = family.at(name, epochs)
        elif name in family.by_epochs:
            view.unknown.add(name)
    for condition, values in family.when:
        view.apply(condition, {name: values[name] for name in values if name in names})
    found = {name: view.values[name] for name in names}
    size, usual_size = config.data.image_size, family.written.data.image_size
    return _fitted(found, view.least_pixels, size, usual_size), view.unknown


def _fitted(values: dict[str, Any], least: int, size: int, usual: int) -> dict[str, Any]:
    """The values with the pixels of ``sizes`` and ``augment`` for images of another size.

    Args:
        values: values of undecided fields by name.
        least: smallest images that the network takes, in pixels.
        size: height and width of the run's images, in pixels.
        usual: the same of the images that the values are for.
    """
    values = dict(values)
    if "sizes" in values:
        least = max(LEAST_PIXELS, least)
        scaled = ((round(pixels * size / usual), end) for pixels, end in values["sizes"])
        values["sizes"] = tuple(phase for phase in scaled if least <= phase[0] < size)
    if "augment" in values:
        augment = values["augment"]
        pixels = {n: round(getattr(augment, n) * size / usual) for n in ("crop", "cutout")}
        values["augment"] = replace(augment, **pixels)
    return values


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with some fields set, which are then no longer undecided.

    Args:
        config: a configuration.
        values: by name of the field, from any group but ``run``.

    Raises:
        ResfastError: an unknown name.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in GROUP_OF:
            raise ResfastError(
                f"a recipe has no value {name!r}{nearest(name, GROUP_OF)}; the names are those of "
                "the options"
            )
        groups.setdefault(GROUP_OF[name], {})[name] = value
    changed = {group: replace(getattr(config, group), **part) for group, part in groups.items()}
    undecided = tuple(name for name in config.undecided if name not in values)
    return replace(config, undecided=undecided, **changed)


def decided_like(config: Config, other: Config) -> Config:
    """The configuration with the undecided fields that ``other`` has decided set to its values."""
    names = [name for name in config.undecided if name not in other.undecided]
    values = values_of(other)
    config = with_values(config, {name: values[name] for name in names})
    return replace(config, recipe_epochs=other.recipe_epochs)


def given(args: Iterable[str]) -> set[str]:
    """Names of the fields that a command line gives: ``--filter-keep 1`` gives ``filter_keep``."""
    names = set()
    for argument in args:
        if not argument.startswith("--"):
            continue
        name = argument[2:].partition("=")[0].replace("-", "_")
        names |= {name, name.removeprefix("no_")}
    return names
