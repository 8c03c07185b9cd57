"""What holds for every task that draws its questions, whatever is drawn."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pause_ray.evaluation.question import Question
from pause_ray.evaluation.scorers import Score, grade
from pause_ray.evaluation.suite import Scorer, TaskSpec
from pause_ray.text.segments import plain

TASKS: TypeAdapter[Any] = TypeAdapter(TaskSpec)
DRAWING = [
    {"kind": "uuid"},
    {"kind": "uuid_chain"},
    {"kind": "uuid_chain", "chain_length": 2},
    {"kind": "ruler_niah"},
    {"kind": "ruler_niah", "value_kind": "uuids"},
    {"kind": "ruler_niah", "keys": 4, "values": 2, "queries": 3, "value_kind": "words"},
    {"kind": "ruler_niah", "keys": 4, "queries": 4},
    {"kind": "ruler_niah", "filler": "needles"},
    {"kind": "ruler_niah", "filler": "needles", "key_kind": "uuids", "value_kind": "uuids"},
    {"kind": "variable_tracking"},
    {"kind": "variable_tracking", "chains": 3, "hops": 2},
    {"kind": "key_value"},
    *({"kind": "combine", "supporting": supporting, "steps": 9} for supporting in (1, 2, 3)),
]


def name(data: dict[str, Any]) -> str:
    return "-".join(map(str, data.values()))


every_task = pytest.mark.parametrize("data", DRAWING, ids=name)
# In stories places come again, and a variable is the next one's value: that is what those tasks are about.
retrieving = pytest.mark.parametrize("data", [data for data in DRAWING if data["kind"] not in ("combine", "variable_tracking")], ids=name)
with_lines = pytest.mark.parametrize("data", [data for data in DRAWING if TASKS.validate_python(data).has_filler], ids=name)
seeds = st.integers(0, 2**32)


def draw_question(data: dict[str, Any], seed: int) -> Question:
    question: Question = TASKS.validate_python(data).question(random.Random(seed), replicate=0)
    return question


@every_task
@given(seed=seeds)
def test_the_same_draw_gives_the_same_question(data: dict[str, Any], seed: int) -> None:
    assert draw_question(data, seed) == draw_question(data, seed)


@every_task
def test_different_draws_give_different_questions(data: dict[str, Any]) -> None:
    drawn = {draw_question(data, seed) for seed in range(20)}
    assert len(drawn) == 20


@every_task
@given(seed=seeds)
def test_the_prompt_around_the_context_does_not_tell_the_answer(data: dict[str, Any], seed: int) -> None:
    question = draw_question(data, seed)
    assert question.references
    told = plain(f"{question.question} {question.answer_prefix}")
    assert not [reference for reference in question.references if plain(reference) in told]


@every_task
@given(seed=seeds)
def test_every_reference_is_told_by_its_fact(data: dict[str, Any], seed: int) -> None:
    for fact in draw_question(data, seed).facts:
        assert all(reference in fact.text for reference in fact.references)


@retrieving
@given(seed=seeds)
def test_no_other_fact_tells_a_reference(data: dict[str, Any], seed: int) -> None:
    facts = draw_question(data, seed).facts
    assert len({fact.text for fact in facts}) == len(facts)
    for one, other in itertools.permutations(facts, 2):
        assert not [reference for reference in one.references if plain(reference) in plain(other.text)]


@every_task
@given(seed=seeds)
def test_the_likely_answer_scores_in_full_and_silence_nothing(data: dict[str, Any], seed: int) -> None:
    question = draw_question(data, seed)
    label_scorer = TASKS.validate_python(data).label_scorer
    scorers: list[Scorer] = ["keywords", "all", "string_match", *([label_scorer] if label_scorer else [])]
    for scorer in scorers:
        for answer, value in ((question.draft, 1.0), ("", 0.0), (question.question, 0.0), (question.answer_prefix, 0.0)):
            score = grade(answer, question.facts, scorer=scorer, labels=question.labels, question=question.question)
            assert isinstance(score, Score)
            assert score.value == value, (scorer, answer)


@with_lines
@given(seed=seeds, filler_seed=seeds)
def test_filler_lines_hold_nothing_of_a_question(data: dict[str, Any], seed: int, filler_seed: int) -> None:
    question = draw_question(data, seed)
    lines = list(itertools.islice(TASKS.validate_python(data).filler_lines(random.Random(f"lines {filler_seed}")), 300))
    assert len(set(lines)) == len(lines)
    text = plain("\n".join(lines))
    assert not [reference for reference in question.references if plain(reference) in text]
    for fact in question.facts:
        key = fact.text.split(fact.references[0])[0]
        assert plain(key) not in text, "the key that is asked for stands in a line"


@with_lines
def test_filler_lines_are_one_line_each_and_look_like_the_fact(data: dict[str, Any]) -> None:
    fact = draw_question(data, 0).facts[0].text
    begin, end = fact[:1], fact[-1:]
    for line in itertools.islice(TASKS.validate_python(data).filler_lines(random.Random(0)), 50):
        assert "\n" not in line
        assert (line[:1], line[-1:]) == (begin, end)
        assert len(line.split()) == len(fact.split())


@with_lines
def test_filler_lines_depend_on_their_seed_alone(data: dict[str, Any]) -> None:
    task = TASKS.validate_python(data)
    first, again, other = (list(itertools.islice(task.filler_lines(random.Random(seed)), 20)) for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)
