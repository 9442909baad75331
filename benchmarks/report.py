"""Helpers of all benchmarks: description of the machine, timing, and formatting of results."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

import resfast
from resfast import runtime

_PACKAGES = ("triton", "nvidia-dali-cuda130", "torchvision", "kornia")


def hardware(device: str) -> dict[str, Any]:
    """Processor and versions, for the records of a benchmark."""
    return {
        "processor": runtime.describe(torch.device(device)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "resfast": resfast.__version__,
        **{name: version(name) for name in _PACKAGES},
        **(cuda_versions() if device == "cuda" else {}),
    }


def cuda_versions() -> dict[str, Any]:
    """Versions of CUDA and cuDNN that torch was built with; None without them."""
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def version(name: str) -> str | None:
    """Version of a package, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed(module: str) -> bool:
    """Whether ``module``, such as ``nvidia.dali``, can be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f} images/s"


def slug(text: str) -> str:
    """``text`` as part of a file name: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def timed(call: Callable[[], object], repeats: int, device: str) -> float:
    """Mean seconds per call over ``repeats`` calls, until ``device`` has finished them."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def verdict(value: float, target: float) -> str:
    """Whether a value reached its target, as text."""
    return "reached" if value >= target else f"missed by {target - value:.2f}"
