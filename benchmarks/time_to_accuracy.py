"""Measures accuracy and training time of recipes over several seeds.

``python -m benchmarks.time_to_accuracy [RECIPE…] [--runs N] [-- options of resfast.train]`` trains
each recipe (by default those named ``fast…``) with N seeds, writes a row for each, and plots all
rows with public results. Other uses:

- ``--add FOLDER…``: writes rows from folders of ``resfast.train``, without training. They are also
  added to ``resfast/runs/targets.json``, from which ``--target`` with ``--max-seconds`` chooses.
- ``--ablation FILE`` with one recipe: FILE is a JSON list of ``{"component", "options"}``, such as
  ``{"component": "without averaging", "options": "--ema 0"}``. Each is trained with N seeds, and a
  Markdown table compares it with the whole recipe.
- ``--plot``: only plots the existing rows.

The same command continues an interrupted measurement.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from benchmarks.report import slug
from resfast import atomic, runtime
from resfast.cli import common as entry
from resfast.cli.train import command_line
from resfast.config.compare import differences
from resfast.config.files import load
from resfast.config.recipes import FAMILIES, RECIPES, check_name, decide, recipe
from resfast.config.recipes.conditions import SMALL_DATA_IMAGES
from resfast.config.schema import Config
from resfast.config.validate import check
from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs import plots, targets
from resfast.runs.statistics import statistics
from resfast.runs.stored import EvaluatedOn
from resfast.runs.summary import (
    AccuracyName,
    SecondsStatistics,
    SeedsSummary,
    Versions,
    read_run,
    read_seeds,
)
from resfast.training import seeds as runs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PUBLIC = ROOT / "benchmarks" / "data" / "public-results.json"
PREFIX, PLOT = "time-to-accuracy", "time-to-accuracy.png"
Model = TypeVar("Model", bound=BaseModel)


class Row(BaseModel):
    """One or several runs of a recipe.

    Attributes:
        recipe: name of the recipe.
        options: epochs and network as on the command line, if the recipe is for several.
        hardware: name of the processor.
        threads: CPU threads of PyTorch.
        versions: versions of the software.
        data: name of the data set.
        data_digest: hexadecimal digest of its content.
        scored_on: ``test``, or ``val`` for held-out training images.
        accuracy: name of the headline accuracy.
        seeds: seeds of the runs.
        accuracies: headline accuracy of each run, 0 to 1.
        seconds: statistics over the runs, by kind; ``timed`` is the headline, see ``timing_rule``.
        compile_seconds: seconds of the run that compiled.
        flops: FLOPs of one run with direct convolutions: 3 x 2 x MACs per training image, 2 x MACs
            per view of the final evaluation.
        peak_memory_bytes: highest memory use of the process, of the device for CUDA.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe: str
    model: str
    params: PositiveInt
    device: Literal["cpu", "cuda"]
    hardware: str
    threads: PositiveInt
    compile_seconds: float = Field(ge=0)
    versions: Versions
    precision: str
    data: str
    data_digest: str
    scored_on: EvaluatedOn
    accuracy: AccuracyName
    seeds: list[int] = Field(min_length=1)
    accuracies: list[float] = Field(min_length=1)
    mean: float = Field(ge=0, le=1)
    sd: float | None
    confidence_interval: tuple[float, float] | None
    seconds: SecondsStatistics
    total_seconds: PositiveFloat
    timing_rule: str
    flops: PositiveInt
    peak_memory_bytes: PositiveInt
    date: str
    command: str
    options: str = ""

    @property
    def name(self) -> str:
        """The recipe with its options."""
        return f"{self.recipe} {self.options}".rstrip()


