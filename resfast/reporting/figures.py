"""Plots as inline SVG, whose colours follow the page: light, dark or printed.

matplotlib draws with placeholder colours, which are replaced by CSS variables. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resfast.reporting.collect import Group, ReportedRun
from resfast.runs.plots import plain

COLOURS = 10
"""Number of colours of the page for groups of runs."""
DASHES = ("", "6 3", "2 2.5", "8 3 2 3")
"""Patterns of lines in SVG's notation; a second sign besides the colour, and after ten groups."""

_INK, _RULE = "#010203", "#010204"
_SERIES = [f"#0102{16 + number:02x}" for number in range(COLOURS)]
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _RULE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "grid.color": _RULE,
    "lines.linewidth": 1.7,
}
_KINDS = ("training", "whitening", "final evaluation", "other evaluations", "compiling", "other")
"""Parts of a run's time, in the order of the stacked bars."""


def colour_number(number: int) -> int:
    """The page's colour of a group, 0 to 9."""
    return number % COLOURS


def dash_number(number: int) -> int:
    """The pattern of a group's lines."""
    return (number % COLOURS // 4 + number // COLOURS) % len(DASHES)


def svg(figure: Figure, name: str, label: str) -> str:
    """A figure as inline SVG.

    Args:
        figure: drawn with the placeholder colours of this module.
        name: unique in the page, so that references within one SVG do not meet another's.
        label: what it shows, for screen readers.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\b(id="|xlink:href="#)([^"]+)"', rf'\g<1>{name}-\2"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    for colour, value in (
        (_INK, "currentColor"),
        (_RULE, "var(--rule)"),
        *((colour, f"var(--s{number})") for number, colour in enumerate(_SERIES)),
    ):
        text = text.replace(colour, value)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])  # type: ignore[index]
    head, _, rest = text.partition(">")
    head = re.sub(r' (?:width|height|version)="[^"]*"', "", head)
    escaped = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head += f' role="img" aria-label="{escaped}" style="max-width:{width * 4 / 3:.0f}px"'
    return f"{head}>{rest}"


def _dashes(number: int) -> Any:
    pattern = DASHES[dash_number(number)]
    return (0, tuple(float(part) / 1.7 for part in pattern.split())) if pattern else "-"


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.grid(alpha=0.7, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def curves(groups: Sequence[Group]) -> str:
    """Losses, accuracy and learning rate over the epochs, all runs in the same axes.

    Lines have the colour of their group, or of their run if there is one group.
    """
    runs = coloured(groups)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(10.2, 6.2), layout="constrained")
        for axes, (title, value) in zip(
            figure.subplots(2, 2, sharex=True).flat, _PANELS, strict=True
        ):
            for run, number in runs:
                points = [
                    (row.epoch, found) for row in run.rows if (found := value(row)) is not None
                ]
                if not points:
                    continue
                axes.plot(
                    *zip(*points, strict=True),
                    color=_SERIES[colour_number(number)],
                    linestyle=_dashes(number),
                    marker="o" if len(points) < 3 else None,
                    markersize=4,
                )
            _finish(axes, title)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(labelbottom=True)
        for axes in figure.axes[2:]:
            axes.set_xlabel("epoch")
    names = ", ".join(run.name for run, _ in runs)
    return svg(figure, "curves", f"Losses, accuracy and learning rate by epoch of {names}")


_PANELS = (
    ("Accuracy of the evaluation (%)", lambda row: _percent(row.eval_accuracy)),
    ("Loss of the evaluation (nats)", lambda row: row.eval_loss),
    ("Training loss (nats)", lambda row: row.train_loss),
    ("Learning rate", lambda row: row.lr),
)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def coloured(groups: Sequence[Group]) -> list[tuple[ReportedRun, int]]:
    """Each run with the number of its colour: of its group, or its own if there is one group."""
    if len(groups) == 1:
        return [(run, number) for number, run in enumerate(groups[0].runs)]
    return [(run, group.number) for group in groups for run in group.runs]


def seconds_of(run: ReportedRun) -> dict[str, float]:
    """A run's wall-clock seconds by part; empty for an unfinished run."""
    summary = run.summary
    if summary is None:
        return {}
    final = summary.final_eval_seconds or 0.0
    parts = {
        "training": summary.train_seconds,
        "whitening": summary.whitening_seconds or 0.0,
        "final evaluation": final,
        "other evaluations": max(0.0, summary.eval_seconds - final),
        "compiling": summary.compile_seconds,
    }
    if summary.total_seconds is not None:
        parts["other"] = max(0.0, summary.total_seconds - sum(parts.values()))
    return parts


def times(runs: Sequence[ReportedRun]) -> tuple[str, list[tuple[str, int]]]:
    """Where each finished run's time went, as stacked bars.

    Returns:
        The SVG, and each part that occurs with the number of its colour.
    """
    split = {run.name: seconds_of(run) for run in runs if run.summary is not None}
    shown = [kind for kind in _KINDS if any(parts.get(kind, 0) > 0 for parts in split.values())]
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(10.2, 0.75 + 0.34 * len(split)), layout="constrained")
        axes = figure.subplots()
        names = [plain(name) for name in split]
        left = [0.0] * len(split)
        for kind in shown:
            widths = [parts.get(kind, 0.0) for parts in split.values()]
            axes.barh(names, widths, left=left, height=0.62, color=_SERIES[_KINDS.index(kind)])
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        _finish(axes, "")
        axes.grid(visible=False, axis="y")
    label = f"Seconds by part of {', '.join(split)}; the table has the values"
    return svg(figure, "times", label), [(kind, _KINDS.index(kind)) for kind in shown]


def class_counts(
    name: str, classes: Sequence[str], train: Sequence[int], test: Sequence[int]
) -> str:
    """Training and test images of each class as bars.

    Args:
        name: unique in the page.
        classes: class names.
        train: number of training images of each class.
        test: number of test images of each class.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(10.2, 0.8 + 0.3 * len(classes)), layout="constrained")
        axes = figure.subplots()
        places = range(len(classes))
        for shift, values, colour in ((-0.19, train, 0), (0.19, test, 1)):
            axes.barh(
                [place + shift for place in places], values, height=0.36, color=_SERIES[colour]
            )
        axes.set_yticks(places, [plain(label) for label in classes])
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.set_xlabel("images")
        _finish(axes, "")
        axes.grid(visible=False, axis="y")
    return svg(figure, name, "Training and test images of each class; the table has the values")


def confusion_map(name: str, percent: Sequence[Sequence[float]]) -> str:
    """A confusion matrix of many classes as an image, in per cent of the true class."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(6.4, 5.6), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(percent, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")
    return svg(figure, name, "Confusion matrix")
