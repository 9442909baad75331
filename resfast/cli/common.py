"""Shared by all commands: exit codes, one-sentence errors, and callable modules."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from resfast.errors import ResfastError

T = TypeVar("T")
CONSOLE_SCRIPT = "resfast"


def program(command: str) -> str:
    """How the user started a command: ``resfast train`` or ``python -m resfast.train``."""
    script, _, started = sys.argv[0].partition(" ")
    if (script, started) == (CONSOLE_SCRIPT, command):
        return sys.argv[0]
    return f"python -m resfast.{command}"


def parse(kind: type[T], args: Sequence[str] | None, command: str, default: T | None = None) -> T:
    """Parses the command line into the dataclass ``kind``; options carry no group prefix.

    Raises:
        ResfastError: a file of its option ``trust`` does not exist.
        SystemExit: help was requested (code 0), or an option is unknown or malformed (code 2).
    """
    import tyro

    prog, markers = program(command), (tyro.conf.OmitArgPrefixes,)
    if default is None:
        parsed = tyro.cli(kind, args=args, prog=prog, config=markers)
    else:
        parsed = tyro.cli(kind, args=args, prog=prog, default=default, config=markers)
    trust_files(getattr(parsed, "trust", ()))
    return parsed


def trust_files(files: Sequence[Path]) -> None:
    """Lets the code of the files given as ``--trust`` run.

    Raises:
        ResfastError: a file does not exist.
    """
    if files:
        from resfast.models.imported import trust

        for file in files:
            trust(file)


def escape_unencodable() -> None:
    """Makes standard output and error escape characters that their encoding lacks.

    Names of classes and files may contain characters that an ASCII or Latin-1 stream cannot
    encode, and lone surrogates, which no stream can.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def run(main: Callable[[], int | None]) -> int:
    """Runs a command; turns errors that a user can act on into one sentence and an exit code.

    Returns:
        0, 2 for bad input, 3 for a loss that is not finite, 130 or 143 after SIGINT or SIGTERM, 141
        if the reader of standard output is gone.
    """
    escape_unencodable()
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    try:
        return main() or 0
    except ResfastError as error:
        print(f"resfast: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt as error:
        path, signum = getattr(error, "path", None), getattr(error, "signum", 2)
        if path is None:
            print("resfast: stopped", file=sys.stderr, flush=True)
        else:
            print(
                f"resfast: stopped and saved; continue with: {program('train')} --resume {path}",
                file=sys.stderr,
                flush=True,
            )
        return 128 + signum
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def make_callable(module: str, home: str, name: str) -> None:
    """Lets ``resfast.train`` be both a module (``python -m resfast.train``) and a function.

    Python binds a submodule as an attribute of its package on import, so the two share a name.
    ``resfast/__init__.py`` declares the function's type for type checkers.

    Args:
        module: name of the module to make callable.
        home: module that defines the function; slow to import, so imported on the first call.
        name: name of the function.
    """

    class CallableModule(types.ModuleType):
        @property
        def __wrapped__(self) -> Callable[..., Any]:
            return getattr(importlib.import_module(home), name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.__wrapped__(*args, **kwargs)

    sys.modules[module].__class__ = CallableModule
