"""Tests, intervals, effects and Pareto fronts: expected numbers are worked out by hand, from tables, or from what 95 % means."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pause_ray.evaluation.compare import compare_arms
from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.statistics import (
    BOOTSTRAP_UNITS,
    FLIP_DRAWS,
    Choice,
    ScoredPair,
    bootstrap_interval,
    bootstrap_weights,
    clustered_interval,
    detectable_difference,
    dominated_by,
    holm,
    jackknife_interval,
    kendall_tau,
    measure_effects,
    min_replicates,
    pareto_front,
    sign_flip_p,
    smallest_p,
    t_interval,
    t_quantile,
    wilson,
)
from tests.stored_sweep import cell, rows


def test_wilson_against_a_published_value() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    interval = wilson(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def test_wilson_at_the_ends() -> None:
    # Closed form for no success: z² / (n + z²); for 9: 3.8415 / 12.8415.
    none, every = wilson(0, 9), wilson(9, 9)
    assert (none.low, every.high) == (0.0, 1.0)
    assert none.high == pytest.approx(3.8415 / 12.8415, abs=1e-4)
    assert every.low == pytest.approx(1 - none.high)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (1, 9), (5, 9), (81, 263), (999, 1000)])
def test_wilson_of_whole_successes_is_scipys(successes: int, trials: int) -> None:
    interval, expected = wilson(successes, trials), binomtest(successes, trials).proportion_ci(method="wilson")
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_sign_flip_counts_patterns_exactly() -> None:
    # Sums of ±1 ±2 ±3: |sum| is 6 for 2 of 8 patterns, and at least 4 for 4 of them (6, 4, -4, -6).
    assert sign_flip_p([1, 2, 3]) == 2 / 8
    assert sign_flip_p([-1, 2, 3]) == 4 / 8
    assert sign_flip_p([0, 0, 0]) == 1


def test_sign_flip_is_not_thrown_off_by_rounding() -> None:
    # 0.1 + 0.2 and 0.3 differ in the last bit; all four patterns of equal size must count as equal: |sum| >= 0.6 for 2 of 8.
    assert sign_flip_p([0.1, 0.2, 0.3]) == 2 / 8
    assert sign_flip_p([1 / 3] * 3 + [-1 / 3] * 3) == 1


def test_drawn_flips_agree_with_the_normal_distribution() -> None:
    # 400 differences of ±1 whose sum is 40 = 2 standard deviations: p = 0.0455, or 0.0511 with the continuity of a ±1 walk.
    p = sign_flip_p([1] * 220 + [-1] * 180)
    assert p == pytest.approx(0.0511, abs=4 * math.sqrt(0.05 * 0.95 / FLIP_DRAWS))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_sign_flip_has_no_favourite_side_and_is_never_below_its_least(differences: list[float]) -> None:
    p = sign_flip_p(differences)
    assert smallest_p(len(differences)) <= p <= 1
    assert sign_flip_p([-value for value in differences]) == pytest.approx(p, abs=0.03)


def test_holm_by_hand() -> None:
    # Sorted 0.01 0.03 0.04 × 3 2 1 = 0.03 0.06 0.04; a later one may not be below an earlier one: 0.06.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_how_many_replicates_their_signs_need() -> None:
    # Smallest p of R replicates is 2^(1-R): 0.031 for six, which Holm doubles for two comparisons.
    assert [min_replicates(arms) for arms in (1, 2, 3, 4)] == [6, 7, 7, 8]


def test_quantiles_of_students_t() -> None:
    # Published tables, two-sided 5 %.
    published = {1: 12.7062, 2: 4.3027, 10: 2.2281, 30: 2.0423, 31: 2.0395, 60: 2.0003, 120: 1.9799, 1000: 1.9623}
    assert {df: round(t_quantile(0.975, df), 4) for df in published} == published
    # Closed forms: tan(π (p - 1/2)) for one degree of freedom, a √2 / √(1 - a²) with a = 2 p - 1 for two.
    for p in (0.6, 0.8, 0.99, 0.9999):
        a = 2 * p - 1
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)))
        assert t_quantile(p, 2) == pytest.approx(a * math.sqrt(2) / math.sqrt(1 - a**2))


def test_leaving_one_out_of_a_mean_is_students_t() -> None:
    values = np.array([0.1, 0.5, 0.3, 0.9])
    left_out = jackknife_interval(values.mean(), (values.sum() - values) / 3, unit="replicates")
    ordinary = t_interval(list(values), lower_bound=-10, unit="replicates")
    assert left_out is not None
    assert ordinary is not None
    assert left_out.low == pytest.approx(ordinary.low)
    assert left_out.high - values.mean() == pytest.approx(values.mean() - ordinary.low)


def test_clusters_of_one_size_are_students_t_of_their_means() -> None:
    clusters = clustered_interval([[0.0, 0.2], [0.5, 0.5], [0.1, 0.5]], lower_bound=-1, unit="replicates")
    means = t_interval([0.1, 0.5, 0.3], lower_bound=-1, unit="replicates")
    assert clusters is not None
    assert means is not None
    assert (clusters.low, clusters.high) == (pytest.approx(means.low), pytest.approx(means.high))
    assert clustered_interval([[0.2, 0.4], [0.3, 0.3]], lower_bound=-1, unit="replicates") is None
    assert clustered_interval([[0.2, 0.4]], lower_bound=-1, unit="replicates") is None


def test_an_interval_holds_the_mean_of_clusters_of_unequal_sizes() -> None:
    # 50 zeros and seven halves: mean 0.061. The clusters' means, 0 and seven times 0.5, have the interval 0.29 to 0.58.
    # Means without one cluster: 0.5, and seven times 3/56; 2.3646 × 7 × 0.15783 / √8 = 0.924 each way.
    clusters = [[0.0] * 50, *[[0.5]] * 7]
    interval = clustered_interval(clusters, lower_bound=-1, unit="replicates")
    assert interval is not None
    assert (interval.low, interval.high) == (pytest.approx(3.5 / 57 - 0.9236, abs=1e-3), pytest.approx(3.5 / 57 + 0.9236, abs=1e-3))


def test_draws_are_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = [0.1 * (place % 7) - 0.2 for place in range(40)]
    whole = bootstrap_weights([0, 1] * 20), sign_flip_p(differences)
    monkeypatch.setattr("pause_ray.evaluation.statistics.BLOCK_VALUES", 100)
    assert (bootstrap_weights([0, 1] * 20) == whole[0]).all()
    assert sign_flip_p(differences) == pytest.approx(whole[1], abs=0.02)


def test_zeros_change_no_sign_flip() -> None:
    assert sign_flip_p([0.0] * 500 + [1, 2, 3]) == 2 / 8


def test_resamples_keep_the_size_of_every_stratum() -> None:
    weights = bootstrap_weights([0, 1, 0, 2, 1, 0])
    assert (weights[:, [0, 2, 5]].sum(axis=1) == 3).all()
    assert (weights[:, [1, 4]].sum(axis=1) == 2).all()
    assert (weights[:, 3] == 1).all()


def test_spread_of_resampled_means_is_that_of_their_closed_form() -> None:
    # The mean of n draws from n values has variance Σ(x - mean)² / n²: here (9 + 1 + 1 + 9) / 16 = 1.25.
    means = bootstrap_weights([0] * 4) @ np.array([-3.0, -1.0, 1.0, 3.0]) / 4
    assert means.var() == pytest.approx(1.25, rel=0.08)


def test_nothing_is_claimed_where_draws_show_no_spread_or_have_no_value() -> None:
    assert bootstrap_interval(0.0, np.zeros(100), num_units=5, num_strata=1, unit="cells") is None
    assert bootstrap_interval(50.0, np.arange(100.0), num_units=3, num_strata=3, unit="cells") is None
    undefined = np.where(np.arange(100) < 10, np.inf, np.arange(100.0))
    assert bootstrap_interval(50.0, undefined, num_units=5, num_strata=1, unit="cells") is None
    assert jackknife_interval(1.0, np.array([1.0, 1.0, 1.0]), unit="replicates") is None


def coverage(num_units: int, *, resampled: bool, tries: int = 800) -> float:
    """How often an interval of the mean of normal values holds the true mean."""
    random = np.random.default_rng(7)
    weights = bootstrap_weights([0] * num_units) / num_units
    held = 0
    for _ in range(tries):
        values = random.normal(1, 1, num_units)
        if resampled:
            interval = bootstrap_interval(values.mean(), weights @ values, num_units=num_units, num_strata=1, unit="replicates")
        else:
            interval = jackknife_interval(values.mean(), (values.sum() - values) / (num_units - 1), unit="replicates")
        assert interval is not None
        held += interval.low <= 1 <= interval.high
    return held / tries


@pytest.mark.seconds
def test_coverage_of_each_interval_where_it_is_used_and_why_three_units_are_not_resampled() -> None:
    # A share of 800 tries whose truth is 0.95 lies within 0.92 to 0.98 (3.9 standard deviations).
    assert 0.92 <= coverage(BOOTSTRAP_UNITS, resampled=True) <= 0.98
    assert 0.92 <= coverage(20, resampled=True) <= 0.98
    assert 0.92 <= coverage(3, resampled=False) <= 0.98
    # All three on one side of the truth: 2 × (1/2)³, so that their range holds it three times of four.
    assert coverage(3, resampled=True) <= 0.80


def test_detectable_difference_by_hand() -> None:
    # Standard deviation 0.2, three values: (t(0.975, 2) + t(0.8, 2)) × 0.2/√3 = (4.30265 + 1.06066) × 0.11547.
    assert detectable_difference([0.1, 0.3, 0.5], num_comparisons=1) == pytest.approx(0.61930, abs=1e-5)
    # Two comparisons: t(0.9875, 2) = 0.975 √2 / √(1 - 0.975²) = 6.20535.
    assert detectable_difference([0.1, 0.3, 0.5], num_comparisons=2) == pytest.approx((6.20535 + 1.06066) * 0.115470, abs=1e-4)


def test_what_is_detectable_is_found_four_times_of_five() -> None:
    unit_spread = np.array([-1.0, 1.0] * 6) / math.sqrt(12 / 11)  # standard deviation 1
    effect = detectable_difference(list(unit_spread), num_comparisons=1)
    values = np.random.default_rng(5).normal(effect, 1, (4000, 12))
    t = values.mean(axis=1) / values.std(axis=1, ddof=1) * math.sqrt(12)
    assert 0.77 <= np.mean(np.abs(t) > t_quantile(0.975, 11)) <= 0.83


def test_tau_counts_pairs_in_the_same_and_in_opposite_order() -> None:
    # 1 2 3 4 against 1 3 2 4: of six pairs one is swapped: (5 - 1)/6.
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)


def test_tau_allows_for_ties() -> None:
    # Of six pairs, a ties one and b three; the first and third, and the first and fourth, agree: 2/√(5 × 3).
    assert kendall_tau([1, 1, 2, 3], [1, 2, 2, 2]) == pytest.approx(2 / math.sqrt(5 * 3))


def test_tau_is_none_without_a_ranking() -> None:
    assert kendall_tau([], []) is None
    assert kendall_tau([1, 2], [1, 2]) is None
    assert kendall_tau([1, 1, 1], [1, 2, 3]) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=8))
def test_tau_of_a_reversed_ranking_is_its_negative(items: list[tuple[int, int]]) -> None:
    a, b = zip(*items, strict=True)
    tau, reversed_tau = kendall_tau(a, b), kendall_tau(a, [-value for value in b])
    assert (tau is None) == (reversed_tau is None)
    if tau is not None:
        assert reversed_tau == pytest.approx(-tau)
        assert -1 <= tau <= 1


PAPER = {
    "3B": ([10, 9.87, 10, 9.13, 6.31, 3.76, 5.73, 5.16], [10, 9.93, 9.87, 9.29, 7.91, 6.29, 5.89, 4.56]),
    "8B": ([10, 10, 10, 10, 9.60, 9.40, 7.89, 7.40], [10, 10, 10, 10, 10, 9.44, 9.16, 7.98]),
}
"""Llama 3.2 3B and 3.1 8B, base and pause-tuned: mean judge score of single-needle retrieval at 1K, 2K, … 128K tokens (README of
LITM-PauseTokens, the data of arXiv 2502.20405)."""


@pytest.mark.parametrize(("model", "headline", "grand"), [("3B", 10.62, 6.3), ("8B", 3.56, 3.1)])
def test_the_papers_table_gives_its_headline_and_what_it_does_not_say(model: str, headline: float, grand: float) -> None:
    # The paper reports +10.61 % and +3.57 %; the change of the grand mean of the same tables is 6.3 % and 3.1 %.
    base, tuned = PAPER[model]
    a = [cell(1000 * 2**n, 50, 1.0, trial="a", rubric=value) for n, value in enumerate(tuned)]
    b = [cell(1000 * 2**n, 50, 1.0, trial="b", rubric=value) for n, value in enumerate(base)]
    comparison = compare_arms(a, b)
    assert comparison is not None
    assert comparison.effects.relative is not None
    assert comparison.effects.relative.value == pytest.approx(headline, abs=0.05)
    assert comparison.effects.rubric_change is not None
    assert comparison.effects.rubric_change.value == pytest.approx(grand, abs=0.05)


def test_middle_gain_is_the_difference_in_the_middle_beyond_that_at_the_edges() -> None:
    # Middle: 1 - 0.25 and 1 - 0.75, mean 0.5. Edges: 0.5 - 0.5 and 1 - 0.8, mean 0.1.
    a = rows({(1024, 10): 0.5, (1024, 40): 1.0, (1024, 60): 1.0, (1024, 90): 1.0}, trial="a")
    b = rows({(1024, 10): 0.5, (1024, 40): 0.25, (1024, 60): 0.75, (1024, 90): 0.8}, trial="b")
    comparison = compare_arms(a, b)
    assert comparison is not None
    assert comparison.effects.middle_gain is not None
    assert comparison.effects.middle_gain.value == pytest.approx(0.4)
    edges_only = compare_arms(a[:1], b[:1])
    assert edges_only is not None
    assert edges_only.effects.middle_gain is None


def test_measures_by_hand() -> None:
    # Rubrics of A 10 10, of B 10 1: 20/11 - 1 = 81.8 %. Scores 2 against 1: 100 %. Exact recall 1 against 1/2.
    a = rows({(1024, 10): 1.0, (2048, 10): 1.0}, trial="a")
    b = rows({(1024, 10): 1.0, (2048, 10): 0.0}, trial="b")
    comparison = compare_arms(a, b)
    assert comparison is not None
    effects = comparison.effects
    assert effects.rubric_change is not None
    assert effects.rubric_change.value == pytest.approx(100 * (20 / 11 - 1))
    assert effects.score_change is not None
    assert effects.score_change.value == pytest.approx(100)
    assert effects.exact_difference.value == 0.5
    never = compare_arms(a, rows({(1024, 10): 0.0, (2048, 10): 0.0}, trial="b"))
    assert never is not None
    assert never.effects.score_change is None


def noisy(num_replicates: int, *, cells: int = 4, gain: float = 0.2, seed: int = 0) -> tuple[list[CellResult], list[CellResult]]:
    """Arms whose replicates differ by ``gain`` and a draw of their own, the same in all cells and two lengths."""
    random = np.random.default_rng(seed)
    a, b = [], []
    for replicate in range(num_replicates):
        for length in (1000, 2000):
            for place in range(cells):
                base = random.uniform(0.3, 0.6)
                at = {"context_tokens": length, "depth_percent": 100 * place / cells, "replicate": replicate}
                b.append(cell(score=base, trial=f"b{replicate}", **at, rubric=10 * base))
                shifted = base + gain
                a.append(cell(score=shifted, trial=f"a{replicate}", **at, rubric=10 * shifted))
        shift = random.normal(0, 0.05)
        for row in range(len(a) - 2 * cells, len(a)):
            raised = float(np.clip((a[row].score or 0) + shift, 0, 1))
            a[row] = dataclasses.replace(a[row], score=raised, rubric=10 * raised)
    return a, b


@pytest.mark.parametrize(("num_replicates", "unit"), [(1, "cells"), (3, "replicates"), (BOOTSTRAP_UNITS, "replicates")])
def test_every_measure_has_an_interval_around_it_that_says_what_it_speaks_of(num_replicates: int, unit: str) -> None:
    comparison = compare_arms(*noisy(num_replicates))
    assert comparison is not None
    its = comparison.effects
    for estimate in (its.difference, its.relative, its.rubric_change, its.score_change):
        assert estimate is not None
        assert estimate.interval is not None
        assert estimate.interval.unit == unit
        assert estimate.interval.low < estimate.value < estimate.interval.high


@pytest.mark.seconds
@pytest.mark.parametrize("num_replicates", [3, 8])
def test_coverage_of_the_papers_metric(num_replicates: int) -> None:
    # Both lengths have the same expected rubrics, 6.5 of A and 4.5 of B, so that the true change is 44.4 %.
    held = 0
    for seed in range(120):
        comparison = compare_arms(*noisy(num_replicates, seed=seed))
        assert comparison is not None
        relative = comparison.effects.relative
        assert relative is not None
        assert relative.interval is not None
        held += relative.interval.low <= 100 * (6.5 / 4.5 - 1) <= relative.interval.high
    assert held >= 107  # 114 expected; 3 standard deviations


@pytest.mark.seconds
def test_coverage_of_the_papers_metric_with_one_replicate_of_a_grid() -> None:
    # 8 lengths × 15 depths, right with probability 0.7 and 0.5: rubrics 7.3 and 5.5. A mean of ratios lies above the ratio of
    # means; intervals that do not correct for that hold the truth 87 times of 100, of 60 in 52.
    random = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        right = {(length, depth): random.random(2) < (0.7, 0.5) for length in range(1, 9) for depth in range(15)}
        pairs = [
            ScoredPair(
                cell=place,
                replicate=0,
                context_tokens=place[0],
                middle=3 < place[1] < 11,
                edge=not 3 < place[1] < 11,
                score_a=float(a),
                score_b=float(b),
                rubric_a=1 + 9 * float(a),
                rubric_b=1 + 9 * float(b),
                exact_a=float(a),
                exact_b=float(b),
            )
            for place, (a, b) in right.items()
        ]
        relative = measure_effects(pairs, num_comparisons=1).relative
        assert relative is not None
        assert relative.interval is not None
        held += relative.interval.low <= 100 * (7.3 / 5.5 - 1) <= relative.interval.high
    assert held >= 55


def test_a_whole_grid_is_compared_in_a_blink() -> None:
    a, b = noisy(3, cells=60)
    compare_arms(a[:8], b[:8])  # what only the first call pays
    began = time.process_time()
    compare_arms(a, b)
    assert time.process_time() - began < 0.5


def test_lengths_are_part_of_the_design_and_not_of_chance() -> None:
    # All cells of a length agree, so drawing other cells of the same lengths changes nothing; drawing lengths would.
    a = [cell(length, depth, 0.5, trial="a", rubric=rubric) for length, rubric in ((1000, 10), (2000, 4)) for depth in (10, 50, 90)]
    b = [cell(length, depth, 0.5, trial="b", rubric=rubric) for length, rubric in ((1000, 5), (2000, 4)) for depth in (10, 50, 90)]
    comparison = compare_arms(a, b)
    assert comparison is not None
    for estimate, value in ((comparison.effects.relative, 50), (comparison.effects.rubric_change, 100 * (14 / 9 - 1))):
        assert estimate is not None
        assert estimate.value == pytest.approx(value)
        assert estimate.interval is None


CHOICES = st.lists(st.builds(Choice, st.integers(0, 5).map(float), st.integers(0, 5).map(float)), max_size=12)


def dominates(one: Choice, other: Choice) -> bool:
    return one.value >= other.value and one.cost <= other.cost and one != other


@given(CHOICES)
def test_the_front_is_what_no_other_dominates(choices: list[Choice]) -> None:
    expected = {place for place, its in enumerate(choices) if not any(dominates(other, its) for other in choices)}
    assert set(pareto_front(choices)) == expected
    assert [choices[place].cost for place in pareto_front(choices)] == sorted(choices[place].cost for place in expected)


@given(CHOICES)
def test_a_choice_off_the_front_is_dominated_by_the_most_valuable_that_can(choices: list[Choice]) -> None:
    on_it = set(pareto_front(choices))
    for place, by in enumerate(dominated_by(choices)):
        assert (by is None) == (place in on_it)
        if by is not None:
            assert by in on_it
            assert dominates(choices[by], choices[place])
            assert choices[by].value == max(other.value for other in choices if dominates(other, choices[place]))


def test_equal_choices_are_on_the_front_together() -> None:
    assert pareto_front([Choice(0.5, 1.0), Choice(0.5, 1.0), Choice(0.4, 1.0)]) == [0, 1]
    assert dominated_by([Choice(0.5, 1.0), Choice(0.5, 2.0)]) == [None, 0]
