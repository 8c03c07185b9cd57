"""Where a trial runs: what of it can be said wrongly."""

from __future__ import annotations

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, with_overrides
from pause_ray.trial.spec import Resources, TrialSpec
from tests.sweep.test_spec import SWEEP


@pytest.mark.parametrize(("workers", "bounds"), [(0, (0, 0)), (3, (3, 3)), ({"min": 1, "max": 4}, (1, 4))])
def test_workers_are_a_number_or_a_range(workers: object, bounds: tuple[int, int]) -> None:
    resources = Resources.parse({"train_workers": workers}, origin="test")
    assert resources.worker_bounds == bounds
    assert Resources.parse(resources.resolved(), origin="test") == resources


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (-1, r"train_workers = -1: .*greater than or equal to 0"),
        ("many", r"train_workers = \"many\": .*integer"),
        ({"min": 3, "max": 2}, r"train_workers: min 3 is above max 2"),
        ({"min": 0, "max": 2}, r"train_workers\.min = 0"),
        ({"mni": 1, "max": 2}, r"train_workers\.mni: unknown field; did you mean min\?"),
    ],
)
def test_a_mistake_is_told_by_the_rule_of_what_was_meant(workers: object, message: str) -> None:
    with pytest.raises(SpecError, match=message) as told:
        Resources.parse({"train_workers": workers}, origin="test")
    assert "<" not in str(told.value)


def test_scoring_actors_are_a_number_that_stays_or_a_range_that_comes_and_goes() -> None:
    stay = Resources.parse({"scoring_actors": 3}, origin="test")
    assert (stay.scoring_bounds, Resources().scoring_bounds) == ((3, 3), (1, 1))
    come = Resources.parse({"scoring_actors": {"min": 0, "max": 4}, "scoring_idle_seconds": 5}, origin="test")
    assert (come.scoring_bounds, come.idle_seconds) == ((0, 4), 5)
    for resources in (stay, come):
        assert Resources.parse(resources.resolved(), origin="test") == resources


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"scoring_actors": 0}, r"scoring_actors = 0: .*greater than or equal to 1"),
        ({"scoring_actors": {"min": 2, "max": 1}}, r"scoring_actors: min 2 is above max 1; swap them"),
        ({"scoring_actors": {"min": 0, "max": 0}}, r"scoring_actors\.max = 0"),
        ({"scoring_actors": {"min": 0}}, r"scoring_actors\.max"),
        (
            {"scoring_actors": 2, "scoring_idle_seconds": 5},
            r"scoring_idle_seconds 5 has no effect on scoring_actors 2, which stay; .*max: 2",
        ),
        ({"scoring_actors": {"min": 0, "max": 1}, "scoring_idle_seconds": -1}, r"scoring_idle_seconds = -1"),
        ({"scoring_actors": {"min": 3, "max": 3}, "scoring_idle_seconds": 5}, r"has no effect on scoring_actors 3, which stay"),
    ],
)
def test_a_mistake_in_scoring_actors_says_what_to_do(resources: JsonObject, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Resources.parse(resources, origin="test")


def trial(changes: JsonObject) -> TrialSpec:
    return TrialSpec.parse(with_overrides(SWEEP["trial"], changes), origin="test")


def test_elastic_workers_need_checkpoints_and_whole_groups() -> None:
    elastic = {"resources.train_workers": {"min": 1, "max": 2}}
    assert trial({**elastic, "train.checkpoint_every": 5}).resources.worker_bounds == (1, 2)
    with pytest.raises(SpecError, match=r"set train\.checkpoint_every"):
        trial(elastic)
    with pytest.raises(SpecError, match=r"train\.sequence_parallel"):
        trial({**elastic, "train.checkpoint_every": 5, "train.sequence_parallel": 2})


def test_the_same_trial_on_other_workers_is_the_same_trial() -> None:
    elastic = trial({"resources.train_workers": {"min": 1, "max": 2}, "train.checkpoint_every": 5})
    assert elastic.defining() == trial({}).defining()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"resources.train_workers": 3},
            r"train.micro_batch_size 2 × train.gradient_accumulation_steps 4 = 8 rows per step cannot be shared by 3 workers",
        ),
        ({"train.sequence_parallel": 2}, r"train.sequence_parallel 2 needs groups of 2 workers, but there are 1"),
    ],
)
def test_workers_that_cannot_share_a_step_are_refused(changes: JsonObject, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        trial({"train.micro_batch_size": 2, "train.gradient_accumulation_steps": 4, **changes})
