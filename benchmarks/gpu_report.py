"""``make gpu-report``: builds, tests, times and trains resfast on this machine; writes a report.

    python -m benchmarks.gpu_report --data folder:PATH --peers peers.json --minutes 10

The parts, in this order (``--parts`` chooses some):

- ``build``: builds the C++ kernels, and the CUDA kernels for this device;
- ``doctor``: reports on the machine and the installation (``python -m resfast.doctor``);
- ``tests``: runs every test that needs a GPU, in one process per file;
- ``benchmarks``: runs everything in ``benchmarks/``, in one process per file;
- ``sanitizer``: runs each of our CUDA kernels on small inputs (``benchmarks/small_kernels.py``)
  under compute-sanitizer, with ``memcheck`` and ``racecheck``;
- ``training``: a short training on the digits, or on ``--data``.

Every step is a process group with a time limit, so that no step stops the others: a step may use
what is left of ``--minutes``, minus the time reserved for later steps. After every step, results
are written to ``OUT/NAME.json``, ``OUT/NAME.md`` and plots, and all output to ``OUT/NAME.log``;
NAME is the processor and the date. Without a GPU, only the steps for the CPU run.

It needs only torch, no installed resfast and no network; a step is ``skipped`` if a module that it
needs is missing. The exit code is 0 on success, 1 if a step failed or timed out, 2 for bad input
and 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.report import cuda_versions, hardware, installed, slug
from resfast import atomic, runtime
from resfast.cli import common as entry
from resfast.cli.doctor.line import Line, Options
from resfast.cli.doctor.main import probe
from resfast.errors import ResfastError

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "doctor", "tests", "benchmarks", "sanitizer", "training")
RESERVED = (0.12, 0.03, 0.14, 0.30, 0.07, 0.10)
"""Fraction of the time reserved for each part; any step may use the rest."""
CLOSING_S, GRACE_S = 12.0, 8.0
"""Seconds reserved for the last plots; seconds for a step at its limit to save its results."""
WEIGHTS = {"test_inference.py": 5, "test_train_step.py": 3}
"""Weights of benchmarks in the time reserved for all of them; 1 for the others."""
LOG_BYTES, TAIL_LINES, CUT_TAIL_LINES, TAIL_COLUMNS = 2**20, 40, 10, 300
OURS = ("resfast", "cutlass")
"""Parts of our kernels' names; compute-sanitizer skips the many kernels of torch."""
SANITIZER_FOUND = 86
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, ResfastError,
    ModuleNotFoundError,  # as the training itself was without a module
)  # fmt: skip
"""Exceptions when reading the results of a step that failed or was cut short."""


@dataclass(frozen=True)
class Step:
    """A command of a part.

    Attributes:
        part: one of PARTS.
        name: name within the part.
        command: program and arguments, run in the repository.
        env: variables added to the environment.
        needs: modules that it needs; it is skipped if one is missing.
        skip: reason to skip it; empty to run it.
        read: reads its results from (the last mebibyte of) its output and from its files.
    """

    part: str
    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()
    skip: str = ""
    read: Callable[[str], dict[str, Any]] = lambda output: {}


@dataclass
class Outcome:
    """The outcome of a step: ``pending``, ``ok``, ``failed``, ``timed out``, ``skipped``, …"""

    part: str
    name: str
    command: str
    env: dict[str, str]
    status: str = "pending"
    why: str = ""
    seconds: float = 0.0
    limit_seconds: float = 0.0
    exit_code: int | None = None
    result: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


# -- the steps of the parts ------------------------------------------------------------------------


