"""Statistics on ledger rows: expected numbers are worked out by hand beside each case."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.compare import FLIP_DRAWS, compare_arms, enough_replicates, holm, least_p, sign_flip_p, summarize, t_95, wilson
from tests.stored_sweep import cell, rows


def test_summary_of_a_small_grid() -> None:
    summary = summarize(rows({(1024, 10): 1.0, (1024, 50): 0.5, (2048, 10): 0.0, (2048, 50): 0.0, (2048, 75): None}))
    assert summary.grand_mean == pytest.approx(1.5 / 4)  # the unscored cell is in no mean
    assert summary.mean_by_length == {1024: 0.75, 2048: 0.0}
    assert summary.mean_by_depth == {10: 0.5, 50: 0.25}
    assert (summary.middle_mean, summary.edge_mean) == (0.25, 0.5)
    assert (summary.num_cells, summary.num_unscored, summary.unscored_share) == (5, 1, 0.2)
    assert summary.exact_recall == 0.25  # one of the four scored cells has score 1


def test_nothing_scored_gives_no_number_rather_than_zero() -> None:
    summary = summarize(rows({(1024, 10): None, (1024, 50): None}))
    assert (summary.grand_mean, summary.interval, summary.exact_recall, summary.mean_by_length) == (None, None, None, {})
    assert summary.unscored_share == 1


def test_costs_are_sums_and_overhead_is_relative_to_what_was_asked() -> None:
    paused = [
        cell(1000, depth, 1.0, prompt_tokens=1050, num_pauses=10, prefilled_tokens=600, decoded_tokens=7, seconds=0.5) for depth in (0, 50)
    ]
    summary = summarize(paused)
    assert summary.prompt_overhead_percent == pytest.approx(5.0)
    assert (summary.pauses_per_prompt, summary.prefilled_tokens, summary.decoded_tokens, summary.seconds) == (10, 1200, 14, 1.0)


def test_depths_of_25_and_75_percent_belong_to_the_middle() -> None:
    summary = summarize(rows({(1024, 24.9): 0.0, (1024, 25): 1.0, (1024, 75): 1.0, (1024, 75.1): 0.0}))
    assert (summary.middle_mean, summary.edge_mean) == (1.0, 0.0)


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


def test_arms_are_paired_by_question_not_by_order() -> None:
    a = rows({(1024, 10): 1.0, (1024, 50): 0.0, (2048, 10): 1.0}, trial="a")
    b = rows({(2048, 10): 0.0, (1024, 50): 0.0, (1024, 10): 1.0}, trial="b")
    comparison = compare_arms(a, b)
    assert comparison is not None
    assert comparison.difference == pytest.approx(1 / 3)
    assert comparison.difference_by_length == {1024: 0.0, 2048: 1.0}
    assert comparison.p == 1.0  # one difference, whose sign alone is flipped


def test_unscored_and_missing_counterparts_are_left_out_and_counted() -> None:
    a = rows({(1024, 10): 1.0, (1024, 50): None, (2048, 10): 0.5}, trial="a")
    b = rows({(1024, 10): 0.0, (1024, 50): 1.0, (4096, 10): 0.0}, trial="b")
    comparison = compare_arms(a, b)
    assert comparison is not None
    assert (comparison.num_pairs, comparison.num_unpaired, comparison.difference) == (1, 4, 1.0)
    assert compare_arms(a, rows({(8192, 0): 1.0}, trial="b")) is None


def test_relative_change_is_the_papers_mean_over_lengths() -> None:
    # Rubric 1 + 9 × score. 1024: 10 against 10; 2048: 10 against 1, i.e. ×10. Mean of 0 % and 900 %; the grand means give 82 %.
    a = rows({(1024, 10): 1.0, (2048, 10): 1.0}, trial="a")
    b = rows({(1024, 10): 1.0, (2048, 10): 0.0}, trial="b")
    comparison = compare_arms(a, b)
    assert comparison is not None
    assert comparison.relative_percent == pytest.approx(450)


def test_the_papers_published_row_gives_its_headline() -> None:
    # Single-needle rubric means of Llama 3.2 3B, 1K to 128K: the paper's "+10.6 %" comes out of its own table.
    base = [10, 9.87, 10, 9.13, 6.31, 3.76, 5.73, 5.16]
    tuned = [10, 9.93, 9.87, 9.29, 7.91, 6.29, 5.89, 4.56]
    a = [cell(1000 * 2**n, 50, 1.0, trial="a", rubric=value) for n, value in enumerate(tuned)]
    b = [cell(1000 * 2**n, 50, 1.0, trial="b", rubric=value) for n, value in enumerate(base)]
    comparison = compare_arms(a, b)
    assert comparison is not None
    assert comparison.relative_percent == pytest.approx(10.62, abs=0.05)


def replicated(differences: list[list[float]]) -> tuple[list, list]:
    """Two arms whose paired differences are these: replicate by replicate, cell by cell."""
    a = [cell(1024, depth, value, trial=f"a{r}", replicate=r) for r, values in enumerate(differences) for depth, value in enumerate(values)]
    b = [cell(1024, depth, 0.0, trial=f"b{r}", replicate=r) for r, values in enumerate(differences) for depth, _ in enumerate(values)]
    return a, b


def test_one_replicate_speaks_of_cells_with_one_imagined_pair_each_way() -> None:
    # 1 1 0 0 and the imagined 1 -1: mean 1/3, variance (4 - 6/9)/5 = 2/3, error √(2/3/6) = 1/3, t(5) = 2.5706: -0.5235 to 1.19.
    comparison = compare_arms(*replicated([[1.0, 1.0, 0.0, 0.0]]))
    assert comparison is not None
    assert comparison.interval is not None
    assert comparison.interval.unit == "cells"
    assert (comparison.interval.low, comparison.interval.high) == (pytest.approx(-0.5235, abs=1e-4), 1.0)


def test_cells_that_all_agree_are_not_certain() -> None:
    # Nine zeros and ±1: variance 2/10, error √(0.2/11) = 0.13484, t(10) = 2.2281: ± 0.3004.
    comparison = compare_arms(*replicated([[0.0] * 9]))
    assert comparison is not None
    assert comparison.interval is not None
    assert (comparison.interval.low, comparison.interval.high) == pytest.approx((-0.3004, 0.3004), abs=1e-4)


def test_coverage_of_the_interval_with_one_replicate() -> None:
    # 15 questions, one arm always right and the other nine times of ten: true difference 0.1, few cells differ.
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        comparison = compare_arms(*replicated([[float(value) for value in random.binomial(1, 0.1, 15)]]))
        assert comparison is not None
        assert comparison.interval is not None
        held += comparison.interval.low <= 0.1 <= comparison.interval.high
    assert held >= 186


def test_quantiles_of_students_t() -> None:
    # Published tables, two-sided 5 %.
    assert [t_95(df) for df in (1, 10, 30)] == [12.7062, 2.2281, 2.0423]
    assert [t_95(df) for df in (31, 60, 120)] == pytest.approx([2.0395, 2.0003, 1.9799], abs=1e-4)


def test_replicates_that_all_agree_speak_of_cells() -> None:
    comparison = compare_arms(*replicated([[0.5] * 9] * 4))
    assert comparison is not None
    assert comparison.interval is not None
    assert comparison.flat
    assert comparison.interval.unit == "cells"
    assert comparison.interval.low < comparison.interval.high
    interval = summarize([cell(1024, depth, 0.5, replicate=r) for depth in (10, 50) for r in range(4)]).interval
    assert interval is not None
    assert interval == wilson(1.0, 2)  # two cells, however many replicates agree


def test_few_replicates_use_students_t() -> None:
    # Replicate means 0.1 0.3 0.5: standard deviation 0.2, error 0.2/√3 = 0.11547, t(2) = 4.3027: 0.3 ± 0.4968.
    comparison = compare_arms(*replicated([[0.1] * 4, [0.3] * 4, [0.5] * 4]))
    assert comparison is not None
    assert comparison.interval is not None
    assert comparison.interval.unit == "replicates"
    assert (comparison.interval.low, comparison.interval.high) == pytest.approx((-0.1968, 0.7968), abs=1e-4)
    # Averaged over replicates every one of the four cells differs by 0.3: 2 of 16 patterns.
    assert (comparison.p, comparison.p_unit) == (2 / 16, "cells")


def test_cells_of_a_replicate_are_no_more_evidence_than_one() -> None:
    # Replicate means 0 to 1: mean 0.5, standard deviation 0.37417, error 0.15275, t(5) = 2.5706: 0.5 ± 0.3927.
    for cells in (1, 100):
        comparison = compare_arms(*replicated([[value] * cells for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]))
        assert comparison is not None
        assert comparison.interval is not None
        assert (comparison.interval.low, comparison.interval.high) == pytest.approx((0.1073, 0.8927), abs=1e-4)
        assert (comparison.p, comparison.p_unit) == (2 / 32, "replicates")  # 64 patterns, the zero's sign is free: 4 of 64


def test_replicates_are_flipped_only_where_that_can_be_significant() -> None:
    # Smallest p of R replicates is 2^(1-R): 0.031 for six, which Holm doubles for two comparisons.
    assert [enough_replicates(arms) for arms in (1, 2, 3, 4)] == [6, 7, 7, 8]
    arms = replicated([[0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]] * 6)
    alone, among_three = compare_arms(*arms), compare_arms(*arms, num_comparisons=3)
    assert alone is not None
    assert among_three is not None
    assert (alone.p_unit, alone.p) == ("replicates", 2 / 64)
    assert (among_three.p_unit, among_three.p) == ("cells", 2 / 128)


def test_coverage_of_the_interval_with_eight_replicates() -> None:
    random = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        comparison = compare_arms(*replicated([[float(np.clip(random.normal(0.3, 0.1), 0, 1))] * 2 for _ in range(8)]))
        assert comparison is not None
        assert comparison.interval is not None
        held += comparison.interval.low <= 0.3 <= comparison.interval.high
    assert 277 <= held <= 296  # 285 ± 2.5 standard deviations


def test_the_same_prompt_under_two_depths_counts_once() -> None:
    places = [(10, 100, 1.0), (11, 100, 1.0), (12, 100, 1.0), (50, 500, 0.0)]
    a = [cell(1024, depth, score, trial="a", needle_token=token) for depth, token, score in places]
    b = [cell(1024, depth, 0.0, trial="b", needle_token=token) for depth, token, _ in places]
    summary, comparison = summarize(a), compare_arms(a, b)
    assert (summary.num_scored, summary.num_repeated, summary.grand_mean, summary.interval) == (4, 2, 0.5, wilson(1, 2))
    assert (summary.exact_recall, summary.exact_interval) == (0.5, wilson(1, 2))
    assert comparison is not None
    assert (comparison.num_pairs, comparison.num_unpaired, comparison.difference, comparison.p) == (2, 0, 0.5, 1.0)
    others = [cell(1024, 10, 1.0, trial="a", needle_token=100, replicate=1), *a]
    assert summarize(others).num_repeated == 2  # another replicate is another prompt


def test_arms_that_read_unlike_amounts_of_text_are_noticed() -> None:
    grid = {(1024, 10): 1.0, (1024, 50): 0.0}
    comparison = compare_arms(rows(grid, trial="x"), rows(grid, trial="y", content_tokens=700))
    assert comparison is not None
    assert comparison.warnings == ("the arms did not read the same amount of text in 2 of 2 pairs (their content_tokens differ)",)


def test_coverage_of_the_interval_with_few_replicates() -> None:
    # True difference 0.5; replicate means scatter around it. A 95 % interval must hold it in about 95 of 100 sweeps.
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        comparison = compare_arms(*replicated([[float(np.clip(random.normal(0.5, 0.1), 0, 1))] * 2 for _ in range(3)]))
        assert comparison is not None
        assert comparison.interval is not None
        held += comparison.interval.low <= 0.5 <= comparison.interval.high
    assert 180 <= held <= 199


def test_intervals_stay_where_scores_can_be() -> None:
    summary = summarize([cell(1024, 0, score, trial=str(r), replicate=r) for r, score in enumerate([1.0, 0.2])])
    assert summary.interval is not None
    assert (summary.interval.low, summary.interval.high) == (0.0, 1.0)


def test_same_rows_give_the_same_numbers() -> None:
    a, b = replicated([[0.0, 0.5, 1.0, 0.5, 0.25] * 5])
    assert compare_arms(a, b) == compare_arms(a, b)
    assert summarize(a) == summarize(list(reversed(a)))


def test_the_same_run_under_two_names_is_noticed() -> None:
    grid = {(1024, 10): 1.0, (1024, 50): 0.0}
    shared = compare_arms(rows(grid, trial="x"), rows(grid, trial="x"))
    copied = compare_arms(rows(grid, trial="x", response="same"), rows(grid, trial="y", response="same"))
    alike = compare_arms(rows(grid, trial="x", response="same", seconds=1.0), rows(grid, trial="y", response="same"))
    honest = compare_arms(rows(grid, trial="x"), rows(grid, trial="y"))
    assert shared is not None
    assert "same rows" in shared.warnings[0]
    assert copied is not None
    assert "one run under two names" in copied.warnings[0]
    assert alike is not None
    assert "word for word" in alike.warnings[0]
    assert honest is not None
    assert honest.warnings == ()


def test_pairs_with_other_facts_or_haystacks_are_noticed() -> None:
    grid = {(1024, 10): 1.0, (1024, 50): 0.0}
    other_fact = compare_arms(rows(grid, trial="x"), rows(grid, trial="y", question="Where?"))
    other_haystack = compare_arms(rows(grid, trial="x"), rows(grid, trial="y", seed=7))
    assert other_fact is not None
    assert other_fact.warnings == ("2 of 2 pairs were asked about different facts",)
    assert other_haystack is not None
    assert other_haystack.warnings == ("the two arms read different haystacks (their seeds differ)",)


def test_an_arm_that_is_always_right_in_one_replicate_is_not_certain() -> None:
    interval = summarize(rows({(1024, depth): 1.0 for depth in (10, 20, 30, 40, 50, 60, 70, 80, 90)})).interval
    assert interval is not None
    assert interval.low == pytest.approx(9 / (9 + 1.959964**2))  # Wilson's lower end for 9 of 9
    assert interval.high == 1.0
