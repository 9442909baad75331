"""``resfast doctor``: checks what resfast can use on this machine, one line per check.

Every line is ``ok``, ``missing`` (optional; the line says what is used instead) or ``problem``
(something is broken; the line says what to do). The exit code is 1 if there is a problem. It needs
no GPU and no network, and leaves nothing behind. Options: ``--data SPEC`` and ``--data-dir DIR`` as
for training, ``--json``.

Only the standard library is imported before a probe runs, and the probes run in a separate process:
a library that crashes or hangs on import becomes a line too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from resfast.cli.common import escape_unencodable, program
from resfast.cli.doctor import environment, kernels
from resfast.cli.doctor.line import PACKAGE, Line, Options, first_line

TIME_LIMIT_S = 60.0
"""Time limit for all probes together, which normally take a few seconds."""

PROBES: dict[str, Callable[[Options], Iterator[Line]]] = {
    "resfast": environment.probe_resfast,
    "Python": environment.probe_python,
    "torch": environment.probe_torch,
    "packages": environment.probe_packages,
    "CUDA device": environment.probe_devices,
    "CPU": environment.probe_cpu,
    "C++ kernels": kernels.probe_cpp_kernels,
    "portability": kernels.probe_portability,
    "CUDA kernels": kernels.probe_cuda_kernels,
    "Triton": kernels.probe_triton,
    "C++ compiler": kernels.probe_compiler,
    "nvcc": kernels.probe_nvcc,
    "DALI": environment.probe_dali,
    "optional": environment.probe_optional,
    "cache": environment.probe_cache,
    "data": environment.probe_data,
    "threads": environment.probe_threads,
    "allocator": environment.probe_allocator,
}


def probe(name: str, options: Options) -> list[Line]:
    """The lines of one probe; a failure becomes one of them."""
    lines: list[Line] = []
    try:
        lines.extend(PROBES[name](options))
    except Exception as error:  # noqa: BLE001  # one probe must not stop the others
        if isinstance(error, ModuleNotFoundError) and error.name and name != error.name:
            text = f"not checked: module {error.name} is not installed"
            lines.append(Line(name, "missing", text))
        else:
            text = f"{type(error).__name__}: {first_line(error)}"
            lines.append(Line(name, "problem", text, "repair or reinstall it"))
    return lines


def examine(options: Options, time_limit_s: float = TIME_LIMIT_S) -> list[Line]:
    """The lines of all probes, which run in a separate process.

    Args:
        options: arguments of the probes.
        time_limit_s: limit for a process of probes, in seconds; the probe then running has failed,
            and the rest run in a new process.
    """
    lines: list[Line] = []
    remaining = list(PROBES)
    while remaining:
        request = json.dumps([remaining, asdict(options)])
        command = [
            sys.executable,
            "-c",
            "from resfast.cli.doctor.main import child; child()",
            request,
        ]
        path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                timeout=time_limit_s,
            )
            output, errors, code = done.stdout, done.stderr, done.returncode
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            failure = f"it ended the process ({cause})"
        except subprocess.TimeoutExpired as error:
            output, errors = error.stdout or b"", error.stderr or b""
            failure = f"it did not answer within {time_limit_s:.0f} s"
        for result in output.splitlines():
            remaining.pop(0)
            lines += [Line(**line) for line in json.loads(result)]
        if remaining:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            todo = "repair or reinstall it"
            lines.append(Line(remaining.pop(0), "problem", f"{failure} {last}".rstrip(), todo))
    return lines


def child() -> None:
    """Run by :func:`examine`: prints a line of JSON for each probe named in the arguments."""
    # Sends what libraries print to standard error, so that only results are on standard output.
    results: Any = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    names, options = json.loads(sys.argv[1])
    for name in names:
        print(json.dumps([asdict(line) for line in probe(name, Options(**options))]), file=results)


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    escape_unencodable()
    # argparse, since tyro itself may be missing.
    parser = argparse.ArgumentParser(program("doctor"), description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=Options.data, help="data set, as for training")
    parser.add_argument("--data-dir", default=Options.data_dir, help="where data sets are kept")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--retune",
        action="store_true",
        help="delete the measured choices of kernels first, so that they are measured again",
    )
    parsed = parser.parse_args(args)
    if parsed.retune:
        for path in environment.choice_files():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                print(f"resfast: error: cannot delete {path}: {error.strerror}", file=sys.stderr)
                return 2
            print(f"deleted {path}", file=sys.stderr)
    lines = examine(Options(parsed.data, parsed.data_dir))
    ok = not any(line.state == "problem" for line in lines)
    if parsed.json:
        print(json.dumps({"ok": ok, "lines": [asdict(line) for line in lines]}, indent=2))
    else:
        print(*lines, sep="\n")
    return 0 if ok else 1
