"""The compiled C++ and CUDA kernels, where they were built; PyTorch in their place where not.

RESFAST_EXTENSION=0 in the environment leaves them out at run time too, RESFAST_CUDA=0 those for
CUDA.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("resfast")

_LIBRARY = torch.library.Library("resfast", "FRAGMENT")
_loaded: list[Path] = []


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
            _loaded.append(path)
            return None
    return NOT_BUILT


def _load_cuda() -> str | None:
    """Loads the CUDA kernels that ``csrc/cuda/build.py`` made; why they are not there, or None."""
    for variable in ("RESFAST_EXTENSION", "RESFAST_CUDA"):
        if os.environ.get(variable) == "0":
            return f"{variable} is 0"
    path = Path(__file__).resolve().parents[1] / "_CUDA.so"
    if not path.exists():
        return NOT_BUILT
    try:
        torch.ops.load_library(path)
    except OSError as error:  # such as a torch without CUDA
        reason = f"{path} cannot be loaded ({error})"
        logger.warning("the CUDA kernels are left out: %s", reason)
        return reason
    _loaded.append(path)
    return None


NOT_BUILT = "they were not built when resfast was installed; `pip install -v` of it says why"
MISSING = _load()
"""Why the compiled kernels are not there, or None where they are."""
CUDA_MISSING = _load_cuda()
"""Likewise for those for CUDA."""
_said = False


@functools.cache
def fingerprint() -> str:
    """Eight digits that another build of the loaded kernels has others of."""
    digest = hashlib.blake2b(digest_size=4)
    for path in _loaded:
        digest.update(path.read_bytes())
    return digest.hexdigest()


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
