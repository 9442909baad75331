"""``resfast doctor``: what of this machine resfast can use, a line each.

Every line is ``ok``, ``missing`` (it is optional, and the line says what takes its place) or
``problem`` (something is broken), with what to do. The exit code is 1 where there is a problem.
It needs no GPU and no network, and leaves nothing behind. Options: ``--data SPEC`` and
``--data-dir DIR`` as the training takes them, ``--json``.

Only the standard library is imported before a probe runs, and the probes run in a process of their
own: a library that crashes or hangs while it is loaded becomes a line as well.
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
"""Limit for all probes together, which take a few seconds."""

PROBES: dict[str, Callable[[Options], Iterator[Line]]] = {
    "resfast": environment.probe_resfast,
    "Python": environment.probe_python,
    "torch": environment.probe_torch,
    "packages": environment.probe_packages,
    "CUDA device": environment.probe_devices,
    "CPU": environment.probe_cpu,
    "C++ kernels": kernels.probe_cpp_kernels,
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
            text = f"not examined: there is no module {error.name}"
            lines.append(Line(name, "missing", text))
        else:
            text = f"{type(error).__name__}: {first_line(error)}"
            lines.append(Line(name, "problem", text, "repair or reinstall it"))
    return lines


def examine(options: Options, time_limit_s: float = TIME_LIMIT_S) -> list[Line]:
    """The lines of all probes, which run in a process of their own.

    Args:
        options: arguments of the probes.
        time_limit_s: limit for a process of probes, in seconds; the probe that exceeds it failed.
    """
    lines: list[Line] = []
    left = list(PROBES)
    while left:
        request = json.dumps([left, asdict(options)])
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
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            how = f"it ended the process ({how})"
        except subprocess.TimeoutExpired as error:
            output, errors = error.stdout or b"", error.stderr or b""
            how = f"it did not answer within {time_limit_s:.0f} s"
        for answer in output.splitlines():
            left.pop(0)
            lines += [Line(**line) for line in json.loads(answer)]
        if left:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            todo = "repair or reinstall it"
            lines.append(Line(left.pop(0), "problem", f"{how} {last}".rstrip(), todo))
    return lines


def child() -> None:
    """Run by :func:`examine`: prints a line of JSON for each probe named in the arguments."""
    # Keeps what libraries print out of the answers.
    answers: Any = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    names, options = json.loads(sys.argv[1])
    for name in names:
        print(json.dumps([asdict(line) for line in probe(name, Options(**options))]), file=answers)


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    escape_unencodable()
    # argparse, since tyro may be what is missing.
    parser = argparse.ArgumentParser(program("doctor"), description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=Options.data, help="data set, as for training")
    parser.add_argument("--data-dir", default=Options.data_dir, help="where data sets are kept")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(args)
    lines = examine(Options(given.data, given.data_dir))
    fine = not any(line.state == "problem" for line in lines)
    if given.json:
        print(json.dumps({"ok": fine, "lines": [asdict(line) for line in lines]}, indent=2))
    else:
        print(*lines, sep="\n")
    return 0 if fine else 1
