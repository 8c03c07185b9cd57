"""Domains keep their bounds, read back as they were written, and say what is wrong with them."""

from __future__ import annotations

import math
import random
from collections import Counter
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, Spec
from pause_ray.sweep.search_space import ABSENT, Constraint, Domain, value_at


class Searched(Spec):
    """A spec with domains in it, as a sweep has them."""

    search: dict[str, Domain]


def domain(data: JsonObject) -> Domain:
    return Searched.parse({"search": {"pauses.every": data}}, origin="test").search["pauses.every"]


def draws(data: JsonObject, *, number: int = 400) -> list[Any]:
    source = random.Random(1)
    return [domain(data).draw(source) for _ in range(number)]


DOMAINS: list[JsonObject] = [
    {"grid": [1, 2, 8]},
    {"choice": ["paragraph", "sentence", None]},
    {"uniform": [-1.5, 2]},
    {"loguniform": [1e-5, 1e-2]},
    {"int": [1, 9], "step": 4},
    {"int": [1, 64], "log": True},
    {"quantised": [0.1, 0.5], "step": 0.1},
]


@pytest.mark.parametrize("data", DOMAINS, ids=lambda data: next(iter(data)))
def test_what_is_drawn_lies_within_the_domain(data: JsonObject) -> None:
    its = domain(data)
    low_and_high, listed = its.ends(), its.listed()
    for value in draws(data):
        if listed is not None:
            assert value in listed
        else:
            assert low_and_high[0] <= value <= low_and_high[1]
            assert value == float(f"{value:.6g}")


@pytest.mark.parametrize("data", DOMAINS, ids=lambda data: next(iter(data)))
def test_a_domain_reads_back_as_it_was_written(data: JsonObject) -> None:
    spec = Searched.parse({"search": {"pauses.every": data}}, origin="test")
    assert Searched.parse(spec.resolved(), origin="again") == spec


@pytest.mark.parametrize("data", [data for data in DOMAINS if domain(data).listed() is not None], ids=lambda data: next(iter(data)))
def test_every_listed_value_is_drawn_sooner_or_later(data: JsonObject) -> None:
    listed = list(domain(data).listed() or ())
    drawn = draws(data, number=100 * len(listed))
    assert all(value in drawn for value in listed)


def test_decimal_steps_have_no_binary_dust() -> None:
    assert list(domain({"quantised": [0.1, 0.5], "step": 0.1}).listed() or ()) == [0.1, 0.2, 0.3, 0.4, 0.5]


@given(low=st.integers(1, 50), steps=st.integers(1, 20), step=st.integers(1, 9))
def test_whole_steps_from_a_whole_bound_are_whole_numbers(low: int, steps: int, step: int) -> None:
    values = list(domain({"quantised": [low, low + steps * step], "step": step}).listed() or ())
    assert values == list(range(low, low + steps * step + 1, step))
    assert all(isinstance(value, int) for value in values)


def test_orders_of_magnitude_are_as_likely_as_each_other() -> None:
    logarithms = [math.log10(value) for value in draws({"loguniform": [1e-5, 1e-1]}, number=2000)]
    assert fmean(logarithms) == pytest.approx(-3, abs=0.1)
    halves = Counter(value < 8 for value in draws({"int": [1, 64], "log": True}, number=2000))
    assert halves[True] / 2000 == pytest.approx(0.5, abs=0.07)  # 7.5 is the geometric middle of 0.5 and 64.5, nearly


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"gird": [1]}, r"search\.pauses\.every\.gird: unknown field; did you mean grid\?"),
        ({"grid": []}, r"search\.pauses\.every\.grid"),
        ({"grid": [1, 1]}, r"grid names a value twice"),
        ({"choice": [1, 1]}, r"choice names a value twice"),
        ({}, r"search\.pauses\.every = \{\}: .*just one of grid, choice, uniform, loguniform, int, quantised"),
        ({"grid": [1], "uniform": [0, 1]}, r"just one of grid"),
        ({"uniform": [1, 1]}, r"uniform \[1, 1\]: the first bound must be below the second"),
        ({"uniform": [2]}, r"search\.pauses\.every\.uniform\.1: required, and missing"),
        ({"loguniform": [0, 1]}, r"orders of magnitude begin above zero"),
        ({"int": [1, 2.5]}, r"search\.pauses\.every\.int\.1 = 2\.5"),
        ({"int": [1, 8], "step": 2}, r"not a whole number of steps of 2 from 1 to 8"),
        ({"int": [0, 8], "log": True}, r"orders of magnitude begin at 1"),
        ({"int": [1, 9], "log": True, "step": 2}, r"log and step 2"),
        ({"quantised": [0, 1], "step": 0.3}, r"not a whole number of steps of 0\.3 from 0 to 1"),
        ({"quantised": [0, 1], "step": 0}, r"search\.pauses\.every\.step = 0"),
    ],
)
def test_a_mistake_names_path_value_and_rule(data: JsonObject, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        domain(data)


TRIAL: JsonObject = {"train": {"lora": {"rank": 8, "alpha": 16}, "quantize": None}, "pauses": None, "name": "x"}


def holds(data: JsonObject) -> bool | None:
    return Constraint.parse(data, origin="test").holds(TRIAL)


@pytest.mark.parametrize(
    ("relation", "than", "times", "expected"),
    [
        ("at_least", "train.lora.rank", 2, True),
        ("at_least", "train.lora.rank", 2.5, False),
        ("at_most", 16, 1, True),
        ("at_most", 15.5, 1, False),
        ("equal", "train.lora.rank", 2, True),
        ("equal", "train.lora.rank", 1, False),
        ("different", "train.lora.rank", 1, True),
        ("different", 16, 1, False),
    ],
)
def test_a_constraint_compares_a_value_with_a_multiple_of_another(relation: str, than: Any, times: float, expected: bool) -> None:
    assert holds({"path": "train.lora.alpha", "is": relation, "than": than, "times": times}) is expected


def test_a_constraint_says_nothing_of_values_that_a_trial_lacks() -> None:
    assert value_at(TRIAL, "pauses.every") is ABSENT
    assert holds({"path": "train.lora.rank", "is": "at_least", "than": "pauses.every"}) is None


def test_texts_and_null_can_be_equal_but_not_larger() -> None:
    assert holds({"path": "name", "is": "different", "than": "train.quantize"}) is True
    with pytest.raises(SpecError, match=r"train\.quantize at_least 3: train\.quantize is null, which is no number"):
        holds({"path": "train.quantize", "is": "at_least", "than": 3})


def test_a_constraint_reads_back_as_it_was_written() -> None:
    data = {"path": "train.lora.alpha", "is": "at_least", "than": "train.lora.rank", "times": 2.0}
    assert Constraint.parse(data, origin="test").resolved() == data
    with pytest.raises(SpecError, match=r"si: unknown field; fields there: path, is, than, times"):
        Constraint.parse({"path": "a", "si": "equal", "than": 1}, origin="test")
