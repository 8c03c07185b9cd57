"""Tests, confidence intervals and effect sizes for paired arms and for shares, and the Pareto front of a value and a cost.

Three kinds of interval are used, by the number of independent units: Student's t for a
mean (two units or more), Student's t over leave-one-out values for a statistic that is not a mean (two or more), and the bootstrap
(``BOOTSTRAP_UNITS`` or more). A resample of n units stays between the smallest and the largest of them, and its variance is too small by
(n - 1)/n, so plain percentiles of few units cover too little. Measured coverage of nominal 95 % intervals for means of 3, 6, 8 and 20
normal values (2,000 draws each): plain percentiles 75, 86, 90 and 93 %; ``bootstrap_interval`` 75, 94, 95 and 95 %; ``jackknife_interval``
95 %. For exponential values: 69, 82, 84 and 90 %; 69, 89, 91 and 93 %; 88, 89, 90 and 91 %.

Every effect is a function of weighted sums over pairs of answers. One code path therefore computes the value (all weights 1), its
leave-one-out values (the weights of one replicate are 0) and its bootstrap draws (weights as drawn). Replicates are the units where there
are two or more; cells of the same haystack are the units where there is one replicate or where leaving out any replicate changes nothing.
Cells are resampled within their context length, because the design fixes the lengths. Measured coverage for the paper's metric, with
answers that are right with probability 0.7 and 0.5 (300 grids each): 98 % for 8 lengths × 15 depths with one replicate (87 % without
the correction for bias), 94 % for 4 × 9, 85 % for 3 × 3; 93 % for 8 × 15 with three and with eight replicates.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

SIGNIFICANT = 0.05
"""The level of significance: a corrected p below it counts as more than chance."""
POWER = 0.8
"""The probability with which a difference of the size ``detectable_difference`` is found."""
FLIP_DRAWS = 10_000
"""The number of random sign patterns that ``sign_flip_p`` draws when it does not try all."""
EXACT_FLIPS = 12
"""The largest number of nonzero differences for which all 2^n sign patterns are tried."""
BOOTSTRAP_DRAWS = 4000
"""The number of bootstrap resamples."""
BOOTSTRAP_UNITS = 8
"""The smallest number of replicates that are resampled; with fewer, the interval comes from leave-one-out values."""
SEED = 20250228
"""The seed of every random draw here, so that the same data have the same interval and p."""
ROUNDING = 1e-12
"""Values closer than this differ by rounding only."""
Z_95 = NormalDist().inv_cdf(0.975)
"""The two-sided 95 % quantile of the standard normal distribution."""
BLOCK_VALUES = 2**21
"""The largest number of values that are drawn at once (16 MB), which bounds the memory."""

Unit = Literal["cells", "replicates"]
Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""A function from the weights of pairs, shape (draws, pairs), to one value per draw, not finite where it is undefined."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float
    unit: Unit
    """The independent units: other cells of the same haystack, or other replicates (haystack, wording, training seed)."""

    def excludes_zero(self) -> bool:
        """Return whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Estimate:
    """A number and its interval."""

    value: float
    interval: Interval | None
    """None where the data show no spread."""


