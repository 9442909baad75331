"""Text from outside, such as names of classes and files, made fit to be drawn."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` on one line, with a replacement character for all that cannot be drawn: control
    characters, line ends, and bytes of file names that are not UTF-8 (lone surrogates)."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
