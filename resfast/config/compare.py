"""Compares configurations: which options differ, and whether that changes the result."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from resfast.config.paths import absolute_data
from resfast.config.schema import Config, RunConfig

FREE_TO_DIFFER = {"data_dir", "prefetch", "threads", *(f.name for f in fields(RunConfig))}
"""Fields that may change when a run is resumed, because they do not affect the result."""


def flatten(config: Config) -> dict[str, Any]:
    """All fields in one dictionary, without the groups."""
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat.update(value if isinstance(value, dict) else {name: value})
    flat["augment"] = str(config.data.augment)
    return flat


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ and would change the result, with both values.

    A relative and an absolute path to the same data agree.
    """
    first, second = flatten(config), flatten(other)
    differing = {
        name: (first[name], second[name])
        for name in first
        if name not in FREE_TO_DIFFER and first[name] != second[name]
    }
    if "data" in differing and len({absolute_data(data) for data in differing["data"]}) == 1:
        del differing["data"]
    return differing