def wilson(successes: float, trials: int) -> Interval:
    """Return Wilson's 95 % score interval of a proportion (Wilson 1927), which holds at 0 and at all successes too.

    For a whole number of successes this is ``scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")``. SciPy takes no
    other number, and here ``successes`` may be a sum of partial scores. The interval is then conservative, because no score between 0
    and 1 varies more than a coin with the same mean.
    """
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half, "cells")


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of the mean of paired differences, from flipping their signs (Fisher 1935).

    The test is exact up to ``EXACT_FLIPS`` nonzero differences and otherwise Monte Carlo with the observed pattern counted
    (Phipson & Smyth 2010).
    """
    values = np.array([value for value in differences if value != 0], dtype=np.float64)  # the sign of a zero changes no sum
    observed = abs(values.sum()) * (1 - 1e-12) - 1e-12
    if len(values) <= EXACT_FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
        return float(np.mean(np.abs(signs @ values) >= observed))
    random = np.random.default_rng(SEED)
    sizes = block_sizes(FLIP_DRAWS, len(values))
    sums = [(2 * random.integers(2, size=(size, len(values)), dtype=np.int8) - 1) @ values for size in sizes]
    return float((1 + np.count_nonzero(np.abs(np.concatenate(sums)) >= observed)) / (1 + FLIP_DRAWS))


def block_sizes(num_draws: int, num_values: int) -> list[int]:
    """Return the sizes of the blocks into which ``num_draws`` draws of ``num_values`` values each are divided."""
    largest = max(1, BLOCK_VALUES // num_values)
    return [min(largest, num_draws - start) for start in range(0, num_draws, largest)]


def smallest_p(num_differences: int) -> float:
    """Return the smallest p that ``sign_flip_p`` can return: all differences have the same sign."""
    return 2.0 ** (1 - num_differences) if num_differences <= EXACT_FLIPS else 1 / (1 + FLIP_DRAWS)


def min_replicates(num_comparisons: int) -> int:
    """Return the smallest number of replicates whose sign flips can be significant after correction for ``num_comparisons``."""
    return next((count for count in range(2, EXACT_FLIPS + 1) if smallest_p(count) * num_comparisons < SIGNIFICANT), EXACT_FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979), in the order given; this bounds the family-wise error rate."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = highest
    return corrected


def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Return the quantile of Student's t distribution (``scipy.stats.t.ppf``)."""
    from scipy.stats import t  # takes longer to import than the whole of `pause-ray check`

    return float(t.ppf(probability, degrees_of_freedom))


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of two rankings of the same items, -1 to 1; None with fewer than three items or if one ranking is all ties."""
    from scipy.stats import kendalltau  # see `t_quantile`

    tau = float(kendalltau(a, b).statistic) if len(a) >= 3 else math.nan
    return tau if math.isfinite(tau) else None


def t_interval(values: Sequence[float], *, lower_bound: float, unit: Unit) -> Interval | None:
    """Return Student's 95 % interval of the mean of independent values, clipped to ``lower_bound`` to 1.

    It is None with fewer than two values, or where all are equal.
    """
    if len(values) < 2 or max(values) - min(values) < ROUNDING:
        return None
    half = t_quantile(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(max(lower_bound, fmean(values) - half), min(1.0, fmean(values) + half), unit)


def clustered_interval(clusters: Sequence[Sequence[float]], *, lower_bound: float, unit: Unit) -> Interval | None:
    """Return Student's 95 % interval of the mean of all values of independent clusters, clipped to ``lower_bound`` to 1.

    For clusters of equal size this is ``t_interval`` of their means. For unequal ones, such as replicates in which some cells could not
    be scored, it is the jackknife over clusters around the mean of all values, so it always contains that mean. Measured coverage:
    92 to 95 % where every other one of 3, 6 or 10 clusters lost four of five values (1,500 draws).
    It is None with one cluster, or where leaving out any cluster changes nothing.
    """
    sums, sizes = np.array([math.fsum(values) for values in clusters]), np.array([len(values) for values in clusters])
    if len(clusters) < 2:
        return None
    leave_one_out = (sums.sum() - sums) / (sizes.sum() - sizes)
    interval = jackknife_interval(float(sums.sum() / sizes.sum()), leave_one_out, unit=unit)
    return None if interval is None else Interval(max(lower_bound, interval.low), min(1.0, interval.high), unit)


def detectable_difference(values: Sequence[float], *, num_comparisons: int) -> float:
    """Return the smallest true mean that a t test on as many values of this spread finds with power 0.8, two-sided 5 %.

    The formula is (t(1 - 0.05/(2 m), n - 1) + t(0.8, n - 1)) × s/√n for m comparisons. Bonferroni's share of the 5 % is what Holm's
    correction demands of the smallest p.
    """
    degrees = len(values) - 1
    quantiles = t_quantile(1 - SIGNIFICANT / (2 * num_comparisons), degrees) + t_quantile(POWER, degrees)
    return quantiles * stdev(values) / math.sqrt(len(values))


def bootstrap_weights(strata: Sequence[int]) -> NDArray[np.uint8]:
    """Return how often each unit is drawn when units are resampled within their stratum, shape (``BOOTSTRAP_DRAWS``, units)."""
    random, stratum_of = np.random.default_rng(SEED), np.asarray(strata)
    weights = np.empty((BOOTSTRAP_DRAWS, len(stratum_of)), dtype=np.uint8)  # a unit is drawn once on average, and never 255 times
    for stratum in sorted(set(strata)):
        units = np.flatnonzero(stratum_of == stratum)
        shares, sizes = np.full(len(units), 1 / len(units)), block_sizes(BOOTSTRAP_DRAWS, len(units))
        weights[:, units] = np.concatenate([random.multinomial(len(units), shares, size=size).astype(np.uint8) for size in sizes])
    return weights


def bootstrap_interval(value: float, draws: Array, *, num_units: int, num_strata: int, unit: Unit) -> Interval | None:
    """Return the bias-corrected 95 % bootstrap percentile interval, widened for few units.

    A mean of ratios is biased, so the percentiles move by twice the normal quantile of the share of draws below ``value`` (Efron 1981).
    With n units they lie where a normal distribution reaches √(n/(n - strata)) × t(0.975, n - strata) (Hesterberg 2015, section 5.3).

    Args:
        value: The statistic of all units.
        draws: The statistic of each resample, not finite where it is undefined.
        num_units: The number of units that were resampled.
        num_strata: The number of strata that they were resampled within.
        unit: The kind of unit.

    Returns:
        None where the draws do not differ, or where more than one in twenty of them is undefined (such as a ratio to zero).
    """
    known = draws[np.isfinite(draws)]
    degrees = num_units - num_strata
    if degrees < 1 or len(known) < 0.95 * len(draws) or float(np.ptp(known)) < ROUNDING:
        return None
    normal, reach = NormalDist(), math.sqrt(num_units / degrees) * t_quantile(0.975, degrees)
    below = (np.count_nonzero(known < value - ROUNDING) + np.count_nonzero(known <= value + ROUNDING)) / (2 * len(known))
    shift = 2 * normal.inv_cdf(min(max(float(below), 1 / len(known)), 1 - 1 / len(known)))
    low, high = np.quantile(known, [normal.cdf(shift - reach), normal.cdf(shift + reach)])
    return Interval(float(low), float(high), unit)


def jackknife_interval(value: float, leave_one_out: Array, *, unit: Unit) -> Interval | None:
    """Return Student's 95 % interval around ``value`` from its jackknife standard error (Tukey 1958); for a mean it is the t interval.

    ``leave_one_out`` holds the statistic without each one of the units. The interval is None with fewer than two units, where leaving one
    out changes nothing, or where it leaves the statistic undefined.
    """
    if len(leave_one_out) < 2 or not np.isfinite(leave_one_out).all() or float(np.ptp(leave_one_out)) < ROUNDING:
        return None
    degrees = len(leave_one_out) - 1
    half = t_quantile(0.975, degrees) * degrees * float(leave_one_out.std(ddof=1)) / math.sqrt(len(leave_one_out))
    return Interval(value - half, value + half, unit)


@dataclass(frozen=True, kw_only=True)
class ScoredPair:
    """One question that both arms answered; one prompt asked under several depths is one pair, whose values are means."""

    cell: Hashable
    """The question without its replicate."""
    replicate: int
    context_tokens: int
    middle: bool
    """Whether the prompt was asked in the middle of the context."""
    edge: bool
    """Whether the prompt was asked at the edges; it may have been asked under depths of both kinds."""
    score_a: float
    """The score of arm A, 0 to 1."""
    score_b: float
    rubric_a: float | None
    """The rubric of arm A, 1 to 10."""
    rubric_b: float | None
    exact_a: float
    """1 where arm A's answer holds everything asked for, else 0."""
    exact_b: float

    @property
    def difference(self) -> float:
        """The score of arm A minus that of arm B."""
        return self.score_a - self.score_b


