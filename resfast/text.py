"""Makes external text, such as class and file names, safe to print and draw."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` on one line, with a replacement character for each non-printable character: control
    characters, line breaks, and non-UTF-8 bytes of file names (lone surrogates)."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
