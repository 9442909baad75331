"""``resfast COMMAND ARGS…``: the console script, which dispatches to the commands.

Only the chosen command is imported, so that ``resfast --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from resfast import __version__
from resfast.cli.common import CONSOLE_SCRIPT, escape_unencodable
from resfast.errors import nearest

COMMANDS = {
    "train": ("resfast.cli.train", "train a network"),
    "study": ("resfast.cli.study", "train what a report compared, and rank it"),
    "evaluate": ("resfast.cli.evaluate", "score a run on the test images of a data set"),
    "ensemble": ("resfast.cli.ensemble", "score several runs as one classifier"),
    "predict": ("resfast.cli.predict", "classify images with a run"),
    "export": ("resfast.cli.export", "write a run as a file that runs without resfast"),
    "sweep": ("resfast.cli.sweep", "search for good values of options"),
    "report": ("resfast.cli.report", "write one HTML page about runs"),
    "data": ("resfast.cli.data", "preview augmentations, find duplicates, or pack shards"),
    "doctor": ("resfast.cli.doctor.main", "check what resfast can use on this machine"),
}
"""Module and summary of each command."""


def usage() -> str:
    """The help text, with one line per command."""
    lines = [f"  {name:<9} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: resfast COMMAND ARGS…",
            "",
            *lines,
            "",
            "resfast COMMAND --help lists the options of a command; resfast --version prints the "
            "version.",
        ]
    )


def main(args: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code of the command, or 2 for an unknown command."""
    escape_unencodable()
    arguments = list(sys.argv[1:] if args is None else args)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if name == "--version":
        print(f"resfast {__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"resfast: error: unknown command {name!r}, expected one of {', '.join(COMMANDS)}"
            f"{nearest(name, COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    command = importlib.import_module(COMMANDS[name][0]).main
    if args is not None:
        return command(arguments[1:])
    # Called without arguments, as by python -m: train then counts time from the process's start.
    sys.argv = [f"{CONSOLE_SCRIPT} {name}", *arguments[1:]]
    return command()


if __name__ == "__main__":
    sys.exit(main())
