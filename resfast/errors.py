"""Errors a user can act on: one sentence with the value, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ResfastError(Exception):
    """Bad input or environment. Commands print the message and exit with ``exit_code``."""

    exit_code = 2


class NonFiniteLossError(ResfastError):
    """The training loss became infinite or NaN."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
