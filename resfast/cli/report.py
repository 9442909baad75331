"""``resfast report RUN…``: one HTML page about runs, which needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from resfast import atomic
from resfast.cli import common as entry
from resfast.errors import ResfastError

COMMAND = "report"
SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class Options:
    """Writes one HTML page about one run or several.

    It has results, configuration differences, curves, confusion matrices, accuracies of classes,
    the most confident mistakes, time, layers, and the data. What a run lacks is left out with a
    sentence. Exit codes: 0 written, 2 bad input.
    """

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN…")]]
    """Folders of runs, runs/NAME, or folders that contain runs: of --runs, or of a study."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """HTML file to write or replace."""
    data: str | None = None
    """Another place of the data, in the notation of train's --data (None: each run's own)."""
    data_dir: Path | None = None
    """Where data sets are looked for, downloaded to and cached (None: each run's own)."""
    mistakes: int = 24
    """Most confident mistakes to show of each configuration (0: none); of more than three
    configurations, at most 12 each."""
    images_per_class: int = 12
    """Training images to show of each class (0: none)."""
    device: str = "auto"
    """Where the networks classify images: cpu, cuda, cuda:N, or auto: CUDA if available."""
    trust: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose code may run, since it makes the network of the run; may be repeated."""


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        options = entry.parse(Options, args, COMMAND)
        path = options.output.expanduser()
        if path.suffix.lower() not in SUFFIXES or path.is_dir():
            raise ResfastError(f"--output {path}: expected the name of a file that ends in .html")
        for name in ("mistakes", "images_per_class"):
            if getattr(options, name) < 0:
                option = f"--{name.replace('_', '-')} {getattr(options, name)}"
                raise ResfastError(f"{option} is out of range: expected at least 0")
        from resfast.reporting.page import report  # matplotlib is slow to import

        text = report(
            options.runs,
            data=options.data,
            data_dir=options.data_dir,
            mistakes=options.mistakes,
            images_per_class=options.images_per_class,
            device=options.device,
        )
        atomic.make_folder(path.parent, "--output")
        atomic.save(path, text.encode("utf-8", "replace"))
        print(path)

    return entry.run(command)
