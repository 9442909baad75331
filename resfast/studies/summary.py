"""``summary.md`` of a study: what was compared, the ranking with intervals, and the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from resfast.inference.ensemble import EnsembleResult
from resfast.runs.statistics import CONFIDENCE
from resfast.studies.definition import Claim, Study
from resfast.studies.ranking import LEVEL, Difference, Ranked, Verdict, rank, verdicts
from resfast.studies.results import Row

NOT_TESTED = "not tested"


def accuracies(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Accuracies of the runs of each variant, None for a run that diverged."""
    found: dict[str, list[float | None]] = {}
    for row in rows:
        found.setdefault(row.variant, []).append(row.accuracy)
    return found


def summary_text(
    study: Study,
    rows: Sequence[Row],
    *,
    quick: bool,
    seeds: int,
    figures: Sequence[str],
    ensembles: Mapping[str, EnsembleResult],
) -> str:
    """The Markdown of the summary.

    Args:
        study: the study.
        rows: of the finished runs, at least one.
        quick: whether it is the quick study.
        seeds: number of seeds that were asked for.
        figures: file names of the figures.
        ensembles: result of each variant's runs together; empty if the study does not combine them.
    """
    found = accuracies(rows)
    ranked = rank(found)
    missing = [v.name for v in study.variants if len(found.get(v.name, ())) < seeds]
    lines = [f"# {study.title}", "", f"Report {study.report}. {study.about}".strip(), ""]
    lines += [circumstances(rows, quick), ""]
    if missing:
        lines += [f"Not trained with all seeds: {', '.join(missing)}.", ""]
    lines += [*_table(study, rows, ranked), "", conclusion(ranked), ""]
    if any(row.stopped == "diverged" for row in rows):
        names = ", ".join(f"{r.name} ({r.diverged})" for r in ranked if r.diverged)
        lines += [f"Runs whose loss became infinite or NaN: {names}.", ""]
    if ensembles:
        lines += [*_ensemble_table(ensembles), ""]
    if study.claims:
        lines += [*_claims(study, found, quick), ""]
    for figure in figures:
        lines += [f"![{study.title}]({figure})", ""]
    command = f"resfast study {study.name}{' --quick' if quick else ''} --data DATA"
    if seeds != study.seed_count(quick):
        command += f" --seeds {seeds}"
    lines += [f"Repeat it with `{command}`; `results.csv` has a row for each run.", ""]
    return "\n".join(lines)


def circumstances(rows: Sequence[Row], quick: bool) -> str:
    """Data, seeds, hardware and date in a sentence."""

    def several(name: str) -> str:
        values = [getattr(row, name) for row in rows]
        texts = dict.fromkeys(
            f"{value:,}" if isinstance(value, int) else str(value)
            for value in values
            if value is not None
        )
        return " or ".join(texts) or "unknown"

    seeds = sorted({row.seed for row in rows})
    scored = {"val": "held-out images", "test": "test images"}
    on = " or ".join(scored[row] for row in dict.fromkeys(r.scored_on for r in rows) if row)
    kind = "The quick study, shorter and on fewer images than the report's" if quick else "In full"
    return (
        f"{kind}: {several('data')}, {several('train_images')} training images, epochs "
        f"{several('epochs')}, accuracy on {several('scored_images')} {on or 'images'}; "
        f"seeds {seeds[0]} to {seeds[-1]}; {several('device')}, {several('precision')}, torch "
        f"{several('torch')}, {several('date')}."
    )


