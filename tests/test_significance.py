"""records/significance.py: the statistics, as computed by hand, and where there are none."""

from __future__ import annotations

import pytest
from scipy import stats

import significance
from significance import Estimate


def test_welchs_test_is_as_computed_by_hand():
    # means 4 and 8, variances 1 and 4, three values each:
    # t = -4 / sqrt(5/3), 50/17 degrees of freedom
    found = significance.welch([3.0, 4.0, 5.0], [6.0, 8.0, 10.0])
    error = (5 / 3) ** 0.5
    reach = stats.t.ppf(0.975, 50 / 17) * error
    assert found.difference == pytest.approx(-4)
    assert (found.low, found.high) == pytest.approx((-4 - reach, -4 + reach))
    assert found.p_value == pytest.approx(2 * stats.t.sf(4 / error, 50 / 17))


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_welchs_test_needs_two_values_and_spread():
    assert significance.welch([1.0], [1.0, 3.0]) == Estimate(-1.0)
    assert significance.welch([1.0, 1.0], [2.0, 2.0]) == Estimate(-1.0)
    assert significance.welch([1.0, 1.5], [2.0, 2.0]).p_value is not None


def test_the_paired_difference_is_as_computed_by_hand():
    # mean 2, deviation 1, three pairs: t = 2 * sqrt(3), 2 degrees of freedom
    found = significance.paired([1.0, 2.0, 3.0])
    reach = stats.t.ppf(0.975, 2) / 3**0.5
    assert found.difference == 2.0
    assert (found.low, found.high) == pytest.approx((2 - reach, 2 + reach))
    assert found.p_value == pytest.approx(2 * stats.t.sf(2 * 3**0.5, 2))


def test_the_paired_difference_needs_two_pairs_and_spread():
    assert significance.paired([0.5]) == Estimate(0.5)
    assert significance.paired([0.5, 0.5]) == Estimate(0.5)


def test_pairs_show_an_effect_that_the_spread_over_seeds_hides():
    base = [1.0, 2.0, 3.0]
    changed = [1.11, 2.10, 3.09]
    paired = significance.paired([new - old for new, old in zip(changed, base, strict=True)])
    independent = significance.welch(changed, base)
    assert paired.difference == pytest.approx(independent.difference)
    assert paired.low > 0 > independent.low


def test_p_below_is_one_sided():
    # mean 2, deviation 1, three values
    assert significance.p_below([1.0, 2.0, 3.0], 4.0) == pytest.approx(stats.t.cdf(-2 * 3**0.5, 2))
    assert significance.p_below([1.0], 4.0) is None
    assert significance.p_below([1.0, 1.0], 4.0) is None


@pytest.mark.parametrize(
    "p_values, adjusted",
    [
        ([0.04, None, 0.01, 0.03, 0.5], [0.09, None, 0.04, 0.09, 0.5]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([None], [None]),
        ([], []),
    ],
)
def test_holms_adjustment_is_as_computed_by_hand(p_values, adjusted):
    assert significance.holm(p_values) == pytest.approx(adjusted)


def test_the_deviation_is_that_of_a_sample():
    assert significance.deviation([1.0, 2.0, 3.0]) == 1.0
    assert significance.deviation([1.0]) is None
