"""A suite becomes cells: the same ones every time, each where the grid says, drawn only from seed, replicate and sample."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError
from pause_ray.evaluation.suite import Cell, SuiteSpec, ask_for, cells, known_facts

NEEDLE = {"needle": "The red door leads to the cellar.", "question": "Where does the red door lead?", "keywords": ["cellar"]}
SINGLE = {"kind": "single", "needles": {"needles": [NEEDLE]}}
GROUP = {"question": "What is in the chest?", "needles": {f"{thing} are in the chest.": [thing] for thing in ("Coins", "Maps", "Keys")}}
MULTI = {"kind": "multi", "groups": {"groups": [GROUP]}}
CHAIN = {"kind": "uuid_chain", "chain_length": 5}
PAIRS = {"kind": "key_value"}
DOCUMENTS = [{"path": "essays"}]


def make_suite(**changes: Any) -> SuiteSpec:
    data = {"name": "tiny", "task": SINGLE, "haystack": DOCUMENTS, "context_tokens": [1000, 2000], "depth_percent": [0, 50, 100]} | changes
    return SuiteSpec.parse({key: value for key, value in data.items() if value is not None}, origin="suite.yaml")


def make_cells(suite: SuiteSpec, *, replicate: int = 0, seed: int = 0, identity: str = "x") -> list[Cell]:
    return cells(suite, identity=identity, replicate=replicate, seed=seed)


def grid(task: dict[str, Any], **axis: Any) -> SuiteSpec:
    has_lines = task["kind"] == "key_value"
    return make_suite(**{"task": task, "haystack": None if has_lines else DOCUMENTS, "depth_percent": None} | axis)


AXES = [{"depth_percent": [10, 40]}, {"lattice_tokens": 250}, {"samples": 3}]
every_grid = pytest.mark.parametrize("axis", AXES, ids=lambda axis: next(iter(axis)))
every_task = pytest.mark.parametrize("task", [SINGLE, MULTI, CHAIN, PAIRS], ids=lambda task: task["kind"])


@every_task
@every_grid
def test_two_expansions_are_equal_and_every_cell_has_its_own_id(task: dict[str, Any], axis: dict[str, Any]) -> None:
    suite = grid(task, **axis)
    first, again = make_cells(suite), make_cells(suite)
    assert first == again
    assert len({cell.id for cell in first}) == len(first)


@every_task
@every_grid
def test_there_are_as_many_cells_as_positions(task: dict[str, Any], axis: dict[str, Any]) -> None:
    suite = grid(task, **axis)
    found = make_cells(suite)
    assert {tokens: sum(cell.context_tokens == tokens for cell in found) for tokens in suite.context_tokens} == suite.num_positions


@every_task
@every_grid
@given(seed=st.integers(0, 2**32), replicate=st.integers(0, 5))
def test_every_depth_is_in_range_and_the_first_facts_is_the_cells(
    task: dict[str, Any], axis: dict[str, Any], seed: int, replicate: int
) -> None:
    for cell in make_cells(grid(task, **axis), seed=seed, replicate=replicate):
        assert all(0 <= fact.depth_percent <= 100 for fact in cell.facts)
        assert cell.depth_percent == cell.facts[0].depth_percent


@every_task
@every_grid
def test_what_is_asked_depends_on_seed_replicate_and_sample_only(task: dict[str, Any], axis: dict[str, Any]) -> None:
    suite = grid(task, **axis)
    other = suite.model_copy(update={"name": "other", "context_tokens": (3000,), "noise": "Rain falls.", "haystack": ()})
    for cell in [*make_cells(suite), *make_cells(other, identity="y")]:
        question = ask_for(suite, seed=0, replicate=0, sample=cell.sample)
        assert [fact.text for fact in cell.facts] == [fact.text for fact in question.facts]
        assert (cell.question, cell.answer_prefix, cell.labels) == (question.question, question.answer_prefix, question.labels)


def test_seed_replicate_and_sample_each_change_what_is_drawn() -> None:
    suite = grid(CHAIN, samples=2)
    questions = {
        ask_for(suite, seed=seed, replicate=replicate, sample=sample) for seed in (0, 1) for replicate in (0, 1) for sample in (0, 1)
    }
    assert len(questions) == 8


def test_samples_have_places_of_their_own_the_same_at_every_length() -> None:
    suite = grid(MULTI, samples=15)
    by_length = {tokens: [cell for cell in make_cells(suite) if cell.context_tokens == tokens] for tokens in suite.context_tokens}
    short, long = ([tuple(fact.depth_percent for fact in cell.facts) for cell in found] for found in by_length.values())
    assert short == long
    assert len(set(short)) == 15
    assert [cell.sample for cell in by_length[1000]] == list(range(15))
    spread = [depth for depths in short for depth in depths]
    assert min(spread) < 20
    assert max(spread) > 80


@given(seed=st.integers(0, 2**32))
def test_facts_in_order_stay_in_order_at_random_places(seed: int) -> None:
    for cell in make_cells(grid(CHAIN, samples=3), seed=seed):
        depths = [fact.depth_percent for fact in cell.facts]
        assert depths == sorted(depths)


@given(depth=st.floats(0, 100))
def test_spaced_facts_follow_the_original_s_formula(depth: float) -> None:
    depth = round(depth, 2)
    for task, facts in ((MULTI, 3), (CHAIN, 4)):
        for cell in make_cells(make_suite(task=task, depth_percent=[depth])):
            wanted = [depth + place * (100 - depth) / facts for place in range(facts)]
            assert [fact.depth_percent for fact in cell.facts] == pytest.approx(wanted, abs=0.0006)


def test_spread_at_random_only_the_first_fact_moves() -> None:
    found = make_cells(make_suite(task=MULTI | {"spread": "random"}))
    assert [cell.depth_percent for cell in found] == [0, 50, 100] * 2
    assert len({tuple(fact.depth_percent for fact in cell.facts[1:]) for cell in found}) == 1


def test_a_lattice_has_the_same_positions_at_every_length_and_its_end() -> None:
    suite = make_suite(depth_percent=None, lattice_tokens=512, context_tokens={"from": 512, "to": 4096, "count": 8})
    found = make_cells(suite)
    for tokens in suite.context_tokens:
        positions = [cell.facts[0].position_tokens for cell in found if cell.context_tokens == tokens]
        assert positions == [*range(0, tokens, 512), None]
    assert suite.num_positions == {tokens: tokens // 512 + 1 for tokens in range(512, 4097, 512)}
    for cell in found:
        position = cell.facts[0].position_tokens
        assert cell.depth_percent == (100 if position is None else round(100 * position / cell.context_tokens, 3))


def test_off_a_lattice_depths_alone_decide() -> None:
    assert all(fact.position_tokens is None for cell in make_cells(make_suite(task=MULTI)) for fact in cell.facts)


def test_an_id_is_that_of_the_asked_question() -> None:
    suite = make_suite()
    cell = make_cells(suite)[0]
    assert dataclasses.replace(cell, draft="another guess").id == cell.id
    for change in (
        {"question": "Where?"},
        {"answer_prefix": "It"},
        {"context_tokens": 1001},
        {"depth_percent": 1.0},
        {"sample": 1},
        {"seed": 1},
        {"replicate": 1},
        {"identity": "y"},
        {"scorer": "all"},
        {"labels": ("cellar",)},
        {"facts": (dataclasses.replace(cell.facts[0], depth_percent=1.0),)},
    ):
        assert dataclasses.replace(cell, **change).id != cell.id, change  # type: ignore[arg-type]


def test_known_facts_are_all_of_a_file_and_all_that_is_drawn() -> None:
    assert [fact.references for fact in known_facts(make_suite(task=MULTI), seed=0, replicate=0)] == [("Coins",), ("Maps",), ("Keys",)]
    suite = grid(CHAIN, samples=4)
    known = {fact.text for fact in known_facts(suite, seed=3, replicate=1)}
    assert known == {fact.text for cell in make_cells(suite, seed=3, replicate=1) for fact in cell.facts}
    assert len(known) == 16


def test_lengths_and_depths_can_be_given_by_their_ends() -> None:
    suite = make_suite(context_tokens={"from": 1000, "to": 16000, "count": 35}, depth_percent={"from": 0, "to": 100, "count": 35})
    assert len(suite.context_tokens) == len(suite.depth_percent) == 35
    assert suite.context_tokens[:2] == (1000, 1441)
    assert suite.context_tokens[-1] == 16000
    assert suite.depth_percent[17] == 50
    steps = {round(later - earlier, 2) for earlier, later in zip(suite.depth_percent, suite.depth_percent[1:], strict=False)}
    assert steps == {2.94}


def test_sigmoid_depths_are_a_logistic_curve_with_the_ends_kept() -> None:
    depths = make_suite(depth_percent={"from": 0, "to": 100, "count": 35, "spacing": "sigmoid"}).depth_percent
    assert (depths[0], depths[17], depths[-1]) == (0, 50, 100)
    assert list(depths) == sorted(set(depths))
    assert depths[1] == pytest.approx(100 / (1 + math.exp(-0.1 * (100 / 34 - 50))), abs=0.001)
    assert [round(100 - depth, 3) for depth in reversed(depths)] == pytest.approx(list(depths))
    assert depths[2] - depths[1] < 0.2 * (depths[18] - depths[17]), "denser at the ends"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"kind": "singel", "needles": {"needles": [NEEDLE]}}}, "task.*singel.*'single', 'multi'"),
        ({"task": {"kind": "single"}}, "task.needles: required, and missing"),
        ({"task": SINGLE | {"spread": "random"}}, "task.*spread: unknown field"),
        ({"noise": "Rain falls."}, "one text to be hidden in: haystack, or noise, or the task's lines .task single has no lines"),
        ({"haystack": []}, "one text to be hidden in"),
        ({"haystack": [], "noise": " \n"}, "noise is empty"),
        ({"task": PAIRS}, "one text to be hidden in.*the lines of task key_value"),
        ({"scorer": "label"}, "scorer label reads labels that task single does not have"),
        ({"scorer": "chain_progress"}, "scorer chain_progress reads labels"),
        ({"task": CHAIN, "scorer": "label"}, "scorer label reads labels that task uuid_chain does not have"),
        ({"scorer": "bleu"}, "scorer"),
        ({"depth_percent": []}, "needs one of depth_percent, lattice_tokens and samples, given: none"),
        ({"samples": 3}, r"needs one of .* given: \['depth_percent', 'samples'\]"),
        ({"lattice_tokens": 10, "samples": 3, "depth_percent": []}, r"given: \['lattice_tokens', 'samples'\]"),
        ({"lattice_tokens": 0, "depth_percent": []}, "lattice_tokens"),
        ({"samples": 0, "depth_percent": []}, "samples"),
        ({"depth_percent": [10, 101]}, "depth_percent 101 is outside 0 to 100"),
        ({"depth_percent": [10, 10]}, "depth_percent names a value twice"),
        ({"context_tokens": [0]}, "context_tokens 0 must be at least 1"),
        ({"context_tokens": []}, "context_tokens"),
        ({"context_tokens": {"from": 1, "to": 3, "count": 9}}, "context_tokens names a value twice"),
        ({"context_tokens": {"to": 2000, "count": 4}}, "spaced values need from < to"),
        ({"context_tokens": {"from": 10, "to": 2000, "count": 4, "spacing": "sigmoid"}}, "spacing linear, given"),
        ({"depth_percent": {"from": 50, "to": 50, "count": 4}}, "spaced values need from < to"),
        ({"depth_percent": {"from": 0, "to": 100, "count": 1}}, "count of at least 2"),
        ({"depth_percent": {"from": 0, "to": 100, "count": 2.5}}, "count of at least 2"),
        ({"depth_percent": {"from": 0, "to": 100, "count": 3, "spacing": "cubic"}}, "spacing linear or sigmoid"),
        ({"depth_percent": {"from": 0, "to": 100, "step": 10}}, "spaced values need"),
        ({"depth_percent": {"from": 20, "to": 80, "count": 5, "spacing": "sigmoid"}}, "from 0 to 100 percent, given from 20 to 80"),
        ({"prompt": {"after": "Answer."}}, "must contain {question}"),
    ],
)
def test_a_suite_that_cannot_be_asked_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        make_suite(**changes)
    assert str(caught.value).startswith("suite.yaml: ")
    assert "\n" not in str(caught.value)
