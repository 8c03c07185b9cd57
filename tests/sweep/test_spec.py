"""Expansion of a sweep: every arm at every point that concerns it, nothing twice, nothing silently ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, Spec, with_overrides
from pause_ray.core.spec import _inner_specs as inner_specs
from pause_ray.sweep.search_space import DOMAIN_FIELDS
from pause_ray.sweep.spec import SweepSpec, expand, known_points, read_sweep
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
        "train": {"max_steps": 2},
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
EVERY: JsonObject = {"pauses.every": {"grid": [1, 2]}}
ASHA = {"kind": "asha", "grace_period": 2}
UP_TO_40: JsonObject = {"pauses.every": {"int": [1, 40]}}
AT_MOST_1: JsonObject = {"path": "pauses.every", "is": "at_most", "than": 1}


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
        ({"search": {"pauses.every": {"gird": [1]}}}, r"search\.pauses\.every\.gird: unknown field; did you mean grid"),
        ({"search": {"pauses.every": {"int": [1, 4]}}}, r"search\.pauses\.every: int is a domain to draw from, and algorithm grid"),
        ({"search": {"train.zero.stage": {"grid": [0, 2]}}}, r"search: train\.zero\.stage changes no result"),
        ({"search": {"train.lora": {"grid": [{"rank": 4}]}, "train.lora.rank": {"grid": [4]}}}, r"rank is a part of train\.lora"),
        ({"trial.train": None}, r"search: no trial reads train\.lora\.rank, as trial\.train is null"),
        ({"search": EVERY, "algorithm": {"points": 3}}, r"algorithm\.kind: required, and missing"),
        ({"search": EVERY, "algorithm": {"kind": "random", "points": 3}}, r"algorithm\.points 3: the search has 2 valid points"),
        ({"search": {}, "algorithm": {"kind": "random", "points": 3}}, r"algorithm random has nothing to choose"),
        ({"search": UP_TO_40, "algorithm": {"kind": "tpe", "points": 8}}, r"random_points 8 of points 8: nothing is left"),
        ({"search": UP_TO_40, "algorithm": {"kind": "tpe", "points": 9, "at_a_time": 9}}, r"at_a_time 9 of points 9"),
        ({"search": UP_TO_40, "algorithm": {"kind": "tpe", "points": 9}, "scheduler": ASHA}, r"asha and algorithm tpe exclude"),
        ({"search": {"pauses.every": {"int": [0, 9]}}, "algorithm": {"kind": "random", "points": 2}}, r"every = 0.*; narrow a domain, or"),
        (
            {"constraints": [{"path": "train.lora.alhpa", "is": "equal", "than": 1}]},
            r"constraints: unknown path.*did you mean train\.lora\.alpha",
        ),
        (
            {"constraints": [{"path": "replicate", "is": "at_most", "than": 1}]},
            r"constraints: replicate at_most 1: replicate is set by the sweep",
        ),
        ({"constraints": [{"path": "train.lora.rank", "is": "at_most", "than": 3}]}, r"search: no point keeps the constraints"),
        (
            {"constraints": [{"path": "engine.url", "is": "equal", "than": 3}]},
            r"constraints: engine\.url equal 3: no trial has both values",
        ),
        ({"constraints": [AT_MOST_1], "arms": {"low": {"pauses.every": 7}}}, r"arm low: none of its trials keeps the constraints"),
        ({"objective": {"metric": "score_edges"}}, r"objective\.metric score_edges: no task of arm pause_tuned asks cells that count"),
        ({"objective": {"metric": "recall"}}, r"objective\.metric = \"recall\""),
        ({"scheduler": ASHA}, r"scheduler: grace_period 2 is not below train\.max_steps 2"),
        ({"search": {}, "scheduler": ASHA}, r"scheduler: asha compares trials, and the search gives one"),
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
    untrained, changed = (
        first_trial({"trial.train": None, "search": {}, "arms": {}, "trial.corpus.num_sequences": rows}) for rows in (10, 20)
    )
    assert untrained.defining() == changed.defining()
    trained, retrained = (first_trial({"trial.corpus.num_sequences": rows}) for rows in (10, 20))
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


def test_constraints_leave_out_points_and_trials_of_arms() -> None:
    alpha_of_rank_4 = {"path": "train.lora.alpha", "is": "equal", "than": "train.lora.rank", "times": 4}
    found = planned(constraints=[alpha_of_rank_4], arms={"baseline": {"train": None}, "low": {"pauses": None}})
    assert found == [  # alpha is 16
        ("pause_tuned", {"pauses.every": 1, "train.lora.rank": 4}, 0),
        ("pause_tuned", {"pauses.every": 2, "train.lora.rank": 4}, 0),
        ("baseline", {"pauses.every": 1}, 0),
        ("baseline", {"pauses.every": 2}, 0),
        ("low", {"train.lora.rank": 4}, 0),
    ]
    one = {"path": "pauses.every", "is": "at_least", "than": 2}
    assert [arm for arm, _, _ in planned(constraints=[one], arms={"baseline": {"pauses": None, "train": None}})] == [
        "pause_tuned",
        "pause_tuned",
        "baseline",
    ]


def test_a_constraint_keeps_away_trials_that_would_break_a_rule() -> None:
    search = {"pauses.every": {"grid": [0, 1, 2]}}
    assert [point for _, point, _ in planned(search=search, constraints=[{"path": "pauses.every", "is": "at_least", "than": 1}])][:2] == [
        {"pauses.every": 1},
        {"pauses.every": 2},
    ]


def test_branches_can_be_searched_whole() -> None:
    search = {"pauses": {"grid": [None, {"unit": "sentence", "every": 2}]}}
    trials = expand(SweepSpec.parse({**SWEEP, "search": search, "arms": {}}, origin="test"))
    assert [trial.spec.pauses and trial.spec.pauses.unit for trial in trials] == [None, "sentence"]


def test_a_sweep_reads_back_as_it_was_written() -> None:
    whole = {
        **SWEEP,
        "search": UP_TO_40,
        "algorithm": {"kind": "random", "points": 4},
        "constraints": [AT_MOST_1],
        "scheduler": ASHA,
    }
    sweep = SweepSpec.parse(whole, origin="test")
    assert SweepSpec.parse(sweep.resolved(), origin="again") == sweep


def test_an_arm_that_is_one_trial_for_all_points_is_there_without_points() -> None:
    sweep = SweepSpec.parse(SWEEP, origin="test")
    assert [trial.arm for trial in expand(sweep, [])] == ["baseline"]
    assert [trial.label for trial in expand(sweep, known_points(sweep))] == [trial.label for trial in expand(sweep)]


@pytest.mark.parametrize(
    ("override", "domain"),
    [
        ({"search.pauses.every.grid": [3]}, ("pauses.every", {"grid": [3]})),
        ({"search.pauses.every": {"grid": [3]}}, ("pauses.every", {"grid": [3]})),
        ({"search.train.warmup_steps": {"grid": [1, 2]}}, ("train.warmup_steps", {"grid": [1, 2]})),
        ({"search.train.warmup_steps.grid": [1, 2]}, ("train.warmup_steps", {"grid": [1, 2]})),
        ({"search.seed.grid": [1, 2]}, ("seed", {"grid": [1, 2]})),
    ],
)
def test_an_override_reaches_a_searched_path_that_is_there_or_not(override: JsonObject, domain: tuple[str, JsonObject]) -> None:
    path, expected = domain
    assert read_sweep(ROOT / "sweeps" / "quickstart.yaml", override).resolved()["search"][path] == expected


def test_no_trial_path_ends_like_a_domain() -> None:
    def names(schema: type[Spec]) -> set[str]:
        inner = (spec for field in schema.model_fields.values() for spec in inner_specs(field.annotation))
        return set(schema.model_fields).union(*map(names, inner))

    assert not names(TrialSpec) & DOMAIN_FIELDS
