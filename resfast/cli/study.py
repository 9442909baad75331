"""``resfast study NAME``: trains the variants of a study and says which of them differ."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resfast.cli import common as entry
from resfast.errors import ResfastError

COMMAND = "study"


@dataclass(frozen=True)
class Options:
    """Trains what a study compares, each with several seeds, and ranks it.

    Writes studies/NAME/ with results.csv, summary.md, PNG figures and the folder of each run. The
    same command continues a study that was interrupted, and several processes with the same command
    share one.
    Exit codes: 0 done, 2 bad input, 130 interrupted and saved.
    """

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[NAME]")]] = ""
    """Name of a study (--list shows them), or a .toml file of your own."""
    list: bool = False
    """Print the studies and exit."""
    quick: bool = False
    """Train minutes instead of the reports' hours: few images and epochs. Rankings of it are those
    of short trainings."""
    data: str = "auto"
    """cifar10, cifar100, digits, folder:PATH, or auto: CIFAR-10 if it is on disk or can be fetched,
    otherwise digits."""
    data_dir: Path = Path("data")
    """Where data sets are looked for, downloaded to and cached."""
    out: Path = Path("studies")
    """Folder that holds the studies."""
    seeds: int | None = None
    """Number of seeds (None: the study's own)."""
    variants: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Variant to train; may be repeated (not given: all)."""
    device: str | None = None
    """cpu, cuda, cuda:N, or auto (None: auto)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = None
    """Compute dtype (None: the study's own)."""
    threads: int | None = None
    """CPU threads (None: torch's default)."""
    trust: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose code may run, since it makes the network of a run; may be repeated."""


def print_list() -> None:
    """Prints the studies with their size."""
    from resfast.studies.definition import names, study

    print("studies (resfast study NAME), with the number of their report, variants and runs")
    for name in names():
        found = study(name)
        variants = len(found.variants)
        full, quick = (variants * found.seed_count(is_quick) for is_quick in (False, True))
        print(
            f"  {name:<20} {found.report:<4} {variants:>2} variants, {full:>3} runs "
            f"({quick:>2} quick)  {found.title}"
        )


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> int | None:
        options = entry.parse(Options, args, COMMAND)
        if options.list:
            print_list()
            return None
        if not options.name:
            raise ResfastError("study needs the NAME of one; --list shows them")
        from resfast.studies.definition import study
        from resfast.studies.runner import Settings
        from resfast.studies.study import SUMMARY, run

        settings = Settings(
            quick=options.quick,
            data=options.data,
            data_dir=options.data_dir,
            out=options.out,
            seeds=options.seeds,
            variants=options.variants,
            device=options.device,
            precision=options.precision,
            threads=options.threads,
        )
        try:
            result = run(study(options.name), settings)
        except KeyboardInterrupt as error:
            message = "resfast: stopped and saved; the same command continues the study"
            print(message, file=sys.stderr, flush=True)
            return 128 + getattr(error, "signum", 2)
        done = result.progress
        if done.trained:
            print(
                f"{done.trained} runs in {done.seconds:.1f} s: {done.training_seconds:.1f} s of "
                "training, evaluation and compilation, and the rest"
            )
        print((result.path / SUMMARY).read_text(encoding="utf-8"), end="")
        print(result.path)
        return None

    return entry.run(command)
