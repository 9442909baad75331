"""Compares configurations: which options differ, and whether that changes the result."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from resfast.config.paths import absolute_paths
from resfast.config.schema import Config, RunConfig
from resfast.errors import ResfastError

FREE_TO_DIFFER = {
    "recipe_epochs",
    "data_dir",
    "prefetch",
    "threads",
    *(f.name for f in fields(RunConfig)),
}
"""Fields that may change when a run is resumed, because they do not affect the result, but for the
number of threads, which changes how sums are rounded."""


def flatten(config: Config) -> dict[str, Any]:
    """All fields in one dictionary, without the groups."""
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat.update(value if isinstance(value, dict) else {name: value})
    flat["augment"] = str(config.data.augment)
    return flat


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ and would change the result, with both values.

    A relative and an absolute path to the same data count as equal.
    """
    given = flatten(config), flatten(other)
    first, second = (flatten(absolute_paths(values)) for values in (config, other))
    return {
        name: (given[0][name], given[1][name])
        for name in first
        if name not in FREE_TO_DIFFER and first[name] != second[name]
    }


def check_same(saved: Config, given: Config, path: Path) -> None:
    """Checks that a run may be resumed with a configuration.

    Args:
        saved: the configuration of the run.
        given: the one to resume it with.
        path: folder of the run, for the error message.

    More epochs than before are allowed, see :func:`check_more_epochs`.

    Raises:
        ResfastError: they differ in fields that would change the result, with both values of each.
    """
    differing = differences(saved, given)
    if "epochs" in differing:
        check_more_epochs(*differing.pop("epochs"), path)
    if differing:
        listed = ", ".join(
            f"{name} was {before!r} and is now {now!r}" for name, (before, now) in differing.items()
        )
        raise ResfastError(
            f"cannot resume {path} with another configuration: {listed}; leave those options out, "
            "or start a new run without --resume"
        )


def check_more_epochs(saved: float | None, given: float | None, path: Path) -> None:
    """Checks that a run may be continued up to another number of epochs.

    Args:
        saved: epochs of the run; None in the common folder of runs that have not resolved it yet.
        given: the new number of epochs, counted from the run's beginning.
        path: folder of the run, for the error message.

    Raises:
        ResfastError: fewer epochs, or a run that ends within an epoch.
    """
    if saved is None and given is not None:
        return
    if saved is None or given is None or given < saved:
        raise ResfastError(
            f"cannot resume {path} with --epochs {given}: it has {saved}; leave the option out, or "
            "give the number of epochs to reach, which is more"
        )
    if saved != int(saved):
        raise ResfastError(
            f"cannot resume {path} with --epochs {given}: its {saved:g} epochs end within one; "
            "only whole epochs can be followed by more"
        )
