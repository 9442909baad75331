"""Writes a report as one HTML file that needs no other file and no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from resfast import __version__
from resfast.data.dataset import print_to_stderr
from resfast.reporting import figures, tables
from resfast.reporting.collect import Group, ReportedRun, collect, groups_of
from resfast.reporting.figures import DASHES, colour_number, coloured, dash_number
from resfast.reporting.pictures import DataSets, DataView, data_views, mistakes_of
from resfast.reporting.tables import Table, number
from resfast.text import printable

MAX_TABLE_CLASSES = 20
"""Confusion matrices of more classes than this are images."""
FEW_GROUPS, MANY_GROUPS_MISTAKES = 3, 12
"""Groups up to which all mistakes asked for are shown, and the most for each of more groups."""


def report(
    runs: Sequence[str | Path],
    *,
    data: str | None = None,
    data_dir: Path | None = None,
    mistakes: int = 24,
    images_per_class: int = 12,
    device: str = "auto",
    say: Callable[[str], None] = print_to_stderr,
) -> str:
    """A page about runs.

    What a run lacks is left out with a sentence: a run that is unfinished, data that is not at
    hand. Everything that comes from files is escaped.

    Args:
        runs: folders of runs, of ``--runs``, or of a study.
        data: another place of the data (None: each run's own).
        data_dir: where data sets are looked for (None: each run's own).
        mistakes: most confident mistakes to show of each configuration; of more than 3
            configurations, at most 12 each. 0 for none.
        images_per_class: length of a row of the image grid; 0 for no grid.
        device: where the networks run, as in :func:`resfast.load`.
        say: called with a line of text for each notable step.

    Returns:
        The HTML.

    Raises:
        ResfastError: a folder without runs, or a ``config.json`` that cannot be read.
    """
    found = collect(runs)
    groups = groups_of(found)
    data_sets = DataSets(data, data_dir, say)
    context = _tables(found, groups)
    context |= _plots(found, groups)
    most = mistakes if len(groups) <= FEW_GROUPS else min(mistakes, MANY_GROUPS_MISTAKES)
    context["mistakes"] = [
        (group.name, mistakes_of(group, data_sets, most, device)) for group in groups if most
    ]
    context["data"] = [
        _data(view, f"data{place}")
        for place, view in enumerate(data_views(found, data_sets, images_per_class))
    ]
    text = _template().render(
        title=_title(found, groups),
        lead=_lead(found, groups),
        css=jinja2.utils.markupsafe.Markup(_text("page.css")),
        version=__version__,
        date=time.strftime("%Y-%m-%d"),
        folder=tables.folder_of(found),
        **context,
    )
    return text


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_text("page.html.jinja"))


def _title(runs: Sequence[ReportedRun], groups: Sequence[Group]) -> str:
    if len(runs) == 1:
        return runs[0].name
    if len(groups) == 1:
        return groups[0].name
    return f"{len(runs)} runs" + (
        f" of {len(groups)} configurations" if len(groups) < len(runs) else ""
    )


def _lead(runs: Sequence[ReportedRun], groups: Sequence[Group]) -> str:
    """The best result in a sentence."""
    finished = [run for run in runs if run.accuracy is not None]
    unfinished = len(runs) - len(finished)
    lines = []
    if finished:
        best = max(finished, key=lambda run: run.accuracy or 0)
        images = "test" if best.scored_on == "test" else "held-out"
        which = f"{best.name} has" if len(runs) > 1 else "It has"
        superlative = "the highest accuracy, " if len(finished) > 1 else "an accuracy of "
        lines.append(
            f"{which} {superlative}{tables.percent(best.accuracy)} of the {images} images."
        )
    if (device := tables.one_device(runs)) is not None:
        lines.append(f"Trained on {device}.")
    if unfinished:
        lines.append(
            f"{unfinished} of {len(runs)} runs are unfinished."
            if len(runs) > 1
            else "The run is unfinished."
        )
    return " ".join(lines)


def _tables(runs: Sequence[ReportedRun], groups: Sequence[Group]) -> dict[str, Any]:
    classes = tables.per_class(groups)
    return {
        "results": tables.results(runs),
        "seeds": tables.seeds(groups),
        "notes": [(run.name, note) for run in runs for note in run.notes],
        "several": len(runs) > 1,
        "differences": tables.configuration_differences(runs) if len(runs) > 1 else None,
        "unusual": tables.unusual_values(runs[0]),
        "first": runs[0].name,
        "per_class": None if classes is None else classes[0],
        "bars": None if classes is None else classes[1],
        "time_split": tables.time_split(runs),
        "networks": tables.networks(groups),
    }


def _plots(runs: Sequence[ReportedRun], groups: Sequence[Group]) -> dict[str, Any]:
    context: dict[str, Any] = {"curves": None, "times": None, "time_legend": ()}
    shown = [(run, place) for run, place in coloured(groups) if run.rows]
    if shown:
        context["curves"] = figures.curves(groups)
    if len(groups) == 1:
        entries = [(run.name, place) for run, place in shown]
    else:
        entries = [(g.name, g.number) for g in groups if any(run.rows for run in g.runs)]
    context["curve_legend"] = [
        (name, colour_number(place), DASHES[dash_number(place)]) for name, place in entries
    ]
    sets = {row.eval_set for run, _ in shown for row in run.rows}
    images = {"test": "the test images", "val": "held-out images"}
    evaluated = " or ".join(images[name] for name in sorted(sets))
    context["curve_caption"] = (
        f"Evaluations are of {evaluated}. Training losses are of augmented images."
    )
    if any(run.summary is not None for run in runs):
        context["times"], parts = figures.times(runs)
        context["time_legend"] = [(name, colour, None) for name, colour in parts]
    context["count_legend"] = [("training", 0, None), ("test", 1, None)]
    context["confusions"] = [
        found
        for place, group in enumerate(groups)
        if (found := _confusion(group, f"confusion{place}")) is not None
    ]
    return context


def _confusion(group: Group, name: str) -> dict[str, Any] | None:
    matrix = group.confusion()
    if matrix is None:
        return None
    percent: Tensor = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    finished = [run for run in group.runs if run.summary is not None]
    images = "test" if finished[0].scored_on == "test" else "held-out"
    several = f", sum of {len(finished)} runs" if len(finished) > 1 else ""
    caption = f"{group.name}: {number(int(matrix.sum()))} {images} images{several}"
    classes = [printable(label) for label in group.classes]
    found: dict[str, Any] = {"caption": caption, "classes": classes, "svg": None}
    if len(classes) > MAX_TABLE_CLASSES:
        return found | {"svg": figures.confusion_map(name, percent.tolist())}
    return found | {"rows": list(zip(classes, percent.tolist(), strict=True))}


def _data(view: DataView, name: str) -> tuple[DataView, str, Table | None]:
    if not view.classes:
        return view, "", None
    classes = [printable(label) for label in view.classes]
    rows = tuple(
        (label, number(train), number(test))
        for label, train, test in zip(classes, view.train, view.test, strict=True)
    )
    counts = Table(("class", "training", "test"), rows)
    return view, figures.class_counts(name, classes, view.train, view.test), counts
