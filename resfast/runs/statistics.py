"""Statistics of the same training with several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Statistics:
    """Statistics of one figure over several runs.

    Attributes:
        count: number of runs.
        mean: arithmetic mean.
        sd: sample standard deviation (n - 1); None for a single run.
        low: lower end of the 95 % confidence interval of the mean (Student's t); None for a single
            run.
        high: upper end of it; None for a single run.
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
    """One-sided t test whose null hypothesis is that the mean is below a target.

    Args:
        values: one of each independent run.
        target: in the same unit.

    Returns:
        The probability of a sample mean at least this high if the true mean were equal to the
        target: a small one is evidence that the target is reached. None for a single run. If all
        values are equal it is 0 above the target, 1/2 at it and 1 below.
    """
    found = statistics(values)
    if found.sd is None:
        return None
    distance = found.mean - target
    if found.sd == 0:
        return 0.5 if distance == 0 else float(distance < 0)
    from scipy.stats import t

    return float(t.sf(distance / (found.sd / math.sqrt(found.count)), found.count - 1))
