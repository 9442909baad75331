"""The tables of a report as plain values; the page's template lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from resfast.config.compare import FREE_TO_DIFFER, flatten
from resfast.config.network import network
from resfast.config.paths import absolute_paths
from resfast.config.schema import Config, RunConfig
from resfast.data.sources import known_classes
from resfast.errors import ResfastError
from resfast.models.presets import build_model
from resfast.models.summary import summarize
from resfast.reporting.collect import Group, ReportedRun
from resfast.reporting.figures import seconds_of
from resfast.runs.statistics import CONFIDENCE, statistics
from resfast.text import printable

_USUAL_CLASSES = 10


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: names of the columns.
        rows: cells as text; the first of each row is its name.
        texts: numbers of the columns that are text, left-aligned, besides the first.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[int, ...] = ()

    def without_empty_columns(self) -> Table:
        """The table without columns in which every cell is empty."""
        kept = [
            column
            for column in range(len(self.head))
            if column == 0 or any(row[column] for row in self.rows)
        ]
        return Table(
            tuple(self.head[column] for column in kept),
            tuple(tuple(row[column] for column in kept) for row in self.rows),
            tuple(kept.index(column) for column in self.texts if column in kept),
        )


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def number(value: float | None) -> str:
    """A count with separators; empty for None."""
    return "" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def results(runs: Sequence[ReportedRun]) -> Table:
    """A row per run: network, state, epochs, accuracies, speed; without what is empty or alike."""
    columns = [_result(run) for run in runs]
    head = tuple(columns[0])
    if all(row["state"] == "finished" for row in columns):
        columns = [row | {"state": ""} for row in columns]
    if one_device(runs) is not None:
        columns = [row | {"device": ""} for row in columns]
    texts = tuple(head.index(name) for name in ("model", "state", "device"))
    return Table(head, tuple(tuple(row.values()) for row in columns), texts).without_empty_columns()


def _result(run: ReportedRun) -> dict[str, str]:
    s, asked = run.summary, run.config.optim.epochs
    done = len(run.rows) if s is None else s.epochs
    row = {
        "run": run.name,
        "model": printable(run.config.model.model),
        "state": "unfinished",
        "parameters": "",
        "MACs": "",
        "epochs": f"{done}" if asked is None or done >= asked else f"{done} of {asked:g}",
        **dict.fromkeys(("test", "test, TTA", "held-out", "held-out, TTA", "best"), ""),
        **dict.fromkeys(("images/s", "seconds", "device"), ""),
    }
    if s is None:
        evaluated = [row.eval_accuracy for row in run.rows if row.eval_accuracy is not None]
        return row | {"best": percent(max(evaluated, default=None))}
    augmented = s.tta != "none"
    return row | {
        "model": printable(s.model),
        "state": "finished" if s.stopped is None else f"stopped: {s.stopped}",
        "parameters": number(s.params),
        "MACs": number(s.macs),
        "test": percent(s.test_accuracy),
        "test, TTA": percent(s.tta_accuracy) if augmented else "",
        "held-out": percent(s.val_accuracy),
        "held-out, TTA": percent(s.val_tta_accuracy) if augmented else "",
        "best": f"{percent(s.best_accuracy)} ({s.best_epoch})" if s.best_accuracy >= 0 else "",
        "images/s": number(s.images_per_second),
        "seconds": seconds(s.timed_seconds),
        "device": printable(f"{s.device}, {s.precision}"),
    }


def one_device(runs: Sequence[ReportedRun]) -> str | None:
    """Device and precision, if all finished runs have the same; otherwise None."""
    found = {f"{s.device}, {s.precision}" for run in runs if (s := run.summary) is not None}
    return printable(found.pop()) if len(found) == 1 else None


def seeds(groups: Sequence[Group]) -> Table | None:
    """Mean and spread of each group with several finished runs; None without one."""
    rows = []
    for group in groups:
        values = [run.accuracy for run in group.runs if run.accuracy is not None]
        kinds = {
            run.summary.headline_accuracy()[0]
            for run in group.runs
            if run.summary is not None and run.accuracy is not None
        }
        if len(values) < 2 or len(kinds) > 1:
            continue
        found = statistics(values)
        assert found.sd is not None
        rows.append(
            (
                group.name,
                f"{len(values)}",
                kinds.pop().replace("_", " ").replace("val", "held-out"),
                percent(found.mean),
                percent(found.sd),
                f"{percent(found.low)} to {percent(found.high)}",
                percent(min(values)),
                percent(max(values)),
            )
        )
    head = (
        *("configuration", "finished", "accuracy", "mean", "standard deviation"),
        *(f"{CONFIDENCE:.0%} interval of the mean".replace("%", " %"), "lowest", "highest"),
    )
    return Table(head, tuple(rows), texts=(2,)) if rows else None


def shown(value: Any) -> str:
    """A value of the configuration, as on the command line where that is short."""
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ",".join(
            ":".join(map(shown, item)) if isinstance(item, tuple | list) else shown(item)
            for item in value
        )
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))


def configuration_differences(runs: Sequence[ReportedRun]) -> Table | None:
    """Options whose values differ between runs, a column per run; None if there are none.

    Options that do not affect a result, such as the name of the run, are left out.
    """
    values = [flatten(absolute_paths(run.config)) for run in runs]
    rows = [
        (f"--{name.replace('_', '-')}", *(shown(value[name]) for value in values))
        for name in values[0]
        if name not in FREE_TO_DIFFER and any(value[name] != values[0][name] for value in values)
    ]
    if not rows:
        return None
    columns = tuple(range(1, len(runs) + 1))
    return Table(("option", *(run.name for run in runs)), tuple(rows), texts=columns)


def unusual_values(run: ReportedRun) -> Table:
    """Options of a run that are not the defaults of the program."""
    own, usual = flatten(run.config), flatten(Config())
    kept_out = {field.name for field in fields(RunConfig)} | {"undecided", "recipe_epochs"}
    rows = tuple(
        (f"--{name.replace('_', '-')}", shown(own[name]), shown(usual[name]))
        for name in own
        if name not in kept_out and own[name] != usual[name]
    )
    return Table(("option", "value", "default"), rows, texts=(1, 2))


def per_class(groups: Sequence[Group]) -> tuple[Table, list[list[float | None]]] | None:
    """Accuracy of each class, a column per group with the same classes; None without any.

    Returns:
        The table, and the accuracies of its cells for their bars, 0 to 1.
    """
    shown_groups = [group for group in groups if group.classes]
    if not shown_groups:
        return None
    classes = shown_groups[0].classes
    shown_groups = [group for group in shown_groups if set(group.classes) == set(classes)]
    rows, bars = [], []
    for name in classes:
        means: list[float | None] = []
        for group in shown_groups:
            found = [
                value
                for summary in group.summaries
                if (value := summary.per_class_accuracy.get(name)) is not None
            ]
            means.append(sum(found) / len(found) if found else None)
        rows.append((printable(name), *(percent(mean) or "–" for mean in means)))
        bars.append(means)
    head = ("class", *(group.name for group in shown_groups))
    return Table(head, tuple(rows)), bars


def time_split(runs: Sequence[ReportedRun]) -> Table:
    """Seconds of each finished run by part."""
    split = {run.name: seconds_of(run) for run in runs if run.summary is not None}
    spent = ((kind, value) for parts in split.values() for kind, value in parts.items())
    kinds = list(dict.fromkeys(kind for kind, value in spent if value > 0))
    rows = tuple(
        (name, *(seconds(parts.get(kind)) for kind in kinds), seconds(sum(parts.values())))
        for name, parts in split.items()
    )
    return Table(("run", *kinds, "all"), rows)


@dataclass(frozen=True)
class Network:
    """The layers of a network.

    Attributes:
        names: of the groups that have it.
        table: a row per layer with parameters or multiply-accumulates, and their sums; None if the
            network cannot be built here.
        note: why not, or None.
    """

    names: tuple[str, ...]
    table: Table | None
    note: str | None = None


def networks(groups: Sequence[Group]) -> list[Network]:
    """Each distinct network of the groups once."""
    found: dict[str, tuple[list[str], Group]] = {}
    for group in groups:
        config = group.runs[0].config
        key = str(
            (asdict(config.model) | {"param_budget": 0}, config.data.image_size, _classes(group))
        )
        found.setdefault(key, ([], group))[0].append(group.name)
    made = []
    for names, group in found.values():
        try:
            made.append(Network(tuple(names), _layers(group)))
        except ResfastError as error:  # its code is not trusted, or a library is missing
            made.append(Network(tuple(names), None, f"{error}."))
    return made


def _classes(group: Group) -> int:
    return len(group.classes) or known_classes(group.runs[0].config.data.data) or _USUAL_CLASSES


def _layers(group: Group) -> Table:
    config = group.runs[0].config
    size = config.data.image_size
    statistics = summarize(build_model(network(config.model), _classes(group), size), size)
    path: list[str] = []
    rows = []
    for layer in statistics.summary_list:
        path[max(layer.depth - 1, 0) :] = [layer.var_name] if layer.depth else []
        parameters = layer.num_params if layer.is_leaf_layer else layer.leftover_params()
        macs = layer.macs if layer.is_leaf_layer else 0
        if parameters <= 0 and not macs:
            continue
        shape = " × ".join(map(str, layer.output_size[1:]))
        rows.append((".".join(path), layer.class_name, shape, number(parameters), number(macs)))
    total = ("all", "", "", number(statistics.total_params), number(statistics.total_mult_adds))
    head = ("layer", "kind", "output", "parameters", "MACs")
    return Table(head, (*rows, total), texts=(1,))


def folder_of(runs: Sequence[ReportedRun]) -> str:
    """The folders of the runs, in one line."""
    parents = dict.fromkeys(printable(str(Path(run.path).parent)) for run in runs)
    return ", ".join(parents)
