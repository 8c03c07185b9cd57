"""Tests, intervals and corrections for paired differences and for shares. Pure numbers; knows no arm, row or file.

Three ways to an interval, by how many independent units there are: Student's t (from two on), Student's t over delete-one
estimates for what is no mean (from two on), and the bootstrap (many). Resampling n units reaches at most from the smallest
to the largest and its spread is too small by (n - 1)/n, so plain percentiles of few units cover too little. For means of
3, 6, 8 and 20 normal values, where 95 % are claimed, they hold the truth in 75, 86, 90 and 93 % of cases, ``bootstrap_interval`` in 75,
94, 95 and 95 %, ``delete_one_interval`` in 95 %; for exponential values 69, 82, 84 and 90 %, 69, 89, 91 and 93 %, 88, 89, 90 and 91 %
(2,000 draws each; ``tests/test_statistics.py`` draws some of them anew). Hence ``BOOTSTRAP_UNITS``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIGNIFICANT = 0.05
"""A p below this, after correction, counts as more than chance."""
POWER = 0.8
"""How often a difference of the size that ``detectable_difference`` names would be found."""
FLIP_DRAWS = 10_000
EXACT_FLIPS = 12
"""Up to this many differences that are not zero all 2^n sign patterns are tried; beyond it, ``FLIP_DRAWS`` random ones."""
BOOTSTRAP_DRAWS = 4000
BOOTSTRAP_UNITS = 8
"""From this many units on they are resampled; below, the range of what a resample can reach holds the truth too rarely."""
SEED = 20250228
EQUAL = 1e-12
"""Values closer than this differ by rounding only."""
Z_95 = NormalDist().inv_cdf(0.975)
BLOCK_VALUES = 2**21
"""Draws are made and used in blocks of so many numbers (16 MB), whatever their number and that of the units."""
_EXACT_DEGREES = 200
"""Up to this many degrees of freedom quantiles of Student's t come from the exact sum; above, from an expansion."""
COPULA_DRAWS = 2000
COPULA_HALVINGS = 14
"""Of the interval in which a correlation is looked for: 2/2^14, far finer than ``COPULA_DRAWS`` can tell."""
SIMULATED_ITEMS = 40
"""Up to this many items the spread of Kendall's tau is simulated; above, that of its arctanh is known well enough."""
STEEP_TAU = 0.8
"""Beyond this tau its arctanh is not: from 1 it would reach down to 0.998 with 41 items, where 0.99 is not rare with 40."""

Unit = Literal["cells", "replicates", "trials"]
Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float
    unit: Unit
    """What would be drawn anew: other cells of the same haystack, other replicates (haystack, wording, seed), or other trials."""

    def excludes_zero(self) -> bool:
        """Whether all of it lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is."""

    value: float
    interval: Interval | None
    """None where the data show no spread to judge by."""


def wilson(successes: float, trials: int) -> Interval:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), right at 0 and at all successes too.

    ``successes`` may be a sum of partial scores: the interval is then wider than it need be, since no score between 0 and 1
    varies more than a coin with the same mean.
    """
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half, "cells")


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences when each sign is as likely as its opposite."""
    values = np.array([value for value in differences if value != 0], dtype=np.float64)  # the sign of a zero changes no sum
    observed = abs(values.sum()) * (1 - 1e-12) - 1e-12
    if len(values) <= EXACT_FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
        return float(np.mean(np.abs(signs @ values) >= observed))
    random = np.random.default_rng(SEED)
    sums = [(2 * random.integers(2, size=(draws, len(values)), dtype=np.int8) - 1) @ values for draws in blocks(FLIP_DRAWS, len(values))]
    return float((1 + np.count_nonzero(np.abs(np.concatenate(sums)) >= observed)) / (1 + FLIP_DRAWS))


def blocks(num_draws: int, num_values: int) -> list[int]:
    """Sizes of the blocks in which draws of so many values each are made."""
    most = max(1, BLOCK_VALUES // num_values)
    return [min(most, num_draws - start) for start in range(0, num_draws, most)]


def least_p(num_differences: int) -> float:
    """The smallest p that ``sign_flip_p`` can give: all differences have one sign."""
    return 2.0 ** (1 - num_differences) if num_differences <= EXACT_FLIPS else 1 / (1 + FLIP_DRAWS)


def enough_replicates(num_comparisons: int) -> int:
    """From how many replicates on flipping their signs can be significant after correction for ``num_comparisons``."""
    return next((count for count in range(2, EXACT_FLIPS + 1) if least_p(count) * num_comparisons < SIGNIFICANT), EXACT_FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm 1979): the chance of one false find among all stays below the corrected p."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = highest
    return corrected


@functools.lru_cache(maxsize=1024)
def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """The value below which Student's t lies with ``probability`` (0.5 to below 1).

    Up to 200 degrees of freedom by bisection of the exact finite sums (Abramowitz & Stegun 26.7.3 and 26.7.4); above by the
    Cornish-Fisher expansion to the third order (26.7.5), right to six digits there.
    """
    if degrees_of_freedom > _EXACT_DEGREES:
        z, df = NormalDist().inv_cdf(probability), degrees_of_freedom
        second, third = (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + (z**3 + z) / (4 * df) + second / df**2 + third / df**3
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees_of_freedom) < 2 * probability - 1 else (low, middle)
    return math.tan(low) * math.sqrt(degrees_of_freedom)


def t_95(degrees_of_freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t."""
    return t_quantile(0.975, degrees_of_freedom)


def t_interval(values: Sequence[float], *, least: float, unit: Unit) -> Interval | None:
    """Student's 95 % interval of the mean, clipped to ``least`` to 1; None where the values show no spread."""
    if len(values) < 2 or max(values) - min(values) < EQUAL:
        return None
    half = t_95(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(max(least, fmean(values) - half), min(1.0, fmean(values) + half), unit)


def clustered_interval(clusters: Sequence[Sequence[float]], *, least: float, unit: Unit) -> Interval | None:
    """Student's 95 % interval of the mean of all values, clipped to ``least`` to 1; what is independent are the clusters.

    Of clusters of one size it is ``t_interval`` of their means. Of unequal ones, such as replicates in which some cells could
    not be scored, it is that of the means without one cluster each, around the mean of all values: so it never leaves that out.
    It holds the truth in 92 to 95 % of cases where every other one of 3, 6 or 10 clusters lost four of five values (1,500 draws).
    None with one cluster, or where none makes a difference.
    """
    sums, sizes = np.array([math.fsum(values) for values in clusters]), np.array([len(values) for values in clusters])
    if len(clusters) < 2:
        return None
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    found = delete_one_interval(float(sums.sum() / sizes.sum()), without, unit=unit)
    return None if found is None else Interval(max(least, found.low), min(1.0, found.high), unit)


def detectable_difference(values: Sequence[float], *, num_comparisons: int) -> float:
    """The smallest true mean that as many values of this spread would show, with power 0.8, two-sided 5 %.

    (t(1 - 0.05/(2 m), n - 1) + t(0.8, n - 1)) × s/√n for m comparisons: the step up from a t test's threshold that four of
    five experiments pass. Bonferroni's share of the 5 % is what Holm asks of the first find.

    Args:
        values: Differences of independent units, at least two.
        num_comparisons: How many comparisons share the 5 %.
    """
    degrees = len(values) - 1
    quantiles = t_quantile(1 - SIGNIFICANT / (2 * num_comparisons), degrees) + t_quantile(POWER, degrees)
    return quantiles * stdev(values) / math.sqrt(len(values))


def bootstrap_weights(strata: Sequence[int]) -> NDArray[np.uint8]:
    """How often each unit is drawn in each resample: draws × units; every stratum keeps its number of units.

    Args:
        strata: The stratum of each unit; units are resampled within theirs.
    """
    random, places = np.random.default_rng(SEED), np.asarray(strata)
    weights = np.empty((BOOTSTRAP_DRAWS, len(places)), dtype=np.uint8)  # a unit is drawn once on average, and never 255 times
    for stratum in sorted(set(strata)):
        units = np.flatnonzero(places == stratum)
        shares, sizes = np.full(len(units), 1 / len(units)), blocks(BOOTSTRAP_DRAWS, len(units))
        weights[:, units] = np.concatenate([random.multinomial(len(units), shares, size=size).astype(np.uint8) for size in sizes])
    return weights


def bootstrap_interval(value: float, draws: Draws, *, num_units: int, num_strata: int, unit: Unit) -> Interval | None:
    """The bootstrap's 95 % percentile interval, corrected for bias and moved out as far as few units need.

    For the bias, which a mean of ratios has, the percentiles move by twice the normal quantile of the share of draws below
    ``value`` (Efron 1981). For few units they lie where a normal distribution reaches √(n/(n - strata)) × t(0.975, n - strata)
    (Hesterberg 2015, section 5.3). None where the draws do not differ, or where one in twenty of them has no value (such as a
    ratio to nothing).
    """
    known = draws[np.isfinite(draws)]
    degrees = num_units - num_strata
    if degrees < 1 or len(known) < 0.95 * len(draws) or float(np.ptp(known)) < EQUAL:
        return None
    normal, reach = NormalDist(), math.sqrt(num_units / degrees) * t_95(degrees)
    below = (np.count_nonzero(known < value - EQUAL) + np.count_nonzero(known <= value + EQUAL)) / (2 * len(known))
    shift = 2 * normal.inv_cdf(min(max(float(below), 1 / len(known)), 1 - 1 / len(known)))
    low, high = np.quantile(known, [normal.cdf(shift - reach), normal.cdf(shift + reach)])
    return Interval(float(low), float(high), unit)


def delete_one_interval(value: float, without: Draws, *, unit: Unit) -> Interval | None:
    """Student's 95 % interval around ``value`` from its values without each one unit (Tukey's jackknife).

    For a mean this is the ordinary t interval. None where leaving a unit out changes nothing or leaves no value.
    """
    if len(without) < 2 or not np.isfinite(without).all() or float(np.ptp(without)) < EQUAL:
        return None
    half = t_95(len(without) - 1) * (len(without) - 1) * float(without.std(ddof=1)) / math.sqrt(len(without))
    return Interval(value - half, value + half, unit)


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> Estimate | None:
    """Kendall's tau-b of two rankings of the same items, and its 95 % interval.

    1: the same order; -1: the opposite one; ties are allowed for (Kendall 1945). The interval holds every correlation of a bivariate
    normal distribution under which a tau this high, or this low, comes up in at least 2.5 % of samples of this size; ranks know
    nothing of the values' own distributions. So it has a width at tau = 1 too, and is all but everything for three items. Above
    ``SIMULATED_ITEMS`` items: arctanh(tau) ± 1.96 × √(0.437/(n - 4)) (Fieller, Hartley & Pearson 1957), or beyond ``STEEP_TAU`` that of
    ``SIMULATED_ITEMS`` items, which is wider than need be. Where 95 % are claimed it holds the truth in 94 to 100 % of samples of 3 to 16
    normal pairs (300 each), of pairs with a tenth of outliers too; in 90 to 99 % where values are rounded so that one pair of seven ties.

    Args:
        a: A value of each item.
        b: Another of each.

    Returns:
        None with fewer than three items, or where all values of one ranking are tied.
    """
    tau = _tau_b(np.array([a], dtype=np.float64), np.array([b], dtype=np.float64))[0]
    if len(a) < 3 or not np.isfinite(tau):
        return None
    limits = _tau_limits(float(tau), len(a))
    return Estimate(float(tau), Interval(*limits, "trials"))


def _tau_limits(tau: float, num_items: int) -> tuple[float, float]:
    if num_items > SIMULATED_ITEMS and abs(tau) <= STEEP_TAU:
        middle, half = math.atanh(tau), Z_95 * math.sqrt(0.437 / (num_items - 4))
        return math.tanh(middle - half), math.tanh(middle + half)
    simulated = min(num_items, SIMULATED_ITEMS)
    return _least_tau(tau, simulated), -_least_tau(-tau, simulated)


@functools.lru_cache(maxsize=64)
def _least_tau(tau: float, num_items: int) -> float:
    """The smallest true tau under which a sample's is at least ``tau`` in 2.5 % of cases."""
    random = np.random.default_rng(SEED)
    first, other = random.standard_normal((2, COPULA_DRAWS, num_items))
    low, high = -1.0, 1.0
    for _ in range(COPULA_HALVINGS):
        correlation = (low + high) / 2
        sampled = _tau_b(first, correlation * first + math.sqrt(1 - correlation**2) * other)
        often_enough = np.mean(sampled >= tau - EQUAL) >= (1 - 0.95) / 2
        low, high = (low, correlation) if often_enough else (correlation, high)
    return 2 / math.pi * math.asin(low)


def _tau_b(a: Draws, b: Draws) -> Draws:
    """Of each row: samples × items."""
    first, second = np.triu_indices(a.shape[1], 1)
    signs_a, signs_b = (np.sign(values[:, first] - values[:, second]) for values in (a, b))
    with np.errstate(invalid="ignore"):
        tau = (signs_a * signs_b).sum(1) / np.sqrt(np.abs(signs_a).sum(1) * np.abs(signs_b).sum(1))
    return np.asarray(tau, dtype=np.float64)


def _t_inside(angle: float, degrees_of_freedom: int) -> float:
    """The share of Student's t between ±t, for t = tan(angle) × √degrees."""
    odd, square = degrees_of_freedom % 2, math.cos(angle) ** 2
    term, total = (math.cos(angle), math.cos(angle)) if odd else (1.0, 1.0)
    for step in range(1, degrees_of_freedom // 2):
        term *= square * (2 * step / (2 * step + 1) if odd else (2 * step - 1) / (2 * step))
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees_of_freedom > 1 else 0.0))
