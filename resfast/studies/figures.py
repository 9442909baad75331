"""The figures of a study, one PNG each."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from resfast.inference.ensemble import NAMES, EnsembleResult, Method
from resfast.runs import folder as records
from resfast.runs import plots
from resfast.runs.statistics import statistics
from resfast.studies.definition import Plot, Study
from resfast.studies.ranking import rank
from resfast.studies.results import Row, curves
from resfast.studies.runner import Unit
from resfast.studies.summary import accuracies

_SMOOTHED = 200
"""Most points of a curve over steps; longer ones are averaged in equal parts."""
_METHODS: dict[Method, tuple[float, str]] = {
    "probabilities": (0.15, plots.TRAIN),
    "vote": (0.3, plots.EVAL),
}
"""How members are combined, with the place and color of its mark."""


def save_figures(
    folder: Path,
    study: Study,
    units: Sequence[Unit],
    rows: Sequence[Row],
    ensembles: Mapping[str, EnsembleResult],
) -> list[str]:
    """Draws the figures of a study; one that cannot be drawn is logged and left out.

    Args:
        folder: where to write them.
        study: the study.
        units: its finished runs.
        rows: of these.
        ensembles: result of each variant's runs together.

    Returns:
        Names of the files that were written.
    """
    written = []
    for plot in study.plots:
        path = folder / plot.file
        with plots.optional(path):
            figure = Figure(figsize=(8.5, 4.6), layout="constrained")
            _draw(figure, plot, units, rows, ensembles)
            figure.suptitle(plots.plain(study.title), fontsize=11)
            plots.save(figure, path)
            written.append(plot.file)
    return written


def _draw(
    figure: Figure,
    plot: Plot,
    units: Sequence[Unit],
    rows: Sequence[Row],
    ensembles: Mapping[str, EnsembleResult],
) -> None:
    if plot.kind == "curves":
        _curves(figure, units)
    elif plot.kind == "band":
        _band(figure, plot, units)
    elif plot.kind == "ensemble":
        _ensembles(figure, ensembles)
    else:
        draw = {"accuracy": _accuracy, "parameters": _parameters, "seconds": _seconds}[plot.kind]
        draw(figure, rows)


def _colors(names: Sequence[str]) -> dict[str, Any]:
    if len(names) <= 10:
        palette: Any = matplotlib.colormaps["tab10"].colors
    else:
        palette = matplotlib.colormaps["tab20"].colors
    return {name: palette[index % len(palette)] for index, name in enumerate(names)}


def _usual(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _accuracy(figure: Figure, rows: Sequence[Row]) -> None:
    """Runs as dots, means with 95 % intervals as bars, the best at the top."""
    _bars(figure, rows, lambda row: None if row.accuracy is None else 100 * row.accuracy)
    axes = figure.axes[0]
    on = {"val": "held-out images", "test": "test images"}
    scored = next((row.scored_on for row in rows if row.scored_on), None)
    axes.set_xlabel(f"accuracy on {on.get(scored or '', 'images')} (%)")


def _bars(figure: Figure, rows: Sequence[Row], value: Callable[[Row], float | None]) -> None:
    names = [item.name for item in rank(accuracies(rows)) if item.found is not None]
    axes = figure.subplots()
    figure.set_figheight(max(2.4, 1.3 + 0.36 * len(names)))
    every: list[float] = []
    for position, name in enumerate(names):
        values = [v for row in rows if row.variant == name and (v := value(row)) is not None]
        every += values
        found = statistics(values)
        half = 0.0 if found.high is None else found.high - found.mean
        label = "mean, 95 % interval" if position == 0 else None
        axes.errorbar(
            found.mean, position, xerr=half, fmt="s", color=plots.TRAIN, capsize=3, label=label
        )
        label = "one run" if position == 0 else None
        height = [position] * len(values)
        axes.plot(values, height, "o", color=plots.EVAL, alpha=0.7, markersize=4, label=label)
    axes.set_yticks(range(len(names)), [plots.plain(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    # Intervals of two runs can be many times as wide as everything else.
    margin = max(1.5 * (max(every) - min(every)), 1e-3 * max(every))
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, min(every) - margin, 0.0), min(high, max(every) + margin))
    _usual(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _parameters(figure: Figure, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    names = list(dict.fromkeys(row.variant for row in rows if row.accuracy is not None))
    colors = _colors(names)
    for name in names:
        own = [row for row in rows if row.variant == name and row.accuracy is not None]
        found = statistics([100 * (row.accuracy or 0.0) for row in own])
        parameters = own[0].parameters or 0
        millions = parameters / 1e6
        axes.plot(
            [millions] * len(own),
            [100 * (row.accuracy or 0.0) for row in own],
            "o",
            color=colors[name],
            alpha=0.4,
            markersize=4,
        )
        label = f"{plots.plain(name)} ({parameters:,})"
        axes.plot(millions, found.mean, "s", color=colors[name], label=label)
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("accuracy (%), runs and mean")
    sizes = [row.parameters for row in rows if row.parameters]
    if max(sizes) > 8 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value >= 1 else "")
    _usual(axes)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)


def _seconds(figure: Figure, rows: Sequence[Row]) -> None:
    _bars(figure, rows, lambda row: row.epoch_seconds)
    figure.axes[0].set_xlabel("training seconds of an epoch")


def _curves(figure: Figure, units: Sequence[Unit]) -> None:
    """Training loss and accuracy of each variant: mean over the seeds, and their range."""
    loss, accuracy = figure.subplots(1, 2)
    names = list(dict.fromkeys(unit.variant.name for unit in units))
    colors = _colors(names)
    scored = "test"
    for name in names:
        histories = [curves(unit) for unit in units if unit.variant.name == name]
        histories = [rows for rows in histories if rows]
        if not histories:
            continue
        scored = histories[0][0].eval_set
        losses = [[row.train_loss for row in rows] for rows in histories]
        length = min(map(len, losses))
        epochs = [row.epoch for row in histories[0][:length]]
        _range(loss, epochs, [values[:length] for values in losses], colors[name], name)
        evaluated = [
            {row.epoch: 100 * row.eval_accuracy for row in rows if row.eval_accuracy is not None}
            for rows in histories
        ]
        shared = [epoch for epoch in evaluated[0] if all(epoch in other for other in evaluated)]
        series = [[values[epoch] for epoch in shared] for values in evaluated]
        _range(accuracy, shared, series, colors[name], None)
    loss.set_ylabel("training loss (nats)")
    accuracy.set_ylabel(f"{'held-out' if scored == 'val' else scored} accuracy (%)")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _usual(axes)
    columns = 1 + len(names) // 12
    figure.legend(
        loc="outside right center",
        frameon=False,
        fontsize=8,
        ncols=columns,
        title="mean, range of seeds",
        title_fontsize=8,
    )
    figure.set_figwidth(10 + 1.5 * columns)


def _range(
    axes: Any, x: Sequence[float], series: Sequence[Sequence[float]], color: Any, name: str | None
) -> None:
    values = np.array(series, dtype=float)
    marker = "o" if len(x) < 15 else None
    label = None if name is None else plots.plain(name)
    axes.plot(x, values.mean(0), color=color, marker=marker, markersize=4, label=label)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def step_values(unit: Unit, column: str) -> np.ndarray:
    """A column of a run's ``steps.csv``, float64 ``[steps]``; empty without the file."""
    path = unit.path / records.STEPS
    if not path.exists():
        return np.empty(0)
    with path.open(encoding="utf-8", newline="") as file:
        return np.array([float(row[column]) for row in csv.DictReader(file)])