@dataclass(frozen=True, kw_only=True)
class Effects:
    """The difference of arm A from arm B in every reported measure."""

    difference: Estimate
    """Difference of mean scores. The interval is Student's t over any number of replicates, for which its coverage was measured."""
    replicates_agree: bool
    """Whether all of several replicates have the same difference, so that the interval of ``difference`` is over cells."""
    detectable: float | None
    """The smallest true difference that this design finds with power 0.8, over the units of the interval of ``difference``; above 1
    no difference is large enough. None with fewer than two pairs."""
    relative: Estimate | None
    """Mean over lengths of the relative change of the rubric, in percent: the paper's headline metric. None without rubrics."""
    rubric_change: Estimate | None
    """Relative change of the mean rubric of all pairs, in percent."""
    score_change: Estimate | None
    """Relative change of the mean score, in percent; None where arm B never scores."""
    exact_difference: Estimate
    """Difference in exact recall."""
    middle_gain: Estimate | None
    """Difference in the middle minus difference at the edges: above zero, A closes the gap in the middle. None without both."""


def measure_effects(pairs: Sequence[ScoredPair], *, num_comparisons: int) -> Effects:
    """Return every measure of the difference with its interval.

    Intervals of mean differences (``difference``, ``exact_difference``) are Student's t over replicates. With one replicate, or where
    all replicates have the same difference, they are over cells (averaged over replicates) with one pseudo-observation at -1 and one at 1
    added, as Bonett & Price (2012) do for paired proportions, so that few or unanimous cells do not look certain. The bootstrap adds
    none: where few cells differ, its intervals are too narrow.
    """
    difference, values, unit = mean_difference(pairs, [pair.difference for pair in pairs])
    exact, _, _ = mean_difference(pairs, [pair.exact_a - pair.exact_b for pair in pairs])
    rubric_a, rubric_b = _known_in_both([pair.rubric_a for pair in pairs], [pair.rubric_b for pair in pairs])
    score_a, score_b = np.array([pair.score_a for pair in pairs]), np.array([pair.score_b for pair in pairs])
    middle, edge = np.array([pair.middle for pair in pairs]), np.array([pair.edge for pair in pairs])
    sample = _PairedSample(pairs)
    return Effects(
        difference=difference,
        replicates_agree=unit == "cells" and sample.num_replicates > 1,
        detectable=detectable_difference(values, num_comparisons=num_comparisons) if len(pairs) > 1 else None,
        relative=sample.estimate(lambda weights: _mean_relative_change(weights, rubric_a, rubric_b, sample.lengths)),
        rubric_change=sample.estimate(lambda weights: _relative_change(weights, rubric_a, rubric_b)),
        score_change=sample.estimate(lambda weights: _relative_change(weights, score_a, score_b)),
        exact_difference=exact,
        middle_gain=sample.estimate(lambda weights: _middle_gain(weights, score_a - score_b, middle, edge)),
    )


def mean_difference(pairs: Sequence[ScoredPair], values: Sequence[float]) -> tuple[Estimate, list[float], Unit]:
    """Return the mean of the pairs' values (-1 to 1) with its t interval, the independent values behind the interval, and their unit."""
    by_replicate = grouped((pair.replicate, value) for pair, value in zip(pairs, values, strict=True))
    interval = clustered_interval(by_replicate, lower_bound=-1.0, unit="replicates")
    if interval is not None:
        return Estimate(fmean(values), interval), [fmean(group) for group in by_replicate], "replicates"
    by_cell = [*group_means((pair.cell, value) for pair, value in zip(pairs, values, strict=True)), -1.0, 1.0]
    return Estimate(fmean(values), t_interval(by_cell, lower_bound=-1.0, unit="cells") if len(pairs) > 1 else None), by_cell, "cells"


def group_means(items: Iterable[tuple[Hashable, float]]) -> list[float]:
    """Return the mean of the values under each key, in order of the keys' first appearance."""
    return [fmean(values) for values in grouped(items)]


def grouped(items: Iterable[tuple[Hashable, Item]]) -> list[list[Item]]:
    """Return the items under each key, in order of the keys' first appearance."""
    groups: defaultdict[Hashable, list[Item]] = defaultdict(list)
    for key, item in items:
        groups[key].append(item)
    return list(groups.values())


