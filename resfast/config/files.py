"""Writes a configuration as JSON and reads it back, including the JSON of older versions."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pydantic

from resfast.config.schema import ADAPTER, Config
from resfast.errors import ResfastError


def to_json(config: Config) -> str:
    """The configuration as indented JSON."""
    return json.dumps(asdict(config), indent=2, default=str) + "\n"


def from_json(text: str, source: str) -> Config:
    """Reads what :func:`to_json` wrote.

    Args:
        text: the JSON.
        source: name of the file, for the error message.

    Raises:
        ResfastError: invalid JSON, an unknown field, or a value of the wrong type.
    """
    try:
        return _with_surrogates(ADAPTER.validate_json(_without_surrogates(_upgrade(text))))
    except pydantic.ValidationError as error:
        raise ResfastError(
            f"{source}: {describe(error)}; expected a config.json written by resfast.train"
        ) from None


def describe(error: pydantic.ValidationError) -> str:
    """The first bad field and what is wrong with it."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"


# Bytes of a file name that are not UTF-8 are lone surrogates in Python, U+DC80 to U+DCFF. JSON can
# hold them but pydantic rejects them, so they pass through it as private-use characters.
_PRIVATE = {code: 0x10F000 + code - 0xDC80 for code in range(0xDC80, 0xDD00)}
_SURROGATES = {private: code for code, private in _PRIVATE.items()}


def _without_surrogates(text: str) -> str:
    if "\\udc" not in text:
        return text
    return json.dumps(json.loads(text), ensure_ascii=False).translate(_PRIVATE)


def _with_surrogates(config: Config) -> Config:
    def restored(value: Any) -> Any:
        if isinstance(value, str):
            return value.translate(_SURROGATES)
        return Path(str(value).translate(_SURROGATES)) if isinstance(value, Path) else value

    groups = {}
    for name in ("data", "transfer", "run"):  # the groups that hold paths and names
        group = getattr(config, name)
        values = {field.name: restored(getattr(group, field.name)) for field in fields(group)}
        groups[name] = replace(group, **values)
    return replace(config, **groups)


def _upgrade(text: str) -> str:
    """Moves the augmentations that version 0.1 wrote into ``data`` to ``augment``."""
    try:
        values = json.loads(text)
    except ValueError:
        return text  # validation reports what is wrong
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, dict) or "augment" in data:
        return text
    old = {name: data.pop(name) for name in ("crop", "padding", "flip") if name in data}
    return json.dumps(values | {"data": data | {"augment": old}}) if old else text


def load(path: Path) -> Config:
    """Reads a saved configuration: JSON, or TOML in a file whose name ends in .toml.

    Values that a TOML file does not name are the defaults of :class:`Config`.

    Raises:
        ResfastError: the file is missing, unreadable or not a configuration.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResfastError(
            f"cannot read {path}: {error.strerror}; expected the config.json of a run"
        ) from None
    except UnicodeDecodeError:
        raise ResfastError(f"{path} is not text; expected the config.json of a run") from None
    if path.suffix == ".toml":
        try:
            text = json.dumps(tomllib.loads(text), default=str)
        except tomllib.TOMLDecodeError as error:
            raise ResfastError(f"{path}: {error}; expected a configuration as TOML") from None
    return from_json(text, str(path))


def to_toml(config: Config) -> str:
    """The configuration as TOML, which :func:`load` reads; values that are None are left out.

    Needs the package tomli-w, which the extra ``sweep`` has.
    """
    import tomli_w

    return tomli_w.dumps(_without_none(json.loads(to_json(config))))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }
