"""Where the data of a configuration lie, independent of the current folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from resfast.config.schema import Config
from resfast.data.sources import SOURCES


def absolute_data(data: str) -> str:
    """``data`` with an absolute path, where it names one.

    Links and ``..`` are left as they are, since the folder may be meant by that name.
    """
    kind, colon, location = data.partition(":")
    if not (colon and location and kind + colon in SOURCES):
        return data
    return f"{kind}:{_absolute(location)}"


def absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths to its data and to the folder of data sets."""
    data = config.data
    return replace(
        config,
        data=replace(
            data, data=absolute_data(data.data), data_dir=Path(_absolute(os.fspath(data.data_dir)))
        ),
    )


def _absolute(path: str) -> str:
    expanded = os.path.expanduser(path)
    return expanded if os.path.isabs(expanded) else os.path.join(os.getcwd(), expanded)