class _PairedSample:
    """Pairs of answers, from which replicates or cells can be left out or resampled by weights."""

    def __init__(self, pairs: Sequence[ScoredPair]) -> None:
        self.lengths = _group_numbers([pair.context_tokens for pair in pairs])
        self._num_pairs = len(pairs)
        self._replicates = _group_numbers([pair.replicate for pair in pairs])
        self._cells = _group_numbers([pair.cell for pair in pairs])
        self.num_replicates = int(self._replicates.max()) + 1
        self._strata: list[int] = self.lengths[np.unique(self._cells, return_index=True)[1]].tolist()

    def estimate(self, statistic: Statistic) -> Estimate | None:
        """Return the statistic of all pairs with its interval; None where it is undefined."""
        value = float(statistic(np.ones((1, self._num_pairs)))[0])
        if not np.isfinite(value):
            return None
        return Estimate(value, self._interval_over_replicates(statistic, value) or self._interval_over_cells(statistic, value))

    def _interval_over_replicates(self, statistic: Statistic, value: float) -> Interval | None:
        if self.num_replicates < BOOTSTRAP_UNITS:
            weights = self._replicates[None, :] != np.arange(self.num_replicates)[:, None]
            return jackknife_interval(value, statistic(weights.astype(np.float64)), unit="replicates")
        draws = self._resample(statistic, self._replicate_weights, self._replicates)
        return bootstrap_interval(value, draws, num_units=self.num_replicates, num_strata=1, unit="replicates")

    def _interval_over_cells(self, statistic: Statistic, value: float) -> Interval | None:
        draws = self._resample(statistic, self._cell_weights, self._cells)
        num_strata = len(set(self._strata))
        return bootstrap_interval(value, draws, num_units=len(self._strata), num_strata=num_strata, unit="cells")

    def _resample(self, statistic: Statistic, weights: NDArray[np.uint8], unit_of_pair: NDArray[np.intp]) -> Array:
        """Return the statistic of every resample, where ``weights`` has shape (draws, units)."""
        ends = np.cumsum(block_sizes(len(weights), self._num_pairs))[:-1]
        return np.concatenate([statistic(block[:, unit_of_pair].astype(np.float64)) for block in np.split(weights, ends)])

    @functools.cached_property
    def _replicate_weights(self) -> NDArray[np.uint8]:
        return bootstrap_weights([0] * self.num_replicates)

    @functools.cached_property
    def _cell_weights(self) -> NDArray[np.uint8]:
        return bootstrap_weights(self._strata)


def _known_in_both(a: Sequence[float | None], b: Sequence[float | None]) -> tuple[Array, Array]:
    """Return two arrays that hold NaN in both where either sequence holds None."""
    columns = np.array([(np.nan if left is None else left, np.nan if right is None else right) for left, right in zip(a, b, strict=True)])
    columns[np.isnan(columns).any(axis=1)] = np.nan
    return columns[:, 0], columns[:, 1]


def _relative_change(weights: Array, a: Array, b: Array) -> Array:
    """Return the relative change of the weighted mean from b to a, in percent."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(100 * (weights @ np.nan_to_num(a) / (weights @ np.nan_to_num(b)) - 1))


def _mean_relative_change(weights: Array, a: Array, b: Array, lengths: NDArray[np.intp]) -> Array:
    """Return the mean over lengths of the relative change in each, in percent; lengths without weight or value are left out."""
    at_length = [lengths == length for length in np.unique(lengths)]
    changes = np.stack([_relative_change(weights[:, pairs], a[pairs], b[pairs]) for pairs in at_length], axis=1)
    known = np.isfinite(changes)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, changes, 0).sum(axis=1) / known.sum(axis=1))


def _middle_gain(weights: Array, differences: Array, middle: NDArray[np.bool_], edge: NDArray[np.bool_]) -> Array:
    """Return the mean difference in the middle minus the mean difference at the edges."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inside, outside = (weights[:, where] @ differences[where] / weights[:, where].sum(axis=1) for where in (middle, edge))
        return np.asarray(inside - outside)


def _group_numbers(values: Sequence[Hashable]) -> NDArray[np.intp]:
    """Return the number of each value among the distinct values, in order of first appearance."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.array([numbers[value] for value in values], dtype=np.intp)


@dataclass(frozen=True)
class Choice:
    """A value (more is better) and its cost (less is better)."""

    value: float
    cost: float


def pareto_front(choices: Sequence[Choice]) -> list[int]:
    """Return the indices of the choices that no other dominates, cheapest first; equal choices are all on the front."""
    on_front = [index for index, dominating in enumerate(dominated_by(choices)) if dominating is None]
    return sorted(on_front, key=lambda index: (choices[index].cost, choices[index].value, index))


def dominated_by(choices: Sequence[Choice]) -> list[int | None]:
    """Return for each choice the index of the most valuable choice that dominates it, or None on the Pareto front.

    A choice dominates another if its value is at least as high, its cost at most as high, and one of them is better. Among equally
    valuable choices the cheapest is returned, among equal ones the first.
    """
    order = sorted(range(len(choices)), key=lambda index: (choices[index].cost, -choices[index].value, index))
    dominating: list[int | None] = [None] * len(choices)
    best: int | None = None
    for index in order:
        if best is not None and choices[index] != choices[best] and choices[best].value >= choices[index].value:
            dominating[index] = best
        elif best is None or choices[index].value > choices[best].value:
            best = index
    return dominating
