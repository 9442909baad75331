"""Turns benchmark results into a file of rows, a page of tables, and plots.

``python -m benchmarks.bench_report RESULT.json… [--out FOLDER] [--name NAME]``, or ``make
bench-report``, which runs the benchmarks first. A result is the output of pytest-benchmark
(``--benchmark-json``), rows that this program wrote, or others' results: a list of
``{"name", "source", "hardware", "case", "batch", "dtype", "images_per_second" | "seconds"}``, which
are marked as given in the tables. If two files have the same measurement, the later one is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from benchmarks.report import slug, verdict
from resfast import atomic
from resfast.cli import common as entry
from resfast.errors import ResfastError

RESULTS = Path(__file__).parent / "results"
FORMAT = "resfast-benchmarks-1"
PLOTS = {
    "speedup": (
        "Speed-up",
        "Speed relative to the baseline, which is 1: the median over rounds, with a line from the "
        "slowest round to the fastest.",
    ),
    "roofline": ("Roofline", "Layers, and the measured rates of matrix products and copies."),
}
ABOUT = (
    "`eager, folded` is eager PyTorch with batch norms folded into the convolutions, `compile` is "
    "torch.compile, `compile max-autotune` is torch.compile in that mode with freezing (and CUDA "
    "graphs on CUDA)."
)
KINDS = {
    "model": ("Networks", ABOUT),
    "peer": (
        "Networks, each library alone in a process",
        "With the defaults of each library (`python -m benchmarks.peers`). The speed is relative "
        "to the fastest library other than resfast.",
    ),
    "layer": ("Layers", ABOUT),
}
"""Title and introduction of the tables of a kind of rows."""
Dtype = Literal["bf16", "fp16", "fp32", "int8"]
_VERSIONS = ("resfast", "torch", "cuda", "cudnn", "triton", "python")


class Row(BaseModel):
    """One measurement.

    Attributes:
        kind: a whole network, one by a library alone in its process (``benchmarks.peers``), one
            layer, a rate of the machine, or another benchmark.
        case: what was run, such as ``resnet-2111``; for other benchmarks, their group.
        name: the implementation that was timed.
        hardware: processor.
        given: whether the figure is someone else's, not measured by these benchmarks.
        source: origin of a given row; otherwise the command.
        seconds: seconds per call, the median of the rounds; for rates of the machine, the minimum.
        iqr_seconds: interquartile range of the rounds.
        flops, bytes: operations per call, two per multiply-accumulate; bytes moved by one pass of a
            layer.
        ratio: speed relative to ``baseline``, the median over rounds; ``ratio_range`` has the
            extremes.
        target, matmul_target: targets for ``ratio`` and the fraction of a matrix product's rate.
        figures: other values reported by the benchmark.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["model", "peer", "layer", "machine", "other"]
    case: str = Field(min_length=1)
    name: str = Field(min_length=1)
    hardware: str = Field(min_length=1)
    given: bool = False
    source: str
    device: Literal["cpu", "cuda"] | None = None
    batch: PositiveInt | None = None
    dtype: Dtype | None = None
    seconds: PositiveFloat
    iqr_seconds: float | None = None
    rounds: PositiveInt | None = None
    images_per_second: PositiveFloat | None = None
    flops: PositiveInt | None = None
    bytes: PositiveInt | None = None
    tflops: PositiveFloat | None = None
    relative_error: float | None = None
    baseline: str | None = None
    ratio: PositiveFloat | None = None
    ratio_range: tuple[PositiveFloat, PositiveFloat] | None = None
    target: PositiveFloat | None = None
    matmul_target: PositiveFloat | None = None
    figures: dict[str, float] = {}
    versions: str | None = None
    commit: str | None = None
    date: str | None = None

    @property
    def what(self) -> tuple[Any, ...]:
        return self.hardware, self.case, self.batch, self.dtype, self.kind

    @property
    def key(self) -> tuple[Any, ...]:
        return *self.what, self.name, self.source if self.given else None


class Skipped(BaseModel):
    """A measurement that could not be made; the fields are those of :class:`Row`.

    Attributes:
        reason: why, such as a library that is not installed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: str = Field(min_length=1)
    name: str = Field(min_length=1)
    hardware: str = Field(min_length=1)
    batch: PositiveInt | None = None
    dtype: Dtype | None = None
    reason: str = Field(min_length=1)


@dataclass(frozen=True)
class Report:
    """Rows in the order they were read, the rates of the machines, and what was skipped."""

    rows: tuple[Row, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def best(self, case: str, hardware: str, dtype: str | None = None) -> float | None:
        """Operations or bytes per second of a machine's ``matmul`` or ``copy``, or None."""
        wanted = ("machine", case, hardware, dtype)
        for row in self.rows:
            if (row.kind, row.case, row.hardware, row.dtype) == wanted:
                return (row.flops or row.bytes) / row.seconds
        return None