def steps(options: argparse.Namespace, work: Path) -> list[Step]:
    """The steps of the chosen parts, in order; ``work`` is the folder for their files."""
    cuda = torch.cuda.is_available()
    no_gpu = "" if cuda else "there is no CUDA device"
    data = ["--data", options.data, "--data-dir", str(options.data_dir)]
    python = (sys.executable, "-m")
    everything = [
        Step(
            "build",
            "C++ kernels",
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            {"RESFAST_EXTENSION": "1", "RESFAST_CUDA": "0"},
            needs=["setuptools"],
        ),
        # For the architectures of the GPUs that nvidia-smi sees.
        Step(
            "build",
            "CUDA kernels",
            [sys.executable, "csrc/cuda/build.py", "resfast/_CUDA.so"],
            skip=no_gpu,
        ),
        Step("doctor", "doctor", [*python, "resfast.doctor", "--json", *data], read=_read_doctor),
    ]
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "mark.gpu" in path.read_text(encoding="utf-8"):
            everything.append(_pytest("tests", path, work, "gpu", skip=no_gpu))
    kind, _, images = options.data.partition(":")
    env = {"RESFAST_BENCH_DATA": images} if kind == "folder" and os.path.isdir(images) else {}
    benchmarks = sorted((ROOT / "benchmarks").glob("test_*.py"))
    # Inference first: it is the most important, should the time be short.
    for path in sorted(benchmarks, key=lambda path: path.name != "test_inference.py"):
        results = f"--benchmark-json={work / path.stem}.benchmark.json"
        step = _pytest(
            "benchmarks", path, work, "gpu" if cuda else "not gpu", "--benchmark-only", results
        )
        everything.append(replace(step, env=env, needs=[*step.needs, "pytest_benchmark"]))
    sanitizer = _sanitizer()
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer or "compute-sanitizer", "--tool", tool]
        command += ["--error-exitcode", str(SANITIZER_FOUND)]
        command += [part for name in OURS for part in ("--kernel-name", f"kns={name}")]
        everything.append(
            Step(
                "sanitizer",
                tool,
                [*command, *python, "benchmarks.small_kernels"],
                # Blocks of torch's cache are adjacent: reading past the end would go unnoticed.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                skip=no_gpu or ("" if sanitizer else "compute-sanitizer was not found"),
                read=_read_sanitizer,
            )
        )
    recipe = ["--recipe", options.recipe, "--epochs", str(options.epochs or (8 if cuda else 1))]
    runs = work / "runs"
    everything.append(
        Step(
            "training",
            options.recipe,
            [*python, "resfast.train", *data, *recipe, "--out", str(runs), "--name", "report"],
            read=partial(_read_training, runs / "report"),
        )
    )
    return [step for step in everything if step.part in options.parts]