class PublicResult(BaseModel):
    """A published result of others: seconds as a range, and its source."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    accuracy: float = Field(gt=0, le=1)
    seconds: tuple[PositiveFloat, PositiveFloat]
    hardware: str
    data: str
    source: str = Field(min_length=1)


# -- rows ------------------------------------------------------------------------------------------


def row_of(folder: Path) -> Row:
    """The row of a folder of ``resfast.train``, with one run or ``--runs N``.

    Raises:
        ResfastError: it is not such a folder, or one of its runs is unfinished or was cut short.
    """
    config, file = load(folder / records.CONFIG), folder / records.SUMMARY
    summary = read_seeds(file) if config.run.runs > 1 else _as_seeds(folder, config)
    if missing := summary.not_recorded():
        raise _too_old(folder, missing)
    if summary.finished < summary.runs:
        raise ResfastError(
            f"{folder} has {summary.finished} of {summary.runs} runs; continue with: "
            f"python -m resfast.train --resume {folder}"
        )
    if summary.stopped:
        raise ResfastError(
            f"{folder} has runs that were cut short ({', '.join(summary.stopped)}); expected "
            "complete runs"
        )
    scored = summary.test_images if summary.scored_on == "test" else summary.val_images
    point = point_of(_trained(folder))
    views_per_image = views(summary.tta, summary.tta_select, summary.tta_mirror)
    on_cuda = summary.device_type == "cuda"
    return Row(
        recipe=summary.recipe,
        model=summary.model,
        params=summary.params,
        device=summary.device_type,
        hardware=summary.device if on_cuda else summary.device.rpartition(",")[0],
        threads=summary.threads,
        compile_seconds=summary.compile_seconds,
        versions=summary.versions,
        precision=summary.precision,
        data=targets.data_name(summary.data),
        data_digest=summary.data_digest,
        scored_on=summary.scored_on,
        accuracy=summary.accuracy,
        seeds=list(summary.seeds),
        accuracies=list(summary.accuracies),
        mean=summary.mean,
        sd=summary.sd,
        confidence_interval=summary.confidence_interval,
        seconds=summary.seconds,
        total_seconds=summary.total_seconds,
        timing_rule=summary.timing_rule,
        flops=3 * 2 * summary.train_macs + round(2 * summary.macs * views_per_image * scored),
        peak_memory_bytes=summary.peak_memory_bytes,
        date=summary.date,
        command=_command("--recipe", config.recipe, *shlex.split(point), count=config.run.runs),
        options=point,
    )


def _trained(folder: Path) -> Config:
    """The configuration of a run, or of the first of several: the values that it trained with."""
    config = load(folder / records.CONFIG)
    if config.run.runs == 1:
        return config
    return load(folder / f"seed{config.runtime.seed}" / records.CONFIG)


def point_of(config: Config) -> str:
    """Epochs and network as options, for a recipe that is for several of them; otherwise empty."""
    family = FAMILIES.get(config.recipe)
    if family is None or not family.fields or config.optim.epochs is None:
        return ""
    options = ["--epochs", f"{config.optim.epochs:g}"]
    if config.model.model != family.written.model.model:
        options += ["--model", config.model.model]
    return shlex.join(options)


def _as_seeds(folder: Path, config: Config) -> SeedsSummary:
    """The summary of a single run as one of several seeds."""
    run = read_run(folder / records.SUMMARY)
    if missing := run.not_recorded():
        raise _too_old(folder, missing)
    return runs.summarize([run], config, None, run.seconds_by_kind().total, folder.name)


def _too_old(folder: Path, missing: Sequence[str]) -> ResfastError:
    return ResfastError(
        f"{folder} does not have its {', '.join(missing)}; an older resfast trained it: "
        "train it again"
    )


def added_row(folder: Path) -> Row:
    """The row of a folder, under the recipe that matches its configuration.

    Raises:
        ResfastError: as in :func:`row_of` and :func:`recipe_of`.
    """
    row, config = row_of(folder), _trained(folder)
    name = recipe_of(config)
    point = point_of(replace(config, recipe=name))
    command = _command("--recipe", name, *shlex.split(point), count=len(row.seeds))
    return row.model_copy(update={"recipe": name, "options": point, "command": command})


def recipe_of(config: Config) -> str:
    """The recipe that matches a configuration: its own or, because of options, another one.

    Raises:
        ResfastError: no recipe matches.
    """
    changed: dict[str, dict[str, tuple[Any, Any]]] = {}
    for name in sorted(RECIPES, key=lambda name: name != config.recipe):
        found = differences(config, _recipe_like(name, config))
        changed[name] = {
            option: values
            for option, values in found.items()
            if option not in ("recipe", "eval_every") and values[1] != "auto"
        }
        if not changed[name]:
            return name
    closest = min(changed, key=lambda name: len(changed[name]))
    values = ", ".join(
        f"{option} {value!r} instead of {expected!r}"
        for option, (value, expected) in changed[closest].items()
    )
    raise ResfastError(
        f"the run matches no recipe (the closest is {closest}, but with {values}); the table is "
        "only for unchanged recipes"
    )


def _recipe_like(name: str, config: Config) -> Config:
    """A recipe for the epochs and the network of a configuration, and not for little data."""
    if not RECIPES[name].undecided:
        return RECIPES[name]
    found = recipe(name, epochs=config.optim.epochs, model=config.model.model)
    streamed = config.data.loader == "dali"
    return decide(found, train_images=SMALL_DATA_IMAGES, streamed=streamed)


def _command(*options: str, count: int) -> str:
    runs_option = ["--runs", str(count)] if count > 1 else []
    return f"python -m resfast.train {shlex.join([*options, *runs_option])}"


def views(tta: str, select: float, mirror: float) -> float:
    """Average number of forward passes per image in the final evaluation."""
    mirrored, shifted = {"none": (0, 0), "flip": (1, 0), "shift": (1, 4), "multi-crop": (1, 8)}[tta]
    return 1 + mirror * mirrored + min(select, mirror) * shifted


def target_row(row: Row, source: str) -> targets.Row:
    """A row for the table of ``--target`` with ``--max-seconds``; ``source`` is the row's file.

    Raises:
        ResfastError: it was not scored on the test set, or its recipe is unknown.
    """
    if row.scored_on != "test":
        raise ResfastError(
            f"{row.name} was scored on held-out training images; the table is for the test set: "
            "train with --score-test and without --hold-out and --val-fraction"
        )
    check_name(row.recipe)
    return targets.Row(
        recipe=row.recipe,
        device=row.device,
        hardware=row.hardware,
        threads=None if row.device == "cuda" else row.threads,
        data=targets.data_name(row.data),
        data_digest=row.data_digest,
        accuracy=row.mean,
        sd=row.sd,
        runs=len(row.seeds),
        timed_seconds=row.seconds.timed.mean,
        compile_seconds=row.compile_seconds,
        date=row.date,
        versions=f"resfast {row.versions.resfast}, torch {row.versions.torch}",
        source=source,
        options=row.options,
    )


def add_target(row: targets.Row, table: Path) -> None:
    """Adds a row to the table; it replaces one of the same recipe, hardware and data."""

    def key(row: targets.Row) -> tuple[Any, ...]:
        return row.name, row.device, row.hardware, row.threads, row.data

    kept = [other for other in targets.read(table) if key(other) != key(row)]
    atomic.save(table, targets.to_json([*kept, row]).encode())


def write_row(row: Row, folder: Path) -> Path:
    """Saves a row."""
    atomic.make_folder(folder, "--out")
    path = folder / file_name(row)
    atomic.save(path, (row.model_dump_json(indent=2) + "\n").encode())
    return path


def file_name(row: Row) -> str:
    """File name of a row, from its recipe with its options, and data."""
    return f"{PREFIX}-{slug(row.name)}-{slug(targets.data_name(row.data))}.json"


def read_rows(folder: Path) -> list[Row]:
    """All rows of a folder.

    Raises:
        ResfastError: a file is not a row.
    """
    return [_valid(Row, path) for path in sorted(folder.glob(f"{PREFIX}-*.json"))]


def default_folder(row: Row) -> Path:
    """The folder of a measurement, ``benchmarks/results/DATE-DEVICE``."""
    return RESULTS / f"{row.date}-{slug(row.hardware) if row.device == 'cuda' else 'cpu'}"


def _folder_of_today(device: str) -> Path:
    kind = runtime.resolve_device(device)
    name = slug(runtime.describe(kind)) if kind.type == "cuda" else "cpu"
    return RESULTS / f"{time.strftime('%Y-%m-%d')}-{name}"


def _valid(kind: type[Model], path: Path, content: Any = None) -> Model:
    try:
        return kind.model_validate(_json(path, "a row") if content is None else content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "row"
        raise ResfastError(f"{path}, {place}: {first['msg']}; expected a row of {PREFIX}") from None


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ResfastError(f"cannot read {path}: {error.strerror}; expected {what}") from None
    except ValueError as error:
        raise ResfastError(f"{path} is not JSON: {error}; expected {what}") from None


# -- training --------------------------------------------------------------------------------------


def train(config: Config, count: int, folder: Path) -> Path:
    """Trains ``count`` seeds in ``folder``, or continues them; returns ``folder``."""
    run = replace(config.run, runs=count, name=folder.name, out=folder.parent)
    is_started = (folder / records.CONFIG).exists()
    runs.train(replace(config, run=run), resume=folder if is_started else None)
    return folder


def measure(name: str, count: int, options: Sequence[str], runs_folder: Path) -> Row:
    """Trains a recipe with ``count`` seeds and additional ``options`` of resfast.train."""
    _, config = command_line(["--recipe", name, *options])
    folder = runs_folder / f"{PREFIX}-{slug(f'{name} {point_of(config)}'.rstrip())}"
    row = row_of(train(config, count, folder))
    command = _command("--recipe", name, *without_folders(options), count=count)
    return row.model_copy(update={"command": command})


def without_folders(options: Sequence[str]) -> list[str]:
    """Options of resfast.train without folders of this machine."""
    shown: list[str] = []
    rest = iter(options)
    for option in rest:
        name, _, value = option.partition("=")
        if name in ("--data", "--data-dir", "--out"):
            value = value or next(rest, "")
            shown += [name, targets.data_name(value)] if name == "--data" else []
        else:
            shown.append(option)
    return shown


# -- ablation --------------------------------------------------------------------------------------


class Component(BaseModel):
    """One change of a recipe in an ablation: a name and options of resfast.train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str = Field(min_length=1)
    options: str