class _Given(BaseModel):
    """A row of someone else's results."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    hardware: str = Field(min_length=1)
    case: str = Field(min_length=1)
    batch: PositiveInt
    dtype: Dtype
    images_per_second: PositiveFloat | None = None
    seconds: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_speed(self) -> _Given:
        if (self.seconds is None) == (self.images_per_second is None):
            raise ValueError("expected exactly one of images_per_second and seconds")
        return self

    def row(self) -> Row:
        seconds = self.seconds or self.batch / self.images_per_second
        speed = {"seconds": seconds, "images_per_second": self.batch / seconds}
        kind = "layer" if self.case.startswith("conv") else "model"
        return Row(kind=kind, given=True, **{**self.model_dump(), **speed})


class _Stats(BaseModel):
    min: PositiveFloat
    median: PositiveFloat
    iqr: float
    rounds: PositiveInt


class _Benchmark(BaseModel):
    """The fields read from an entry of pytest-benchmark's file."""

    name: str
    group: str | None = None
    stats: _Stats
    extra_info: dict[str, Any] = {}

    def row(self, file: Mapping[str, Any]) -> Row:
        info, stats = self.extra_info, self.stats
        commit = file.get("commit_info") or {}
        versions = [f"{name} {info[name]}" for name in _VERSIONS if info.get(name)]
        values: dict[str, Any] = {name: info[name] for name in Row.model_fields if name in info}
        if "kind" not in values:
            test, _, name = self.name.partition("[")
            values |= {"kind": "other", "case": self.group or test, "name": name[:-1] or test}
            values["figures"] = {
                name: value for name, value in info.items()
                if isinstance(value, int | float) and name not in (*values, "threads", "batch")
            }  # fmt: skip
        seconds = stats.min if values["kind"] == "machine" else stats.median
        row = Row.model_validate(
            values
            | {
                "hardware": info.get("processor") or "unknown",
                "source": "pytest benchmarks --benchmark-only",
                "seconds": seconds,
                "iqr_seconds": stats.iqr,
                "rounds": stats.rounds,
                "versions": ", ".join(versions) or None,
                "commit": commit.get("id") and commit["id"][:12] + "+" * bool(commit.get("dirty")),
                "date": file.get("datetime", "")[:10] or None,
            }
        )
        return row.model_copy(update={"tflops": row.flops and row.flops / row.seconds / 1e12})


