"""What the entry points share: exit codes, one-sentence errors, and modules that can be called."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from resfast.errors import ResfastError

T = TypeVar("T")


def parse(kind: type[T], args: Sequence[str] | None, prog: str, default: T | None = None) -> T:
    """Reads the command line into the dataclass ``kind``, groups dissolved into plain options."""
    import tyro

    markers = (tyro.conf.OmitArgPrefixes,)
    if default is None:
        return tyro.cli(kind, args=args, prog=prog, config=markers)
    return tyro.cli(kind, args=args, prog=prog, default=default, config=markers)


def escape_unencodable() -> None:
    """Lets standard output and error print any text: what their encoding lacks is escaped.

    Names of classes and files may hold characters that an ASCII or Latin-1 stream cannot, and lone
    surrogates, which no stream can.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def run(main: Callable[[], int | None]) -> int:
    """Runs a command and turns what a user can act on into one sentence and an exit code.

    Returns:
        0, 2 for bad input, 3 for a loss that is not finite, 130 or 143 after SIGINT or SIGTERM.
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
                f"resfast: stopped and saved; go on with: python -m resfast.train --resume {path}",
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
    What type checkers see of it is in ``resfast/__init__.py``.

    Args:
        module: name of the module to call.
        home: module that holds the function; imported on the first call, since it is slow.
        name: of the function.
    """

    class CallableModule(types.ModuleType):
        @property
        def __wrapped__(self) -> Callable[..., Any]:
            return getattr(importlib.import_module(home), name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.__wrapped__(*args, **kwargs)

    sys.modules[module].__class__ = CallableModule
