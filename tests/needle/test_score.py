"""Scores follow the keywords and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.needle.score import Score, grade
from pause_ray.needle.task import NeedleSpec
from tests.needle.tiny import STOCK


def test_the_needle_itself_is_a_full_answer() -> None:
    assert grade(STOCK.needle, STOCK) == Score(value=1.0)


@pytest.mark.parametrize("silence", ["", " \n\t", "I don't know."])
def test_an_answer_without_keywords_scores_zero_and_is_scored(silence: str) -> None:
    assert grade(silence, STOCK) == Score(value=0.0)


def test_case_line_breaks_and_unicode_forms_do_not_matter() -> None:
    assert grade("Eat a SANDWICH in dolores\n  park\u00a0, on a sunny\u2003day", STOCK).value == 1.0
    wide = NeedleSpec(needle="The word is caf\u00e9.", question="Which word?", keywords=("caf\u00e9",))
    assert grade("CAFE\u0301", wide).value == 1.0


@given(kept=st.sets(st.sampled_from(STOCK.keywords)), noise=st.text(alphabet="xyz .,", max_size=30))
def test_the_score_is_the_share_of_keywords_whatever_stands_around_them(kept: set[str], noise: str) -> None:
    assert grade(noise.join(["", *sorted(kept), ""]), STOCK).value == len(kept) / len(STOCK.keywords)


def test_the_rubric_has_the_papers_levels_for_three_keywords() -> None:
    assert [Score(value=found / 3).rubric for found in range(4)] == [1, 4, 7, 10]


@given(shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_the_rubric_lies_between_1_and_10_and_never_turns_the_order_round(shares: tuple[float, float]) -> None:
    low, high = sorted(shares)
    assert 1 <= Score(value=low).rubric <= Score(value=high).rubric <= 10