def _pytest(part: str, path: Path, work: Path, marked: str, *options: str, skip: str = "") -> Step:
    """A step that runs the tests of one file with a mark."""
    folder = ROOT / part
    name = (path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)).as_posix()
    results = work / f"{part}-{name.removesuffix('.py').replace('/', '-')}.xml"
    command = [sys.executable, "-m", "pytest", os.path.relpath(path, ROOT), "-m", marked, *options]
    command += ["-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
    read = partial(_read_tests, results)
    return Step(part, name, command, needs=["pytest"], skip=skip, read=read)


def _sanitizer() -> str | None:
    """Path of compute-sanitizer: from PATH, CUDA_HOME, the usual folder, or its package."""
    nvidia = find_spec("nvidia")
    packages = [Path(path) for path in nvidia.submodule_search_locations or ()] if nvidia else []
    homes = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")]
    homes += [home for path in packages for home in sorted(path.glob("cu[0-9]*"), reverse=True)]
    names = ["compute-sanitizer", *(str(home / "bin" / "compute-sanitizer") for home in homes)]
    return next((path for name in names if (path := shutil.which(name))), None)


# -- reading results -------------------------------------------------------------------------------


# Each returns the results and, under ``said``, a short summary for the page.


def _read_doctor(output: str) -> dict[str, Any]:
    found = json.loads(output)
    lines = [Line(**line) for line in found["lines"]]
    problems = ", ".join(line.name for line in lines if line.state == "problem")
    return {**found, "said": f"problems: {problems}" if problems else "no problem"}


def _read_tests(path: Path, output: str) -> dict[str, Any]:
    """Counts of a JUnit file, names of failed tests and reasons of skipped ones."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    failures, reasons = [], set()
    for case in ElementTree.parse(path).iter("testcase"):
        if case.get("name") is None:  # the test that was interrupted
            continue
        bad = [kind for kind in ("failure", "error") if case.find(kind) is not None]
        skipped = case.find("skipped")
        counts["failed" if bad else "passed" if skipped is None else "skipped"] += 1
        if bad:
            message = str(case.find(bad[0]).get("message", "")).partition("\n")[0]
            failures.append(f"{case.get('name')}: {message[:TAIL_COLUMNS]}")
        elif skipped is not None:
            reasons.add(str(skipped.get("message")))
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    return {**counts, "failures": failures, "skip_reasons": sorted(reasons), "said": words}


def _read_sanitizer(output: str) -> dict[str, Any]:
    """The summary of compute-sanitizer and the number of launches that it checked."""
    found = re.findall(
        r"(?:(?:ERROR|RACECHECK) SUMMARY: |^)(\d+ (?:errors?|hazards?|launches).*)", output, re.M
    )
    if len(found) != 2:
        raise ValueError("compute-sanitizer or the program under it ended without a summary")
    return {"said": "; ".join(found)}


def _read_training(run: Path, output: str) -> dict[str, Any]:
    """The summary of a run, or its last epoch if it was cut short."""
    # pydantic, which they need, is there if the training began.
    from resfast.runs import folder as records
    from resfast.runs.epoch_row import read_rows, row_values
    from resfast.runs.summary import read_run

    if (file := run / records.SUMMARY).exists():
        result = read_run(file)
        words = (
            f"{result.data}: {result.test_accuracy:.2%} after {result.epochs} epochs in "
            f"{result.train_seconds:.1f} s ({result.images_per_second:,.0f} images/s)"
        )
        return {**json.loads(result.to_json()), "said": words}
    last = read_rows(run / records.METRICS)[-1]
    return {"last_epoch": row_values(last), "said": f"epoch {last.epoch} was the last"}


def _missing_module(output: str) -> str | None:
    """The missing module that ended a program, or None."""
    named = re.findall(r"No module named '?([\w.]+)", output)
    return named[-1] if named and not installed(named[-1]) else None


# -- running steps ---------------------------------------------------------------------------------


def run(step: Step, outcome: Outcome, limit_s: float, log: Path) -> None:
    """Runs a step for at most ``limit_s`` seconds; its output is appended to ``log``."""
    absent = [module for module in step.needs if not installed(module)]
    if step.skip or absent:
        outcome.status = "skipped"
        outcome.why = step.skip or f"there is no module {absent[0]}"
        return
    if limit_s <= 0:
        outcome.status, outcome.why = "timed out", "no time was left for it"
        return
    outcome.limit_seconds = round(limit_s, 1)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.env}
    # The inference benchmark starts no case that it could not finish in time.
    env["RESFAST_BENCH_MINUTES"] = f"{0.8 * limit_s / 60:.2f}"
    begin = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n$ {outcome.command}\n".encode())
        file.flush()
        offset = file.tell()
        timed_out = False
        try:
            with _interruptible():
                process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env={**os.environ, **env},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            outcome.status, outcome.why = "failed", f"it cannot be started: {error}"
            return
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            # Like Ctrl-C: pytest writes its results, and a training its last epoch.
            _signal_group(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            _signal_group(process, signal.SIGKILL)  # also processes that it left running
            outcome.exit_code = process.wait()
            outcome.seconds = round(time.monotonic() - begin, 1)
    _judge(step, outcome, timed_out, _since(log, offset))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Processes started within it react to SIGINT, which background jobs of a shell ignore."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all processes have ended
        os.killpg(process.pid, signum)


def _since(log: Path, offset: int) -> str:
    """Content of ``log`` from ``offset`` on, at most its last mebibyte."""
    with log.open("rb") as file:
        file.seek(max(offset, file.seek(0, os.SEEK_END) - LOG_BYTES))
        return file.read().decode("utf-8", errors="replace")


def _judge(step: Step, outcome: Outcome, timed_out: bool, output: str) -> None:
    """Fills in status, reason, result and the end of the output."""
    try:
        outcome.result = step.read(output)
        unreadable = ""
    except UNREADABLE as error:
        unreadable = f"its results cannot be read: {type(error).__name__}: {error}"
    code, missing = outcome.exit_code, _missing_module(output)
    if timed_out:
        outcome.status = "timed out"
        outcome.why = f"after {outcome.limit_seconds:.0f} s"
    elif code == 0 and not unreadable:
        outcome.status = "ok"
        return
    elif code == 5 and "pytest" in step.command:
        outcome.status, outcome.why = "skipped", "no test was selected"
        return
    elif missing and not outcome.result.get("passed") and "lines" not in outcome.result:
        outcome.status, outcome.why = "skipped", f"there is no module {missing}"
    else:
        outcome.status = "failed"
        ended = f"signal {-code}" if code and code < 0 else f"exit code {code}"
        outcome.why = unreadable if code == 0 else ended
    printable = re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e\n\u00a0-\uffef]", "", output)
    lines = CUT_TAIL_LINES if timed_out else TAIL_LINES
    outcome.tail = [line[:TAIL_COLUMNS] for line in printable.splitlines()[-lines:]]


# -- the report ------------------------------------------------------------------------------------


@dataclass
class Report:
    """The results so far, and where they are written.

    Attributes:
        name: name of its files.
        folder: folder of its files.
        work: folder for the files of the steps.
        peers: files with results of others.
        record: content of the JSON file.
        outcomes: outcomes of the steps.
        aliases: replacements for folders of this machine, as the report may be published.
        tables: Markdown about the benchmarks.
    """

    name: str
    folder: Path
    work: Path
    peers: Sequence[Path]
    record: dict[str, Any]
    outcomes: list[Outcome]
    aliases: Mapping[str | Path, str] = field(default_factory=dict)
    tables: str = ""

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def save(self, state: str) -> None:
        """Writes the JSON and Markdown files, each atomically."""
        self.record |= {"state": state, "steps": [asdict(outcome) for outcome in self.outcomes]}
        text = json.dumps(self.record, indent=2, default=str) + "\n"
        for path, name in self.aliases.items():
            text = text.replace(str(path), name) if len(str(path)) > 1 else text
        atomic.save(self.folder / f"{self.name}.json", text.encode())
        text = page(json.loads(text), self.tables)
        atomic.save(self.folder / f"{self.name}.md", text.encode())

    def add_benchmarks(self) -> None:
        """Adds tables and plots of the benchmarks so far, or errors that prevent them."""
        files = [path for path in sorted(self.work.glob("*.benchmark.json")) if path.stat().st_size]
        errors, readable = [], []
        try:
            from benchmarks import bench_report

            for path in (*files, *self.peers):
                try:
                    bench_report.load([path])
                    readable.append(path)
                except ResfastError as error:  # the benchmark was killed while writing
                    errors.append(str(error))
            if readable:
                found = bench_report.load(readable)
                rows = [row.model_dump(mode="json") for row in found.rows]
                self.record |= {"format": bench_report.FORMAT, "rows": rows}
                plots = bench_report.save_plots(found, self.folder, self.name)
                names = {kind: path.name for kind, path in plots.items()}
                self.tables = bench_report.tables(found, names)
        except Exception as error:  # noqa: BLE001  # errors here must not stop the report
            errors.append(f"{type(error).__name__}: {error}")
        self.record["benchmark_errors"] = errors


def page(record: Mapping[str, Any], tables: str) -> str:
    """The report as Markdown; ``tables`` is the part about benchmarks."""
    commit = (record["commit"] or "unknown") + (", with changes" if record["dirty"] else "")
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items() if value)
    lines = [
        f"# {record['name']}",
        "",
        f"{machine}. Commit {commit}, {record['date']}, `{record['command']}`: {record['state']}, "
        f"{record['seconds']:.0f} s.",
        "",
        "| part | step | status | seconds | |",
        "|---|---|---|---|---|",
    ]
    for step in record["steps"]:
        cells = [
            step["part"],
            step["name"],
            step["status"],
            f"{step['seconds']:.1f}",
            short_result(step),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    failures = [
        f"- `{step['name']}` {name}"
        for step in record["steps"]
        for name in step["result"].get("failures", ())
    ]
    if failures:
        lines += ["", "## Failed tests", "", *failures]
    for step in record["steps"]:
        if "lines" in step["result"]:
            found = [str(Line(**line)) for line in step["result"]["lines"]]
            lines += ["", "## Doctor", "", "~~~~", *found, "~~~~"]
    if tables:
        lines += ["", tables.strip()]
    for error in record.get("benchmark_errors", ()):
        lines += ["", f"Missing from the benchmarks: {error}"]
    for step in record["steps"]:
        if step["tail"]:
            lines += ["", f"## End of the output of {step['part']}, {step['name']}", ""]
            lines += [f"`{step['command']}`", "", "~~~~", *step["tail"], "~~~~"]
    return "\n".join(lines) + "\n"


def short_result(step: Mapping[str, Any]) -> str:
    """The reason for a step's status and a short form of its result."""
    return "; ".join(filter(None, (step["why"], step["result"].get("said"))))


def _git(*arguments: str) -> str | None:
    """Output of git in the repository; None without git or a repository."""
    command = ["git", "-c", f"safe.directory={ROOT}", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _new_name(folder: Path) -> str:
    """Processor and date, such as ``nvidia-h200-2026-11-21``; numbered if the name is taken."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = runtime.describe(device).partition(",")[0]
    name = slug(f"{processor} {datetime.now():%Y-%m-%d}")
    names = [name, *(f"{name}-{count}" for count in range(2, 1000))]
    return next(name for name in names if not (folder / f"{name}.json").exists())


def _machine() -> dict[str, Any]:
    return hardware("cuda" if torch.cuda.is_available() else "cpu") | cuda_versions()


def options_of(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        ResfastError: the data or results of others are missing or cannot be used.
        SystemExit: an option is unknown or malformed (code 2), or help was asked for.
    """
    # argparse, since tyro may not be installed here.
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", help="data set to train on, as for resfast.train")
    add("--data-dir", default="data", type=Path, help="folder of data sets")
    add("--recipe", default="default", help="recipe of the training")
    add("--epochs", type=int, help="epochs of the training (default: 8, on a CPU 1)")
    add("--peers", action="append", default=[], type=Path, help="JSON file with results of others")
    add("--minutes", default=10.0, type=float, help="total time limit")
    add("--parts", nargs="+", default=PARTS, choices=PARTS, help="parts to run (default: all)")
    add("--out", default=ROOT / "benchmarks" / "results", type=Path, help="folder of the report")
    options = parser.parse_args(args)
    if not 0.1 <= options.minutes <= 24 * 60:
        parser.error(f"--minutes {options.minutes} is out of range: expected 0.1 to 1440")
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs {options.epochs} is out of range: expected at least 1")
    for line in probe("data", Options(options.data, str(options.data_dir))):
        if line.state == "problem":
            raise ResfastError(f"--data {options.data}: {line.text} {line.todo}".rstrip())
    if options.peers:
        from benchmarks import bench_report

        bench_report.load(options.peers)  # find a bad file now, not after ten minutes
    kind, colon, path = options.data.partition(":")
    options.data = kind + colon + (os.path.abspath(os.path.expanduser(path)) if path else "")
    options.data_dir, options.out = options.data_dir.resolve(), options.out.resolve()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResfastError(f"cannot create the folder {options.out}: {error.strerror}") from None
    return options


def report_on(todo: Sequence[Step], report: Report, minutes: float) -> bool:
    """Runs the steps and writes the report after each; returns whether no step failed."""
    begin, total = time.monotonic(), 60 * minutes
    weights = [WEIGHTS.get(step.name, 1) for step in todo]
    weight_of_part = dict.fromkeys(PARTS, 0)
    for step, weight in zip(todo, weights, strict=True):
        weight_of_part[step.part] += weight
    reserved_of_part = dict(zip(PARTS, RESERVED, strict=True))
    reserved = [
        total * reserved_of_part[step.part] * weight / weight_of_part[step.part]
        for step, weight in zip(todo, weights, strict=True)
    ]
    for index, (step, outcome) in enumerate(zip(todo, report.outcomes, strict=True)):
        left = total - (time.monotonic() - begin) - min(CLOSING_S, 0.1 * total)
        allowed = left - sum(reserved[index + 1 :])
        print(f"{step.part}, {step.name}: ", end="", flush=True)
        outcome.status = "running"
        report.save("running")
        try:
            run(step, outcome, max(allowed - GRACE_S, 0.5 * allowed), report.log)
        except KeyboardInterrupt:
            outcome.status = "interrupted"
            report.save("interrupted")
            raise
        if step.part == "benchmarks":
            report.add_benchmarks()
        report.record["seconds"] = round(time.monotonic() - begin, 1)
        text = short_result(asdict(outcome))
        print(f"{outcome.status} ({outcome.seconds:.1f} s) {text}".rstrip(), flush=True)
        report.save("running" if index + 1 < len(todo) else "done")
    return not any(outcome.status in ("failed", "timed out") for outcome in report.outcomes)


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def command() -> int:
        options = options_of(args)
        signal.signal(signal.SIGTERM, stop)
        with tempfile.TemporaryDirectory(prefix="resfast-report-") as work:
            todo = steps(options, Path(work))
            name = _new_name(options.out)
            arguments = shlex.join(sys.argv[1:] if args is None else args)
            record = {
                "name": name,
                "date": datetime.now().astimezone().isoformat(timespec="seconds"),
                "command": f"python -m benchmarks.gpu_report {arguments}".rstrip(),
                "commit": _git("rev-parse", "HEAD"),
                "dirty": bool(_git("status", "--porcelain")),
                "machine": _machine(),
                "minutes": options.minutes,
                "seconds": 0.0,
            }
            outcomes = [
                Outcome(step.part, step.name, shlex.join(map(str, step.command)), dict(step.env))
                for step in todo
            ]
            aliases = {sys.executable: "python", work: "WORK", options.out: "OUT"}
            aliases |= {os.path.dirname(options.data.partition(":")[2]): "DATA"}
            aliases |= {ROOT: ".", sys.prefix: "ENVIRONMENT", Path.home(): "~"}
            report = Report(name, options.out, Path(work), options.peers, record, outcomes, aliases)
            report.save("running")
            has_passed = report_on(todo, report, options.minutes)
            print(options.out / f"{name}.md")
        return 0 if has_passed else 1

    return entry.run(command)


if __name__ == "__main__":
    sys.exit(main())
