"""Whom a scheduler judges, its clock, and how it goes on from what was written down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, with_overrides
from pause_ray.sweep.rungs import Schedule, governed
from pause_ray.sweep.search_log import Rung, SearchLog, SearchRecord, Stop
from pause_ray.sweep.spec import PlannedTrial, SchedulerSpec, SweepSpec, expand

ASHA = SchedulerSpec(kind="asha", rungs=3, reduction=3)
NEEDLE = {"needle": "The map is under the drum.", "question": "Where is the map?", "keywords": ["drum"]}
FACTS = {
    "needle": "The gate of {place} is {colour}.",
    "question": "Which colour has the gate of {place}?",
    "slots": {"place": ["Oslo", "Lima", "Cairo"], "colour": ["red", "blue"]},
}
SWEEP: JsonObject = {
    "name": "judged",
    "trial": {
        "model": {"source": "none"},
        "corpus": {"sources": [{"path": "none"}], "facts": {"facts": [FACTS]}, "num_sequences": 64},
        "train": {"max_steps": 54},
        "eval": {
            "name": "one",
            "noise": "The grass is green.",
            "task": {"kind": "single", "needles": {"needles": [NEEDLE]}},
            "context_tokens": [512],
            "depth_percent": [0, 100],
        },
    },
    "search": {"train.lora.rank": {"grid": [2, 4]}, "pauses.every": {"grid": [1, 2]}},
    "arms": {
        "baseline": {"pauses": None, "train": None},
        "no_pauses": {"pauses": None},
        "rank_2": {"train.lora.rank": 2, "train.max_steps": 60},
    },
    "replicates": 2,
}


@dataclass(frozen=True)
class Placed:
    planned: PlannedTrial


def rung_of(trial: str, number: int, score: float) -> Rung:
    return Rung(trial=trial, rung=number, step=3**number, proxy_score=score, num_cells=16, seconds=1.5, prefilled_tokens=900)


@pytest.fixture
def trials() -> dict[str, Placed]:
    sweep = SweepSpec.parse(with_overrides(SWEEP, {"trial.pauses": {"unit": "paragraph"}}), origin="test")
    return {f"{number:02}": Placed(planned) for number, planned in enumerate(expand(sweep))}


def judged(trials: dict[str, Placed], **changes: Any) -> list[str]:
    data = with_overrides(SWEEP, {"trial.pauses": {"unit": "paragraph"}, "scheduler": {"kind": "asha"}} | changes)
    return governed(SweepSpec.parse(data, origin="test"), trials)


def test_the_unchanged_arm_is_judged_at_replicate_0(trials: dict[str, Placed]) -> None:
    found = [trials[key].planned for key in judged(trials)]
    assert [(each.arm, each.spec.replicate) for each in found] == [("pause_tuned", 0)] * 4
    assert len({tuple(each.point.items()) for each in found}) == 4


def test_nothing_is_judged_without_a_scheduler(trials: dict[str, Placed]) -> None:
    assert judged(trials, scheduler=None) == []


def test_a_suite_whose_text_is_its_tasks_own_lines_cannot_be_judged(trials: dict[str, Placed]) -> None:
    own = {"name": "own_lines", "task": {"kind": "key_value"}, "context_tokens": [512], "depth_percent": [0, 100]}
    data = with_overrides(SWEEP, {"trial.pauses": {"unit": "paragraph"}, "scheduler": {"kind": "asha"}, "trial.eval": own})
    with pytest.raises(SpecError, match=r"scheduler.* own_lines .*key_value"):
        expand(SweepSpec.parse(data, origin="test"))


@pytest.mark.parametrize(("steps", "expected"), [(54, (2, 6, 18)), (55, (3, 7, 19)), (27, (1, 3, 9))])
def test_rungs_stand_at_powers_of_the_reduction(steps: int, expected: tuple[int, ...]) -> None:
    assert ASHA.steps(steps) == expected
    schedule = Schedule(scheduler=ASHA, context_tokens=(512,))
    times = [schedule.time_of(rung) for rung in range(3)]
    assert times == [1, 3, 9]
    assert schedule.whole_time == 27
    assert all(math.ceil(steps * time / 27) == step for time, step in zip(times, expected, strict=True))


def test_what_was_written_down_is_known_again(tmp_path: Path) -> None:
    log = SearchLog(tmp_path)
    seen = [rung_of("a", 0, 0.5), rung_of("b", 0, 0.25), rung_of("a", 1, 0.75)]
    for rung in seen:
        log.append(rung.as_event(point={"train.lora.rank": 2}))
    log.append(Stop(trial="b", rung=0, by="asha").as_event(point={"train.lora.rank": 4}))
    schedule = Schedule.resume(ASHA, SearchRecord.read(tmp_path), trials=["a", "b", "c", "d"], finished=["d"], context_tokens=(512,))
    assert [schedule.known("a", number) for number in range(3)] == [seen[0], seen[2], None]
    assert schedule.known("b", 0) == seen[1]
    assert schedule.known("c", 0) is None
    assert schedule.settled == {"b", "d"}


def test_a_trial_of_another_sweep_is_none_of_ours(tmp_path: Path) -> None:
    SearchLog(tmp_path).append(rung_of("elsewhere", 0, 0.5).as_event(point={}))
    schedule = Schedule.resume(ASHA, SearchRecord.read(tmp_path), trials=["a"], finished=[], context_tokens=(512,))
    assert schedule.recorded == {"a": ()}


def test_points_that_no_survivor_has_are_left_out_in_all_arms_and_replicates(trials: dict[str, Placed], tmp_path: Path) -> None:
    by_point = {tuple(trials[key].planned.point.values()): key for key in judged(trials)}
    log = SearchLog(tmp_path)
    for point in ((4, 1), (4, 2), (2, 2)):
        log.append(Stop(trial=by_point[point], rung=0, by="asha").as_event(point=trials[by_point[point]].planned.point))
    entries = [
        {"digest": key, "arm": each.planned.arm, "point": each.planned.point, "replicate": each.planned.spec.replicate}
        for key, each in trials.items()
    ]
    left_out = SearchRecord.read(tmp_path).left_out(entries, governed_arm="pause_tuned")
    runs = {(each.planned.arm, *each.planned.point.values()) for key, each in trials.items() if key not in left_out}
    assert runs == {("pause_tuned", 2, 1), ("baseline",), ("no_pauses", 2), ("rank_2", 1)}
