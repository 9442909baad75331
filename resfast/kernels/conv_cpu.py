"""``resfast::conv2d_bias_act`` on the CPU: several algorithms, the fastest by measurement.

- ``oneDNN``: torch's own library, with the epilogue as post-operations; every shape and dtype.
- ``gemm``: our kernel for AVX512-BF16, over patches of the input (``csrc/cpu/conv_gemm.cpp``).
- ``winograd``: for 3x3 kernels, with the same kernel (``csrc/cpu/conv_winograd.cpp``): F(2x2, 3x3)
  of Lavin and Gray (arXiv:1509.09308) for stride 1, 2.25 times fewer multiplications, and the same
  idea for stride 2, 1.44 times fewer.

The last two are for bfloat16. :class:`~resfast.kernels.conv.ConvBiasAct` asks for a plan once per
shape; the choice is kept in ``$XDG_CACHE_HOME/resfast/conv-cpu.json``, by processor, version, shape
and number of threads, unless the machine was too busy to tell. ``RESFAST_CONV=oneDNN``, ``gemm`` or
``winograd`` takes that algorithm wherever it applies.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resfast import atomic
from resfast.kernels import conv_reference

logger = logging.getLogger("resfast")

ALGORITHMS = ("oneDNN", "gemm", "winograd")
ONEDNN_NAMES = {"none": "none", "relu": "relu", "leaky_relu": "leaky_relu", "silu": "swish"}
MEASURE_SECONDS = 0.04
"""Spent on each candidate of each shape."""
MAX_SPREAD = 1.5
"""Median over shortest time up to which a measurement is kept for other processes."""
MAX_ERROR = 0.02
"""Of a candidate, root mean square relative to that of the result: a few roundings to bfloat16."""

Run = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Plan:
    """How convolutions of one shape are computed: ``run(x, residual)``, to a given ``shape``."""

    algorithm: str
    shape: torch.Size
    run: Run


def conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    activation: str,
    negative_slope: float = conv_reference.NEGATIVE_SLOPE,
) -> Tensor:
    """The operator, for a weight that is not known to stay the same: oneDNN."""
    run = _onednn(x, weight, bias, stride, padding, activation, negative_slope, None)
    return run(x, residual)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    activation: str,
    negative_slope: float,
    packed: dict[Any, Any],
) -> Plan:
    """The algorithm for arguments like these; ``packed`` keeps the weights between plans."""
    args = (x, weight, bias, stride, padding, activation, negative_slope, packed)
    names = [name for name in ALGORITHMS if _applies(name, x, weight, stride)]
    named = os.environ.get("RESFAST_CONV")
    if named and named not in ALGORITHMS:
        _warn_once(f"RESFAST_CONV={named} is unknown; expected one of {', '.join(ALGORITHMS)}")
    chosen = named if named in names else None
    if chosen is None and (named in ALGORITHMS or len(names) == 1 or x.numel() == 0):
        chosen = "oneDNN"
    if chosen is None:
        sizes = (x.shape, weight.shape, stride, padding, residual is not None)
        key = "-".join(",".join(map(str, part)) for part in sizes[:-1]) + f"-{sizes[-1]:d}"
        key = f"{_machine()}|{torch.get_num_threads()} threads|{key}"
        chosen = _choices().get(key)
        if chosen not in names:
            chosen, steady = _fastest(names, args, residual)
            _choices()[key] = chosen
            if steady:
                _save(key, chosen)
    run = BUILDERS[chosen](*args)
    with torch.inference_mode():
        shape = run(x, residual).shape
    return Plan(chosen, shape, run)


def _applies(name: str, x: Tensor, weight: Tensor, stride: list[int]) -> bool:
    if name == "oneDNN":
        return True
    if x.dtype != torch.bfloat16 or x.numel() == 0 or not _has_kernels():
        return False
    return name == "gemm" or (
        list(weight.shape[2:]) == [3, 3] and list(stride) in ([1, 1], [2, 2])
    )


@functools.cache
def _has_kernels() -> bool:
    built = hasattr(torch.ops.resfast, "conv_bf16_supported")  # only for x86-64
    return built and torch.ops.resfast.conv_bf16_supported()


# -- oneDNN ----------------------------------------------------------------------------------------


@functools.cache
def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolution takes ``dtype`` on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    ):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    activation: str,
    negative_slope: float,
    packed: dict[Any, Any] | None,
) -> Run:
    dtype = x.dtype if _onednn_has(x.dtype) else torch.float32
    if not _onednn_has(dtype) or x.numel() == 0:
        return lambda x, residual: conv_reference.conv2d_bias_act(
            x, weight, bias, residual, stride, padding, activation, negative_slope
        )
    bias = None if bias is None else bias.to(dtype)
    weight = weight.to(dtype)
    if packed is not None:
        key = ("oneDNN", x.shape)
        if key not in packed:
            packed[key] = torch.ops.mkldnn._reorder_convolution_weight(
                weight, padding, stride, [1, 1], 1, list(x.shape)
            )
        weight = packed[key]
    name = ONEDNN_NAMES[activation]
    scalars = [negative_slope] if activation == "leaky_relu" else []
    rest = (padding, stride, [1, 1], 1)
    unary = torch.ops.mkldnn._convolution_pointwise.default
    binary = torch.ops.mkldnn._convolution_pointwise.binary
    fused = activation in ("none", "relu")  # what oneDNN's binary form takes after the sum
    attribute = "relu" if activation == "relu" else None
    act = conv_reference.ACTIVATIONS[activation]
    channels_last = torch.channels_last

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        kind = x.dtype
        x = x.to(dtype).contiguous(memory_format=channels_last)
        if residual is None:
            out = unary(x, weight, bias, *rest, name, scalars, "")
        else:
            residual = residual.to(dtype).contiguous(memory_format=channels_last)
            out = binary(x, residual, weight, bias, *rest, "add", 1.0, attribute, [], "")
            if not fused:
                out = act(out, negative_slope)
        return out.to(kind).contiguous(memory_format=channels_last)

    return run


# -- our kernels -----------------------------------------------------------------------------------


def _own(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    activation: str,
    negative_slope: float,
    packed: dict[Any, Any],
) -> Run:
    if name not in packed:
        pack = getattr(torch.ops.resfast, f"conv_{name}_pack")
        packed[name] = pack(weight.contiguous(), *(stride[:1] if name == "winograd" else ()))
    ready, kernel = packed[name], getattr(torch.ops.resfast, f"conv_{name}").default
    geometry = [*weight.shape, *stride, *padding]
    code = list(conv_reference.ACTIVATIONS).index(activation)
    channels_last = torch.channels_last

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=channels_last)
        return kernel(x, ready, bias, residual, geometry, code, negative_slope)

    return run


BUILDERS: dict[str, Callable[..., Run]] = {
    "oneDNN": _onednn,
    "gemm": functools.partial(_own, "gemm"),
    "winograd": functools.partial(_own, "winograd"),
}


# -- choice ----------------------------------------------------------------------------------------


@torch.inference_mode()
def _fastest(names: list[str], args: tuple, residual: Tensor | None) -> tuple[str, bool]:
    """The fastest of the algorithms whose result on these very numbers is good enough.

    Also whether its times agree, so that the choice is worth keeping: not on a busy machine.
    """
    x, weight, bias, stride, padding, activation, negative_slope, _ = args
    exact = conv_reference.conv2d_bias_act(
        x.float(),
        weight.float(),
        bias,
        None if residual is None else residual.float(),
        stride,
        padding,
        activation,
        negative_slope,
    )
    scale = exact.square().mean().sqrt()
    runs = {}
    for name in names:
        run = BUILDERS[name](*args[:-1], {})
        error = (run(x, residual).float() - exact).square().mean().sqrt()
        if name == "oneDNN" or error <= MAX_ERROR * scale:
            runs[name] = run
    times = _seconds(runs, x, residual)
    chosen = min(times, key=lambda name: min(times[name]))
    steady = statistics.median(times[chosen]) <= MAX_SPREAD * min(times[chosen])
    shortest = {name: min(values) for name, values in times.items()}
    logger.debug("convolution %s %s: %s of %s", x.shape, weight.shape, chosen, shortest)
    return chosen, steady


def _seconds(runs: dict[str, Run], x: Tensor, residual: Tensor | None) -> dict[str, list[float]]:
    """Times of each, measured in turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + MEASURE_SECONDS * len(runs), 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 100):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x, residual)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


