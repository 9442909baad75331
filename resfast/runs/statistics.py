"""Statistics of the same training with several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Statistics:
    """Of one figure over several runs; what cannot be said from so few runs is None.

    Attributes:
        count: runs.
        mean: arithmetic mean.
        sd: standard deviation of the runs, with ``count - 1`` below the line.
        low: lower end of the confidence interval of the mean (95 %, Student's t).
        high: upper end.
    """

    count: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


def statistics(values: Sequence[float]) -> Statistics:
    """Mean, spread and confidence interval of at least one value."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Statistics(1, mean, None, None, None)
    from scipy.stats import t  # slow to import

    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * sd / math.sqrt(count)
    return Statistics(count, mean, sd, mean - half, mean + half)


def p_value(values: Sequence[float], target: float) -> float | None:
    """One-sided t test of "the mean is at least ``target``" against "it is below".

    Args:
        values: of independent runs.
        target: in their unit.

    Returns:
        The probability of a mean at least this high if the true one were just at the target; a
        small one speaks for having reached it. None for a single run. Without any spread it is 0
        above the target, 1/2 at it and 1 below.
    """
    found = statistics(values)
    if found.sd is None:
        return None
    distance = found.mean - target
    if found.sd == 0:
        return 0.5 if distance == 0 else float(distance < 0)
    from scipy.stats import t

    return float(t.sf(distance / (found.sd / math.sqrt(found.count)), found.count - 1))