class _AblationRow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    component: str
    options: str
    row: Row


def read_components(path: Path) -> list[Component]:
    """The components of a file.

    Raises:
        ResfastError: it is not a list of components, or two have the same name.
    """
    content = _json(path, 'a list of {"component", "options"}')
    if not isinstance(content, list) or not content:
        raise ResfastError(f'{path}: expected a list of {{"component", "options"}}')
    try:
        components = [Component.model_validate(entry) for entry in content]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "entry"
        raise ResfastError(
            f'{path}: {place}: {first["msg"]}; expected {{"component", "options"}}'
        ) from None
    names = [slug(component.component) for component in components]
    if len(set(names)) < len(names):
        raise ResfastError(f"{path}: two components have the same name; give each its own")
    return components


def ablation(
    recipe: str,
    components: Sequence[Component],
    count: int,
    options: Sequence[str],
    runs_folder: Path,
    folder: Path,
) -> Path:
    """Trains a recipe without and with each change, and writes a table.

    Existing rows with the same options and seeds are kept.

    Returns:
        Path of the Markdown table; the rows are in a JSON file of the same name.
    """
    path = atomic.make_folder(folder, "--out") / f"ablation-{slug(recipe)}.json"
    kept: dict[tuple[str, str, tuple[int, ...]], _AblationRow] = {}
    if path.exists():
        for entry_ in _json(path, "rows of an ablation"):
            known = _valid(_AblationRow, path, entry_)
            kept[known.component, known.options, tuple(known.row.seeds)] = known
    whole = Component(component=recipe, options="")
    wanted: list[tuple[Component, Config]] = []
    for component in (whole, *components):  # check all options before training
        arguments = ["--recipe", recipe, *options, *shlex.split(component.options)]
        config = command_line(arguments)[1]
        if wanted and config == wanted[0][1]:
            raise ResfastError(
                f"component {component.component!r}: {component.options!r} changes nothing of "
                f"{recipe}; give options that change it"
            )
        check(config)
        wanted.append((component, config))
    done: list[_AblationRow] = []
    for component, config in wanted:
        given = shlex.join(without_folders([*options, *shlex.split(component.options)]))
        first = config.runtime.seed
        key = component.component, given, tuple(range(first, first + count))
        if key not in kept:
            name = f"ablation-{slug(recipe)}-{slug(component.component)}"
            row = row_of(train(config, count, runs_folder / name))
            kept[key] = _AblationRow(component=component.component, options=given, row=row)
        done.append(kept[key])
        dumped = [row.model_dump(mode="json") for row in done]
        rest = [row.model_dump(mode="json") for row in kept.values() if row not in done]
        atomic.save(path, (json.dumps(dumped + rest, indent=2) + "\n").encode())
    table = path.with_suffix(".md")
    atomic.save(table, ablation_table(done).encode())
    return table


