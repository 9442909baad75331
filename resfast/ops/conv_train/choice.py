"""How to compute a convolution of others' networks in training on the CPU, by measurement.

Networks of this project follow :func:`resfast.ops.conv_train.op.applies`, so that a run that is
resumed computes the same bits. For others :func:`algorithm` times a step, forward and backward, of
each candidate once per shape, on some images of the first batch, and caches the choice in
``$XDG_CACHE_HOME/resfast/conv-train-cpu.json`` unless the machine was too busy to measure.

- ``torch``: PyTorch's convolution (oneDNN).
- ``matmul``: 1x1 filters as a matrix product over the pixels.
- ``conv2d_train:TILE``: :mod:`resfast.ops.conv_train.op` with this largest tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv import choice as conv_choice
from ..conv import cpu as conv_cpu
from . import op as conv_train

CHOICES = conv_choice.Choices("conv-train-cpu.json")
MEASURED_VALUES = 2**21
"""About as many values of the input are enough to measure; smaller batches are taken whole."""
GROUP = 32
"""A measured part of a batch has a multiple of as many images, which the direct kernels need."""
MAX_ERROR = 0.04
"""Largest RMS difference from PyTorch's result, relative to its RMS: roundings to bfloat16."""
MARGIN = 1.05
"""How many times as fast as PyTorch's a kernel must be, since it is measured on its own."""
_known: dict[tuple[object, ...], str] = {}


def candidates(
    x: Tensor, weight: Tensor, stride: int, padding: int, largest_tile: int
) -> list[str]:
    """The algorithms that compute a convolution without groups or dilation.

    Args:
        x: ``[N, C, H, W]``.
        weight: float32 ``[K, C, R, S]``.
        stride: of rows and columns.
        padding: of rows and columns.
        largest_tile: the largest side of a Winograd tile, 2 to 4.
    """
    names = ["torch"]
    if tuple(weight.shape[2:]) == (1, 1) and padding == 0:
        names.append("matmul")
    elif conv_train.applies(x, weight, stride, padding):
        names.append("conv2d_train:2")
        if stride == 1:
            names += [f"conv2d_train:{tile}" for tile in range(3, largest_tile + 1)]
    return names


def by_rule(x: Tensor, weight: Tensor, stride: int, padding: int, largest_tile: int = 2) -> str:
    """The algorithm where nothing can be measured, as in ``torch.compile``; same arguments."""
    if conv_train.applies(x, weight, stride, padding):
        return f"conv2d_train:{largest_tile}"
    is_matmul = tuple(weight.shape[2:]) == (1, 1) and padding == 0
    return "matmul" if is_matmul and stride > 1 and conv_train.AMX else "torch"


def algorithm(x: Tensor, weight: Tensor, stride: int, padding: int, largest_tile: int = 2) -> str:
    """The fastest of :func:`candidates`; their arguments.

    The first call for a shape measures, unless another process has.
    """
    weight_format = weight.is_contiguous()
    sizes = (x.shape, weight.shape, weight_format, stride, padding, x.requires_grad, largest_tile)
    known = (*sizes, torch.get_num_threads())
    found = _known.get(known)
    if found is not None:
        return found
    names = candidates(x, weight, stride, padding, largest_tile)
    if len(names) == 1:
        found = names[0]
    else:
        shape = "-".join(",".join(map(str, part)) for part in (x.shape, weight.shape))
        key = f"{conv_cpu.machine()}|{torch.get_num_threads()} threads|{shape}-{stride}-{padding}"
        key += f"|{'contiguous' if weight_format else 'channels_last'}|tile {largest_tile}"
        key += "" if x.requires_grad else "|weight gradient only"
        found = CHOICES.get(key, names)
        if found is None:
            found, steady = _fastest(names, x, weight, stride, padding)
            CHOICES.put(key, found, keep=steady)
    _known[known] = found
    return found


def forget() -> None:
    """Clears the choices of this process; the file is kept."""
    _known.clear()
    CHOICES.forget()


def run(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> Tensor:
    """A convolution by one of :func:`candidates`, in bfloat16, with gradients.

    Args:
        name: of the algorithm.
        x: ``[N, C, H, W]`` of any dtype, in ``channels_last``.
        weight: float32 ``[K, C, R, S]``.
        bias: ``[K]`` or None.
        stride: of rows and columns.
        padding: of rows and columns.

    Returns:
        bfloat16 ``[N, K, P, Q]`` in ``channels_last``.
    """
    x = x.to(torch.bfloat16)
    kind, _, tile = name.partition(":")
    if kind == "conv2d_train":
        tile_side = conv_cpu.fastest_tile(x, stride, padding, int(tile))
        out = conv_train.conv2d(x, weight, stride, padding, tile_side)
        return out if bias is None else out + bias.to(out.dtype)[:, None, None]
    narrow = weight.to(torch.bfloat16)
    bias = None if bias is None else bias.to(torch.bfloat16)
    if kind == "matmul":
        pixels = x.permute(0, 2, 3, 1)
        if stride > 1:
            pixels = pixels[:, ::stride, ::stride]
        return F.linear(pixels, narrow.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, narrow, bias, stride, padding)


def _seconds(calls: Mapping[str, conv_choice.Call]) -> conv_choice.Times:
    """Times on the CPU; those of our kernels are longer by the margin that they need."""
    times = conv_choice.host_seconds(calls)
    return {
        name: values if name == "torch" else [MARGIN * value for value in values]
        for name, values in times.items()
    }


def _fastest(
    names: list[str], x: Tensor, weight: Tensor, stride: int, padding: int
) -> tuple[str, bool]:
    count = max(1, MEASURED_VALUES // max(1, x[:1].numel()))
    if count >= GROUP:
        count -= count % GROUP
    # Like those of the network, but outside of its graph and of hooks on what that saves.
    keep: Callable[[Tensor], Tensor] = lambda saved: saved  # noqa: E731
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        some = x.detach()[:count].to(torch.bfloat16, memory_format=torch.channels_last)
        some.requires_grad_(x.requires_grad)
        filters = weight.detach().clone().requires_grad_()
        exact = run("torch", some, filters, None, stride, padding).detach()

        def step(name: str) -> Tensor:
            out = run(name, some, filters, None, stride, padding)
            out.backward(exact)
            some.grad = filters.grad = None
            return out.detach()

        return conv_choice.fastest(
            {name: functools.partial(step, name) for name in names},
            is_right=conv_choice.near(exact.float(), MAX_ERROR),
            seconds=_seconds,
            trusted="torch",
            what=f"training with {list(x.shape)} and {list(weight.shape)}",
        )
