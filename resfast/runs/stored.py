"""What the types of the files of a run share: reading JSON, with errors that name file and field.

pydantic checks the values, and Python's json reads and writes them: names of runs, data and classes
may hold bytes that are not UTF-8, as lone surrogates, which pydantic's own JSON refuses.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from resfast.config.files import describe
from resfast.errors import ResfastError

STORED = pydantic.ConfigDict(extra="ignore")
"""How files are read: other versions of resfast may have written more fields."""

EvaluatedOn = Literal["test", "val"]
"""The test images, or those held out of the training set."""


def _none_unless_finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Finite = Annotated[float | None, pydantic.PlainSerializer(_none_unless_finite)]
"""A number that may be infinite or NaN, which JSON has no notation for: it is written as null."""


def read(adapter: pydantic.TypeAdapter, path: Path, expected: str) -> Any:
    """Reads a JSON file.

    Args:
        adapter: of the type to read.
        path: the file.
        expected: what it should be, for the error message.

    Raises:
        ResfastError: it cannot be read, or a field is missing or of the wrong type.
    """
    return valid(adapter, parsed(text_of(path, expected), str(path), expected), str(path), expected)


def text_of(path: Path, expected: str) -> str:
    """The text of a file.

    Raises:
        ResfastError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResfastError(f"cannot read {path}: {error.strerror}; expected {expected}") from None
    except UnicodeDecodeError:
        raise ResfastError(f"{path} is not text; expected {expected}") from None


def parsed(text: str, source: str, expected: str) -> Any:
    """The values of a JSON text; ``source`` is where it comes from, for the error message.

    Raises:
        ResfastError: it is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ResfastError(f"{source} is not JSON: {error}; expected {expected}") from None


def valid(adapter: pydantic.TypeAdapter, values: Any, source: str, expected: str) -> Any:
    """The object of a type that JSON values describe.

    Raises:
        ResfastError: a field is missing or of the wrong type.
    """
    try:
        return adapter.validate_python(values)
    except pydantic.ValidationError as error:
        raise ResfastError(f"{source}: {describe(error)}; expected {expected}") from None
