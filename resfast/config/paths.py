"""Makes the paths to a configuration's data absolute, so that they hold in any current folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from resfast.config.schema import Config
from resfast.data.sources import SOURCES


def absolute_data(data: str) -> str:
    """``data`` with its path, if it has one, made absolute.

    Links and ``..`` are not resolved: the user may mean the link, whatever it points to.
    """
    kind, colon, location = data.partition(":")
    if not (colon and location and kind + colon in SOURCES):
        return data
    return f"{kind}:{_absolute(location)}"


def absolute_model(model: str) -> str:
    """``model`` with the path of its file, if it is made by one, made absolute."""
    where, _, name = model.rpartition(":")
    return f"{_absolute(where)}:{name}" if where.endswith(".py") else model


def absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths to everything that it reads."""
    data, transfer = config.data, config.transfer
    return replace(
        config,
        model=replace(config.model, model=absolute_model(config.model.model)),
        data=replace(
            data,
            data=absolute_data(data.data),
            data_dir=Path(_absolute(os.fspath(data.data_dir))),
            classes=_absolute_path(data.classes),
        ),
        transfer=replace(
            transfer,
            init_from=_absolute_path(transfer.init_from),
            teacher=_absolute_path(transfer.teacher),
            unlabelled=_absolute_path(transfer.unlabelled),
            pseudo_from=_absolute_path(transfer.pseudo_from),
        ),
    )


def _absolute_path(path: Path | None) -> Path | None:
    return None if path is None else Path(_absolute(os.fspath(path)))


def _absolute(path: str) -> str:
    expanded = os.path.expanduser(path)
    return expanded if os.path.isabs(expanded) else os.path.join(os.getcwd(), expanded)
