"""RULER's family: counts and kinds as in its published configuration, whose names the suites carry."""

from __future__ import annotations

import random
import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError
from pause_ray.evaluation.tasks.ruler import RulerNiahTask, VariableTrackingTask

seeds = st.integers(0, 2**32)
counts = st.integers(1, 5)


@given(seed=seeds, keys=counts, values=counts, queries=counts)
def test_every_key_has_its_values_and_the_asked_come_first(seed: int, keys: int, values: int, queries: int) -> None:
    keys = max(keys, queries)
    question = RulerNiahTask(kind="ruler_niah", keys=keys, values=values, queries=queries).question(random.Random(seed), replicate=0)
    assert len(question.facts) == keys * values
    assert [bool(fact.references) for fact in question.facts] == [True] * (queries * values) + [False] * ((keys - queries) * values)
    names = [re.findall(r"[a-z]+-[a-z]+", fact.text)[0] for fact in question.facts]
    asked = list(dict.fromkeys(names))[:queries]
    assert len(set(names)) == keys
    assert re.findall(r"[a-z]+-[a-z]+", question.question) == re.findall(r"[a-z]+-[a-z]+", question.answer_prefix) == asked


def test_a_question_for_one_value_is_in_the_singular() -> None:
    one = RulerNiahTask(kind="ruler_niah").question(random.Random(0), replicate=0)
    several = RulerNiahTask(kind="ruler_niah", values=2).question(random.Random(0), replicate=0)
    assert "code number of" in one.question
    assert "code numbers of" in several.question
    assert one.answer_prefix.endswith(" is")
    assert several.answer_prefix.endswith(" are")


def test_kinds_of_keys_and_values() -> None:
    task = RulerNiahTask(kind="ruler_niah", key_kind="uuids", value_kind="uuids")
    fact = task.question(random.Random(0), replicate=0).facts[0]
    key, value = re.findall(r"[0-9a-f-]{36}", fact.text)
    assert fact.references == (value,)
    assert uuid.UUID(key) != uuid.UUID(value)
    number = RulerNiahTask(kind="ruler_niah").question(random.Random(0), replicate=0).references
    assert re.fullmatch(r"[1-9]\d{6}", number[0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"keys": 2, "queries": 3}, "queries 3 exceed keys 2"),
        ({"keys": 0}, "keys"),
        ({"values": 0}, "values"),
        ({"key_kind": "numbers"}, "key_kind"),
        ({"filler": "noise"}, "filler"),
        ({"filler": "needles", "value_kind": "words"}, "needs value_kind numbers or uuids"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RulerNiahTask.parse({"kind": "ruler_niah", **data}, origin="test")


@given(seed=seeds, chains=st.integers(1, 4), hops=st.integers(1, 5))
def test_following_the_assignments_gives_the_answer(seed: int, chains: int, hops: int) -> None:
    question = VariableTrackingTask(kind="variable_tracking", chains=chains, hops=hops).question(random.Random(seed), replicate=0)
    assert question.in_order
    assert len(question.facts) == chains * (hops + 1)
    value: dict[str, str] = {}
    for fact in question.facts:
        found = re.fullmatch(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))\.", fact.text)
        assert found is not None
        name, source, number = found.groups()
        assert name not in value
        value[name] = number or value[source]
    asked = re.findall(r"\d{5}", question.question)
    assert len(asked) == 1
    assert len(set(value.values())) == chains
    assert sorted(question.references) == sorted(name for name, number in value.items() if number == asked[0])
    assert question.facts[0].references, "the chain that is asked for begins at the cell's depth"
    assert asked[0] in question.facts[0].text


@given(seed=seeds)
def test_the_number_of_variables_in_the_answer_prefix_is_right(seed: int) -> None:
    question = VariableTrackingTask(kind="variable_tracking", hops=4).question(random.Random(seed), replicate=0)
    assert question.answer_prefix.startswith(f"The {len(question.references)} variables")
