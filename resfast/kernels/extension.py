"""The compiled C++ kernels, where they were built; plain PyTorch in their place where not.

RESFAST_EXTENSION=0 in the environment leaves them out at run time too.
"""

from __future__ import annotations

import importlib.machinery
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("resfast")

_LIBRARY = torch.library.Library("resfast", "FRAGMENT")


def _load() -> str | None:
    """Loads the extension; why it is not there, or None."""
    if os.environ.get("RESFAST_EXTENSION") == "0":
        return "RESFAST_EXTENSION is 0"
    folder = Path(__file__).resolve().parents[1]
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_C{suffix}"
        if path.exists():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                return f"{path} cannot be loaded ({error})"
            return None
    return "they were not built when resfast was installed; `pip install -v` of it says why"


def _load_cuda() -> None:
    """Loads the CUDA kernels that ``csrc/cuda/build.py`` made, where it did."""
    path = Path(__file__).resolve().parents[1] / "_CUDA.so"
    if path.exists():
        try:
            torch.ops.load_library(path)
        except OSError as error:
            logger.warning("the CUDA kernels are left out: %s cannot be loaded (%s)", path, error)


MISSING = _load()
"""Why the compiled kernels are not there, or None where they are."""
_load_cuda()
_said = False


def _say_once() -> None:
    global _said
    if not _said:
        _said = True
        logger.warning("the C++ kernels are replaced by slower PyTorch code: %s", MISSING)


def define(name: str, schema: str, *, cpu: Callable[..., Any]) -> None:
    """Defines an operator; without the extension, ``cpu`` is its kernel for the CPU."""
    _LIBRARY.define(schema)
    if MISSING is None:
        return

    def kernel(*args: Any, **kwargs: Any) -> Any:
        _say_once()
        return cpu(*args, **kwargs)

    _LIBRARY.impl(name, kernel, "CPU")