def bands(units: Sequence[Unit], column: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The lowest and highest value in each step over the variants of each group.

    A run's values are the means over the seeds of its variant. After a run has diverged, the others
    remain. Source: figure 4 of Santurkar et al., arXiv:1805.11604.

    Returns:
        By group, two arrays float64 ``[steps]``; NaN in a step without a value.
    """
    groups: dict[str, dict[str, list[np.ndarray]]] = {}
    for unit in units:
        values = step_values(unit, column)
        if values.size:
            group = unit.variant.group or unit.variant.name
            groups.setdefault(group, {}).setdefault(unit.variant.name, []).append(values)
    found = {}
    for group, variants in groups.items():
        means = [_nan_mean(runs) for runs in variants.values()]
        stacked = _padded(means)
        empty = np.isnan(stacked).all(0)
        low = np.where(empty, np.nan, np.nanmin(np.where(empty, 0.0, stacked), 0))
        high = np.where(empty, np.nan, np.nanmax(np.where(empty, 0.0, stacked), 0))
        found[group] = low, high
    return found


def _padded(series: Sequence[np.ndarray]) -> np.ndarray:
    longest = max(map(len, series))
    rows = [np.pad(v, (0, longest - len(v)), constant_values=math.nan) for v in series]
    values = np.stack(rows)
    return np.where(np.isfinite(values), values, np.nan)


def _nan_mean(runs: Sequence[np.ndarray]) -> np.ndarray:
    values = _padded(runs)
    counts = np.maximum((~np.isnan(values)).sum(0), 1)
    return np.where(np.isnan(values).all(0), np.nan, np.nansum(values, 0) / counts)


def _band(figure: Figure, plot: Plot, units: Sequence[Unit]) -> None:
    axes = figure.subplots()
    found = bands(units, plot.column)
    colors = _colors(list(found))
    for group, (low, high) in found.items():
        part = max(1, math.ceil(len(low) / _SMOOTHED))
        low, high = (_parts(values, part) for values in (low, high))
        steps = part * (np.arange(len(low)) + 0.5)
        color = colors[group]
        axes.fill_between(
            steps, low, high, color=color, alpha=0.35, linewidth=0, label=plots.plain(group)
        )
        for edge in (low, high):
            axes.plot(steps, edge, color=color, linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel(plot.label or plot.column)
    if plot.logarithmic:
        axes.set_yscale("log")
    _usual(axes)
    title = "between the lowest and the highest variant"
    figure.legend(loc="outside lower center", ncols=4, frameon=False, title=title, fontsize=9)


def _parts(values: np.ndarray, part: int) -> np.ndarray:
    """Means of consecutive parts, NaN values left out."""
    padded = np.pad(values, (0, -len(values) % part), constant_values=math.nan)
    return _nan_mean(list(padded.reshape(-1, part).T))


def _ensembles(figure: Figure, ensembles: Mapping[str, EnsembleResult]) -> None:
    """Members as dots, both ways to combine them with their intervals."""
    axes = figure.subplots()
    for position, result in enumerate(ensembles.values()):
        each = [100 * member.accuracy for member in result.members]
        label = "member" if position == 0 else None
        axes.plot([position] * len(each), each, "o", color="#777777", alpha=0.6, label=label)
        for method, (offset, color) in _METHODS.items():
            low, high = (100 * value for value in result.interval[method])
            mean = 100 * result.accuracy[method]
            axes.errorbar(
                position + offset,
                mean,
                yerr=[[mean - low], [high - mean]],
                fmt="s",
                color=color,
                capsize=3,
                label=NAMES[method] if position == 0 else None,
            )
    names = [
        f"{plots.plain(name)}\n{len(result.members)} members\n{result.parameters:,} parameters"
        for name, result in ensembles.items()
    ]
    axes.set_xticks([index + 0.15 for index in range(len(names))], names)
    axes.set_xlim(-0.5, len(names) - 0.2)
    axes.set_ylabel("test accuracy (%)")
    _usual(axes)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
