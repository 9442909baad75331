"""What every benchmark says of the machine, and how it writes speeds."""

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
    """Of CUDA and cuDNN that torch is built with; None where there are none."""
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed(module: str) -> bool:
    """Whether ``module``, such as ``nvidia.dali``, can be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f} images/s"


def slug(text: str) -> str:
    """As part of a file's name: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def timed(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds of each of some calls in a row, until ``device`` is done with them."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def verdict(value: float, target: float) -> str:
    """Whether a figure is as high as it was meant to be."""
    return "reached" if value >= target else f"missed by {target - value:.2f}"
