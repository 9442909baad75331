"""Reads arrays, containers, numbers and text from a pickle without running any code in it."""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO

import numpy as np


class ForbiddenError(pickle.UnpicklingError):
    """A pickle asks for something other than arrays, containers, numbers and text."""


class _Dtype:
    """Replaces ``numpy.dtype`` in a pickle: numbers and text, no objects and no fields."""

    __slots__ = ("value",)

    def __init__(self, objects: bool, name: str | bytes, *_: object) -> None:
        self.value = np.dtype(name.decode("ascii") if isinstance(name, bytes) else str(name))
        if self.value.kind not in ("biufSUO" if objects else "biufSU"):
            raise ForbiddenError(f"an array of {self.value}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *structure = state
        if any(part is not None for part in structure[:3]):
            raise ForbiddenError("a structured array")
        order = order.decode("ascii") if isinstance(order, bytes) else order
        self.value = self.value.newbyteorder(order)


class _Array:
    """Replaces ``numpy.ndarray`` in a pickle."""

    __slots__ = ("value",)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, fortran, raw = state
        if dtype.value.kind == "O":  # a list of what else the pickle holds
            self.value = raw
            return
        self.value = _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _from_buffer(raw: Any, dtype: _Dtype, shape: Any, order: str, axes: Any = None) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, dtype.value)
    array = np.frombuffer(raw, dtype.value)
    if order == "K":
        return array.reshape(shape).transpose(axes)
    return array.reshape(shape, order=order)


class _ArrayUnpickler(pickle.Unpickler):
    """Imports nothing.

    A pickle calls the few functions here, which rebuild an array from its bytes, instead of
    NumPy's, which trust the pickle about memory.
    """

    def __init__(self, file: BinaryIO, objects: bool) -> None:
        super().__init__(file, encoding="bytes")
        self._objects = objects

    def find_class(self, module: str, name: str) -> Any:
        # Bound methods and strings: a pickle cannot set attributes on them.
        package = module.replace("numpy._core", "numpy.core")
        known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): self._dtype,
            ("numpy.core.multiarray", "_reconstruct"): self._reconstruct,
            ("numpy.core.multiarray", "scalar"): self._scalar,
            ("numpy.core.numeric", "_frombuffer"): self._from_buffer,
            ("_codecs", "encode"): self._encode,
            ("collections", "OrderedDict"): self._ordered_dict,
            ("builtins", "range"): self._range,
            ("__builtin__", "xrange"): self._range,
        }
        try:
            return known[package, name]
        except KeyError:
            raise ForbiddenError(f"{module}.{name}") from None

    def _dtype(self, *args: Any) -> _Dtype:
        return _Dtype(self._objects, *args)

    def _reconstruct(self, *_: object) -> _Array:
        return _Array()

    def _scalar(self, dtype: _Dtype, raw: bytes) -> Any:
        return _from_buffer(raw, dtype, (1,), "C")[0].item()

    def _from_buffer(self, *args: Any) -> np.ndarray:
        return _from_buffer(*args)

    def _ordered_dict(self, items: Any = ()) -> dict[Any, Any]:
        return dict(items)

    def _range(self, *args: int) -> range:
        return range(*args)

    def _encode(self, text: str, encoding: str | bytes) -> bytes:
        if encoding not in ("latin1", b"latin1"):  # how protocols below 3 write bytes
            raise ForbiddenError(f"the encoding {encoding!r}")
        return text.encode("latin1")


class BrokenError(Exception):
    """A pickle cannot be read; the text says why."""


def load(file: BinaryIO, *, objects: bool = False) -> Any:
    """The content of a pickle; its arrays are behind :func:`array`.

    Args:
        file: opened at the start of the pickle. Text of Python 2 becomes bytes.
        objects: whether an array of objects is read too, as the list of its elements.

    Raises:
        ForbiddenError: it asks for something other than arrays, containers, numbers and text.
        BrokenError: it is cut off or damaged.
        OSError: the file cannot be read.
    """
    try:
        return _ArrayUnpickler(file, objects).load()
    except ForbiddenError:
        raise
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError,
        IndexError, OverflowError, MemoryError, RecursionError, ImportError,
    ) as error:  # fmt: skip
        raise BrokenError(str(error) or type(error).__name__) from None


def array(value: Any) -> Any:
    """A value in a pickle; an array as ``numpy.ndarray``."""
    return getattr(value, "value", None) if isinstance(value, _Array) else value
