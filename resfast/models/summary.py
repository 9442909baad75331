"""Layer table and multiply-accumulate count of a network."""

from __future__ import annotations

import copy

import torch
import torchinfo
from torch import nn


def summarize(model: nn.Module, image_size: int = 32) -> torchinfo.ModelStatistics:
    """Type, output shape, parameters and MACs of each layer of a network, for one RGB image.

    Args:
        model: any network that takes ``[N, 3, H, W]``; it is not changed.
        image_size: H and W, in pixels.

    Returns:
        torchinfo's statistics; :func:`layer_table` prints them.
    """
    return torchinfo.summary(
        copy.deepcopy(model),
        input_data=torch.zeros(1, 3, image_size, image_size),
        device="cpu",
        depth=4,
        col_names=("output_size", "num_params", "mult_adds"),
        row_settings=("var_names",),
        verbose=0,
    )


def layer_table(model: nn.Module, image_size: int = 32) -> str:
    """:func:`summarize` as a table to print."""
    table = str(summarize(model, image_size))
    for unit in torchinfo.Units:  # torchinfo prints "Units.MEGABYTES" on Python 3.11 and later
        table = table.replace(f"(Units.{unit.name})", f"({unit.value})")
    return table


def count_macs(model: nn.Module, image_size: int = 32) -> int:
    """Multiply-accumulate operations (MACs) of the forward pass of one image."""
    return int(summarize(model, image_size).total_mult_adds)
