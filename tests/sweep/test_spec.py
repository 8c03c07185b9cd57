"""Expansion of a sweep: every arm at every point that concerns it, nothing twice, nothing silently ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pause_ray.errors import SpecError
from pause_ray.spec import JsonObject, with_overrides
from pause_ray.sweep.spec import SweepSpec, expand, read_sweep
from pause_ray.trial.spec import TrialSpec

ROOT = Path(__file__).resolve().parents[2]
FACTS = {
    "facts": [
        {"needle": "The key of {city} is {word}.", "question": "What is the key of {city}?", "slots": {"city": ["Oslo"], "word": ["elm"]}}
    ]
}
SWEEP: JsonObject = {
    "name": "small",
    "trial": {
        "model": {"source": "some/model"},
        "pauses": {"unit": "paragraph", "every": 1},
        "corpus": {"sources": [{"path": "texts"}], "facts": FACTS},
        "train": {"steps": 2},
        "eval": {
            "name": "single",
            "haystack": [{"path": "texts"}],
            "task": {
                "kind": "single",
                "needles": {"needles": [{"needle": "The dog is blue.", "question": "Which colour is the dog?", "keywords": ["blue"]}]},
            },
            "context_tokens": [100],
            "depth_percent": [50],
        },
    },
    "search": {"pauses.every": {"grid": [1, 2]}, "train.lora.rank": {"grid": [4, 8]}},
    "arms": {"baseline": {"pauses": None, "train": None}},
}


def planned(**changes: Any) -> list[tuple[str, JsonObject, int]]:
    sweep = SweepSpec.parse(with_overrides(SWEEP, {path.replace("__", "."): value for path, value in changes.items()}), origin="test")
    return [(trial.arm, trial.point, trial.spec.replicate) for trial in expand(sweep)]


def first_trial(changes: JsonObject) -> TrialSpec:
    return expand(SweepSpec.parse(with_overrides(SWEEP, changes), origin="test"))[0].spec


def test_the_template_is_run_at_every_point_and_an_arm_without_the_searched_branches_once() -> None:
    assert planned() == [
        ("pause_tuned", {"pauses.every": 1, "train.lora.rank": 4}, 0),
        ("pause_tuned", {"pauses.every": 1, "train.lora.rank": 8}, 0),
        ("pause_tuned", {"pauses.every": 2, "train.lora.rank": 4}, 0),
        ("pause_tuned", {"pauses.every": 2, "train.lora.rank": 8}, 0),
        ("baseline", {}, 0),
    ]


def test_an_arm_varies_only_along_paths_that_it_does_not_set() -> None:
    arms = [(arm, point) for arm, point, _ in planned(arms={"untuned": {"train": None}, "low": {"pauses": None, "train.lora.rank": 4}})][4:]
    assert arms == [("untuned", {"pauses.every": 1}), ("untuned", {"pauses.every": 2}), ("low", {})]


def test_replicates_differ_in_seed_and_needle_but_not_in_anything_else() -> None:
    sweep = SweepSpec.parse(with_overrides(SWEEP, {"replicates": 3, "search": {}}), origin="test")
    trials = [trial.spec for trial in expand(sweep) if trial.arm == "baseline"]
    assert [trial.replicate for trial in trials] == [0, 1, 2]
    assert len({trial.data_seed for trial in trials}) == 3
    assert len({trial.model_copy(update={"replicate": 0}).model_dump_json() for trial in trials}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"pauses.evry": {"grid": [1]}}}, r"search: unknown path pauses\.evry.*did you mean pauses\.every"),
        ({"search": {"resources.threads": {"grid": [1]}}}, r"resources\.threads cannot be searched"),
        ({"search": {"pauses.every": {"grid": [1, 1]}}}, r"names a value twice"),
        ({"search": {"pauses.every": {"grid": []}}}, r"grid"),
        ({"search": {"pauses.every": {"grid": [0]}}}, r"arm pause_tuned.*pauses\.every = 0"),
        ({"arms": {"baseline": {"trian": None}}}, r"arms\.baseline: unknown path trian.*did you mean train"),
        ({"arms": {"one": {"train": None}, "two": {"train": None}}}, r"arms one and two are the same trial"),
        ({"arms": {"pause_tuned": {}}}, r"is the name of the unchanged trial's arm"),
        ({"control": "baseline"}, r"control baseline: must be tuned, and without pauses"),
        ({"control": "basline"}, r"control 'basline' is none of the arms"),
        ({"arms": {"wide": {"resources.scoring_actors": 2}}}, r"arms\.wide: resources\.scoring_actors is the same for all arms"),
        ({"compare_to": "basline"}, r"compare_to 'basline' is none of the arms"),
        ({"trial.eval.depth_percent": [120]}, r"depth_percent 120 is outside 0 to 100"),
        ({"trial.corpus": None}, r"train needs a corpus"),
        ({"trial.replicate": 2}, r"trial\.replicate 2 is set by the sweep"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(change: JsonObject, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        expand(SweepSpec.parse(with_overrides(SWEEP, change) if "trial" in next(iter(change)) else {**SWEEP, **change}, origin="test"))


def test_resources_do_not_change_what_a_trial_is() -> None:
    one, other = (
        expand(SweepSpec.parse(with_overrides(SWEEP, {"trial.resources.scoring_actors": actors}), origin="test"))[0].spec
        for actors in (1, 4)
    )
    assert one != other
    assert one.defining() == other.defining()


def test_the_corpus_of_a_trial_that_trains_nothing_does_not_count() -> None:
    untrained, changed = (first_trial({"trial.train": None, "search": {}, "arms": {}, "trial.corpus.rows": rows}) for rows in (10, 20))
    assert untrained.defining() == changed.defining()
    trained, retrained = (first_trial({"trial.corpus.rows": rows}) for rows in (10, 20))
    assert trained.defining() != retrained.defining()


def test_every_shipped_sweep_expands_and_compares_with_an_arm_it_has() -> None:
    paths = sorted((ROOT / "sweeps").glob("*.yaml"))
    assert paths
    for path in paths:
        sweep = read_sweep(path, {})
        assert sweep.reference_arm in {trial.arm for trial in expand(sweep)}


def test_the_quickstart_is_two_frequencies_by_two_ranks_and_three_controls() -> None:
    arms = [trial.arm for trial in expand(read_sweep(ROOT / "sweeps" / "quickstart.yaml", {}))]
    assert sorted(arms) == ["baseline", *["pause_tuned"] * 4, "pauses_untuned", "tuned_without_pauses"]


def test_an_override_of_an_unknown_path_is_refused() -> None:
    with pytest.raises(SpecError, match=r"--set: unknown path train\.stps"):
        read_sweep(ROOT / "sweeps" / "quickstart.yaml", {"trial.train.stps": 3})
