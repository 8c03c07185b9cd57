"""Which trials train together: those that have the base model and its handling in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.errors import SpecError
from pause_ray.spec import JsonObject, read_yaml, with_overrides
from pause_ray.trial.companions import companions, leaders_first
from pause_ray.trial.prepare import PreparedTrial, prepare
from pause_ray.trial.spec import TrialSpec
from tests.sweep.tiny_sweep import write_model, write_sweep

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> JsonObject:
    folder = tmp_path_factory.mktemp("trial")
    sparse: JsonObject = read_yaml(write_sweep(folder, write_model(folder / "model")))["trial"]
    places = {"corpus.sources": [{"path": str(folder / "training")}], "eval.haystack": [{"path": str(folder / "haystack")}]}
    return with_overrides(sparse, places | {"train.zero.stage": 0})


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def prepared(trial: JsonObject, cache: Path, *changes: JsonObject) -> dict[str, PreparedTrial]:
    """By a number in the order of ``changes``, so that a test can name them."""
    specs = [TrialSpec.parse(with_overrides(trial, its), origin="test") for its in changes]
    return {str(number): prepare(spec, cache=cache) for number, spec in enumerate(specs)}


def test_lora_seed_rate_steps_and_pauses_may_differ(trial: JsonObject, packages: Path) -> None:
    changes: list[JsonObject] = [
        {},
        {"train.lora.rank": 4},
        {"train.lora.targets": ["q_proj"], "train.lora.dropout": 0.1},
        {"seed": 5},
        {"replicate": 1},
        {"train.learning_rate": 0.1, "train.steps": 2},
        {"pauses.every": 2},
    ]
    trials = prepared(trial, packages, *changes)
    assert set(companions(trials, at_most=7).values()) == {tuple(trials)}


@pytest.mark.parametrize(
    "changes",
    [
        {"train": None},
        {"train.precision": "float32"},
        {"train.gradient_checkpointing": True},
        {"pauses.token": "text"},
        {"pauses": None},
    ],
)
def test_the_base_and_its_handling_may_not(trial: JsonObject, packages: Path, changes: JsonObject) -> None:
    trials = prepared(trial, packages, {}, changes, {"seed": 1})
    assert companions(trials, at_most=3) == {"0": ("0", "2"), "2": ("0", "2")}


def test_groups_are_of_like_size_and_none_is_too_large(trial: JsonObject, packages: Path) -> None:
    trials = prepared(trial, packages, *({"train.lora.rank": rank} for rank in range(1, 8)))
    groups = companions(trials, at_most=3)
    assert sorted(len(group) for group in set(groups.values())) == [2, 2, 3]
    assert all(key in groups[key] for key in trials)
    assert companions(trials, at_most=1) == {}


def test_trials_with_the_same_training_count_as_one(trial: JsonObject, packages: Path) -> None:
    """The second is asked something else of the same adapter."""
    trials = prepared(trial, packages, {}, {"eval.max_new_tokens": 5}, {"seed": 1})
    assert companions(trials, at_most=2) == dict.fromkeys(trials, ("0", "2"))
    del trials["2"]
    assert companions(trials, at_most=2) == {}


def test_a_training_that_needs_deepspeed_is_refused(trial: JsonObject, packages: Path) -> None:
    trials = prepared(trial, packages, {"train.zero.stage": 2})
    with pytest.raises(SpecError, match=r"train\.zero\.stage 2.*train_together to 1"):
        companions(trials, at_most=2)
    assert companions(trials, at_most=1) == {}


def test_trials_that_run_at_once_train_in_different_groups() -> None:
    groups = dict.fromkeys("abc", tuple("abc")) | dict.fromkeys("de", tuple("de"))
    assert leaders_first("abcdef", groups) == ["a", "d", "f", "b", "c", "e"]
    assert leaders_first("ebfa", groups) == ["e", "b", "f", "a"]