def ablation_table(rows: Sequence[_AblationRow]) -> str:
    """A Markdown table; the first row is the whole recipe, with which the others are compared."""
    first, shared = rows[0].row, rows[0].options
    seeds = f"seeds {first.seeds[0]} to {first.seeds[-1]}" if len(first.seeds) > 1 else "one seed"
    threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
    lines = [
        f"`{first.recipe}`{f' with `{shared}`' if shared else ''} on {first.data}, "
        f"{first.hardware}, {threads}, {first.date}, {seeds}, {first.accuracy} of the "
        f"{first.scored_on} images; seconds are timed_seconds. Differences are to the first row, "
        "with the standard error of a difference of means.",
        "",
        "| component | options | accuracy | difference | PFLOP | seconds | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry_ in rows:
        row, seconds = entry_.row, entry_.row.seconds.timed
        spread = "" if row.sd is None else f" ± {row.sd:.2%}"
        change = took = ""
        if row is not first:
            change = f"{100 * (row.mean - first.mean):+.2f}"
            if row.sd is not None and first.sd is not None:
                error = (row.sd**2 / len(row.seeds) + first.sd**2 / len(first.seeds)) ** 0.5
                change += f" ± {100 * error:.2f}"
            took = f"{seconds.mean - first.seconds.timed.mean:+.1f}"
        own = entry_.options.removeprefix(shared).strip()
        lines.append(
            f"| {entry_.component} | {f'`{own}`' if own else ''} | {row.mean:.2%}{spread} | "
            f"{change} | {row.flops / 1e15:.3g} | {seconds.mean:.1f} | {took} |"
        )
    return "\n".join(lines) + "\n"


# -- plot ------------------------------------------------------------------------------------------

ORIGINAL = "CIFAR-10, original pixels"
_COLORS = ("#1f5fa8", "#d1495b", "#5b7f3a", "#e3a857", "#7a5195", "#3aa6a0")


def _data_label(data: str) -> str:
    name = targets.data_name(data)
    return ORIGINAL if name == "cifar10" else name.removeprefix("folder:")


def save_plot(rows: Sequence[Row], public: Sequence[PublicResult], path: Path) -> None:
    """Plots accuracy against seconds.

    Our rows have filled markers, public results hollow ones. Markers are round for original
    CIFAR-10 pixels and square for other data. Each processor has its own color.
    """
    points: list[tuple[PublicResult, float | None, bool]] = [(p, None, False) for p in public]
    for row in rows:
        seconds = row.seconds.timed.mean
        processor = row.hardware
        if row.device == "cpu":
            processor += f", {row.threads} threads"
        given = PublicResult(
            name=row.name,
            accuracy=row.mean,
            seconds=(seconds, seconds),
            hardware=processor,
            data=_data_label(row.data),
            source="measured",
        )
        points.insert(0, (given, row.sd, True))
    hardware = list(dict.fromkeys(point.hardware for point, *_ in points))
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(hardware)}
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    labels: list[tuple[str, float, float]] = []
    for point, sd, ours in points:
        color, (least, most) = colors[point.hardware], point.seconds
        middle = (least * most) ** 0.5
        axes.errorbar(
            middle,
            point.accuracy,
            yerr=sd,
            xerr=[[middle - least], [most - middle]],
            color=color,
            marker="o" if point.data == ORIGINAL else "s",
            markerfacecolor=color if ours else "white",
            markersize=8,
            capsize=3,
        )
        other = "" if point.data == ORIGINAL else f" ({point.data})"
        took = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
        text = (
            f"{plots.plain(point.name + other)}\n"
            f"{point.accuracy:.2%}, {took} s, {plots.plain(point.hardware)}"
        )
        labels.append((text, middle, point.accuracy))
    handles = [
        Line2D([], [], color=c, marker="o", ls="", label=plots.plain(h)) for h, c in colors.items()
    ]
    gray = {"color": "#666666", "ls": ""}
    handles += [
        Line2D([], [], marker="o", label="original CIFAR-10 pixels", **gray),
        Line2D([], [], marker="s", label="other data: named at the point", **gray),
        Line2D([], [], marker="D", label="filled: resfast, mean ± standard deviation", **gray),
        Line2D(
            [], [], marker="D", markerfacecolor="white", label="hollow: others' figures", **gray
        ),
    ]
    figure.legend(handles=handles, fontsize=7, frameon=False, loc="outside lower center", ncols=3)
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel("training time in seconds, without compilation and data loading")
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _annotate(axes, labels)
    plots.save(figure, path)


