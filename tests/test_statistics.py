"""Tests, intervals and corrections: expected numbers are worked out by hand, from tables, or from what 95 % means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.statistics import (
    BOOTSTRAP_UNITS,
    FLIP_DRAWS,
    bootstrap_interval,
    bootstrap_weights,
    clustered_interval,
    delete_one_interval,
    detectable_difference,
    enough_replicates,
    holm,
    kendall_tau,
    least_p,
    sign_flip_p,
    t_95,
    t_interval,
    t_quantile,
    wilson,
)


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
    assert least_p(len(differences)) <= p <= 1
    assert sign_flip_p([-value for value in differences]) == pytest.approx(p, abs=0.03)


def test_holm_by_hand() -> None:
    # Sorted 0.01 0.03 0.04 × 3 2 1 = 0.03 0.06 0.04; a later one may not be below an earlier one: 0.06.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_how_many_replicates_their_signs_need() -> None:
    # Smallest p of R replicates is 2^(1-R): 0.031 for six, which Holm doubles for two comparisons.
    assert [enough_replicates(arms) for arms in (1, 2, 3, 4)] == [6, 7, 7, 8]


def test_quantiles_of_students_t() -> None:
    # Published tables, two-sided 5 %.
    published = {1: 12.7062, 2: 4.3027, 10: 2.2281, 30: 2.0423, 31: 2.0395, 60: 2.0003, 120: 1.9799, 1000: 1.9623}
    assert {df: round(t_95(df), 4) for df in published} == published
    # Closed forms: tan(π (p - 1/2)) for one degree of freedom, a √2 / √(1 - a²) with a = 2 p - 1 for two.
    for p in (0.6, 0.8, 0.99, 0.9999):
        a = 2 * p - 1
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)))
        assert t_quantile(p, 2) == pytest.approx(a * math.sqrt(2) / math.sqrt(1 - a**2))


def test_quantiles_go_on_where_the_expansion_takes_over() -> None:
    for p in (0.8, 0.975, 0.9995):
        steps = np.diff([t_quantile(p, df) for df in range(198, 204)])
        assert (steps < 0).all()
        assert steps.min() > 1.05 * steps.max() - 1e-9  # no jump between 200 and 201


def test_leaving_one_out_of_a_mean_is_students_t() -> None:
    values = np.array([0.1, 0.5, 0.3, 0.9])
    left_out = delete_one_interval(values.mean(), (values.sum() - values) / 3, unit="replicates")
    ordinary = t_interval(list(values), least=-10, unit="replicates")
    assert left_out is not None
    assert ordinary is not None
    assert left_out.low == pytest.approx(ordinary.low)
    assert left_out.high - values.mean() == pytest.approx(values.mean() - ordinary.low)


def test_clusters_of_one_size_are_students_t_of_their_means() -> None:
    clusters = clustered_interval([[0.0, 0.2], [0.5, 0.5], [0.1, 0.5]], least=-1, unit="replicates")
    means = t_interval([0.1, 0.5, 0.3], least=-1, unit="replicates")
    assert clusters is not None
    assert means is not None
    assert (clusters.low, clusters.high) == (pytest.approx(means.low), pytest.approx(means.high))
    assert clustered_interval([[0.2, 0.4], [0.3, 0.3]], least=-1, unit="replicates") is None
    assert clustered_interval([[0.2, 0.4]], least=-1, unit="replicates") is None


def test_an_interval_holds_the_mean_of_clusters_of_unequal_sizes() -> None:
    # 50 zeros and seven halves: mean 0.061. The clusters' means, 0 and seven times 0.5, have the interval 0.29 to 0.58.
    # Means without one cluster: 0.5, and seven times 3/56; 2.3646 × 7 × 0.15783 / √8 = 0.924 each way.
    clusters = [[0.0] * 50, *[[0.5]] * 7]
    interval = clustered_interval(clusters, least=-1, unit="replicates")
    assert interval is not None
    assert (interval.low, interval.high) == (pytest.approx(3.5 / 57 - 0.9236, abs=1e-3), pytest.approx(3.5 / 57 + 0.9236, abs=1e-3))


def test_draws_are_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = [0.1 * (place % 7) - 0.2 for place in range(40)]
    whole = bootstrap_weights([0, 1] * 20), sign_flip_p(differences)
    monkeypatch.setattr("pause_ray.statistics.BLOCK_VALUES", 100)
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
    assert delete_one_interval(1.0, np.array([1.0, 1.0, 1.0]), unit="replicates") is None


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
            interval = delete_one_interval(values.mean(), (values.sum() - values) / (num_units - 1), unit="replicates")
        assert interval is not None
        held += interval.low <= 1 <= interval.high
    return held / tries


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
    assert 0.77 <= np.mean(np.abs(t) > t_95(11)) <= 0.83


def test_tau_counts_pairs_in_the_same_and_in_opposite_order() -> None:
    # 1 2 3 4 against 1 3 2 4: of six pairs one is swapped: (5 - 1)/6.
    found = kendall_tau([1, 2, 3, 4], [1, 3, 2, 4])
    assert found is not None
    assert found.value == pytest.approx(4 / 6)


def test_tau_allows_for_ties() -> None:
    # Of six pairs, a ties one and b three; the first and third, and the first and fourth, agree: 2/√(5 × 3).
    found = kendall_tau([1, 1, 2, 3], [1, 2, 2, 2])
    assert found is not None
    assert found.value == pytest.approx(2 / math.sqrt(5 * 3))


def test_tau_has_no_value_where_nothing_is_ranked() -> None:
    assert kendall_tau([1, 2], [1, 2]) is None
    assert kendall_tau([1, 1, 1], [1, 2, 3]) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=8))
def test_tau_turns_with_a_ranking(items: list[tuple[int, int]]) -> None:
    a, b = zip(*items, strict=True)
    found, turned = kendall_tau(a, b), kendall_tau(a, [-value for value in b])
    assert (found is None) == (turned is None)
    if found is not None and turned is not None:
        assert found.interval is not None
        assert turned.interval is not None
        assert turned.value == pytest.approx(-found.value)
        assert (turned.interval.low, turned.interval.high) == pytest.approx((-found.interval.high, -found.interval.low))
        assert -1 <= found.interval.low <= found.interval.high <= 1


@pytest.mark.parametrize("num_items", [5, 41])
def test_a_perfect_agreement_of_few_items_is_not_certain(num_items: int) -> None:
    found = kendall_tau(range(num_items), range(num_items))
    assert found is not None
    assert found.interval is not None
    assert found.value == 1
    assert 0 < found.interval.low < found.interval.high == 1
    # A chance of 1 in 24 for four items in one order is not below 2.5 %, so independence is not excluded.
    four = kendall_tau(range(4), range(4))
    assert four is not None
    assert four.interval is not None
    assert not four.interval.excludes_zero()


@pytest.mark.parametrize(("num_items", "correlation"), [(6, 0.6), (12, 0.0), (60, 0.9)])
def test_taus_interval_holds_the_truth_as_often_as_it_says(num_items: int, correlation: float) -> None:
    random, truth, found = np.random.default_rng(7), 2 / math.pi * math.asin(correlation), {}
    hits = 0
    for _ in range(200):
        a, noise = random.standard_normal((2, num_items))
        tau = kendall_tau(a, correlation * a + math.sqrt(1 - correlation**2) * noise) if num_items > 40 else None
        if tau is None:  # few values are possible: each interval is found once
            ranks = tuple(np.argsort(np.argsort((correlation * a + math.sqrt(1 - correlation**2) * noise)[np.argsort(a)])))
            inversions = sum(ranks[i] > ranks[j] for i in range(num_items) for j in range(i + 1, num_items))
            if inversions not in found:
                found[inversions] = kendall_tau(range(num_items), ranks)
            tau = found[inversions]
        assert tau is not None
        assert tau.interval is not None
        hits += tau.interval.low <= truth <= tau.interval.high
    assert 0.91 <= hits / 200 <= 1  # 95 % ± 3 standard deviations of 200 draws, on the side that matters
