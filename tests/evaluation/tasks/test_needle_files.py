"""Facts from files: which is asked in which replicate, and which files are refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.evaluation.tasks.needle_files import MultiTask, SingleTask

ANY_DRAW = random.Random(0)
NEEDLES = [{"needle": f"The {colour} door leads to the {room}.", "question": f"Where does the {colour} door lead?", "keywords": [room]}
           for colour, room in (("red", "cellar"), ("blue", "roof"), ("green", "river"))]  # fmt: skip
GROUPS = [
    {"question": f"What is in the {box}?", "needles": {f"{thing} are in the {box}.": [thing] for thing in things}}
    for box, things in (("chest", ("Coins", "Maps", "Keys")), ("drawer", ("Pens", "Nails")))
]


def single(needles: list[dict[str, Any]]) -> SingleTask:
    return SingleTask.parse({"kind": "single", "needles": {"needles": needles}}, origin="test")


def multi(groups: list[dict[str, Any]], **changes: Any) -> MultiTask:
    return MultiTask.parse({"kind": "multi", "groups": {"groups": groups}, **changes}, origin="test")


def test_replicates_ask_for_the_facts_in_turn() -> None:
    asked = [single(NEEDLES).question(ANY_DRAW, replicate=replicate) for replicate in range(4)]
    assert [question.references for question in asked] == [("cellar",), ("roof",), ("river",), ("cellar",)]
    assert asked[1].draft == asked[1].facts[0].text


def test_a_group_is_asked_together_and_keeps_its_facts_apart() -> None:
    question = multi(GROUPS).question(ANY_DRAW, replicate=2)
    assert [fact.references for fact in question.facts] == [("Coins",), ("Maps",), ("Keys",)]
    assert question.spread == "spaced"
    assert not question.in_order
    assert multi(GROUPS, spread="random").question(ANY_DRAW, replicate=0).spread == "random"


def test_facts_of_all_replicates_are_known() -> None:
    assert len(single(NEEDLES).known_facts()) == 3
    assert len(multi(GROUPS).known_facts()) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "Does it lead to the Cellar?"}, "the question already contains the keywords"),
        ({"keywords": ["cellar", "attic"]}, r"the needle does not contain the keywords \['attic'\]"),
        ({"keywords": []}, "keywords"),
        ({"needle": ""}, "needle"),
    ],
)
def test_a_needle_that_cannot_be_asked_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        single([NEEDLES[0] | change])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"question": "Are coins in the chest?"}, r"the question already contains the keywords \['Coins'\]"),
        ({"needles": {"Coins are in the chest.": ["Coins"]}}, "needles"),
        (
            {"needles": {"Coins are in the chest.": ["Coins"], "Maps are in the chest.": ["ink"]}},
            r"does not contain the keywords \['ink'\]",
        ),
        ({"needles": {"Coins are in the chest.": ["Coins"], "Coins are near the chest.": ["Coins"]}}, "contains the keywords"),
        ({"needles": {"Coins are in the chest.": ["Coins"], "Maps are in the chest.": []}}, "no keywords"),
    ],
)
def test_a_group_that_cannot_be_scored_per_fact_is_refused(group: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        multi([GROUPS[0] | group])
