"""How sure a difference between runs is: paired and independent samples, several changes at once.

scipy computes the distributions. It is imported where it is needed, so that a command that only
wants a standard deviation works without it.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A difference of means, its 95% interval, and p that it is none.

    Interval and p are None where they cannot be computed: with too few values, or without spread.
    """

    difference: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


def deviation(values: list[float]) -> float | None:
    """The standard deviation of a sample, with n - 1 in the denominator; None for one value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values)


def paired(differences: list[float]) -> Estimate:
    """The mean of differences within pairs, by Student's t (Student, Biometrika 6, 1908).

    Runs of one seed see the same data in the same order. What the seed does to both of them cancels
    in their difference, so this test sees effects that are smaller than the spread over seeds.
    It takes two pairs or more, whose differences are not all the same.
    """
    difference = statistics.fmean(differences)
    if len(set(differences)) < 2:
        return Estimate(difference)

    from scipy import stats

    return _estimate(difference, stats.ttest_1samp(differences, 0.0))


def welch(values: list[float], base: list[float]) -> Estimate:
    """mean(values) - mean(base) of independent samples (Welch, Biometrika 34, 1947).

    The samples may differ in size and in spread. It takes two values in each, and spread in one.
    """
    difference = statistics.fmean(values) - statistics.fmean(base)
    too_few = min(len(values), len(base)) < 2
    no_spread = len(set(values)) == 1 and len(set(base)) == 1
    if too_few or no_spread:
        return Estimate(difference)

    from scipy import stats

    return _estimate(difference, stats.ttest_ind(values, base, equal_var=False))


def _estimate(difference: float, test) -> Estimate:
    """The difference with what a t-test of scipy says of it."""
    interval = test.confidence_interval(CONFIDENCE)
    return Estimate(difference, float(interval.low), float(interval.high), float(test.pvalue))


def p_below(values: list[float], bound: float) -> float | None:
    """One-sided p that the mean behind a sample is not below a bound, by Student's t.

    None with fewer than two values, or without spread.
    """
    if len(set(values)) < 2:
        return None

    from scipy import stats

    return float(stats.ttest_1samp(values, bound, alternative="less").pvalue)


def holm(p_values: list[float | None]) -> list[float | None]:
    """p-values, adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    Of n p-values the smallest is multiplied by n, the next one by n - 1, and so on; none becomes
    smaller than the one before it, or larger than 1. A None stays None and does not count.
    """
    known = [place for place, p in enumerate(p_values) if p is not None]
    known.sort(key=lambda place: p_values[place])
    adjusted = list(p_values)
    largest = 0.0
    for rank, place in enumerate(known):
        scaled = p_values[place] * (len(known) - rank)
        largest = max(largest, min(1.0, scaled))
        adjusted[place] = largest
    return adjusted
