"""Statistics of two independent samples: a ratio of means, a difference of means, and a test.

The variances may differ: degrees of freedom are those of Welch and Satterthwaite, for the interval
of a ratio at its estimate. Sources: E. C. Fieller, Some problems in interval estimation, J. R.
Stat. Soc. B 16 (1954); B. L. Welch, The generalization of Student's problem, Biometrika 34 (1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from resfast.runs.statistics import CONFIDENCE, Statistics, statistics


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval; both ends are None if there is none."""

    value: float
    low: float | None
    high: float | None


def ratio(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Ratio of the mean of ``first`` to that of ``second``, with Fieller's interval.

    Args:
        first: positive values, at least one.
        second: the same, of the other sample.

    Returns:
        The ratio. Without an interval if a sample has one value only, or the mean of ``second``
        does not differ from 0.
    """
    a, b = statistics(first), statistics(second)
    value = a.mean / b.mean
    error = _combined(a, b, value)
    if error is None:
        return Estimate(value, None, None)
    t = _t_quantile(error.degrees) if error.squared else 0.0
    # Ratios r with (a - r b)^2 <= t^2 (va + r^2 vb), va and vb being the squared standard errors.
    squared_a, squared_b = _squared_error(a), _squared_error(b)
    lead = b.mean**2 - t**2 * squared_b
    if lead <= 0:
        return Estimate(value, None, None)
    root = math.sqrt(max(0.0, (a.mean * b.mean) ** 2 - lead * (a.mean**2 - t**2 * squared_a)))
    return Estimate(value, (a.mean * b.mean - root) / lead, (a.mean * b.mean + root) / lead)


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of ``first`` minus that of ``second``, with Welch's interval."""
    a, b = statistics(first), statistics(second)
    value, error = a.mean - b.mean, _combined(a, b, 1.0)
    if error is None:
        return Estimate(value, None, None)
    half = _t_quantile(error.degrees) * math.sqrt(error.squared) if error.squared else 0.0
    return Estimate(value, value - half, value + half)


def p_faster(ours: Sequence[float], theirs: Sequence[float], target: float) -> float | None:
    """One-sided Welch test whose null hypothesis is that our mean is at least a multiple of theirs.

    Args:
        ours: seconds of our trials.
        theirs: seconds of theirs.
        target: that multiple: the ratio to be below.

    Returns:
        The probability of a difference at least this favourable to us if our mean time were exactly
        ``target`` times theirs. None if a sample has one value only. If no value differs within a
        sample it is 0, 1/2 or 1.
    """
    a, b = statistics(ours), statistics(theirs)
    error, distance = _combined(a, b, target), a.mean - target * b.mean
    if error is None:
        return None
    if error.squared == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    from scipy.stats import t

    return float(t.cdf(distance / math.sqrt(error.squared), error.degrees))


@dataclass(frozen=True)
class _Error:
    """Squared standard error of ``a - factor b``, and its degrees of freedom (Satterthwaite)."""

    squared: float
    degrees: float


def _combined(a: Statistics, b: Statistics, factor: float) -> _Error | None:
    if a.sd is None or b.sd is None:
        return None
    part_a, part_b = _squared_error(a), factor**2 * _squared_error(b)
    squared = part_a + part_b
    if squared == 0:
        return _Error(0.0, math.inf)
    degrees = squared**2 / (part_a**2 / (a.count - 1) + part_b**2 / (b.count - 1))
    return _Error(squared, degrees)


def _squared_error(found: Statistics) -> float:
    assert found.sd is not None
    return found.sd**2 / found.count


def _t_quantile(degrees: float) -> float:
    from scipy.stats import t  # slow to import

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees))
