"""Writes the results of a race: ``race.json``, and ``race.md`` to read."""

from __future__ import annotations

from pathlib import Path

from benchmarks.race.results import Estimate, Figures, Race
from benchmarks.race.rows import ROWS
from resfast import atomic

RESULT, PAGE, PLOT = "race.json", "race.md", "race.png"


def write(result: Race, folder: Path) -> None:
    """Writes ``race.json`` and ``race.md``.

    Raises:
        ResfastError: a file cannot be written.
    """
    atomic.save(folder / RESULT, (result.model_dump_json(indent=2) + "\n").encode())
    atomic.save(folder / PAGE, page(result).encode())


def page(result: Race) -> str:
    """The results as Markdown."""
    hardware = ", ".join(f"{name} {value}" for name, value in result.hardware.items() if value)
    lines = [
        "# Race",
        "",
        f"{result.data} (digest {result.data_digest}), {result.date}. {hardware}.",
        "",
        f"`{result.command}`",
        "",
        _protocol(result),
        "",
        f"![Accuracy against seconds]({PLOT})",
        "",
        *_trials(result),
        "",
        *_with_warmup(result),
        *_comparisons(result),
        "",
        *_circumstances(result),
    ]
    problems = [f"- {one.name}: {why}" for one in result.contenders for why in one.problems]
    if problems:
        lines += ["", "Problems:", "", *problems]
    return "\n".join(lines) + "\n"


def _protocol(result: Race) -> str:
    first = f"the first {result.warmup}" if result.warmup > 1 else "the first"
    warmup = f"those named so{f', and {first} of each process' if result.warmup else ''}"
    return (
        f"{result.trials} trials each, in alternating turns of {result.block}, in the opposite "
        "order every other time; all other processes are paused meanwhile. Intervals are 95 % "
        "confidence intervals of the mean, ± is the sample standard deviation. *Seconds* are by a "
        "clock outside, from the end of one trial to the end of the next: they include what a "
        "script does between trials, such as loading, evaluation, writing or sleeping. *Own "
        f"seconds* are what it reports. Preparation and warm-up trials ({warmup}) count only where "
        "a column says so; compilers start with empty caches. Raw rows: "
        f"`{ROWS}`."
    )


def _trials(result: Race) -> list[str]:
    lines = [
        "| contender | n | seconds | own seconds | accuracy, one view | test-time augmentation |",
        "|---|---|---|---|---|---|",
    ]
    for one in result.contenders:
        count = 0 if one.seconds is None else one.seconds.count
        lines.append(
            f"| {one.name} | {count} | {_seconds(one.seconds)} | {_seconds(one.own_seconds)} | "
            f"{_percent(one.accuracy)} | {_percent(one.tta_accuracy)} |"
        )
    return lines


def _with_warmup(result: Race) -> list[str]:
    lines = [
        "| contender | preparation, s | warm-up, s | to first result, s | a trial with both, s |",
        "|---|---|---|---|---|",
    ]
    for one in result.contenders:
        lines.append(
            f"| {one.name} | {_mean(one.preparation_seconds)} | {_mean(one.warmup_seconds)} | "
            f"{_mean(one.first_result_seconds)} | {_number(one.seconds_with_warmup)} |"
        )
    return lines


def _comparisons(result: Race) -> list[str]:
    if not result.comparisons:
        return []
    lines = [
        "",
        "Ratio of mean seconds (below 1: resfast is faster), and differences of accuracy in "
        "points; p is that of a one-sided Welch test for a ratio below "
        f"{result.target_ratio:g}:",
        "",
        "| resfast | peer | clock | ratio (interval) | p | one view | test-time augmentation |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in result.comparisons:
        p_value = "–" if pair.p_value is None else f"{pair.p_value:.2g}"
        lines.append(
            f"| {pair.ours} | {pair.peer} | {pair.clock} | {_estimate(pair.ratio, 1, '.3f')} | "
            f"{p_value} | {_estimate(pair.accuracy_difference, 100, '+.2f')} | "
            f"{_estimate(pair.tta_accuracy_difference, 100, '+.2f')} |"
        )
    return lines


def _circumstances(result: Race) -> list[str]:
    lines = [
        "| contender | SM clock, MHz | GPU, °C | CPU clock, MHz | load | command | SHA-256 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result.contenders:
        digest = f"`{one.script_sha256[:16]}…`" if one.script_sha256 else "–"
        lines.append(
            f"| {one.name} | {_mean(one.sm_mhz)} | {_mean(one.gpu_celsius)} | "
            f"{_mean(one.cpu_mhz)} | {_mean(one.load)} | `{one.command}` | {digest} |"
        )
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _mean(found: Figures | None) -> str:
    return _number(None if found is None else found.mean)


def _seconds(found: Figures | None) -> str:
    if found is None:
        return "–"
    if found.sd is None:
        return f"{found.mean:.4g}"
    return f"{found.mean:.4g} ± {found.sd:.2g} ({found.low:.4g} to {found.high:.4g})"


def _percent(found: Figures | None) -> str:
    if found is None:
        return "–"
    if found.sd is None:
        return f"{found.mean:.2%}"
    return f"{found.mean:.2%} ± {found.sd:.2%} ({found.low:.2%} to {found.high:.2%})"


def _estimate(found: Estimate | None, scale: float, form: str) -> str:
    if found is None:
        return "–"
    text = format(scale * found.value, form)
    if found.low is None or found.high is None:
        return text
    return f"{text} ({format(scale * found.low, form)} to {format(scale * found.high, form)})"
