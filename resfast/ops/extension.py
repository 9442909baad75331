"""Loads the compiled C++ and CUDA kernels, if they were built.

At run time, RESFAST_EXTENSION=0 in the environment disables all of them and RESFAST_CUDA=0 those
for CUDA. :mod:`resfast.ops.registration` then registers PyTorch code instead.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger("resfast")

_loaded: list[Path] = []


def _load() -> str | None:
    """Loads the CPU kernels; returns why they are missing, or None."""
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
    """Loads the CUDA kernels (``csrc/cuda/build.py``); returns why they are missing, or None."""
    for variable in ("RESFAST_EXTENSION", "RESFAST_CUDA"):
        if os.environ.get(variable) == "0":
            return f"{variable} is 0"
    path = Path(__file__).resolve().parents[1] / "_CUDA.so"
    if not path.exists():
        return NOT_BUILT
    try:
        torch.ops.load_library(path)
    except OSError as error:  # for example, torch is built without CUDA
        reason = f"{path} cannot be loaded ({error})"
        logger.warning("the CUDA kernels are not used: %s", reason)
        return reason
    _loaded.append(path)
    return None


NOT_BUILT = "they were not built when resfast was installed; `pip install -v` shows why"
MISSING = _load()
"""Why the compiled CPU kernels are missing, or None if they are loaded."""
CUDA_MISSING = _load_cuda()
"""Why the CUDA kernels are missing, or None if they are loaded."""


@functools.cache
def fingerprint() -> str:
    """Eight hexadecimal digits that identify the build of the loaded kernels."""
    digest = hashlib.blake2b(digest_size=4)
    for path in _loaded:
        digest.update(path.read_bytes())
    return digest.hexdigest()
