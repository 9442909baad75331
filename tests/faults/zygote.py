"""Runs commands of resfast in forked processes and stops them at a chosen file event.

``python -m tests.faults.zygote`` imports everything once, then answers lines of JSON. A file event
is what Python's audit hooks report of files below the folder of the test: a file opened for
writing, renamed, removed or truncated, or a folder made. The hook runs before the event.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
FAILED: set[str] = set()
"""Modules that cannot be imported by themselves."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def is_write(event: str, args: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event changes something below a folder."""
    if event not in EVENTS or not args:
        return False
    if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITES):
        return False
    path = args[0]
    if isinstance(path, int):
        return False
    return os.path.abspath(os.fsdecode(path)).startswith(folder)


def run(command: dict[str, Any]) -> None:
    """The child: runs ``command["argv"]`` with the faults that it asks for, and exits."""
    folder, kill_at = command["folder"], command.get("kill_at")
    seen = 0
    number = getattr(signal, command.get("signal", "SIGKILL"))
    output = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    if command.get("most_bytes") is not None:
        limit = command["most_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    counts = Path(command["output"] + ".events")
    descriptor = os.open(counts, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    inside = threading.local()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if getattr(inside, "hook", False) or not is_write(event, args, folder):
            return
        inside.hook = True
        seen += 1
        os.pwrite(descriptor, f"{seen:8d}".encode(), 0)
        if seen == kill_at:
            os.kill(os.getpid(), number)
        inside.hook = False

    name, *arguments = command["argv"]
    main = importlib.import_module(f"resfast.cli.{name}").main
    sys.addaudithook(hook)
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 (a traceback is what the tests look for)
        traceback.print_exc()
        code = 1
    if command.get("most_bytes") is None:
        Path(command["output"] + ".modules").write_text(json.dumps(sorted(sys.modules)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def preload(names: Path) -> None:
    """Imports what a child has imported, so that the next ones need not."""
    if names.exists():
        for name in json.loads(names.read_text()):
            if name not in sys.modules and name not in FAILED:
                try:
                    importlib.import_module(name)
                except Exception:  # noqa: BLE001 (some are made by other modules)
                    FAILED.add(name)


def serve() -> None:
    """Answers each line, a command, with its exit code (negative: a signal) and its events."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            run(command)
        _, status = os.waitpid(child, 0)
        counts = Path(command["output"] + ".events")
        text = counts.read_text().strip() if counts.exists() else ""
        preload(Path(command["output"] + ".modules"))
        answer = {"code": os.waitstatus_to_exitcode(status), "events": int(text or 0)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
