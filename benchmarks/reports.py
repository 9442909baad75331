"""Writes ``docs/reports.md``: the reports' claims and figures beside our commands and figures.

``python -m benchmarks.reports`` reads the catalog of studies, ``benchmarks/reports.toml`` and the
results of studies in ``benchmarks/results/*/studies/``. Cells without a result say so.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resfast import atomic
from resfast.config.network import network
from resfast.models.presets import build_model, create_model
from resfast.models.resnet import count_parameters
from resfast.runs.statistics import statistics
from resfast.studies.definition import Study, names, study
from resfast.studies.ranking import verdicts
from resfast.studies.results import RESULTS, Row, read_results
from resfast.studies.summary import accuracies, interval_text, source, verdict_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reports.md"
ROWS = ROOT / "benchmarks" / "reports.toml"
NOT_MEASURED = "not measured"
REPORTS = {
    "000": "One-cycle training of small ResNets",
    "001": "Settings, mixing, pseudo-labels",
    "002": "Channels, schedules, shortcuts, ensembles",
    "003": "Five models",
    "004": "Plain CNN, ResNets, VGG-A and its loss landscape",
}
HEAD = """# The reports

`resfast` began with five student reports about CIFAR-10 networks of at most 5 million parameters.
This page has what each of them trained or tabulated, its figure, our command, and ours. `python
-m benchmarks.reports` writes it from the catalog of [studies](studies.md) and from
`benchmarks/results/`; a cell without a result says so.

The reports trained on CIFAR-10's own pixels and on GPUs. Ours are on the data that is named;
figures on JPEG files (`cifar10-jpeg.tar.xz`, quality 75) are lower than on the original pixels.
*Quick* figures are of the quick study: minutes of training on a part of the images, with
accuracies far below the reports'. They can tell whether an effect shows early, and cannot confirm
a report's figure. A statement held if its difference is beyond noise: Welch's t test over the
seeds, with Holm's correction over the statements of a study. A statement is the report's, in its
words or by its figures, or ours where the report leaves it open.
"""


@dataclass(frozen=True)
class Measured:
    """Results of a study.

    Attributes:
        rows: one for each run.
        quick: whether they are of the quick study.
        folder: that has them.
    """

    rows: list[Row]
    quick: bool
    folder: Path


def measured(name: str) -> Measured | None:
    """The newest results of a study, full ones before quick ones."""
    found = []
    for path in sorted((ROOT / "benchmarks" / "results").glob(f"*/studies/{name}*/{RESULTS}")):
        if path.parent.name in (name, f"{name}-quick"):
            quick = path.parent.name.endswith("-quick")
            found.append(Measured(read_results(path), quick, path.parent))
    return min(reversed(found), key=lambda one: one.quick, default=None)


def page() -> str:
    """The text of the page."""
    extra = tomllib.loads(ROWS.read_text(encoding="utf-8"))["row"]
    studies = [study(name) for name in names()]
    results = {one.name: measured(one.name) for one in studies}
    lines = [HEAD]
    for report, title in REPORTS.items():
        lines += [f"## Report {report}: {title}", ""]
        lines += ["| experiment | the report's | our command | ours |", "|---|---|---|---|"]
        own = [one for one in studies if one.report == report]
        for one in own:
            lines += _variant_rows(one, results[one.name])
        for row in extra:
            if row["report"] == report:
                cells = row["experiment"], row["reported"], f"`{row['command']}`", _ours(row)
                lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| statement | of | study | whether it held |", "|---|---|---|---|"]
        lines += [line for one in own for line in _claim_rows(one, results[one.name])]
        lines.append("")
    return "\n".join(lines)


def _variant_rows(one: Study, found: Measured | None) -> Iterator[str]:
    for variant in one.variants:
        experiment = f"{one.title}: {variant.about or variant.name}"
        reported = []
        if variant.reported is not None:
            reported.append(f"{100 * variant.reported:.4g} %")
        if variant.stated:
            reported.append(variant.stated)
        command = f"`resfast study {one.name} --variants {variant.name}`"
        with torch.device("meta"):  # shapes only
            count = count_parameters(build_model(network(one.config(variant, False).model)))
        own = [] if found is None else [row for row in found.rows if row.variant == variant.name]
        cells = [
            experiment,
            ", ".join(reported) or "not stated",
            command,
            _figure(own, found, count),
        ]
        yield f"| {' | '.join(cells)} |"


def _figure(rows: list[Row], found: Measured | None, parameters: int) -> str:
    if not rows or found is None:
        return f"{parameters:,} parameters; accuracy {NOT_MEASURED}"
    reached = [row.accuracy for row in rows if row.accuracy is not None]
    if not reached:
        return "diverged"
    seen = statistics(reached)
    parameters = next((row.parameters for row in rows if row.parameters), parameters)
    interval = "" if seen.low is None else f" ({interval_text(seen)})"
    kind = "quick: " if found.quick else ""
    link = "../" + (found.folder / "summary.md").relative_to(ROOT).as_posix()
    text = f"{kind}{seen.mean:.2%}{interval}, {len(rows)} seeds, {parameters:,} parameters"
    return f"{text}, {rows[0].data}, {rows[0].device} ([summary]({link}))"


def _claim_rows(one: Study, found: Measured | None) -> Iterator[str]:
    values = {} if found is None else accuracies(found.rows)
    for claim, verdict in zip(one.claims, verdicts(one.claims, values), strict=True):
        text = verdict_text(claim, *verdict, quick=found is not None and found.quick)
        yield f"| {claim.text} | {source(claim)} | `{one.name}` | {text} |"


def _ours(row: dict[str, Any]) -> str:
    """The last cell of a row of ``reports.toml``."""
    if "parameters" in row:
        with torch.device("meta"):  # shapes only
            count = count_parameters(create_model(row["parameters"]))
        return f"{row.get('times', 1) * count:,} parameters"
    if "run" in row:
        saved = json.loads((ROOT / row["run"] / "summary.json").read_text(encoding="utf-8"))
        where = f"{Path(saved['data']).name}, {saved['device']}, seed {saved['seed']}"
        link = f"[run](../{row['run']}/summary.json)"
        if row.get("figure") == "train_seconds":
            return f"{saved['train_seconds'] / 60:.0f} min, {where} ({link})"
        return f"{saved['test_accuracy']:.2%}, {where} ({link})"
    return str(row["ours"])


def main() -> None:
    """Writes the page."""
    atomic.save(PAGE, page().encode())
    print(PAGE)


if __name__ == "__main__":
    main()
