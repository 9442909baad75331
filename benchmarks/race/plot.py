"""The plot of a race: accuracy against seconds, by both clocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.race.results import CLOCKS, Figures, Race
from benchmarks.race.rows import Row
from resfast.runs import plots

_COLORS = ("#1f5fa8", "#d1495b", "#5b7f3a", "#e3a857", "#7a5195", "#3aa6a0")
_TITLES = {"outside": "by the clock outside", "own": "by each contender's own clock"}


def save(result: Race, rows: Sequence[Row], path: Path) -> None:
    """Plots every trial as a point and each contender's means with their 95 % intervals.

    Accuracy is that with test-time augmentation where a contender has it. Raises no error: see
    :func:`resfast.runs.plots.optional`.
    """
    with plots.optional(path):
        plots.save(_figure(result, rows), path)


def _figure(result: Race, rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, len(CLOCKS), sharey=True)
    for axes, (clock, field) in zip(panels, CLOCKS.items(), strict=True):
        for number, one in enumerate(result.contenders):
            color = _COLORS[number % len(_COLORS)]
            seconds, accuracy = getattr(one, field), one.tta_accuracy or one.accuracy
            if seconds is None or accuracy is None:
                continue
            points = [
                (
                    getattr(row, field),
                    row.accuracy if row.tta_accuracy is None else row.tta_accuracy,
                )
                for row in rows
                if row.contender == one.name and row.phase == "trial"
            ]
            known = [(x, y) for x, y in points if x is not None and y is not None]
            axes.plot(*zip(*known, strict=True), ".", color=color, alpha=0.35)
            axes.errorbar(
                seconds.mean,
                accuracy.mean,
                xerr=_half(seconds),
                yerr=_half(accuracy),
                color=color,
                marker="o" if one.kind == "resfast" else "s",
                markersize=7,
                capsize=3,
                ls="",
                label=plots.plain(f"{one.name}: {seconds.mean:.4g} s, {accuracy.mean:.2%}"),
            )
        axes.set_xlim(left=0)
        axes.set_title(_TITLES[clock], fontsize=10)
        axes.set_xlabel("seconds of a trial")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("test accuracy")
    figure.suptitle(plots.plain(f"{result.data}, {result.date}"), fontsize=10)
    return figure


def _half(found: Figures) -> float:
    return 0.0 if found.high is None else found.high - found.mean
