"""Several keys: all in one context, each asked for once, and the context the same for all questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pause_ray.core.errors import SpecError
from pause_ray.evaluation.haystack import ask, load_haystack, prompt_builder
from pause_ray.evaluation.prefix_plan import plan_prefixes, split_for_actors
from pause_ray.evaluation.scorers import Score, grade
from pause_ray.evaluation.suite import Cell, SuiteSpec, cells, known_facts
from pause_ray.evaluation.tasks.keys_values import MOST_FACTS
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import BuiltPrompt
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker
from tests.evaluation.tiny import make_haystack_folder, make_suite, make_tokenizer_folder

NUM_FACTS = 12
DEPTHS = [round(100 * place / (NUM_FACTS - 1), 3) for place in range(NUM_FACTS)]


def multi_key(haystack: Path, **changes: Any) -> SuiteSpec:
    return make_suite(haystack, **({"task": {"kind": "multi_key"}, "context_tokens": [2048], "depth_percent": DEPTHS} | changes))


def asked(suite: SuiteSpec, *, seed: int = 0) -> list[Cell]:
    return cells(suite, identity="x", replicate=0, seed=seed)


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_haystack_folder(tmp_path_factory.mktemp("texts") / "haystack")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return ModelTokenizer.load(make_tokenizer_folder(tmp_path_factory.mktemp("model") / "model"))


def prompts(suite: SuiteSpec, tokenizer: ModelTokenizer, policy: PausePolicy | None, tmp_path: Path) -> list[BuiltPrompt]:
    text = load_haystack(suite, cache=tmp_path, seed=0, replicate=0)
    marker = resolve_marker(tokenizer, policy)
    builder = prompt_builder(text, suite=suite, tokenizer=tokenizer, policy=policy, marker=marker, seed=0)
    return [ask(cell, builder) for cell in asked(suite)]


def test_every_fact_is_asked_for_once_at_its_own_depth_and_all_are_in_every_cell(haystack: Path) -> None:
    found = asked(multi_key(haystack))
    assert [cell.depth_percent for cell in found] == DEPTHS
    assert len({cell.references for cell in found}) == NUM_FACTS
    assert len({cell.id for cell in found}) == NUM_FACTS
    for cell in found:
        assert len(cell.references) == 1
        assert cell.references[0] in cell.facts[0].text
        assert cell.references[0] not in cell.question
        assert {fact.text for fact in cell.facts} == {fact.text for fact in found[0].facts}
        assert {(fact.text, fact.position_tokens) for fact in cell.facts} == {(fact.text, fact.position_tokens) for fact in found[0].facts}


def test_the_value_of_another_key_is_no_answer(haystack: Path) -> None:
    found = asked(multi_key(haystack))
    for cell, other in zip(found, [*found[1:], found[0]], strict=True):
        for said, right in ((cell.references[0], 1.0), (other.references[0], 0.0)):
            score = grade(said, cell.facts, scorer=cell.scorer, labels=(), question=cell.question)
            assert isinstance(score, Score)
            assert score.value == right


def test_other_seeds_hide_other_facts_and_all_of_them_are_known(haystack: Path) -> None:
    suite = multi_key(haystack)
    told = {reference for fact in known_facts(suite, seed=0, replicate=0) for reference in fact.references}
    assert told == {cell.references[0] for cell in asked(suite)}
    assert told.isdisjoint(cell.references[0] for cell in asked(suite, seed=1))


@pytest.mark.parametrize("pauses", [None, PausePolicy(unit="sentence", every=2)])
def test_the_context_is_computed_once(haystack: Path, tokenizer: ModelTokenizer, pauses: PausePolicy | None, tmp_path: Path) -> None:
    built = prompts(multi_key(haystack), tokenizer, pauses, tmp_path)
    planned = plan_prefixes([prompt.ids for prompt in built])
    longest = max(len(prompt.ids) for prompt in built)
    prefilled = sum(each.num_tokens - each.keep_tokens for each in planned)
    assert prefilled < longest + NUM_FACTS * 120, "more than the questions and the last words of the context is computed again"
    assert longest >= 2048


def test_facts_stand_where_their_depths_say_about(haystack: Path, tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    suite = multi_key(haystack, context_tokens=[4096])
    for cell, prompt in zip(asked(suite), prompts(suite, tokenizer, None, tmp_path), strict=True):
        place = (prompt.needle_token - prompt.prefix_tokens) / prompt.content_tokens
        assert abs(100 * place - cell.depth_percent) < 12, (cell.depth_percent, place)
        assert np.array_equal(sorted(prompt.needle_tokens[1:]), prompt.needle_tokens[1:])


def test_one_actor_answers_all_questions_of_a_context(haystack: Path) -> None:
    runs = split_for_actors(asked(multi_key(haystack)), num_actors=2)
    assert [len(run) for run in runs] == [NUM_FACTS]


@pytest.mark.parametrize(
    "grid",
    [
        {"depth_percent": [50]},
        {"depth_percent": {"from": 0, "to": 100, "count": MOST_FACTS + 1}},
        {"depth_percent": [], "samples": 3},
        {"depth_percent": [], "lattice_tokens": 256},
    ],
)
def test_keys_without_several_depths_or_with_more_than_there_are_names_for_are_refused(haystack: Path, grid: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="multi_key hides a fact at every depth"):
        multi_key(haystack, **grid)