def _table(study: Study, rows: Sequence[Row], ranked: Sequence[Ranked]) -> list[str]:
    reported = any(variant.reported is not None for variant in study.variants)
    percent = f"{CONFIDENCE:.0%}"
    header = ["", "variant", "parameters", "MACs", "accuracy", f"{percent} interval", "runs"]
    header += ["against the best", "seconds an epoch", *(["the report's"] if reported else [])]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for position, item in enumerate(ranked, 1):
        own = [row for row in rows if row.variant == item.name and row.accuracy is not None]
        cells = [str(position) if own else "", item.name]
        if item.found is None or not own:
            cells += ["", "", "diverged", "", str(item.diverged), "", ""]
        else:
            interval = NOT_TESTED if item.found.low is None else interval_text(item.found)
            seconds = [row.epoch_seconds for row in own if row.epoch_seconds is not None]
            cells += [
                f"{own[0].parameters:,}",
                f"{(own[0].macs or 0) / 1e6:,.1f} M",
                f"{item.found.mean:.2%}",
                interval,
                str(len(own) + item.diverged),
                "the best" if item.to_best is None else difference_text(item.to_best),
                f"{sum(seconds) / max(len(seconds), 1):.2f}",
            ]
        if reported:
            value = study.variant(item.name).reported
            cells.append("" if value is None else f"{value:.2%}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def interval_text(found: object) -> str:
    """``91.20 to 93.10 %``, within 0 and 100."""
    low, high = getattr(found, "low", None), getattr(found, "high", None)
    if low is None or high is None:
        return NOT_TESTED
    return f"{100 * max(low, 0):.2f} to {100 * min(high, 1):.2f} %"


def difference_text(found: Difference) -> str:
    """A difference in percentage points, or that there is none beyond noise."""
    points = f"{100 * found.mean:+.2f} points"
    if found.p is None:
        return f"{points}, not tested"
    if not found.is_significant:
        return f"no difference beyond noise ({points}, p = {found.p:.2g})"
    assert found.low is not None
    assert found.high is not None
    return f"{points} ({100 * found.low:+.2f} to {100 * found.high:+.2f}, p = {found.p:.2g})"


def conclusion(ranked: Sequence[Ranked]) -> str:
    """Which variants are the best, and which cannot be told apart from the best."""
    best = ranked[0]
    if best.found is None:
        return "The loss of every run became infinite or NaN."
    others = {item.name: item.to_best for item in ranked[1:] if item.to_best is not None}
    if not others:
        return "There is nothing to compare it with."
    worse = [name for name, found in others.items() if found.is_significant]
    untested = [name for name, found in others.items() if found.p is None]
    alike = [name for name in others if name not in (*worse, *untested)]
    parts = [f"`{best.name}` has the highest mean accuracy."]
    if alike:
        parts.append(f"No difference from it beyond noise: {_names(alike)}.")
    if worse:
        parts.append(f"Lower than it: {_names(worse)}.")
    if untested:
        parts.append(f"Not tested, for want of a second seed or of any spread: {_names(untested)}.")
    parts.append(
        f"A difference counts if its p-value is below {LEVEL:.2f}, by Welch's t test of each "
        "variant against the best with Holm's correction; with few seeds only large ones do."
    )
    return " ".join(parts)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def verdict_text(
    claim: Claim, verdict: Verdict, difference: Difference | None, *, quick: bool
) -> str:
    """A verdict with the difference that decided it.

    A quick study cannot tell whether a final accuracy is reached.
    """
    if quick and claim.at_least is not None:
        return "not measured"
    text = f"quick: {verdict}" if quick and verdict != "not measured" else verdict
    if difference is None:
        return text
    p = NOT_TESTED if difference.p is None else f"p = {difference.p:.2g}"
    return f"{text} ({100 * difference.mean:+.2f} points, {p})"


def source(claim: Claim) -> str:
    """Whose statement it is."""
    return "us" if claim.is_ours else "the report"


def _claims(study: Study, found: Mapping[str, Sequence[float | None]], quick: bool) -> list[str]:
    lines = ["| statement | of | whether it held |", "|---|---|---|"]
    for claim, verdict in zip(study.claims, verdicts(study.claims, found), strict=True):
        text = verdict_text(claim, *verdict, quick=quick)
        lines.append(f"| {claim.text} | {source(claim)} | {text} |")
    return lines


def _ensemble_table(ensembles: Mapping[str, EnsembleResult]) -> list[str]:
    lines = [
        "Runs of a variant together, on all test images (intervals: Wilson's, for other images):",
        "",
        "| variant | members | parameters | members' accuracy | mean of softmax | interval "
        "| majority vote | interval |",
        "|" + "---|" * 8,
    ]
    for name, result in ensembles.items():
        each = [member.accuracy for member in result.members]
        cells = [name, str(len(each)), f"{result.parameters:,}"]
        cells.append(f"{100 * min(each):.2f} to {100 * max(each):.2f} %")
        for method in ("probabilities", "vote"):
            low, high = result.interval[method]
            cells += [f"{result.accuracy[method]:.2%}", f"{100 * low:.2f} to {100 * high:.2f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
