"""Lines and points are the ledger's means, and arms can be told apart; read back from the figures' own objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.storage import Storage
from pause_ray.evaluation.grid import DepthAxis
from pause_ray.evaluation.statistics import Estimate
from pause_ray.report import figures
from pause_ray.report.ranking import cost_axes
from pause_ray.report.results import SweepResults, read_results
from tests.stored_sweep import grid, rows, store_sweep, store_trial

LENGTHS, DEPTHS = (1024, 2048, 4096), (10.0, 50.0, 90.0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> SweepResults:
    """A reference that is worst, a control, and eight arms, each better and longer than the one before."""
    storage = Storage.open(tmp_path_factory.mktemp("figures"))
    arms = ["baseline", "control", *(f"arm{number}" for number in range(8))]
    for number, arm in enumerate(arms):
        scores = grid(LENGTHS, DEPTHS, lambda length, depth, number=number: (number + (depth == 50.0) + length // 2048) / 20)
        its = [
            row
            for length in LENGTHS
            for row in rows(
                {key: score for key, score in scores.items() if key[0] == length}, trial=arm, prompt_tokens=length + length * number // 16
            )
        ]
        store_trial(storage, arm, its, trained=arm != "baseline", pauses=arm.startswith("arm"))
    return read_results(store_sweep(storage, [(arm, arm, {}, 0) for arm in arms], control="control"), storage)


def lines_of(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_profiles_go_through_the_summarys_means(results: SweepResults) -> None:
    shown = dict(list(enumerate(results.scored))[:3])
    by_length, by_depth = figures.profiles(shown, axis=DepthAxis("percent")).axes
    for label, line in lines_of(by_length).items():
        [summary] = [its.summary for its in results.scored if its.label == label]
        assert list(line.get_ydata()) == list(summary.mean_by_length.values())
    marked = [line for line in by_depth.lines if line.get_marker() != "None"]
    assert [list(line.get_ydata()) for line in marked] == [list(its.summary.mean_by_depth.values()) for its in shown.values()]
    assert len(by_depth.lines) == len(marked) + 3 * len(DEPTHS)  # and a whisker for each mean


def test_the_reference_and_the_control_are_always_shown(results: SweepResults) -> None:
    shown = figures.few_of(results.scored)
    assert [condition.label for condition in shown.values()] == ["baseline", "control", "arm4", "arm5", "arm6", "arm7"]
    assert [results.scored[look] for look in shown] == list(shown.values())


def test_costs_and_scores_are_drawn_where_the_summary_says(results: SweepResults) -> None:
    found = cost_axes(results)
    [axes] = figures.fronts(found, results.scored).axes
    drawn = {label: (line.get_xdata()[0], line.get_ydata()[0]) for label, line in lines_of(axes).items()}
    expected = {its.label: (round(its.summary.prompt_overhead_percent, 1), its.summary.grand_mean) for its in results.scored if its.summary}
    assert drawn == expected


def test_the_stair_goes_through_the_front_and_what_is_beaten_is_hollow(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    for arm, score, tokens in (("base", 0.5, 1000), ("good", 0.75, 1100), ("bad", 0.25, 1200)):
        store_trial(storage, arm, rows({(1000, 50.0): score}, trial=arm, prompt_tokens=tokens))
    results = read_results(store_sweep(storage, [(arm, arm, {}, 0) for arm in ("base", "good", "bad")], compare_to="base"), storage)
    found = cost_axes(results)
    [axes] = figures.fronts(found, results.scored).axes
    [stair] = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert list(zip(stair.get_xdata(), stair.get_ydata(), strict=True)) == [(0.0, 0.5), (10.0, 0.75), (20.0, 0.75)]
    assert {label for label, line in lines_of(axes).items() if line.get_markerfacecolor() == "white"} == {"bad"}


def test_of_many_arms_the_front_the_reference_and_the_best_have_names(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    for number in range(30):
        its = rows({(1000, 50.0): number / 40}, trial=f"t{number}", prompt_tokens=1000 + 10 * (number if number < 25 else 29))
        store_trial(storage, f"t{number}", its)
    planned = [(f"t{number}", "base" if number == 7 else "paused", {"pauses.every": number}, 0) for number in range(30)]
    results = read_results(store_sweep(storage, planned, compare_to="base"), storage)
    found = cost_axes(results)
    [axes] = figures.fronts(found, results.scored).axes
    named = set(lines_of(axes))
    assert len(named) == figures.MAX_NAMED_ARMS
    assert {"base every=7", "paused every=29"} <= named


def test_arms_differ_without_colour(results: SweepResults) -> None:
    found = cost_axes(results)
    lines = lines_of(figures.fronts(found, results.scored).axes[0]).values()
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == len(results.scored)


def test_recall_has_a_point_where_it_was_measured() -> None:
    recall = {5.0: Estimate(1.0, None), 55.0: Estimate(0.25, None)}
    [axes] = figures.recall_by_position({2: ("arm", recall), 5: ("never asked", {})}).axes
    assert {label: list(line.get_ydata()) for label, line in lines_of(axes).items()} == {"arm": [1.0, 0.25]}


def test_training_curves_have_every_step_and_hollow_points_for_held_out_rows(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    log = [{"step": step, "loss": 3.0 / step} for step in (1, 2, 3, 4)]
    log[1] |= {"validation_loss": 2.0}
    log[3] |= {"validation_loss": 1.5}
    for trial, its in (("t0", log), ("t1", log[:3])):
        store_trial(storage, trial, rows({(1024, 50.0): 1.0}, trial=trial), trained=True, training=its)
    tuned = read_results(store_sweep(storage, [("t0", "tuned", {}, 0), ("t1", "tuned", {}, 1)], compare_to="tuned"), storage)
    figure = figures.training_curves(dict(enumerate(tuned.conditions)))
    assert figure is not None
    drawn = [(list(line.get_xdata()), list(line.get_ydata()), line.get_markerfacecolor() == "none") for line in figure.axes[0].lines]
    assert drawn == [
        ([1, 2, 3, 4], [3.0, 1.5, 1.0, 0.75], False),
        ([2, 4], [2.0, 1.5], True),
        ([1, 2, 3], [3.0, 1.5, 1.0], False),
        ([2], [2.0], True),
    ]
    assert list(lines_of(figure.axes[0])) == ["tuned"], "one entry of the legend for all replicates"
