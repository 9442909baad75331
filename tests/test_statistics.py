from __future__ import annotations

import random

import pytest
import scipy.stats

from resfast.runs.statistics import p_value, statistics

VALUES = [0.9071, 0.9064, 0.9083, 0.9069, 0.9078]


def test_mean_and_spread_are_those_of_the_textbook():
    found = statistics([1.0, 2.0, 3.0, 4.0])
    assert (found.count, found.mean) == (4, 2.5)
    assert found.sd == pytest.approx((5 / 3) ** 0.5)
    # t(0.975, 3) = 3.18245 in any table.
    half = 3.182446 * (5 / 3) ** 0.5 / 2
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)


@pytest.mark.parametrize("target", [0.9, 0.907, 0.9073, 0.91])
def test_p_value_is_that_of_scipys_one_sided_test(target: float):
    expected = scipy.stats.ttest_1samp(VALUES, target, alternative="greater").pvalue
    assert p_value(VALUES, target) == pytest.approx(expected, rel=1e-9)


def test_a_mean_well_above_the_target_has_a_small_p_value_and_one_below_a_large_one():
    assert p_value(VALUES, 0.90) < 0.001
    assert p_value(VALUES, 0.92) > 0.999


def test_one_run_has_a_mean_and_nothing_else():
    found = statistics([0.9])
    assert (found.mean, found.sd, found.low, found.high) == (0.9, None, None, None)
    assert p_value([0.9], 0.8) is None


@pytest.mark.parametrize(("target", "expected"), [(0.8, 0.0), (0.9, 0.5), (0.95, 1.0)])
def test_runs_without_spread_decide_by_their_mean(target: float, expected: float):
    assert p_value([0.9, 0.9, 0.9], target) == expected


def test_the_interval_holds_the_true_mean_in_95_of_100_experiments():
    chance, hits = random.Random(0), 0
    for _ in range(2000):
        found = statistics([chance.gauss(0.9, 0.01) for _ in range(5)])
        hits += found.low <= 0.9 <= found.high
    assert 0.93 <= hits / 2000 <= 0.97
