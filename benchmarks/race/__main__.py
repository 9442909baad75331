"""Races others' unchanged training scripts against our recipes on the same device and images.

``python -m benchmarks.race --peers FOLDER --recipes fast94 --data folder:… --out FOLDER`` runs
every script of a folder and every recipe named, each in a process of its own that prints its
trials. The processes take turns of a few trials; all others are paused. Each trial is timed by a
clock outside them, from the end of the one before and without pauses, beside what the contender
reports.

The folder has Python scripts that print the table of airbench, or a ``peers.toml`` that says what
to run and what its output means::

    [[peer]]
    name = "theirs"
    script = "train.py"                      # or command = "python3.12 {folder}/train.py --fast"
    trial = 'done: (?P<accuracy>[\\d.]+)% .* (?P<tta_accuracy>[\\d.]+)% in (?P<seconds>[\\d.]+) s'
    warmup = '^warming up'                   # optional: a line of a warm-up trial
    start = '^training'                      # optional: the first line after the preparation

Scripts run in a folder where ``cifar10/train.pt`` and ``test.pt`` have the images of ``--data``. A
script that fails or prints no trial is a row with the reason. Ctrl-C keeps the rows; the same
command with ``--resume``, and more ``--trials`` if wanted, adds to them. Options of resfast.train
for all recipes follow ``--``.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from benchmarks.race import contenders as who
from benchmarks.race import data as files
from benchmarks.race import page, plot, results, rows
from benchmarks.race.contenders import Contender
from benchmarks.race.runner import Rules, Runner, run
from benchmarks.race.sample import Sampler
from benchmarks.report import hardware
from resfast import atomic
from resfast.cli import common as entry
from resfast.data.dataset import Dataset
from resfast.data.sources import load_dataset
from resfast.errors import ResfastError
from resfast.runs.targets import data_name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--peers", type=Path, metavar="FOLDER", help="others' scripts and peers.toml")
    add("--only", nargs="+", default=[], metavar="NAME", help="peers to choose (default: all)")
    add("--recipes", nargs="+", default=[], metavar="RECIPE", help="our recipes")
    add("--data", required=True, help="images, as for resfast.train")
    add("--data-dir", type=Path, default=Path("data"), help="as for resfast.train (default: data)")
    add("--trials", type=int, default=20, help="of each contender (default: 20)")
    add("--block", type=int, default=2, help="trials of a turn (default: 2)")
    add("--warmup", type=int, default=1, help="first trials of each process that do not count")
    add("--target-ratio", type=float, default=1.0, help="what the p-values test (default: 1)")
    add("--patience", type=float, default=1800.0, help="seconds without a trial (default: 1800)")
    add("--out", type=Path, required=True, help="folder for rows, tables and the plot")
    add("--work", type=Path, default=Path("build/race"), help="where scripts run: images and logs")
    add("--resume", action="store_true", help="add trials to those in --out")
    return parser


def _check(given: argparse.Namespace) -> None:
    for name, least in (("trials", 1), ("block", 1), ("warmup", 0)):
        if getattr(given, name) < least:
            raise ResfastError(
                f"--{name} {getattr(given, name)} is out of range: expected at least {least}"
            )
    for name in ("target_ratio", "patience"):
        if not 0 < getattr(given, name) < float("inf"):
            option = name.replace("_", "-")
            raise ResfastError(f"--{option} {getattr(given, name)}: expected a number above 0")


def _earlier(given: argparse.Namespace) -> list[rows.Row]:
    """The rows that a race is to be added to."""
    found = rows.read(given.out)
    if found and not given.resume:
        raise ResfastError(
            f"{given.out} has a race; add trials with --resume, or choose another --out"
        )
    return found


def _check_same(before: results.Race, now: results.Race, folder: Path) -> None:
    """Checks that trials of a race can be added to those of another."""
    differs = None
    if before.data_digest != now.data_digest:
        differs = "other images"
    elif before.warmup != now.warmup:
        differs = f"--warmup {before.warmup}"
    known = {one.name: (one.command, one.script_sha256) for one in before.contenders}
    for one in now.contenders:
        if known.get(one.name) not in (None, (one.command, one.script_sha256)):
            differs = f"another script or other options for {one.name}"
    if differs is not None:
        raise ResfastError(f"{folder} has a race with {differs}; choose another --out")


def _read(path: Path) -> results.Race:
    try:
        return results.Race.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ResfastError(f"{path} cannot be read as the results of a race: {reason}") from None


class _Recorder:
    """Writes each row at once, and prints it.

    Args:
        folder: of the results.
        found: rows of earlier sessions.
        hidden: folders of this machine, and what to write instead in the output of scripts.
    """

    def __init__(self, folder: Path, found: list[rows.Row], hidden: dict[str, str]) -> None:
        self.folder, self.rows, self.hidden = folder, found, hidden

    def __call__(self, row: rows.Row) -> None:
        row = row.model_copy(update={"tail": tuple(map(self._without_folders, row.tail))})
        self.rows.append(row)
        rows.write(self.folder, self.rows)
        print(_line(row), flush=True)

    def _without_folders(self, line: str) -> str:
        for folder, name in self.hidden.items():
            line = line.replace(folder, name)
        return line


def _line(row: rows.Row) -> str:
    text = f"{row.contender}, {row.phase} {row.number}: {row.seconds:.3f} s"
    if row.own_seconds is not None:
        text += f" ({row.own_seconds:.3f} s by its own clock)"
    if row.accuracy is not None:
        text += f", {row.accuracy:.2%}"
    if row.tta_accuracy is not None:
        text += f", with test-time augmentation {row.tta_accuracy:.2%}"
    if row.reason is not None:
        text = "\n    ".join([f"{row.contender}: {row.reason}", *row.tail])
    return text


def _machine(sampler: Sampler) -> dict[str, Any]:
    gpu = {name.replace(".", "_"): value for name, value in sampler.gpu.items()}
    names = {"name": "gpu", "driver_version": "driver"}
    return {**hardware("cpu"), **{names.get(name, name): value for name, value in gpu.items()}}


def _command(given: argparse.Namespace, options: Sequence[str]) -> str:
    """The command that repeats the race, without folders of this machine."""
    parts = ["python", "-m", "benchmarks.race"]
    parts += ["--peers", "FOLDER"] if given.peers else []
    parts += ["--only", *given.only] if given.only else []
    parts += ["--recipes", *given.recipes] if given.recipes else []
    parts += ["--data", data_name(given.data), "--trials", str(given.trials)]
    parts += ["--block", str(given.block), "--warmup", str(given.warmup)]
    parts += ["--target-ratio", f"{given.target_ratio:g}", "--out", "FOLDER"]
    return shlex.join([*parts, *(["--", *options] if options else [])])


def _stop_once(number: int, frame: FrameType | None) -> None:
    """Interrupts the race; further signals must not interrupt the ending of its processes."""
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    error = KeyboardInterrupt()
    error.signum = number  # type: ignore[attr-defined]  # for the exit code
    raise error


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _race(given: argparse.Namespace, options: Sequence[str]) -> None:
    _check(given)
    work = atomic.make_folder(given.work, "--work").resolve()
    atomic.make_folder(given.out, "--out")
    dataset = _images(given, work)
    earlier = _earlier(given)
    found: list[Contender] = [
        *who.recipes(given.recipes, options, given.data, given.data_dir, work, dataset.digest),
        *(who.peers(given.peers, work, given.only) if given.peers else []),
    ]
    who.check_names(found)
    hidden = {str(work): "WORK", sys.prefix: "PYTHON"}
    hidden = {str(given.peers.resolve()): "PEERS", **hidden} if given.peers else hidden
    recorder = _Recorder(given.out, earlier, {**hidden, str(who.ROOT): ".", str(Path.home()): "~"})
    rules = Rules(given.trials, given.block, given.warmup, given.patience)
    sampler, logs = Sampler(), atomic.make_folder(work / "logs", "--work")
    runners = [
        Runner(
            one,
            rules,
            [row for row in earlier if row.contender == one.name],
            recorder,
            sampler,
            logs,
        )
        for one in found
    ]
    first_block = max((row.block + 1 for row in earlier if row.block is not None), default=0)
    settings = {
        "rules": rules,
        "target_ratio": given.target_ratio,
        "command": _command(given, options),
        "data": data_name(given.data),
        "data_digest": dataset.digest,
        "hardware": _machine(sampler),
    }
    result, path = results.race(found, earlier, **settings), given.out / page.RESULT
    if earlier and path.exists():
        _check_same(_read(path), result, given.out)
    page.write(result, given.out)
    try:
        run(runners, sampler, first_block)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume continues", file=sys.stderr)
        raise
    finally:
        result = results.race(found, recorder.rows, **settings)
        page.write(result, given.out)
        plot.save(result, recorder.rows, given.out / page.PLOT)
        print(f"\n{page.page(result)}\n{given.out}", flush=True)


def _images(given: argparse.Namespace, work: Path) -> Dataset:
    """The images, written for scripts; loading them leaves the cache that resfast.train uses."""
    dataset = load_dataset(given.data, data_dir=given.data_dir, image_size=files.SIZE)
    try:
        files.write(dataset, work)
    except OSError as error:
        raise ResfastError(
            f"cannot write the images to {work}: {error.strerror}; choose another --work"
        ) from None
    return dataset


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2, 130 and 143 as ``resfast train``."""
    arguments = list(sys.argv[1:] if args is None else args)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given, options = _parser().parse_args(arguments[:cut]), arguments[cut + 1 :]
    before = {number: signal.signal(number, _stop_once) for number in _SIGNALS}
    try:
        return entry.run(lambda: _race(given, options))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