def load(paths: Sequence[Path]) -> Report:
    """Reads results.

    Args:
        paths: files of pytest-benchmark, of :func:`write` or of others' results, in any mix.

    Returns:
        All rows; given rows have a ratio if the baseline was measured on the same hardware.

    Raises:
        ResfastError: a file that cannot be read or has another format; names the row and field.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    skipped: dict[Skipped, None] = {}
    for path in paths:
        for row in _read(Path(path)):
            if isinstance(row, Skipped):
                skipped[row] = None
            else:
                rows[row.key] = row
    base = {row.what: row for row in rows.values() if row.baseline == row.name}
    for key, row in rows.items():
        if row.given and (measured := base.get(row.what)):
            compared = {"baseline": measured.name, "ratio": measured.seconds / row.seconds}
            rows[key] = row.model_copy(update=compared)
    return Report(tuple(rows.values()), tuple(skipped))


def _read(path: Path) -> list[Row | Skipped]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ResfastError(f"cannot read {path}: {error.strerror}; check the name") from None
    except ValueError as error:
        raise ResfastError(f"{path} is not JSON: {error}; pass a file of results") from None
    match content:
        case {"benchmarks": list(rows)}:
            return [_row(path, i, _Benchmark, row, content) for i, row in enumerate(rows)]
        case {"format": str(name), "rows": list(rows)} if name == FORMAT:
            skipped = content.get("skipped", [])
            return [_row(path, i, Row, row) for i, row in enumerate(rows)] + [
                _row(path, i, Skipped, row) for i, row in enumerate(skipped)
            ]
        case list(rows):
            return [_row(path, i, _Given, row) for i, row in enumerate(rows)]
    raise ResfastError(
        f"{path} has no results: expected a file of pytest-benchmark or benchmarks.bench_report, "
        "or a list of rows"
    )


def _row(path: Path, index: int, kind: type[BaseModel], value: Any, *args: Any) -> Any:
    try:
        read = kind.model_validate(value)
        return read if isinstance(read, Row | Skipped) else read.row(*args)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "row"
        raise ResfastError(
            f"{path}, row {index}, {place}: {first['msg']}, not {str(first['input'])[:80]!r}"
        ) from None


# -- tables ----------------------------------------------------------------------------------------


def tables(report: Report, plots: Mapping[str, str] | None = None) -> str:
    """The rows as Markdown tables, with headings from the second level.

    Args:
        report: the rows.
        plots: links to the plots of :func:`save_plots`, by kind.
    """
    plots = plots or {}
    rows = sorted(report.rows, key=lambda row: (row.case, row.batch or 0, row.dtype or ""))
    parts = [_targets(report, rows)]
    for name, (title, about) in PLOTS.items():
        if name in plots:
            parts.append(f"## {title}\n\n{about}\n\n![{title}]({plots[name]})")
    for kind, (title, about) in KINDS.items():
        chosen = [row for row in rows if row.kind == kind]
        for case in dict.fromkeys(row.case for row in chosen):
            parts += [f"## {title}\n\n{about}"] if case == chosen[0].case else []
            parts.append(f"### {case}\n\n" + _speeds(report, chosen, case))
    others = [
        (row.case, _name(row), row.hardware, _ms(row.seconds), _ms(row.iqr_seconds),
         _number(row.images_per_second),
         ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items()))
        for row in report.rows if row.kind == "other"
    ]  # fmt: skip
    if others:
        head = "benchmark | name | hardware | median, ms | IQR, ms | images/s | figures"
        parts.append("## Other benchmarks\n\n" + _table(head, others))
    if report.skipped:
        head = "case | hardware | batch | dtype | name | reason"
        lines = [
            (row.case, row.hardware, str(row.batch or ""), row.dtype or "", row.name, row.reason)
            for row in report.skipped
        ]
        parts.append("## Not measured\n\n" + _table(head, lines))
    parts.append(_machines(report))
    return "\n\n".join(filter(None, parts)) + "\n"


def _targets(report: Report, rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        what = (row.case, row.hardware, str(row.batch), row.dtype or "", row.name)
        part = _matmul_part(report, row)
        if row.target and row.ratio:
            against = f"{row.ratio:.2f} times {row.baseline}"
            lines.append((*what, against, f"{row.target:g}", verdict(row.ratio, row.target)))
        if row.matmul_target and part:
            against, target = f"{part:.2f} of a matrix product's rate", row.matmul_target
            lines.append((*what, against, f"{target:g}", verdict(part, target)))
    head = "case | hardware | batch | dtype | name | measured | target | result"
    return "## Targets\n\n" + _table(head, lines) if lines else ""


def _speeds(report: Report, rows: Sequence[Row], case: str) -> str:
    lines = []
    for row in rows:
        if row.case == case:
            part = _matmul_part(report, row)
            speed = f"{row.ratio:.2f} × {row.baseline}" if row.ratio else ""
            if row.ratio_range:
                speed += " ({:.2f} to {:.2f})".format(*row.ratio_range)
            lines.append(
                (row.hardware, str(row.batch), row.dtype or "", _name(row),
                 _number(row.images_per_second), _ms(row.seconds), _ms(row.iqr_seconds),
                 f"{row.tflops:.3g}" if row.tflops else "", f"{part:.0%}" if part else "",
                 speed)
            )  # fmt: skip
    head = "hardware | batch | dtype | name | images/s | median, ms | IQR, ms | TFLOP/s"
    return _table(f"{head} | of matmul | speed (range)", lines)


def _machines(report: Report) -> str:
    lines = {}
    for row in report.rows:
        if not row.given:
            rates = (
                report.best(what, row.hardware, dtype)
                for what, dtype in (("matmul", "bf16"), ("matmul", "fp32"), ("copy", None))
            )
            lines[row.hardware] = (
                row.hardware,
                *(_number(rate and rate / 1e9) for rate in rates),
                row.versions or "",
                row.commit or "",
                row.date or "",
            )
    head = "hardware | matmul bf16, GFLOP/s | matmul fp32, GFLOP/s | copy, GB/s | versions"
    return "## Machine\n\n" + _table(f"{head} | commit | date", lines.values()) if lines else ""


def _table(head: str, lines: Iterable[Sequence[str]]) -> str:
    names = head.split(" | ")
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    rule = ["---"] * len(names)
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, rule, *cells))


def _name(row: Row) -> str:
    return f"{row.name} (given: {row.source})" if row.given else row.name


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _matmul_part(report: Report, row: Row) -> float | None:
    """Fraction of the rate of a matrix product on the same machine, or None if unknown."""
    rate = report.best("matmul", row.hardware, row.dtype)
    return row.flops / row.seconds / rate if rate and row.flops else None


# -- plots -----------------------------------------------------------------------------------------


def save_plots(report: Report, folder: Path, name: str) -> dict[str, Path]:
    """Writes ``NAME-speedup.png`` and ``NAME-roofline.png`` into ``folder``.

    Returns:
        Paths by ``speedup`` and ``roofline``, without plots that would be empty or that failed,
        which is logged.
    """
    from resfast.runs import plots

    saved = {}
    for kind, draw in (("speedup", _speedup), ("roofline", _roofline)):
        path = folder / f"{name}-{kind}.png"
        with plots.optional(path):
            figure = draw(report)
            if figure is not None:
                plots.save(figure, path)
                saved[kind] = path
    return saved


COLORS = {
    "eager": "#c3c9d1",
    "eager, folded": "#8b95a1",
    "compile": "#e3a857",
    "compile max-autotune": "#d1495b",
    "cuDNN": "#5b7f3a",
    "torch.compile": "#d1495b",
    "OpenVINO": "#6a4c93",
    "ONNX Runtime": "#5b7f3a",
    "resfast": "#1f5fa8",
    "resfast, CUDA graph": "#0c2d57",
}
GIVEN_COLOR = "#7a5195"


def _panels(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    panels: dict[Any, list[Row]] = {}
    for row in sorted(
        rows, key=lambda row: (list(KINDS).index(row.kind), row.case, row.batch or 0)
    ):
        panels.setdefault(key(row), []).append(row)
    return panels


def _speedup(report: Report) -> Any:
    """Bar chart of every implementation of a network, and of resfast for layers by batch size."""
    from matplotlib.figure import Figure

    from resfast.runs.plots import plain

    whole = ("model", "peer")
    shown = [r for r in report.rows if r.ratio and (r.kind in whole or r.name == "resfast")]
    panels = _panels((r for r in shown if r.kind != "other"), lambda r: (r.hardware, r.kind))
    if not panels:
        return None
    figure = Figure(figsize=(11, 3.4 * len(panels)), layout="constrained")
    for axes, ((hardware, kind), rows) in zip(
        figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        model = kind in whole
        bars: dict[str, dict[str, Row]] = {}  # by color, then by position on the axis
        for row in rows:
            batch = f"batch {row.batch}"
            color, place = (
                (_name(row), f"{row.case}\n{batch}, {row.dtype}") if model else (batch, row.case)
            )
            bars.setdefault(color, {})[place] = row
        places = list(dict.fromkeys(place for group in bars.values() for place in group))
        width = 0.8 / max(len(bars), 4)
        for i, (label, group) in enumerate(bars.items()):
            at = [places.index(place) + (i + 0.5 - len(bars) / 2) * width for place in group]
            color = COLORS.get(label, GIVEN_COLOR) if model else f"C{i}"
            axes.bar(
                at, [row.ratio for row in group.values()], width, color=color, label=plain(label)
            )
            for x, row in zip(at, group.values(), strict=True):
                if row.ratio_range:
                    axes.plot([x, x], row.ratio_range, color="black", linewidth=0.7)
        axes.axhline(1, color="black", linewidth=0.8)
        names = ["\n".join(map(plain, place.split("\n"))) for place in places]
        axes.set_xticks(range(len(places)), names, rotation=30, ha="right", fontsize=7)
        baselines = " or ".join(dict.fromkeys(row.baseline for row in rows))
        if kind == "peer":
            baselines = "the fastest other library"
        axes.set_ylabel(f"speed relative to\n{plain(baselines)}", fontsize=8)
        what = {"model": "networks", "peer": "networks, each library alone in a process"}.get(
            kind, "resfast, layers"
        )
        axes.set_title(f"{what}: {plain(hardware)}", fontsize=9)
        _finish(axes)
    return figure


def _roofline(report: Report) -> Any:
    """Rate over arithmetic intensity of every layer, below the measured limits of the machine."""
    from matplotlib.figure import Figure

    from resfast.runs.plots import plain

    layers = (row for row in report.rows if row.kind == "layer" and row.flops and row.bytes)
    panels = _panels(layers, lambda row: (row.hardware, row.dtype))
    if not panels:
        return None
    figure = Figure(figsize=(11, 4.6 * len(panels)), layout="constrained")
    for axes, ((hardware, dtype), rows) in zip(
        figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        for name in dict.fromkeys(row.name for row in rows):
            named = [row for row in rows if row.name == name]
            axes.scatter(
                [row.flops / row.bytes for row in named], [row.tflops for row in named],
                s=[6 + 6 * row.batch.bit_length() for row in named], label=plain(name),
                color=COLORS.get(name, GIVEN_COLOR), alpha=0.8, linewidths=0,
            )  # fmt: skip
        peak, copy = report.best("matmul", hardware, dtype), report.best("copy", hardware)
        if peak and copy:
            reached = [row.flops / row.bytes for row in rows] + [peak / copy]
            ends = [min(reached) / 2, peak / copy, max(reached) * 2]
            roof = [min(peak, copy * x) / 1e12 for x in ends]
            label = f"matmul {peak / 1e12:.3g} TFLOP/s, copy {copy / 1e9:,.0f} GB/s"
            axes.plot(ends, roof, color="black", linewidth=1, label=label)
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel("operations per byte (one pass over inputs, weights and result)")
        axes.set_ylabel("TFLOP/s")
        title = f"layers, {dtype}, larger dots for larger batches: {hardware}"
        axes.set_title(plain(title), fontsize=9)
        _finish(axes)
    return figure


def _finish(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


# -- files -----------------------------------------------------------------------------------------


def write(report: Report, folder: Path, name: str) -> list[Path]:
    """Writes ``NAME.json``, ``NAME.md`` and the plots to ``folder``, which it creates.

    Returns:
        The paths written.

    Raises:
        ResfastError: there are no rows, or a file cannot be written.
    """
    if not report.rows:
        raise ResfastError("the results have no rows: no benchmark ran; check what was skipped")
    atomic.make_folder(folder, "--out")
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    atomic.save(data, encoded(report))
    plots = save_plots(report, folder, name)
    linked = {kind: path.name for kind, path in plots.items()}
    dates = sorted({row.date for row in report.rows if row.date})
    title = ", ".join(["# Benchmarks", *dates[-1:]])
    command = "`make bench-report`; all rows, with versions and commits, are in"
    page_text = f"{title}\n\n{command} [{data.name}]({data.name}).\n\n{tables(report, linked)}"
    atomic.save(page, page_text.encode())
    return [data, page, *plots.values()]


def encoded(report: Report) -> bytes:
    """The rows as a file that :func:`load` reads, a row a line."""

    def lines(rows: Sequence[BaseModel]) -> str:
        values = (row.model_dump(mode="json", exclude_defaults=True) for row in rows)
        return ",\n".join(json.dumps(value, ensure_ascii=False) for value in values)

    parts = [f'"format": "{FORMAT}"', f'"rows": [\n{lines(report.rows)}\n]']
    if report.skipped:
        parts.append(f'"skipped": [\n{lines(report.skipped)}\n]')
    return f"{{{', '.join(parts)}}}\n".encode()


def default_folder(report: Report) -> Path:
    """``benchmarks/results/DATE-DEVICE``, with the date of the newest row."""
    own = [row for row in report.rows if not row.given]
    date = max((row.date for row in own if row.date), default=f"{datetime.now(UTC):%Y-%m-%d}")
    gpus = [row.hardware for row in own if row.device == "cuda"]
    device = slug(gpus[0]) if gpus else "cpu"
    return RESULTS / f"{date}-{device}"


def main(args: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 success, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_report",
        description="Tables and plots of benchmark results.",
    )
    parser.add_argument(
        "results", nargs="+", type=Path, help="JSON files of pytest-benchmark or of rows"
    )
    parser.add_argument(
        "--out", type=Path, help="output folder (default benchmarks/results/DATE-DEVICE)"
    )
    parser.add_argument("--name", default="benchmarks", help="name of the files, without suffix")
    options = parser.parse_args(args)

    def command() -> None:
        report = load(options.results)
        for path in write(report, options.out or default_folder(report), options.name):
            print(path)

    return entry.run(command)


if __name__ == "__main__":
    sys.exit(main())