@functools.cache
def _machine() -> str:
    from resfast import __version__

    name = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.startswith(("model name", "model\t", "cpu fam"))]
        name = " ".join(dict.fromkeys(line.partition(":")[2].strip() for line in lines))
    except OSError:
        pass  # not Linux
    return f"{name}|torch {torch.__version__}|resfast {__version__}"


def cache_path() -> Path:
    """The file that keeps the choices between processes."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "resfast" / "conv-cpu.json"


_known: dict[Path, dict[str, str]] = {}


def _read(path: Path) -> dict[str, str]:
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"{path} is ignored: it cannot be read ({error}); it is written anew")
        return {}
    if not isinstance(choices, dict):
        _warn_once(f"{path} is ignored: it does not hold choices of algorithms; it is written anew")
        return {}
    return {key: name for key, name in choices.items() if name in ALGORITHMS}


def _choices() -> dict[str, str]:
    path = cache_path()
    if path not in _known:
        _known[path] = _read(path)
    return _known[path]


def _save(key: str, name: str) -> None:
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = {**_read(path), key: name}  # another process may have written meanwhile
        atomic.write_bytes(path, json.dumps(merged, indent=0, sort_keys=True).encode())
    except OSError as error:
        _warn_once(f"{path} cannot be written ({error}); convolutions are measured in each process")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