def _annotate(axes: Any, labels: Sequence[tuple[str, float, float]]) -> None:
    """Writes each text next to its point, where it covers no point and no earlier text."""
    axes.figure.draw_without_rendering()
    axes.figure.set_layout_engine("none")
    taken = [
        Bbox.from_bounds(x - 6, y - 6, 12, 12)
        for x, y in axes.transData.transform([(x, y) for _, x, y in labels])
    ]
    for text, x, y in labels:
        for (dx, ha), (dy, va) in product(
            ((8, "left"), (-8, "right")), ((-4, "top"), (4, "bottom"), (-24, "top"), (24, "bottom"))
        ):
            written = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", fontsize=7, ha=ha, va=va
            )
            box = written.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.figure.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            written.remove()
        else:
            written = axes.annotate(text, (x, y), (8, -4), textcoords="offset points", fontsize=7)
            box = written.get_window_extent()
        taken.append(box)


def public_results(path: Path = PUBLIC) -> list[PublicResult]:
    """Published results of others, from a file of the benchmarks."""
    return [_valid(PublicResult, path, entry_) for entry_ in _json(path, "public results")]


# -- command ---------------------------------------------------------------------------------------


def _line(row: Row) -> str:
    found, seconds = statistics(row.accuracies), row.seconds.timed
    spread = "" if found.sd is None else f" ± {found.sd:.2%}"
    return (
        f"{row.name}: {row.mean:.2%}{spread} ({len(row.seeds)} seeds, {row.accuracy}) in "
        f"{seconds.mean:.2f} s, {row.flops / 1e15:.3g} PFLOP, peak memory "
        f"{row.peak_memory_bytes / 2**30:.2f} GiB"
    )


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--runs", type=int, default=5, help="seeds per recipe (default: 5)")
    parser.add_argument("--add", type=Path, nargs="+", metavar="FOLDER", help="folders of runs")
    parser.add_argument("--ablation", type=Path, metavar="FILE", help="list of changes to compare")
    parser.add_argument("--plot", action="store_true", help="only plot the existing rows")
    parser.add_argument("--out", type=Path, help="folder for rows, tables and the plot")
    parser.add_argument(
        "--runs-folder", type=Path, default=Path("runs"), help="folder for the runs (default: runs)"
    )
    arguments = list(sys.argv[1:] if args is None else args)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given, options = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]

    def command() -> None:
        for name in given.recipes:
            check_name(name)
        if given.runs < 1 and not given.add:
            raise ResfastError(f"--runs {given.runs} is out of range: expected at least 1")
        if (given.add or given.plot) and (given.recipes or options or given.ablation):
            raise ResfastError("--add and --plot do not train; leave out recipes and options")
        folder = given.out
        if given.ablation is not None:
            if len(given.recipes) != 1:
                raise ResfastError("--ablation needs exactly one recipe")
            components = read_components(given.ablation)
            config = command_line(["--recipe", given.recipes[0], *options])[1]
            folder = folder or _folder_of_today(config.runtime.device)
            table = ablation(
                given.recipes[0], components, given.runs, options, given.runs_folder, folder
            )
            print(f"{table.read_text()}\n{table}")
            return
        measured = [added_row(path) for path in given.add or []]
        if not (given.add or given.plot):
            recipes = given.recipes or [name for name in RECIPES if name.startswith("fast")]
            if not recipes:
                raise ResfastError("no recipe is named fast…; name the recipes to measure")
            for name in recipes:
                measured.append(measure(name, given.runs, options, given.runs_folder))
                folder = folder or default_folder(measured[0])
                print(_line(measured[-1]), write_row(measured[-1], folder), sep="\n", flush=True)
        if given.add:
            folder = folder or default_folder(measured[0])
            if not folder.resolve().is_relative_to(ROOT):
                raise ResfastError(
                    f"--out {folder} is outside the repository, but the table names files in it; "
                    f"choose a folder below {RESULTS}"
                )
            inside = folder.resolve().relative_to(ROOT)
            found = [target_row(row, str(inside / file_name(row))) for row in measured]
            for row, target in zip(measured, found, strict=True):
                print(_line(row), write_row(row, folder), sep="\n")
                add_target(target, targets.TABLE)
        folder = folder or _folder_of_today("auto")
        rows = read_rows(folder)
        if not rows:
            raise ResfastError(f"{folder} has no rows; measure some first")
        save_plot(rows, public_results(), folder / PLOT)
        print(folder / PLOT)

    return entry.run(command)


if __name__ == "__main__":
    sys.exit(main())
