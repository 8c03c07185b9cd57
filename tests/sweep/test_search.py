"""A search asks for the same points for the same seed and the same values, also when it was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject
from pause_ray.sweep.search import SearchLog, TpeSearch
from pause_ray.sweep.spec import SweepSpec, TpeAlgorithm, expand, known_points
from tests.sweep.test_spec import SWEEP

SPACE: JsonObject = {
    "pauses.every": {"int": [1, 12]},
    "train.lora.rank": {"int": [2, 64], "log": True},
    "train.lora.alpha": {"quantised": [8, 64], "step": 8},
    "train.learning_rate": {"loguniform": [1e-5, 1e-3]},
    "train.schedule": {"choice": ["linear", "cosine"]},
}
AT_LEAST = {"path": "train.lora.alpha", "is": "at_least", "than": "train.lora.rank"}
TPE = {"kind": "tpe", "points": 24, "random_points": 8}


def sweep_of(search: JsonObject, algorithm: JsonObject, **changes: object) -> SweepSpec:
    return SweepSpec.parse({**SWEEP, "search": search, "algorithm": algorithm, **changes}, origin="test")


def learning(sweep: SweepSpec, folder: Path) -> TpeSearch:
    assert isinstance(sweep.algorithm, TpeAlgorithm)
    return TpeSearch(sweep, sweep.algorithm, log=SearchLog(folder))


def value(point: JsonObject) -> float:
    """The best frequency is 4."""
    return 1 / (1 + abs(point["pauses.every"] - 4))


def ask_on(search: TpeSearch, *, rounds: int | None = None) -> list[JsonObject]:
    """Points of so many rounds, each told its value."""
    asked: list[JsonObject] = []
    while rounds is None or rounds > 0:
        points = search.ask()
        if not points:
            break
        asked += points
        for point in points:
            search.tell(point, value(point))
        rounds = None if rounds is None else rounds - 1
    return asked


def test_random_points_keep_the_constraints_and_become_trials() -> None:
    sweep = sweep_of(SPACE, {"kind": "random", "points": 12}, constraints=[AT_LEAST])
    points = known_points(sweep) or []
    assert len(points) == 12
    assert all(point["train.lora.alpha"] >= point["train.lora.rank"] for point in points)
    trials = [trial for trial in expand(sweep) if trial.arm == "pause_tuned"]
    assert [trial.point for trial in trials] == points
    assert trials[0].spec.train is not None
    assert trials[0].spec.train.lora.rank == points[0]["train.lora.rank"]
    unlimited = known_points(sweep_of(SPACE, {"kind": "random", "points": 12})) or []
    assert any(point["train.lora.alpha"] < point["train.lora.rank"] for point in unlimited)


@pytest.mark.parametrize("at_a_time", [1, 4])
def test_a_search_that_went_on_asks_what_it_would_have_asked(tmp_path: Path, at_a_time: int) -> None:
    sweep = sweep_of(SPACE, {**TPE, "at_a_time": at_a_time}, constraints=[AT_LEAST])
    whole = ask_on(learning(sweep, tmp_path / "whole"))
    assert len(whole) == TPE["points"]
    assert all(point["train.lora.alpha"] >= point["train.lora.rank"] for point in whole)
    for rounds in (1, 4):
        ask_on(learning(sweep, tmp_path / "parts"), rounds=rounds)
    interrupted = learning(sweep, tmp_path / "parts")
    ask_on(interrupted, rounds=5)
    interrupted.ask()  # killed before the values of this round were told
    assert ask_on(learning(sweep, tmp_path / "parts")) == whole
    assert SearchLog(tmp_path / "parts").events() == SearchLog(tmp_path / "whole").events()


def test_it_learns_from_values_in_the_direction_of_the_objective(tmp_path: Path) -> None:
    nearness = {}
    for mode in ("max", "min"):
        sweep = sweep_of(SPACE, {**TPE, "points": 40}, objective={"mode": mode})
        learned = ask_on(learning(sweep, tmp_path / mode))[20:]
        nearness[mode] = sum(map(value, learned)) / len(learned)
    assert nearness["max"] > 2 * nearness["min"]


def test_points_asked_before_stay_asked_when_a_value_has_changed_since(tmp_path: Path) -> None:
    sweep = sweep_of(SPACE, TPE)
    search = learning(sweep, tmp_path)
    first: list[JsonObject] = []
    for _ in range(14):
        points = search.ask()
        first += points
        for point in points:
            search.tell(point, None)  # every trial failed
    again = ask_on(learning(sweep, tmp_path))  # and now they are finished
    assert again[:14] == first
    assert len(again) == len({str(point) for point in again}) == TPE["points"]
    told = [event for event in SearchLog(tmp_path).events() if event["event"] == "told"]
    assert [event["value"] for event in told[:14]] == [None] * 14
    assert [event["value"] for event in told[14:28]] == [value(point) for point in first]


def test_a_small_space_is_asked_for_each_of_its_points_once(tmp_path: Path) -> None:
    space = {"pauses.every": {"int": [1, 6]}, "train.schedule": {"grid": ["linear", "cosine"]}}
    sweep = sweep_of(space, {"kind": "tpe", "points": 12, "random_points": 2})
    points = ask_on(learning(sweep, tmp_path))
    assert {(point["pauses.every"], point["train.schedule"]) for point in points} == {
        (every, schedule) for every in range(1, 7) for schedule in ("linear", "cosine")
    }
    assert len(points) == 12
    with pytest.raises(SpecError, match=r"algorithm\.points 13: the search has 12 valid points"):
        expand(sweep_of(space, {"kind": "tpe", "points": 13, "random_points": 2}))


def test_trials_of_points_to_come_are_not_known_and_the_others_are() -> None:
    sweep = sweep_of(SPACE, TPE)
    assert known_points(sweep) is None
    assert [trial.arm for trial in expand(sweep)] == ["baseline"]
    point = {"pauses.every": 3, "train.lora.rank": 4, "train.lora.alpha": 8, "train.learning_rate": 1e-4, "train.schedule": "cosine"}
    assert [(trial.arm, trial.point) for trial in expand(sweep, [point])] == [("pause_tuned", point), ("baseline", {})]


def test_an_arm_that_a_constraint_keeps_from_a_point_is_left_out_of_its_round() -> None:
    """Rounds are small: at the point of one, an arm may well have no trial at all."""
    arms = {"baseline": {"pauses": None, "train": None}, "small_alpha": {"train.lora.alpha": 8}}
    sweep = sweep_of({"train.lora.rank": {"int": [4, 16]}}, {**TPE, "points": 10}, constraints=[AT_LEAST], arms=arms)
    assert [trial.arm for trial in expand(sweep, [{"train.lora.rank": 16}])] == ["pause_tuned", "baseline"]
    assert [trial.arm for trial in expand(sweep, [{"train.lora.rank": 8}])] == ["pause_tuned", "baseline", "small_alpha"]
    never = sweep_of({"train.lora.rank": {"int": [9, 16]}}, {**TPE, "points": 8, "random_points": 2}, constraints=[AT_LEAST], arms=arms)
    with pytest.raises(SpecError, match="arm small_alpha: none of its trials keeps the constraints"):
        expand(never)
