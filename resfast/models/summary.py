"""Layer table and multiply-accumulate count of a network."""

from __future__ import annotations

import copy
from collections.abc import Mapping

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


def network_table(models: Mapping[str, nn.Module], image_size: int = 32) -> str:
    """A line for each network: layers with weights, parameters, MACs and size, to compare them.

    Args:
        models: networks by name; they are not changed.
        image_size: H and W of the image, in pixels.
    """
    width = max(len("model"), *map(len, models))
    lines = [f"{'model':<{width}}  {'layers':>6}  {'parameters':>11}  {'MACs':>15}  {'MB':>7}"]
    for name, model in models.items():
        found = summarize(model, image_size)
        layers = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in model.modules())
        lines.append(
            f"{name:<{width}}  {layers:>6,}  {found.total_params:>11,}  "
            f"{found.total_mult_adds:>15,}  {4 * found.total_params / 1e6:>7,.2f}"
        )
    return "\n".join([*lines, "layers: convolutions and dense layers; MB: of float32 weights"])


def count_macs(model: nn.Module, image_size: int = 32) -> int:
    """Multiply-accumulate operations (MACs) of the forward pass of one image."""
    return int(summarize(model, image_size).total_mult_adds)
