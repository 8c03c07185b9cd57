"""Training facts: every draw fills the slots, and none may touch the evaluation's."""

from __future__ import annotations

import random

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.data.spec import CorpusSpec, FactFile, FactSpec, draw_fact, shared_with_evaluation

FACTS = FactFile.parse(
    {
        "facts": [
            {
                "needle": "The key of {room} hangs {place}.",
                "question": "Where does the key of {room} hang?",
                "slots": {"room": ["the attic", "the cellar"], "place": ["behind the clock", "under the bench"]},
            },
            {"needle": "{name} keeps bees.", "question": "Who keeps bees?", "slots": {"name": ["Ada", "Grace", "Mary"]}},
        ]
    },
    origin="test",
)


def test_every_fact_is_drawn_and_filled() -> None:
    rng = random.Random(1)
    drawn = {draw_fact(FACTS, rng=rng) for _ in range(500)}
    assert len(drawn) == 2 * 2 + 3
    assert not any("{" in fact.needle + fact.question for fact in drawn)
    for fact in drawn:
        if fact.needle.startswith("The key"):
            assert any(room in fact.needle and room in fact.question for room in ("the attic", "the cellar"))


def test_facts_for_validation_are_others() -> None:
    slots = {"room": tuple(f"room {number}" for number in range(40)), "place": ("behind the clock", "under the bench")}
    facts = FactFile(facts=(FactSpec(needle="The key of {room} hangs {place}.", question="Where is the key of {room}?", slots=slots),))
    rng = random.Random(2)
    held_out, others = ({draw_fact(facts, rng=rng, held_out=wanted) for _ in range(800)} for wanted in (True, False))
    assert held_out
    assert len(held_out) + len(others) == 80
    assert not {fact.needle for fact in held_out} & {fact.needle for fact in others}


def test_too_few_facts_to_hold_some_out_are_an_error() -> None:
    one = FactFile(facts=(FactSpec(needle="{name} keeps bees.", question="Who keeps bees?", slots={"name": ("Ada",)}),))
    with pytest.raises(SpecError, match=r"corpus.facts: too few .* corpus.validation_rows: 0"):
        for wanted in (True, False):
            draw_fact(one, rng=random.Random(0), held_out=wanted)


@pytest.mark.parametrize(
    ("needles", "keywords", "told"),
    [
        ([], ["Behind  the CLOCK"], "behind the clock"),
        ([], ["keeps"], "keeps"),
        (["grace keeps\nbees."], [], "grace keeps"),
        (["\uff27race keeps\u00a0bees\u2024"], [], "race keeps"),
        ([], ["\uff4beeps"], "keeps bees"),
        (["It is said that the key of the attic hangs under the bench."], [], "under the bench"),
    ],
)
def test_a_shared_needle_or_keyword_is_named(needles: list[str], keywords: list[str], told: str) -> None:
    found = shared_with_evaluation(FACTS, needles=needles, keywords=keywords)
    assert len(found) == 1
    assert told in found[0]


def test_other_facts_are_not_shared() -> None:
    assert (
        shared_with_evaluation(FACTS, needles=["Hopper keeps bees.", "The key of the attic hangs."], keywords=["sandwich", "clocks"]) == []
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"needle": "{name} lives in {town}."}, "town"),
        ({"slots": {"name": ["Ada"], "hat": ["red"]}}, "hat"),
        ({"slots": {"name": []}}, "no words"),
        ({"question": "Does {name} keep bees?"}, "tells the answer"),
    ],
)
def test_a_fact_whose_slots_do_not_fit_is_refused(change: dict[str, object], told: str) -> None:
    good = {"needle": "{name} keeps bees.", "question": "Who keeps bees?", "slots": {"name": ["Ada"]}}
    assert FactSpec.parse(good, origin="facts.yaml").needle
    with pytest.raises(SpecError, match=f"facts.yaml.*{told}"):
        FactSpec.parse({**good, **change}, origin="facts.yaml")


@pytest.mark.parametrize(("change", "told"), [({"facts": None}, "needs facts"), ({"min_context_tokens": 4096}, "exceeds sequence_len")])
def test_a_corpus_whose_fields_do_not_fit_is_refused(change: dict[str, object], told: str) -> None:
    good = {"sources": [{"path": "essays"}], "facts": FACTS.resolved()}
    assert CorpusSpec.parse(good, origin="trial.yaml").num_sequences == 480
    with pytest.raises(SpecError, match=f"trial.yaml.*{told}"):
        CorpusSpec.parse({**good, **change}, origin="trial.yaml")
