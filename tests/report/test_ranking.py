"""The best trial, the fronts and the proxy's agreement are what the ledgers say, by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.storage import Storage
from pause_ray.report.ranking import best, cost_axes, objective_of, rank_correlations, rung_histories
from pause_ray.report.results import SweepResults, read_results
from tests.stored_sweep import rows, rung_event, stop_event, store_search, store_sweep, store_trial

MIDDLE, EDGE = (1024, 50.0), (1024, 0.0)


def trial(storage: Storage, key: str, middle: float, edge: float, *, tokens: int | None = None, overhead: int = 0, **options: Any) -> None:
    log = [{"step": 1, "loss": 1.0, "seconds": 1.0, **({} if tokens is None else {"tokens": tokens})}]
    scores = rows({MIDDLE: middle, EDGE: edge}, trial=key, replicate=options.pop("replicate", 0), prompt_tokens=1024 + overhead)
    store_trial(storage, key, scores, training=log, **{"trained": tokens is not None, "pauses": tokens is not None} | options)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path)


def arms(storage: Storage, *names: str, **options: Any) -> SweepResults:
    return read_results(store_sweep(storage, [(name, name, {}, 0) for name in names], compare_to=names[0], **options), storage)


def test_the_best_is_the_best_by_the_sweeps_objective(storage: Storage) -> None:
    trial(storage, "base", 0.5, 1.0)
    trial(storage, "paused", 1.0, 0.25, tokens=100)
    by_score = best(arms(storage, "base", "paused"))
    assert by_score is not None
    assert (by_score.condition.label, by_score.value) == ("base", 0.75)
    by_middle = best(arms(storage, "base", "paused", spec={"objective": {"metric": "score_middle", "mode": "max"}}))
    assert by_middle is not None
    assert (by_middle.condition.label, by_middle.value) == ("paused", 1.0)
    lowest = best(arms(storage, "base", "paused", spec={"objective": {"metric": "score_middle", "mode": "min"}}))
    assert lowest is not None
    assert (lowest.condition.label, lowest.value) == ("base", 0.5)
    tuned = best(arms(storage, "base", "paused"), tuned=True)
    assert tuned is not None
    assert tuned.condition.label == "paused"


def test_an_objective_that_is_not_known_is_refused_and_none_is_the_score(storage: Storage) -> None:
    trial(storage, "base", 0.5, 1.0)
    assert objective_of(arms(storage, "base")).metric == "score"
    with pytest.raises(SpecError, match="metric"):
        best(arms(storage, "base", spec={"objective": {"metric": "speed"}}))


def test_the_best_arm_is_found_by_its_mean_and_then_its_best_replicate(storage: Storage) -> None:
    for number, (steady, lucky) in enumerate([(0.75, 0.25), (0.5, 1.0)]):
        trial(storage, f"s{number}", steady, steady, replicate=number)
        trial(storage, f"l{number}", lucky, lucky, replicate=number)
    planned = [(f"{key}{number}", arm, {}, number) for key, arm in (("s", "steady"), ("l", "lucky")) for number in (0, 1)]
    found = best(read_results(store_sweep(storage, planned, compare_to="steady"), storage))
    assert found is not None
    assert (found.condition.label, found.value, found.trial.digest, found.trial_value) == ("steady", 0.625, "s0", 0.75)


def test_an_arm_with_missing_replicates_does_not_win_against_whole_ones(storage: Storage) -> None:
    trial(storage, "a0", 0.5, 0.5)
    trial(storage, "b0", 1.0, 1.0)
    planned = [("a0", "whole", {}, 0), ("b0", "half", {}, 0), ("b1", "half", {}, 1)]
    found = best(read_results(store_sweep(storage, planned, compare_to="whole"), storage))
    assert found is not None
    assert found.condition.label == "whole"


def test_nothing_is_best_while_nothing_has_finished(storage: Storage) -> None:
    assert best(read_results(store_sweep(storage, [("none", "base", {}, 0)], compare_to="base"), storage)) is None


def test_an_arm_is_beaten_by_one_that_costs_no_more(storage: Storage) -> None:
    trial(storage, "base", 0.5, 0.5)
    trial(storage, "cheap", 0.75, 1.0, tokens=1000, overhead=32)
    trial(storage, "dear", 0.5, 1.0, tokens=1000, overhead=64)
    overhead, training = cost_axes(arms(storage, "base", "cheap", "dear"))
    assert (overhead.kind, training.kind) == ("overhead", "training")
    assert [(its.condition.label, its.cost) for its in overhead.arms] == [("base", 0.0), ("cheap", 3.1), ("dear", 6.2)]
    assert [(its.condition.label, its.cost) for its in training.arms] == [("base", 0.0), ("cheap", 1000.0), ("dear", 1000.0)]
    for axis in (overhead, training):
        assert [its.condition.label for its in axis.front] == ["base", "cheap"]
        [dominated] = [its for its in axis.arms if not its.is_on_front]
        assert dominated.compared_with is not None
        assert dominated.lead is not None
        assert (dominated.compared_with.label, dominated.lead.value) == ("cheap", 0.125)  # 0.25 in the middle, none at the edge
        assert not dominated.is_significant


def test_a_lead_on_many_questions_is_significant(storage: Storage) -> None:
    grid = {(length, depth): 1.0 for length in (1024, 2048, 4096) for depth in (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)}
    store_trial(storage, "good", rows(grid, trial="good"))
    store_trial(storage, "long", rows(dict.fromkeys(grid, 0.0), trial="long", prompt_tokens=5000))
    [axis] = cost_axes(arms(storage, "good", "long"))
    assert [(its.is_on_front, its.is_significant) for its in axis.arms] == [(True, True), (False, True)]


def test_a_dearer_arm_on_the_front_is_significant_only_by_its_lead_over_the_next_cheaper(storage: Storage) -> None:
    depths = [(length, depth) for length in (1024, 2048, 4096) for depth in (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)]
    found = {"base": 0, "some": 12, "more": 13, "worse": 2}  # of 18 questions
    for cost, (name, num_found) in enumerate(found.items()):
        scores = {place: float(number < num_found) for number, place in enumerate(depths)}
        store_trial(storage, name, rows(scores, trial=name, prompt_tokens=3000 + 100 * cost))
    [axis] = cost_axes(arms(storage, *found))
    by_label = {its.condition.label: its for its in axis.arms}
    assert [its.condition.label for its in axis.front] == ["base", "some", "more"]
    compared_with = {label: its.compared_with.label if its.compared_with else None for label, its in by_label.items()}
    assert compared_with == {"base": None, "some": "base", "more": "some", "worse": "more"}
    assert {label: its.is_significant for label, its in by_label.items()} == {"base": True, "some": True, "more": False, "worse": True}
    lead = by_label["more"].lead
    assert lead is not None
    assert lead.value == pytest.approx(1 / 18)


def test_an_arm_most_of_whose_cells_have_no_score_does_not_win(storage: Storage) -> None:
    places = [(1024, float(depth)) for depth in range(10, 90, 4)]
    store_trial(storage, "base", rows(dict.fromkeys(places, 0.75), trial="base"))
    for name, num_lost in (("lost", 3), ("kept", 2)):  # of 20
        scores = {place: None if number < num_lost else 1.0 for number, place in enumerate(places)}
        store_trial(storage, name, rows(scores, trial=name))
    without, with_it = best(arms(storage, "base", "lost")), best(arms(storage, "base", "lost", "kept"))
    assert without is not None
    assert with_it is not None
    assert (without.condition.label, with_it.condition.label) == ("base", "kept")


def test_a_cost_that_is_not_told_or_the_same_for_all_is_no_cost(storage: Storage) -> None:
    trial(storage, "base", 0.5, 0.5)
    trial(storage, "other", 0.75, 0.75)
    assert cost_axes(arms(storage, "base", "other")) == []
    store_trial(storage, "tuned", rows({MIDDLE: 1.0}, trial="tuned"), trained=True)  # its log does not count tokens
    assert cost_axes(arms(storage, "base", "tuned")) == []


def judged(storage: Storage, **spec: Any) -> SweepResults:
    """Six points; the two worst are stopped at rung 0, one at rung 1; the proxy swaps the two best."""
    for number, score in ((3, 0.5), (4, 1.0), (5, 0.75)):
        trial(storage, f"p{number}", score, score)
    points = [(f"p{number}", "paused", {"pauses.every": number}, 0) for number in range(6)]
    again = [(f"r{number}", "paused", {"pauses.every": number}, 1) for number in (0, 5)]
    folder = store_sweep(storage, [*points, *again], compare_to="paused", spec={"arm": "paused", **spec})
    events = [rung_event(f"p{number}", 0, number / 10) for number in range(6)]
    events += [stop_event("p0", 0), stop_event("p1", 0)]
    events += [rung_event(f"p{number}", 1, score) for number, score in ((2, 0.2), (3, 0.4), (4, 0.6), (5, 0.8))]
    store_search(folder, [*events, stop_event("p2", 1)])
    return read_results(folder, storage)


def test_what_a_scheduler_stopped_is_neither_missing_nor_finished(storage: Storage) -> None:
    results = judged(storage)
    assert results.progress == "3 of 8 trials finished, 4 stopped early"
    by_label = {its.label: its for its in results.conditions}
    assert (by_label["paused every=0"].num_stopped, by_label["paused every=0"].num_missing) == (2, 0)
    assert (by_label["paused every=5"].num_stopped, by_label["paused every=5"].num_missing) == (0, 1)
    assert not results.is_finished


def test_every_trial_on_a_rung_has_its_scores_and_its_end(storage: Storage) -> None:
    seen = {its.trial: its for its in rung_histories(judged(storage))}
    assert list(seen) == [f"p{number}" for number in range(6)]
    assert seen["p2"].proxy_scores == {0: 0.2, 1: 0.2}
    assert seen["p2"].stop is not None
    assert (seen["p2"].stop.rung, seen["p2"].value) == (1, None)
    assert (seen["p4"].stop, seen["p4"].value) == (None, 1.0)


def test_agreement_is_taken_over_trials_with_both_scores(storage: Storage) -> None:
    first, second = rank_correlations(judged(storage))
    assert (first.rung, first.steps, first.num_trials, first.num_stopped) == (0, (10,), 3, 3)
    assert (second.rung, second.steps, second.num_trials, second.num_stopped) == (1, (30,), 3, 1)
    assert first.tau is not None
    assert first.tau == pytest.approx(1 / 3)  # of three pairs one is swapped


@pytest.mark.parametrize("mode", ["max", "min"])
def test_agreement_is_above_0_where_the_proxy_prefers_whom_the_objective_prefers(storage: Storage, mode: str) -> None:
    results = judged(storage, objective={"metric": "score", "mode": mode})
    better, seen = objective_of(results).better, rung_histories(results)
    for correlation in rank_correlations(results):
        both = [(its.proxy_scores[correlation.rung], its.value) for its in seen if its.value is not None]
        same = [better(one[0], other[0]) == better(one[1], other[1]) for one, other in itertools.combinations(both, 2)]
        assert (same.count(True), same.count(False)) == (2, 1)
        assert correlation.tau is not None
        assert correlation.tau == pytest.approx((2 - 1) / 3)
