"""``resfast sweep SPACE``: searches for good values of options, with one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from resfast.cli import common as entry
from resfast.errors import ResfastError

COMMAND = "sweep"
PACKAGES = {"optuna": "optuna", "tomli_w": "tomli-w", "filelock": "filelock"}
"""Modules of the extra ``sweep``, and the packages that have them."""


@dataclass(frozen=True)
class Options:
    """Searches for good values of options, on held-out images.

    SPACE is a TOML file with the options of every trial and a range for each one that is searched.
    Start the same command several times to share the trials among processes; start it again to go
    on after an interruption. Writes results.csv, best.toml, importance.png and contour.png. Exit
    codes: 0 done, 2 bad input, 130 interrupted and saved.
    """

    space: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SPACE")]]
    """TOML file of the sweep."""
    trials: int = 20
    """Number of trials of the whole sweep, those of earlier commands and other processes
    included."""
    out: Path | None = None
    """Folder of the sweep (None: sweeps/ and the name of the file without .toml)."""
    heartbeat: int = 60
    """Seconds between signs of life; after twice as many without one, the trial of a killed process
    is taken over."""
    trust: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose code may run, since it makes the network of a run; may be repeated."""


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        options = entry.parse(Options, args, COMMAND)
        for name, least in (("trials", 1), ("heartbeat", 1)):
            if (value := getattr(options, name)) < least:
                raise ResfastError(f"--{name} {value} is out of range: expected at least {least}")
        missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
        if missing:
            raise ResfastError(
                f"resfast sweep needs the package {missing[0]}; pip install 'resfast[sweep]'"
            )
        _sweep(options)

    return entry.run(command)


def _sweep(options: Options) -> None:
    from resfast.cli.train import undecided
    from resfast.training.sweep.results import importances
    from resfast.training.sweep.space import read_options, read_space
    from resfast.training.sweep.study import counts, sweep

    path = options.space.expanduser()
    arguments, rest = read_options(path)
    start, base = undecided(arguments)
    for name in ("resume", "profile", "list", "summary"):
        if getattr(start, name):
            raise ResfastError(f"{path}: --{name} is not for a sweep; leave it out of options")
    space = read_space(path, arguments, rest, base)
    out = Path("sweeps") / path.stem if options.out is None else options.out.expanduser()
    try:
        found = sweep(
            space, base, out, trials=options.trials, heartbeat_s=options.heartbeat, say=_say
        )
    except KeyboardInterrupt as error:
        _say(f"{out} is saved; the same command goes on with it")
        stopped = KeyboardInterrupt()
        stopped.signum = getattr(error, "signum", 2)  # type: ignore[attr-defined]
        raise stopped from None
    states = ", ".join(f"{count} {name}" for name, count in counts(found.study).items())
    print(f"trials: {states}")
    if found.best is None:
        print(f"no trial was completed; see {out / 'results.csv'}")
        return
    print(f"best {space.objective} on held-out images: {found.best.value:.4f}")
    for name, value in found.best.params.items():
        print(f"  --{name.replace('_', '-')} {value}")
    if shares := importances(found.study):
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print(f"importance: {shown}")
    print(f"train it with: resfast train --config {out / 'best.toml'}\n{out}")


def _say(line: str) -> None:
    print(line, flush=True)
