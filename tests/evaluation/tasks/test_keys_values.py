"""Drawn words and numbers: facts' and filler lines' apart, and none within another."""

from __future__ import annotations

import itertools
import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError
from pause_ray.evaluation.tasks.keys_values import (
    ADJECTIVES,
    NOUNS,
    distinct,
    drawn_uuid,
    fact_name,
    fact_number,
    filler_names,
    filler_number,
    listed,
)


def test_no_name_lies_within_another() -> None:
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words)
        assert all(word.isalpha() and word.islower() for word in words)
    assert not [pair for pair in itertools.permutations(ADJECTIVES, 2) if pair[0].endswith(pair[1])]
    assert not [pair for pair in itertools.permutations(NOUNS, 2) if pair[0].startswith(pair[1])]


def test_a_haystack_of_128k_tokens_needs_no_name_twice() -> None:
    # a line of a name and a number has 20 tokens and more
    names = list(itertools.islice(filler_names(random.Random(0)), 131_072 // 20))
    assert len(set(names)) == len(names)


def test_names_of_facts_and_of_lines_are_apart() -> None:
    in_lines = set(itertools.islice(filler_names(random.Random(0)), len(ADJECTIVES) * len(NOUNS)))
    draw = random.Random(1)
    of_facts = {fact_name(draw) for _ in range(5_000)}
    assert not of_facts & in_lines
    assert len(of_facts) > 1_000


@given(seed=st.integers(0, 2**32))
def test_numbers_have_seven_digits_and_facts_have_their_own(seed: int) -> None:
    draw = random.Random(seed)
    facts, lines = {fact_number(draw) for _ in range(50)}, {filler_number(draw) for _ in range(50)}
    assert all(len(number) == 7 and number[0] != "0" and number.isdigit() for number in facts | lines)
    assert not facts & lines


class Extremes(random.Random):
    """Draws the last value that can be drawn."""

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return (start if stop is None else stop) - 1


def test_the_largest_number_still_has_seven_digits() -> None:
    assert len(filler_number(Extremes())) == len(fact_number(Extremes())) == 7


def test_uuids_are_of_version_4_and_come_from_the_draw() -> None:
    one, again, other = (drawn_uuid(random.Random(seed)) for seed in (1, 1, 2))
    assert uuid.UUID(one).version == 4
    assert one == again != other


def test_distinct_draws_again_what_lies_within_another() -> None:
    texts = iter(["abc", "b", "abcd", "xyz"])
    assert distinct([lambda _: next(texts)] * 2, random.Random(0)) == ["abc", "xyz"]


def test_a_list_reads_like_one() -> None:
    assert [listed(list("abc")[:size]) for size in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_more_names_than_there_are_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(SpecError, match=r"only 2 of the 3 .* let it hide fewer"):
        distinct([lambda draw: draw.choice("ab")] * 3, random.Random(0))
