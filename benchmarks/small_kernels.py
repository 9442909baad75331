"""Launches every CUDA kernel of the extension on small feature maps, for compute-sanitizer.

``python -m benchmarks.small_kernels``, alone or under ``compute-sanitizer``, as in ``make
gpu-report``. Each tile shape of each kernel runs once per problem, with and without a split
reduction; problems include odd map sizes, odd channel counts and the stem. Results must be close to
the reference. The exit code is 1 if one is not, 2 without a GPU or without the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from resfast.cli import common as entry
from resfast.errors import ResfastError
from resfast.ops import extension  # noqa: F401  # loads the kernels
from resfast.ops.conv import reference as conv_reference

# [N, C, H, W], filters, kernel side, stride, padding.
PROBLEMS = [
    ((2, 64, 9, 7), 64, 3, 1, 1),
    ((3, 24, 8, 8), 60, 3, 2, 1),
    ((2, 3, 6, 6), 64, 3, 1, 1),
    ((2, 60, 5, 7), 128, 1, 2, 0),
    ((2, 256, 4, 4), 128, 3, 1, 1),
]
BLOCKS = [(3, 64, 5, 7), (5, 128, 8, 8), (2, 256, 4, 4)]
"""[N, C, H, W] of residual blocks."""
TYPES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
MAX_ERROR = 0.02
"""Relative RMS error, which allows for a few roundings to bfloat16."""

Launch = tuple[str, Callable[[], Tensor], Tensor]
"""Description, launch, and expected result."""


def launches(device: str, ops: Any) -> Iterator[Launch]:
    """Every kernel on every problem it supports; ``ops`` is ``torch.ops.resfast``."""
    generator = torch.Generator().manual_seed(0)
    acts = list(conv_reference.ACTIVATIONS)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    multiprocessors = 132  # those of an H200: too many for these maps, so reductions are split
    for name, (dtype, tf32) in TYPES.items():
        for index, (shape, filters, side, stride, padding) in enumerate(PROBLEMS):
            x, bias = random(*shape, dtype=dtype), random(filters, dtype=torch.float32)
            weight = (
                random(filters, shape[1], side, side, dtype=dtype) / (shape[1] * side**2) ** 0.5
            )
            geometry, act = ([stride] * 2, [padding] * 2), (acts[index % len(acts)], 0.1)
            plain = conv_reference.conv2d_bias_act(x, weight, None, None, *geometry, "none")
            residual = random(*plain.shape, dtype=dtype)
            arguments = (x, weight, bias, residual, *geometry, *act)
            exact = conv_reference.conv2d_bias_act(*arguments)
            what = f"{name} {list(shape)} to {filters}, {side}x{side}, stride {stride}"
            flat = ops.conv2d_cuda_candidates(x, weight, *geometry, multiprocessors)
            # One candidate with a split reduction and one without per tile.
            chosen = {(t, s > 1): (t, s) for t, s in zip(flat[::2], flat[1::2], strict=True)}
            for tile, splits in chosen.values():
                yield (
                    f"conv2d_cuda {what}, tile {tile}, {splits} splits",
                    lambda a=(*arguments, tile, splits, tf32): ops.conv2d_cuda(*a),
                    exact,
                )
            if not hasattr(ops, "conv2d_hopper") or dtype == torch.float32:
                continue
            for config in ops.conv2d_hopper_configs(x, weight, *geometry):
                yield (
                    f"conv2d_hopper {what}, config {config}",
                    lambda a=(*arguments, config): ops.conv2d_hopper(*a),
                    exact,
                )
        if not hasattr(ops, "basic_block_cuda") or dtype == torch.float32:
            continue
        for shape in BLOCKS:
            channels = shape[1]
            x = random(*shape, dtype=dtype)
            weights = [
                random(channels, channels, 3, 3, dtype=dtype) / (9 * channels) ** 0.5 for _ in "12"
            ]
            biases = [random(channels, dtype=torch.float32) for _ in "12"]
            rest = ([1, 1], [1, 1], "leaky_relu", 0.1)
            half = conv_reference.conv2d_bias_act(x, weights[0], biases[0], None, *rest)
            exact = conv_reference.conv2d_bias_act(half, weights[1], biases[1], x, *rest)
            flat = ops.basic_block_cuda_candidates(x)
            arguments = (x, weights[0], biases[0], weights[1], biases[1], *rest[2:])
            for tile, cluster in zip(flat[::2], flat[1::2], strict=True):
                yield (
                    f"basic_block_cuda {name} {list(shape)}, tile {tile}, cluster {cluster}",
                    lambda a=(*arguments, tile, cluster): ops.basic_block_cuda(*a),
                    exact,
                )


def run(device: str, ops: Any) -> int:
    """Launches all kernels and prints wrong results and the number of launches.

    Returns:
        The number of launches whose result is wrong.
    """
    count = wrong = 0
    for name, launch, exact in launches(device, ops):
        result, exact = launch().float(), exact.float()
        error = float((result - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        count += 1
        if not error <= MAX_ERROR:
            wrong += 1
            print(f"{name}: the relative error is {error:.3g}", flush=True)
    print(f"{count} launches, {wrong} wrong", flush=True)
    return wrong


def main() -> int:
    """Entry point; returns the exit code."""

    def command() -> int:
        if not torch.cuda.is_available():
            raise ResfastError("no CUDA device was found to launch the kernels on")
        if not hasattr(torch.ops.resfast, "conv2d_cuda"):
            raise ResfastError(
                "the CUDA kernels are not built: python csrc/cuda/build.py resfast/_CUDA.so"
            )
        return 1 if run("cuda", torch.ops.resfast) else 0

    return entry.run(command)


if __name__ == "__main__":
    sys.exit(main())
