"""Device, dtype, compiler, allocator and memory: what the machine has and how a run uses it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal

import torch

from resfast.errors import ResfastError

logger = logging.getLogger("resfast")

Precision = Literal["auto", "bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}

MIN_COMPUTE_CAPABILITY = (8, 0)
"""Minimum for our kernels; also in ``csrc/cuda/build.py``, which cannot import this."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def resolve_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ResfastError: an unknown name, or a device that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ResfastError(f"device {name!r} is unknown; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise ResfastError(
                f"device {name!r} does not exist ({count} CUDA devices found); choose --device "
                "cpu, or check the driver with nvidia-smi"
            )
    return torch.device(name)


def resolve_precision(
    precision: Precision, device: torch.device
) -> Literal["bf16", "fp16", "fp32"]:
    """The compute dtype; for ``auto``, bf16 where the hardware supports it.

    Otherwise ``auto`` is fp16 on CUDA and fp32 on the CPU.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16 products."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if flags:
        return bool(flags.get("amx_bf16") or flags.get("avx512_bf16") or flags.get("bf16"))
    text = cpu_info()
    return "amx_bf16" in text or "avx512_bf16" in text


def cpu_info() -> str:
    """The content of ``/proc/cpuinfo``, or "" where it does not exist."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def tune_allocator() -> bool:
    """Makes glibc keep freed memory instead of returning large blocks to the kernel.

    Otherwise every step takes page faults on all its activations, a large part of a CPU training
    step. Affects later allocations of the whole process.

    Returns:
        Whether it took effect (glibc on Linux only).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def release_memory(device: torch.device) -> None:
    """Returns unused memory to the kernel, which a tuned allocator never does by itself.

    Only on the CPU with glibc. Later allocations take page faults again, once.
    """
    if device.type == "cpu" and sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work on ``device``, or None if it should."""
    compiler = os.environ.get("CXX") or "g++"
    if not (shutil.which(compiler) or shutil.which("clang++")):
        return f"no C++ compiler ({compiler}, clang++) was found"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "the GPU is older than compute capability 7.0"
    return None


def prepare(device: torch.device, *, threads: int, tf32: bool, tuned_allocator: bool) -> None:
    """Applies the process-wide settings of a run."""
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        return
    # Even on the CPU torch.compile looks for a CUDA toolchain and warns if it finds one but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if tuned_allocator and not tune_allocator():
        logger.warning("the allocator was not tuned: the C library is not glibc")


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device to finish; does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Branches:
    """Parallel branches of a CUDA graph, for work whose parts are independent.

    Each part runs under :meth:`branch`, on a stream of its own while a graph is captured and one
    after the other otherwise. Work after the context waits for all of them. Tensors that the parts
    read must stay alive until then.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._main = torch.cuda.current_stream(device) if capturing else None
        self._device = device
        self._used: list[torch.cuda.Stream] = []

    def __enter__(self) -> Branches:
        return self

    def __exit__(self, *error: object) -> None:
        if self._main is not None:
            for stream in self._used:
                self._main.wait_stream(stream)

    @contextlib.contextmanager
    def branch(self) -> Iterator[None]:
        """Context of one part."""
        if self._main is None:
            yield
            return
        stream = _side_stream(self._device, len(self._used))
        stream.wait_stream(self._main)
        self._used.append(stream)
        with torch.cuda.stream(stream):
            yield


@functools.cache
def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def has_triton() -> bool:
    """Whether Triton, which some of the CUDA kernels are written in, is installed."""
    return find_spec("triton") is not None


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of tensors on a CUDA device, else the process's resident set size.

    0 where it is unknown.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe(device: torch.device) -> str:
    """Name of the GPU, or of the CPU and its number of threads, for the records of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = (line for line in cpu_info().splitlines() if line.startswith("model name"))
    name = next(names, ":CPU").partition(":")[2].strip()
    return f"{name}, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    """Free memory in bytes: of the host, or of ``device`` if it is a GPU with less."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = {
                name: rest.split()[0] for name, _, rest in (line.partition(":") for line in file)
            }
        host = int(values["MemAvailable"]) * 1024
    except (OSError, KeyError):  # not Linux
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if device.type == "cuda":
        return min(host, torch.cuda.mem_get_info(device)[0])
    return host
