"""The objective is a mean that some cells count for; which ones a suite asks is known before anything runs."""

from __future__ import annotations

import pytest

from pause_ray.needle.task import SuiteSpec
from pause_ray.objective import Metric, ObjectiveSpec
from pause_ray.spec import with_overrides
from tests.needle.answered_rows import row
from tests.needle.tiny import STOCK
from tests.sweep.test_spec import SWEEP

SUITE = SWEEP["trial"]["eval"]
ROWS = [
    row(0, STOCK.needle, depth_percent=0.0, needle_token=3),
    row(1, "Eat a sandwich.", depth_percent=50.0, needle_token=500),
    row(2, "I don't know.", depth_percent=60.0, needle_token=600),
    row(3, None, depth_percent=100.0, needle_token=999),
]


PARTLY = 1 / len(STOCK.keywords)
"""The score of an answer with one keyword."""


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("score", (1 + PARTLY) / 3), ("score_middle", PARTLY / 2), ("score_edges", 1), ("exact_recall", 1 / 3)],
)
def test_the_value_is_the_mean_of_the_cells_that_count(metric: Metric, expected: float) -> None:
    assert ObjectiveSpec(metric=metric).value(ROWS) == pytest.approx(expected)


def test_nothing_scored_has_no_value() -> None:
    assert ObjectiveSpec().value([]) is None
    assert ObjectiveSpec().value(ROWS[3:]) is None
    assert ObjectiveSpec(metric="score_middle").value(ROWS[:1]) is None


def test_a_search_learns_nothing_from_a_mean_that_leaves_much_out() -> None:
    told = [row(number, STOCK.needle) for number in range(18)]
    unscored = [row(number, None) for number in range(18, 22)]
    objective = ObjectiveSpec()
    assert objective.learned(told + unscored[:2]) == objective.value(told + unscored[:2]) == 1.0
    assert objective.learned(told + unscored) is None
    assert objective.learned([]) is None


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
        if ObjectiveSpec(metric=metric).is_produced_by(suite, replicate=0, seed=0)
    }
    assert found == produced | {"score", "exact_recall"}
