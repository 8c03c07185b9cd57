"""Statistics on ledger rows: expected numbers are worked out by hand beside each case."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pause_ray.core.spec import with_overrides
from pause_ray.evaluation.compare import (
    Metric,
    ObjectiveSpec,
    compare_arms,
    explain_no_pairs,
    is_middle,
    middle_gap,
    recall_by_depth,
    summarize,
)
from pause_ray.evaluation.ledger import UNKNOWN_TOKEN, CellResult, FactResult
from pause_ray.evaluation.statistics import Estimate, wilson
from pause_ray.evaluation.suite import SuiteSpec
from tests.evaluation.answered_rows import row as answered_row
from tests.evaluation.tiny import STOCK
from tests.stored_sweep import cell, rows
from tests.sweep.test_spec import SWEEP


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


def test_overhead_is_relative_to_what_was_asked() -> None:
    paused = [cell(1000, depth, 1.0, prompt_tokens=1050, num_pauses=10) for depth in (0, 50)]
    summary = summarize(paused)
    assert summary.prompt_overhead_percent == pytest.approx(5.0)
    assert summary.pauses_per_prompt == 10


def test_depths_of_25_and_75_percent_belong_to_the_middle() -> None:
    summary = summarize(rows({(1024, 24.9): 0.0, (1024, 25): 1.0, (1024, 75): 1.0, (1024, 75.1): 0.0}))
    assert (summary.middle_mean, summary.edge_mean) == (1.0, 0.0)


def test_the_gap_of_the_middle_has_an_interval_also_where_all_cells_agree() -> None:
    cells = rows(dict.fromkeys([(1024, depth) for depth in (30.0, 40.0, 60.0, 70.0)], 0.0) | {(1024, depth): 1.0 for depth in (10.0, 90.0)})
    gap = middle_gap(cells)
    assert gap is not None
    assert gap.interval is not None
    middle, edges = wilson(0, 4), wilson(2, 2)
    assert gap.value == -1.0
    assert gap.interval.low == -1.0, "each share is at its bound"
    assert gap.interval.high == pytest.approx(-1.0 + (middle.high**2 + (1 - edges.low) ** 2) ** 0.5)
    assert middle_gap([row for row in cells if is_middle(row.depth_percent)]) is None


@pytest.mark.parametrize("metric", ["score", "score_middle", "score_edges", "exact_recall"])
def test_the_interval_of_an_objective_is_that_of_its_metric(metric: Metric) -> None:
    cells = rows({(1024, 10.0): 1.0, (1024, 30.0): 0.5, (1024, 50.0): 0.25, (1024, 90.0): 0.5})
    objective = ObjectiveSpec(metric=metric)
    value, interval = objective.value(cells), objective.interval(cells)
    sums = {"score": (2.25, 4), "score_middle": (0.75, 2), "score_edges": (1.5, 2), "exact_recall": (1, 4)}
    assert interval == wilson(*sums[metric])
    assert value == sums[metric][0] / sums[metric][1]


def test_a_prompt_asked_under_a_depth_of_the_middle_and_one_of_the_edges_counts_once_in_each() -> None:
    # Depths 24 and 26 of 1,024 tokens land at one place, 70 and 74 at another, 90 alone.
    places = {24: 240, 26: 240, 70: 700, 74: 700, 90: 900}

    def arm(trial: str, right: dict[float, float]) -> list[CellResult]:
        return [cell(1024, depth, right[depth], trial=trial, needle_token=token) for depth, token in places.items()]

    a = arm("a", {24: 1.0, 26: 1.0, 70: 0.0, 74: 0.0, 90: 0.0})
    b = arm("b", {24: 0.0, 26: 0.0, 70: 0.5, 74: 0.5, 90: 0.0})
    summary = summarize(a)
    assert (summary.num_repeated, summary.middle_mean, summary.edge_mean) == (2, 0.5, 0.5)
    assert summary.middle_mean == summarize([row for row in a if is_middle(row.depth_percent)]).grand_mean
    comparison = compare_arms(a, b)
    assert comparison is not None
    assert comparison.effects.middle_gain is not None
    assert comparison.effects.middle_gain.value == pytest.approx((1 - 0.5) / 2 - 1 / 2)  # one place each, 24/26 in both


def test_replicates_of_unequal_sizes_have_an_interval_around_their_estimate() -> None:
    sizes = [50, 1, 1, 1, 1, 1, 1, 1]
    differences = [[0.5 if replicate else 0.0] * size for replicate, size in enumerate(sizes)]
    comparison = compare_arms(*replicated(differences))
    assert comparison is not None
    assert comparison.interval is not None
    assert comparison.interval.low < comparison.difference < comparison.interval.high
    summary = summarize(replicated(differences)[0])
    assert summary.interval is not None
    assert summary.grand_mean == pytest.approx(3.5 / 57)
    assert summary.interval.low <= 3.5 / 57 <= summary.interval.high


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
    assert comparison.effects.relative is not None
    assert comparison.effects.relative.value == pytest.approx(450)


def replicated(differences: list[list[float]]) -> tuple[list[CellResult], list[CellResult]]:
    """Two arms whose paired differences are these: replicate by replicate, cell by cell."""
    a = [cell(1024, depth, value, trial=f"a{r}", replicate=r) for r, values in enumerate(differences) for depth, value in enumerate(values)]
    b = [cell(1024, depth, 0.0, trial=f"b{r}", replicate=r) for r, values in enumerate(differences) for depth, _ in enumerate(values)]
    return a, b


def test_the_papers_gain_is_not_certain_because_one_replicate_has_nearly_all_of_it() -> None:
    # 3B, tuned minus base of the three runs on the scale 0 to 10: +1.30, +0.06, +0.06. Mean 0.0473 of 1, standard deviation
    # 0.0716, error 0.0413, t(2) = 4.3027: -0.130 to 0.225; 5.363 × 0.0413 = 0.222 is what three such runs could have shown.
    comparison = compare_arms(*replicated([[0.130], [0.006], [0.006]]))
    assert comparison is not None
    assert comparison.interval is not None
    assert (comparison.interval.low, comparison.interval.high) == pytest.approx((-0.1305, 0.2252), abs=2e-4)
    assert comparison.detectable == pytest.approx(0.2217, abs=2e-4)


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


@pytest.mark.seconds
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


def test_replicates_that_all_agree_speak_of_cells() -> None:
    comparison = compare_arms(*replicated([[0.5] * 9] * 4))
    assert comparison is not None
    assert comparison.interval is not None
    assert comparison.replicates_agree
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
    # Six replicates can give 2/64 at best, which Holm's factor for three comparisons lifts over 0.05.
    arms = replicated([[0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]] * 6)
    alone, among_three = compare_arms(*arms), compare_arms(*arms, num_comparisons=3)
    assert alone is not None
    assert among_three is not None
    assert (alone.p_unit, alone.p) == ("replicates", 2 / 64)
    assert (among_three.p_unit, among_three.p) == ("cells", 2 / 128)


@pytest.mark.seconds
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


@pytest.mark.seconds
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
    untold = compare_arms(rows(grid, trial="x"), rows(grid, trial="y", question="", references=()))
    assert untold is not None
    assert untold.warnings == ()
    assert other_haystack is not None
    assert other_haystack.warnings == ("the two arms read different haystacks (their seeds differ)",)


def test_an_arm_that_is_always_right_in_one_replicate_is_not_certain() -> None:
    interval = summarize(rows({(1024, depth): 1.0 for depth in (10, 20, 30, 40, 50, 60, 70, 80, 90)})).interval
    assert interval is not None
    assert interval.low == pytest.approx(9 / (9 + 1.959964**2))  # Wilson's lower end for 9 of 9
    assert interval.high == 1.0


def test_random_samples_of_one_place_are_questions_of_their_own() -> None:
    a = [cell(1024, 30, score, trial="a", sample=sample) for sample, score in enumerate([1.0, 1.0, 0.0])]
    b = [cell(1024, 30, score, trial="b", sample=sample) for sample, score in enumerate([0.0, 1.0, 1.0])]
    comparison = compare_arms(a, b)
    assert comparison is not None
    assert (comparison.num_pairs, comparison.difference, comparison.p) == (3, 0.0, 1.0)
    assert summarize(a).num_repeated == 0
    assert compare_arms(a[:1], b[1:]) is None


def test_cells_whose_place_in_the_prompt_is_unknown_are_not_taken_for_one_prompt() -> None:
    unknown = [cell(1024, depth, 1.0, needle_token=UNKNOWN_TOKEN) for depth in (10, 50, 90)]
    assert summarize(unknown).num_repeated == 0


def test_the_same_first_fact_with_others_elsewhere_is_another_prompt() -> None:
    def row(depth: float, second_token: int) -> CellResult:
        facts = (fact(depth, 1.0, token=100), fact(60, 0.0, token=second_token))
        return cell(1024, depth, 0.5, needle_token=100, facts=facts)

    assert summarize([row(10, 600), row(11, 700)]).num_repeated == 0
    assert summarize([row(10, 600), row(11, 600)]).num_repeated == 1


def fact(depth_percent: float, score: float | None, *, token: int = 0, references: tuple[str, ...] = ("figs",)) -> FactResult:
    return FactResult(text="Figs are in it.", references=references, depth_percent=depth_percent, token=token, score=score)


def test_recall_by_depth_counts_facts_where_they_were_to_stand() -> None:
    several = cell(
        1024, 5, 0.5, facts=(fact(5, 1.0, token=1), fact(45, 0.0, token=2), fact(100, 1.0, token=3), fact(50, None, references=()))
    )
    other = cell(2048, 8, 1.0, facts=(fact(8, 1.0, token=9),))
    unscored = cell(4096, 8, None)
    expected = {5: Estimate(1.0, wilson(2, 2)), 45: Estimate(0.0, wilson(0, 1)), 95: Estimate(1.0, wilson(1, 1))}
    assert recall_by_depth([several, other, unscored]) == expected
    again = dataclasses.replace(several, cell_id="again", depth_percent=6)  # the same prompt asked under another depth
    assert recall_by_depth([several, other, again]) == expected


def test_unlike_scorers_and_models_are_noticed() -> None:
    grid = {(1024, 10): 1.0, (1024, 50): 0.0}
    judged = compare_arms(rows(grid, trial="x"), rows(grid, trial="y", scorer="judge"))
    other_model = compare_arms(rows(grid, trial="x"), rows(grid, trial="y", model="other/model"))
    assert judged is not None
    assert judged.warnings == ("2 of 2 pairs were scored in different ways (keywords against judge): rescore one of them",)
    assert other_model is not None
    assert other_model.warnings == ("the arms are answers of different models (some/model against other/model)",)


def run(trial: str, replicate: int, *, like: str = "", drift: float = 0.0) -> list[CellResult]:
    """Answers of a run; ``like`` gives it those of another."""
    grid = {(1024, 10): 1.0, (1024, 50): 0.0, (2048, 10): 1.0}
    return [
        dataclasses.replace(row, response=f"{like or trial} says {row.score}", seconds=row.seconds + drift)
        for row in rows(grid, trial=trial, replicate=replicate)
    ]


def test_one_run_that_stands_as_replicates_of_two_arms_is_noticed() -> None:
    # As in the paper's released data, where the second run of one arm is the third of another.
    a, b = [*run("a0", 0), *run("a1", 1)], [*run("b0", 0), *run("b1", 1), *run("b2", 2, like="a1")]
    comparison = compare_arms(a, b)
    assert comparison is not None
    assert comparison.warnings == (
        "replicate 1 of the first arm and replicate 2 of the second have the same answers and durations: "
        "this looks like one run under two names",
    )
    honest = compare_arms(a, [*run("b0", 0), *run("b1", 1), *run("b2", 2, like="a1", drift=0.25)])
    assert honest is not None
    assert honest.warnings == ()


def test_one_run_that_stands_as_two_replicates_of_an_arm_is_noticed() -> None:
    comparison = compare_arms([*run("a0", 0), *run("a1", 1, like="a0")], [*run("b0", 0), *run("b1", 1)])
    assert comparison is not None
    assert [text.split(" have ")[0] for text in comparison.warnings] == ["replicate 0 of the first arm and replicate 1 of the first"]


def test_equal_answers_without_a_clock_are_not_called_one_run() -> None:
    def arm(trial: str, **changes: Any) -> list[CellResult]:
        return [dataclasses.replace(row, seconds=0.0, **changes) for row in run(trial, 0, like="x")]

    same = compare_arms(arm("a"), arm("b"))
    assert same is not None
    assert same.warnings == ("every answer is word for word the same in both arms",)
    graded_elsewhere = compare_arms(arm("a", response=None), arm("b", response=None))
    assert graded_elsewhere is not None
    assert graded_elsewhere.warnings == ()


def test_one_answer_that_two_replicates_share_proves_nothing() -> None:
    comparison = compare_arms([*run("a0", 0)[:1], *run("a1", 1, like="a0")[:1]], [*run("b0", 0), *run("b1", 1)])
    assert comparison is not None
    assert comparison.warnings == ()


def test_explain_no_pairs_names_what_the_arms_do_not_share() -> None:
    a = rows({(1024, 10): 1.0})
    assert explain_no_pairs(a, rows({(1024, 10): 1.0}, task="multi")) == "the arms have no tasks in common: single against multi"
    assert explain_no_pairs(a, rows({(2048, 10): 1.0})) == "the arms have no context lengths in common: 1024 against 2048"
    assert "no replicates in common: 0 against 3" in explain_no_pairs(a, rows({(1024, 10): 1.0}, replicate=3))
    assert explain_no_pairs(a, rows({(1024, 10): None})) == "no question was scored in both arms"
    crossed = explain_no_pairs(rows({(1024, 10): 1.0, (2048, 20): 1.0}), rows({(1024, 20): 1.0, (2048, 10): 1.0}))
    assert "at one cell" in crossed


SUITE = SWEEP["trial"]["eval"]
OBJECTIVE_ROWS = [
    answered_row(0, STOCK.needle, depth_percent=0.0, needle_token=3),
    answered_row(1, "Eat a sandwich.", depth_percent=50.0, needle_token=500),
    answered_row(2, "I don't know.", depth_percent=60.0, needle_token=600),
    answered_row(3, None, depth_percent=100.0, needle_token=999),
]


PARTLY = 1 / len(STOCK.keywords)
"""The score of an answer with one keyword."""


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("score", (1 + PARTLY) / 3), ("score_middle", PARTLY / 2), ("score_edges", 1), ("exact_recall", 1 / 3)],
)
def test_the_value_is_the_mean_of_the_cells_that_count(metric: Metric, expected: float) -> None:
    assert ObjectiveSpec(metric=metric).value(OBJECTIVE_ROWS) == pytest.approx(expected)


def test_nothing_scored_has_no_value() -> None:
    assert ObjectiveSpec().value([]) is None
    assert ObjectiveSpec().value(OBJECTIVE_ROWS[3:]) is None
    assert ObjectiveSpec(metric="score_middle").value(OBJECTIVE_ROWS[:1]) is None


def test_a_search_learns_nothing_from_a_mean_that_leaves_much_out() -> None:
    scored = [answered_row(number, STOCK.needle) for number in range(18)]
    unscored = [answered_row(number, None) for number in range(18, 22)]
    objective = ObjectiveSpec()
    assert objective.comparable_value(scored + unscored[:2]) == objective.value(scored + unscored[:2]) == 1.0
    assert objective.comparable_value(scored + unscored) is None
    assert objective.comparable_value([]) is None


def test_better_is_more_or_less() -> None:
    assert ObjectiveSpec().better(0.6, 0.5)
    assert ObjectiveSpec(mode="min").better(0.5, 0.6)
    assert not ObjectiveSpec().better(0.5, 0.5)


@pytest.mark.parametrize(
    ("positions", "produced"),
    [
        ({"depth_percent": [0, 50]}, {"score_middle", "score_edges"}),
        ({"depth_percent": [25, 75]}, {"score_middle"}),
        ({"depth_percent": [0, 24.9, 75.1]}, {"score_edges"}),
        ({"depth_percent": [], "lattice_tokens": 40}, {"score_middle", "score_edges"}),
        ({"depth_percent": [], "samples": 60}, {"score_middle", "score_edges"}),
    ],
)
def test_depths_decide_which_metrics_a_suite_produces(positions: dict[str, object], produced: set[str]) -> None:
    suite = SuiteSpec.parse(with_overrides(SUITE, positions), origin="test")
    found = {
        metric
        for metric in ("score", "score_middle", "score_edges", "exact_recall")
        if ObjectiveSpec(metric=metric).is_measured_by(suite, replicate=0, seed=0)
    }
    assert found == produced | {"score", "exact_recall"}
