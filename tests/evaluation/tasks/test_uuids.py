"""UUIDs: one under a name; chains that lead from the first, which is asked, to the last."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError
from pause_ray.evaluation.scorers import Score, grade
from pause_ray.evaluation.tasks.keys_values import UuidChainTask, UuidTask

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
seeds = st.integers(0, 2**32)


@given(seed=seeds)
def test_the_question_and_the_fact_share_a_name(seed: int) -> None:
    question = UuidTask(kind="uuid").question(random.Random(seed), replicate=0)
    (fact,) = question.facts
    assert UUID.findall(fact.text) == list(fact.references)
    (name,) = re.findall(r"vault ([a-z]+-[a-z]+)", fact.text)
    assert name in question.question


@given(seed=seeds, length=st.integers(2, 8))
def test_a_chain_leads_from_the_question_to_the_reference(seed: int, length: int) -> None:
    question = UuidChainTask(kind="uuid_chain", chain_length=length).question(random.Random(seed), replicate=0)
    leads = dict(UUID.findall(fact.text) for fact in question.facts)
    assert len(leads) == len(question.facts) == length - 1
    (place,) = UUID.findall(question.question)
    walked = []
    while place in leads:
        place = leads[place]
        walked.append(place)
    assert question.references == (walked[-1],)
    assert question.labels == tuple(walked)
    assert (question.in_order, question.spread) == (True, "spaced")


@given(seed=seeds, reached=st.integers(0, 4))
def test_a_chain_is_scored_by_how_far_the_answer_got(seed: int, reached: int) -> None:
    question = UuidChainTask(kind="uuid_chain").question(random.Random(seed), replicate=0)
    answer = f"It leads to {question.labels[reached - 1].upper()}." if reached else question.question
    score = grade(answer, question.facts, scorer="chain_progress", labels=question.labels, question=question.question)
    assert isinstance(score, Score)
    assert score.value == reached / 4


def test_a_chain_has_a_step() -> None:
    with pytest.raises(SpecError, match="chain_length"):
        UuidChainTask.parse({"kind": "uuid_chain", "chain_length": 1}, origin="test")
