"""Which variants differ: means, intervals, and Welch's t test with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from resfast.runs.statistics import CONFIDENCE, Statistics, statistics
from resfast.studies.definition import Claim

LEVEL = 1 - CONFIDENCE
"""Corrected p-values below this are called a difference."""
Verdict = Literal[
    "held", "did not hold", "not distinguishable", "no difference beyond noise", "not measured"
]


@dataclass(frozen=True)
class Difference:
    """Of the means of two variants.

    Attributes:
        mean: of the first minus that of the second.
        low, high: 95 % confidence interval (Welch); None if a variant has a single run, or if all
            runs of each variant are equal.
        p: two-sided p-value; None in the same cases.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def is_significant(self) -> bool:
        """Whether it is beyond noise."""
        return self.p is not None and self.p < LEVEL


@dataclass(frozen=True)
class Ranked:
    """A variant in the order of the means.

    Attributes:
        name: of the variant.
        found: statistics of its accuracies; None if all its runs diverged.
        to_best: its mean minus that of the best, with p corrected for the number of comparisons;
            None for the best and if all its runs diverged.
        diverged: number of its runs whose loss became infinite or NaN.
    """

    name: str
    found: Statistics | None
    to_best: Difference | None
    diverged: int = 0


def welch(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Difference of two means without the assumption of equal variances.

    Source: Welch, "The generalization of 'Student's' problem when several different population
    variances are involved", Biometrika 34 (1947).
    """
    a, b = statistics(first), statistics(second)
    difference = a.mean - b.mean
    if a.sd is None or b.sd is None:
        return Difference(difference, None, None, None)
    from scipy.stats import t  # slow to import

    parts = [found.sd**2 / found.count for found in (a, b) if found.sd is not None]
    error = math.sqrt(sum(parts))
    if error == 0:  # equal by chance: no spread to judge a difference by
        return Difference(difference, None, None, None)
    squares = sum(part**2 / (found.count - 1) for part, found in zip(parts, (a, b), strict=True))
    freedom = sum(parts) ** 2 / squares
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p = 2 * float(t.sf(abs(difference) / error, freedom))
    return Difference(difference, difference - half, difference + half, p)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Corrected p-values, which keep the chance of any false difference at the level.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6 (1979). None, where nothing was tested, stays None.
    """
    tested = sorted((p, index) for index, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for position, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - position)))
        corrected[index] = largest
    return corrected


def rank(accuracies: Mapping[str, Sequence[float | None]]) -> list[Ranked]:
    """Variants in the order of their mean accuracy, each compared with the best.

    Args:
        accuracies: of each variant's runs, 0 to 1; None for a run that diverged.
    """
    reached = {
        name: [value for value in values if value is not None]
        for name, values in accuracies.items()
    }
    lost = {name: len(accuracies[name]) - len(values) for name, values in reached.items()}
    order = sorted(
        (name for name, values in reached.items() if values),
        key=lambda name: -statistics(reached[name]).mean,
    )
    differences = [welch(reached[name], reached[order[0]]) for name in order[1:]]
    corrected = holm([difference.p for difference in differences])
    ranked = []
    for index, name in enumerate(order):
        to_best = None
        if index:
            found = differences[index - 1]
            to_best = Difference(found.mean, found.low, found.high, corrected[index - 1])
        ranked.append(Ranked(name, statistics(reached[name]), to_best, lost[name]))
    return ranked + [
        Ranked(name, None, None, lost[name]) for name, values in reached.items() if not values
    ]


def verdicts(
    claims: Sequence[Claim], accuracies: Mapping[str, Sequence[float | None]]
) -> list[tuple[Verdict, Difference | None]]:
    """Whether each claim held, and the difference that decided it.

    Comparisons are corrected together. A difference that could not be tested, with a single seed,
    is not distinguishable. That variants are alike is not proved by few seeds: if none differs from
    the best of them, there is no difference beyond noise.
    """
    reached = {
        name: [value for value in values if value is not None]
        for name, values in accuracies.items()
    }
    differences = [_difference(claim, reached) for claim in claims]
    corrected = holm([found.p if found else None for found in differences])
    return [
        _verdict(claim, reached, found, p)
        for claim, found, p in zip(claims, differences, corrected, strict=True)
    ]


def _difference(claim: Claim, reached: Mapping[str, Sequence[float]]) -> Difference | None:
    if claim.better and claim.worse and reached.get(claim.better) and reached.get(claim.worse):
        return welch(reached[claim.better], reached[claim.worse])
    return None


def _verdict(
    claim: Claim,
    reached: Mapping[str, Sequence[float]],
    found: Difference | None,
    p: float | None,
) -> tuple[Verdict, Difference | None]:
    if claim.variant and claim.at_least is not None and reached.get(claim.variant):
        mean = statistics(reached[claim.variant]).mean
        return ("held" if mean >= claim.at_least else "did not hold"), None
    if any(not reached.get(name) for name in claim.names):
        return "not measured", None
    if claim.alike:
        others = rank({name: reached[name] for name in claim.alike})[1:]
        differing = [other.to_best for other in others if other.to_best is not None]
        if any(difference.p is None for difference in differing):
            return "not distinguishable", None
        differ = any(difference.is_significant for difference in differing)
        return ("did not hold" if differ else "no difference beyond noise"), None
    assert found is not None
    found = Difference(found.mean, found.low, found.high, p)
    if not found.is_significant:
        return "not distinguishable", found
    return ("held" if found.mean > 0 else "did not hold"), found
