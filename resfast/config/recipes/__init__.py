"""Named configurations, one complete TOML file each; compare two with ``diff``.

A file names every field of every group but ``run``, in the order of the dataclasses. TOML has no
None, so a field whose value is None is a comment that says where its value comes from.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pydantic

from resfast.config.files import describe
from resfast.config.schema import ADAPTER, Config
from resfast.data.augment import parse_augment
from resfast.errors import ResfastError, nearest


def read(path: Path) -> tuple[Config, str]:
    """A recipe's configuration and its one-line summary.

    Raises:
        ResfastError: invalid TOML, a missing or unknown field, or a value of the wrong type or out
            of range.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ResfastError(f"{path}: {error}; expected a recipe as TOML") from None
    summary = str(values.pop("summary", ""))
    if not summary:
        raise ResfastError(f"{path} has no summary; expected one line about the recipe")
    data = values.get("data", {})
    if isinstance(data.get("augment"), str):
        data["augment"] = asdict(parse_augment(data["augment"]))
    try:
        config = ADAPTER.validate_python({"recipe": path.stem, **values})
    except pydantic.ValidationError as error:
        raise ResfastError(f"{path}: {describe(error)}; expected a recipe") from None
    for group in fields(Config):
        if group.name in ("recipe", "run"):
            continue
        for field in fields(getattr(config, group.name)):
            if field.default is not None and field.name not in values.get(group.name, {}):
                raise ResfastError(
                    f"{path}: {group.name}.{field.name} is missing; a recipe names every value"
                )
    return config, summary


_READ = {path.stem: read(path) for path in sorted(Path(__file__).parent.glob("*.toml"))}

RECIPES: dict[str, Config] = {name: config for name, (config, _) in _READ.items()}
"""Recipe name to configuration."""

SUMMARIES: dict[str, str] = {name: summary for name, (_, summary) in _READ.items()}
"""Recipe name to its one-line summary."""


def recipe(name: str) -> Config:
    """A recipe by name.

    Raises:
        ResfastError: an unknown name; the message suggests the nearest known one.
    """
    if name not in RECIPES:
        raise ResfastError(
            f"unknown recipe {name!r}{nearest(name, RECIPES)} (known: {', '.join(RECIPES)})"
        )
    return RECIPES[name]
