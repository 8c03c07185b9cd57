"""Stories are possible, and their questions have the answer that a second telling of the story gives."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError
from pause_ray.evaluation.scorers import Score, grade
from pause_ray.evaluation.tasks.combine import PLACES, CombineTask

seeds = st.integers(0, 2**32)
GO = r"went to|walked over to|moved to|hurried to"
TAKE = r"picked up|took|grabbed"
DROP = r"put down|left behind|set down"
FACT = re.compile(rf"([A-Z][a-z]+) (?:({GO})|({TAKE})|({DROP})) the ([a-z]+)\.")


def retell(texts: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Where persons are in the end, and all the places where things were; fails where a fact is impossible."""
    where: dict[str, str] = {}
    held: dict[str, set[str]] = defaultdict(set)
    been: dict[str, list[str]] = {}
    for text in texts:
        found = FACT.fullmatch(text)
        assert found is not None, text
        person, goes, takes, _, noun = found.groups()
        if goes:
            assert noun in PLACES
            assert noun != where.get(person), "goes where the person is"
            where[person] = noun
            for thing in held[person]:
                been[thing].append(noun)
        elif takes:
            assert not any(noun in things for things in held.values()), "takes what somebody holds"
            assert been.setdefault(noun, [where[person]])[-1] == where[person], "takes what is elsewhere"
            held[person].add(noun)
        else:
            held[person].remove(noun)
    return where, been


@given(seed=seeds, supporting=st.sampled_from([1, 2, 3]), more=st.integers(0, 20))
def test_the_reference_is_where_the_story_leads(seed: int, supporting: int, more: int) -> None:
    steps = {1: 3, 2: 6, 3: 7}[supporting] + more
    question = CombineTask(kind="combine", supporting=supporting, steps=steps).question(random.Random(seed), replicate=0)  # type: ignore[arg-type]
    assert question.in_order
    assert len(question.facts) == steps
    where, been = retell([fact.text for fact in question.facts])
    (answer,) = question.references
    if supporting == 1:
        (person,) = re.findall(r"Where is (\w+) now", question.question)
        assert where[person] == answer
    elif supporting == 2:
        (thing,) = re.findall(r"Where is the (\w+) now", question.question)
        assert been[thing][-1] == answer
        assert len(been[thing]) == 2, "a thing that was not carried needs one fact only"
    else:
        ((thing, last),) = re.findall(r"Where was the (\w+) before it was in the (\w+)\?", question.question)
        assert been[thing].count(last) == 1
        assert been[thing][been[thing].index(last) - 1] == answer


@given(seed=seeds, supporting=st.sampled_from([1, 2, 3]))
def test_one_fact_names_the_answer_and_others_are_about_others(seed: int, supporting: int) -> None:
    question = CombineTask(kind="combine", supporting=supporting, steps=12).question(random.Random(seed), replicate=0)  # type: ignore[arg-type]
    assert sum(bool(fact.references) for fact in question.facts) == 1
    assert len({fact.text.split()[0] for fact in question.facts}) >= 2


@given(seed=seeds)
def test_every_other_place_is_a_wrong_answer(seed: int) -> None:
    question = CombineTask(kind="combine", supporting=3, steps=12).question(random.Random(seed), replicate=0)
    for place in PLACES:
        score = grade(f"In the {place}.", question.facts, scorer="label", labels=question.labels, question=question.question)
        assert isinstance(score, Score)
        assert score.value == (place in question.references)


def test_no_place_lies_within_another() -> None:
    assert len(PLACES) == 6
    assert not [pair for pair in ((one, other) for one in PLACES for other in PLACES) if pair[0] != pair[1] and pair[0] in pair[1]]


@pytest.mark.parametrize(("supporting", "steps"), [(1, 2), (2, 5), (3, 6)])
def test_a_story_without_room_for_a_distractor_is_refused(supporting: int, steps: int) -> None:
    with pytest.raises(SpecError, match="steps"):
        CombineTask.parse({"kind": "combine", "supporting": supporting, "steps": steps}, origin="test")


def test_a_number_of_supporting_facts_that_is_not_offered_is_refused() -> None:
    with pytest.raises(SpecError, match="supporting"):
        CombineTask.parse({"kind": "combine", "supporting": 4, "steps": 20}, origin="test")


@pytest.mark.parametrize(("supporting", "steps"), [(1, 10), (2, 12), (3, 14)])
def test_to_name_the_place_that_the_text_names_last_is_mostly_wrong(supporting: Literal[1, 2, 3], steps: int) -> None:
    task = CombineTask(kind="combine", supporting=supporting, steps=steps)
    questions = [task.question(random.Random(seed), replicate=0) for seed in range(500)]
    last = [
        [place for fact in asked.facts for place in PLACES if place in fact.text and place not in asked.question][-1] for asked in questions
    ]
    assert sum((place,) == asked.references for place, asked in zip(last, questions, strict=True)) / 500 < 0.45


def test_half_of_the_time_a_thing_is_not_where_its_bearer_went() -> None:
    task = CombineTask(kind="combine", supporting=2, steps=12)
    questions = [task.question(random.Random(seed), replicate=0) for seed in range(500)]
    is_with_bearer = []
    for asked in questions:
        (thing,) = re.findall(r"Where is the (\w+) now", asked.question)
        bearer = next(fact.text.split()[0] for fact in asked.facts if thing in fact.text)
        where, _ = retell([fact.text for fact in asked.facts])
        is_with_bearer.append((where[bearer],) == asked.references)
    assert 0.4 < sum(is_with_bearer) / 500 < 0.6
