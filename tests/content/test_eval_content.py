"""What the shipped needles, facts and suites promise to the training and evaluation that use them."""

import itertools
import math
import re
import string
from pathlib import Path

import pytest

from pause_ray.corpus.spec import FactFile, FactSpec
from pause_ray.needle.task import NeedleFile, SuiteSpec
from pause_ray.spec import read_yaml

EVAL = Path(__file__).resolve().parents[2] / "eval"
STOCK = NeedleFile.parse(read_yaml(EVAL / "needles" / "stock.yaml"), origin="stock.yaml")
FACTS = FactFile.parse(read_yaml(EVAL / "needles" / "training_facts.yaml"), origin="training_facts.yaml").facts
SUITES = sorted((EVAL / "suites").glob("*.yaml"))


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.casefold()))


def slots_in(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def all_text(fact: FactSpec) -> str:
    return " ".join([fact.needle, fact.question, *itertools.chain.from_iterable(fact.slots.values())])


def parse_suite(path: Path) -> SuiteSpec:
    data = read_yaml(path)
    data["needles"] = read_yaml(EVAL.parent / data["needles"])
    return SuiteSpec.parse(data, origin=str(path))


def fact_id(fact: FactSpec) -> str:
    return fact.needle[:40]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_is_named_as_its_file_and_keeps_half_of_the_essays_for_training(path):
    suite = parse_suite(path)
    assert suite.name == path.stem
    for source in suite.haystack:
        assert source.from_percent == 50
        assert source.sha256 is not None


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_asks_near_the_beginning_in_the_middle_and_near_the_end(path):
    suite = parse_suite(path)
    assert len(suite.context_tokens) >= 3
    assert max(suite.context_tokens) == 4096
    assert min(suite.depth_percent) <= 10
    assert 50 in suite.depth_percent
    assert max(suite.depth_percent) >= 90


def test_the_first_needle_is_the_stock_one():
    first = STOCK.needles[0]
    assert "San Francisco" in first.question
    assert {word.casefold() for word in first.keywords} == {"sandwich", "dolores park", "sunny day"}


def test_needles_differ_in_place_and_share_no_keyword():
    assert len(STOCK.needles) >= 5
    for one, other in itertools.combinations(STOCK.needles, 2):
        assert one.question != other.question
        for keyword in one.keywords:
            assert keyword.casefold() not in other.needle.casefold()


def test_every_needle_is_one_sentence_with_as_many_keywords_as_the_others():
    for needle in STOCK.needles:
        assert re.fullmatch(r"[A-Z][^.!?]*\.", needle.needle)
        assert needle.question.endswith("?")
        assert len(needle.keywords) == len(STOCK.needles[0].keywords)


@pytest.mark.parametrize("fact", FACTS, ids=fact_id)
def test_a_fact_uses_its_slots_and_its_question_leaves_some_of_them_to_answer(fact):
    assert slots_in(fact.needle) == set(fact.slots)
    assert slots_in(fact.question) < set(fact.slots)
    assert slots_in(fact.question), "nothing says which fact is asked for"
    for choices in fact.slots.values():
        assert len(set(choices)) == len(choices) >= 5


@pytest.mark.parametrize("fact", FACTS, ids=fact_id)
def test_no_question_contains_a_word_of_its_answer(fact):
    identifying = slots_in(fact.question)
    asked = words(fact.question.translate(str.maketrans("{}", "  ")))
    asked = (asked - identifying) | {word for slot in identifying for choice in fact.slots[slot] for word in words(choice)}
    function_words = {"a", "an", "the", "of", "on", "to", "o"}
    for slot in set(fact.slots) - identifying:
        for choice in fact.slots[slot]:
            assert not (words(choice) - function_words) & asked, (slot, choice)


def test_there_are_enough_different_training_facts():
    assert len({fact.needle for fact in FACTS}) >= 8
    assert len({fact.question for fact in FACTS}) == len(FACTS)
    assert sum(math.prod(len(choices) for choices in fact.slots.values()) for fact in FACTS) >= 5_000
    # no template may be so small that a few hundred rows repeat it word for word
    assert min(math.prod(len(choices) for choices in fact.slots.values()) for fact in FACTS) >= 1_000


@pytest.mark.parametrize("fact", FACTS, ids=fact_id)
def test_no_training_fact_shares_a_keyword_or_place_with_the_evaluation(fact):
    taught = all_text(fact)
    for needle in STOCK.needles:
        for keyword in needle.keywords:
            assert keyword.casefold() not in taught.casefold()
            assert not words(keyword) & words(taught), keyword
        places = set(re.findall(r"(?<!^)\b[A-Z][a-z]+", needle.needle))
        assert not places & set(re.findall(r"[A-Z][a-z]+", taught))
    assert "best thing to do" not in taught.casefold()


@pytest.mark.parametrize("fact", FACTS, ids=fact_id)
def test_the_first_and_last_combination_fill_to_sentences(fact):
    for pick in (0, -1):
        chosen = {slot: choices[pick] for slot, choices in fact.slots.items()}
        needle, question = fact.needle.format(**chosen), fact.question.format(**chosen)
        assert re.fullmatch(r"[A-Z][^{}!?]*\.", needle)
        assert re.fullmatch(r"[A-Z][^{}]*\?", question)
