"""Named configurations, one complete TOML file each; compare two with ``diff``.

A file names every field of every group but ``run``, in the order of the dataclasses. TOML has no
None, so a field whose value is None is a comment that says where its value comes from. Tables that
make values depend on the number of epochs, the network or the data may follow, see
:mod:`resfast.config.recipes.family`.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pydantic

from resfast.config.files import describe
from resfast.config.recipes.family import Family, decide_by, read_family, with_values
from resfast.config.schema import ADAPTER, Config
from resfast.data.augment import parse_augment
from resfast.errors import ResfastError, nearest

_TABLES: tuple[str, ...] = ("by_epochs", "when")


def read(path: Path) -> tuple[Family, str]:
    """A recipe and its one-line summary.

    Raises:
        ResfastError: invalid TOML, a missing or unknown field, a value of the wrong type or out of
            range, or a table that :func:`resfast.config.recipes.family.read_family` refuses.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ResfastError(f"{path}: {error}; expected a recipe as TOML") from None
    summary = str(values.pop("summary", ""))
    if not summary:
        raise ResfastError(f"{path} has no summary; expected one line about the recipe")
    tables = {name: values.pop(name, {}) for name in _TABLES}
    data = values.get("data", {})
    if isinstance(data.get("augment"), str):
        data["augment"] = asdict(parse_augment(data["augment"]))
    try:
        config = ADAPTER.validate_python({"recipe": path.stem, **values})
    except pydantic.ValidationError as error:
        raise ResfastError(f"{path}: {describe(error)}; expected a recipe") from None
    for group in fields(Config):
        if group.name in ("recipe", "undecided", "recipe_epochs", "run"):
            continue
        for field in fields(getattr(config, group.name)):
            if field.default is not None and field.name not in values.get(group.name, {}):
                raise ResfastError(
                    f"{path}: {group.name}.{field.name} is missing; a recipe names every value"
                )
    family = read_family(config, tables, path)
    return replace(family, written=replace(config, undecided=family.fields)), summary


_READ = {path.stem: read(path) for path in sorted(Path(__file__).parent.glob("*.toml"))}

FAMILIES: dict[str, Family] = {name: family for name, (family, _) in _READ.items()}
"""Recipe name to what its values depend on."""

RECIPES: dict[str, Config] = {name: family.written for name, family in FAMILIES.items()}
"""Recipe name to configuration, as written in the file's groups."""

SUMMARIES: dict[str, str] = {name: summary for name, (_, summary) in _READ.items()}
"""Recipe name to its one-line summary."""

_FORMER = {
    "fast-resnet-2111": "default with --epochs 28",
    "fast-resnet-2111-70": "default with --epochs 70",
}
"""Names of recipes that are gone, and what has their values."""


def check_name(name: str) -> None:
    """Checks the name of a recipe.

    Raises:
        ResfastError: an unknown name; the message says what replaced it, or suggests the nearest
            known one.
    """
    if name in _FORMER and name not in RECIPES:
        raise ResfastError(f"the recipe {name!r} is now {_FORMER[name]}")
    if name not in RECIPES:
        raise ResfastError(
            f"unknown recipe {name!r}{nearest(name, RECIPES)} (known: {', '.join(RECIPES)})"
        )


def recipe(name: str, *, epochs: float | None = None, **values: Any) -> Config:
    """A recipe by name.

    Values that depend on the number of epochs, the network or the data, as all of ``default`` do,
    are decided here if ``epochs`` is given, except for those that depend on the data, and otherwise
    when training begins. After that they do not follow changes of the epochs or the network, which
    are therefore better given here.

    Args:
        name: name of the recipe.
        epochs: number of epochs, or None for that of the recipe.
        values: other values, by the name of their option: ``model="speednet-94"``. They are kept
            whatever the recipe says.

    Raises:
        ResfastError: an unknown recipe or value; the message suggests the nearest known one.
    """
    check_name(name)
    config = with_values(RECIPES[name], values)
    if epochs is None:
        return config
    return decide(with_values(config, {"epochs": epochs}))


def decide(
    config: Config, *, train_images: int | None = None, streamed: bool | None = None
) -> Config:
    """Sets the undecided values of a configuration as far as what they depend on is known.

    A value is kept if it is not the recipe's: the user has changed it. Once the number of epochs
    has been known, values are for that number, and do not follow changes of it.

    Args:
        config: a configuration; one without undecided values is returned as it is.
        train_images: number of training images, or None if it is not known yet.
        streamed: whether DALI decodes images during training, or None if it is not known yet.

    Returns:
        The configuration; ``undecided`` has the fields that depend on something unknown.

    Raises:
        ResfastError: undecided fields of an unknown recipe, or that the recipe does not have.
    """
    return decide_by(FAMILIES, config, train_images, streamed)
