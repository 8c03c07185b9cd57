"""Scores follow what was hidden and asked, by the rule of their scorer and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.evaluation.question import Fact
from pause_ray.evaluation.scorers import Score, Unscored, grade
from pause_ray.evaluation.suite import Scorer

KEYWORDS = ("sandwich", "Dolores Park", "sunny day")
STOCK = Fact(text="The best thing is to eat a sandwich and sit in Dolores Park on a sunny day.", references=KEYWORDS)
DISTRACTOR = Fact(text="The worst thing is to stand in the rain.")
NUMBERS = tuple(Fact(text=f"A number is {number}.", references=(number,)) for number in ("1234567", "7654321", "1111111"))
PLACES = ("balcony", "cellar", "pantry")


def score(response: str, facts: tuple[Fact, ...], scorer: Scorer, *, labels: tuple[str, ...] = (), question: str = "") -> Score:
    result = grade(response, facts, scorer=scorer, labels=labels, question=question)
    assert isinstance(result, Score)
    return result


def told(response: str, place: str, *, question: str = "Where is Mina now?") -> float:
    return score(response, (Fact(text="", references=(place,)),), "label", labels=PLACES, question=question).value


def test_the_needle_itself_is_a_full_answer() -> None:
    assert score(STOCK.text, (STOCK,), "keywords") == Score(value=1.0, fact_scores=(1.0,))


@pytest.mark.parametrize("silence", ["", " \n\t", "I don't know."])
@pytest.mark.parametrize("scorer", ["keywords", "all", "exact", "string_match"])
def test_an_answer_without_references_scores_zero_and_is_scored(silence: str, scorer: Scorer) -> None:
    assert score(silence, (STOCK,), scorer) == Score(value=0.0, fact_scores=(0.0,))


def test_case_line_breaks_and_unicode_forms_do_not_matter() -> None:
    assert score("Eat a SANDWICH in dolores\n  park\u00a0, on a sunny\u2003day", (STOCK,), "keywords").value == 1.0
    wide = Fact(text="The word is caf\u00e9.", references=("caf\u00e9",))
    assert score("CAFE\u0301", (wide,), "keywords").value == 1.0


@given(kept=st.sets(st.sampled_from(KEYWORDS)), noise=st.text(alphabet="xyz .,", max_size=30))
def test_the_score_is_the_share_of_keywords_whatever_stands_around_them(kept: set[str], noise: str) -> None:
    answer = noise.join(["", *sorted(kept), ""])
    share = len(kept) / len(KEYWORDS)
    assert score(answer, (STOCK,), "keywords").value == score(answer, (STOCK,), "string_match").value == share
    assert score(answer, (STOCK,), "all").value == (share == 1)


@given(
    kept=st.sets(st.sampled_from([0, 1, 2])),
    scorer=st.sampled_from(["keywords", "all", "exact", "string_match", "label", "chain_progress"]),
)
def test_every_fact_is_scored_by_itself_under_every_scorer(kept: set[int], scorer: Scorer) -> None:
    answer = " ".join(NUMBERS[place].references[0] for place in sorted(kept))
    graded = score(answer, (*NUMBERS, DISTRACTOR), scorer, labels=("1234567", "9"))
    assert graded.fact_scores == (*(float(place in kept) for place in range(3)), None)


def test_the_share_is_of_references_and_not_of_facts() -> None:
    graded = score("7654321", (STOCK, NUMBERS[1]), "keywords")
    assert graded == Score(value=1 / 4, fact_scores=(0.0, 1.0))


def test_string_match_is_letter_by_letter_where_keywords_are_not() -> None:
    assert score("dolores\npark, a SANDWICH", (STOCK,), "string_match").value == 1 / 3
    assert score("dolores\npark, a SANDWICH", (STOCK,), "keywords").value == 2 / 3


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        # RULER's metric: four values, each a quarter, in any order and with anything around them
        ("7654321, 1234567 and 1111111 are", 3 / 3),
        ("They are 1234567 and 7654321.", 2 / 3),
        ("12345678", 1 / 3),
        ("123456", 0.0),
        ("1 234 567", 0.0),
    ],
)
def test_rulers_string_match(answer: str, value: float) -> None:
    assert score(answer, NUMBERS, "string_match").value == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("1234567 7654321 1111111", 1.0),
        (" 1234567, 7654321, and 1111111.\n", 1.0),
        ("1234567, 1111111, 7654321", 0.0),
        ("They are 1234567, 7654321, 1111111", 0.0),
        ("1234567, 7654321", 0.0),
    ],
)
def test_exact_is_the_references_in_order_and_nothing_else(answer: str, value: float) -> None:
    assert score(answer, NUMBERS, "exact").value == value


def test_exact_takes_an_and_that_belongs_to_a_reference() -> None:
    salt = Fact(text="The shelf holds salt and pepper.", references=("salt and pepper",))
    assert score("Salt and pepper.", (salt,), "exact").value == 1.0


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("The most recent location of Mina is the cellar.", 1.0),
        ("CELLAR", 1.0),
        ("cellar. Before, it was the balcony.", 1.0),  # only the first sentence counts
        ("She went from the balcony to the cellar.", 0.0),  # two labels
        ("balcony. cellar.", 0.0),
        ("She is downstairs.", 0.0),
        ("", 0.0),
        ("cellar\n<example>\nMina went to the balcony", 1.0),
        ("cellar <context> pantry", 1.0),
        ("cellar Question: is it the pantry", 1.0),
        ("To answer the question, she is in the cellar", 1.0),
    ],
)
def test_babilongs_rule_wants_one_label_in_the_first_sentence(answer: str, value: float) -> None:
    assert told(answer, "cellar") == value


def test_labels_of_the_question_do_not_count() -> None:
    question = "Where was the teapot before it was in the balcony?"
    answer = "Before the balcony the teapot was in the cellar."
    assert told(answer, "cellar", question=question) == 1.0
    assert told(answer, "cellar", question="Where was the teapot?") == 0.0
    assert told("The balcony", "cellar", question=question) == 0.0


@pytest.mark.parametrize(("answer", "value"), [("b", 1 / 3), ("c, over b", 2 / 3), ("d", 1.0), ("a", 0.0), ("B then D", 1.0)])
def test_furthest_goes_by_the_last_label_reached(answer: str, value: float) -> None:
    assert score(answer, (Fact(text="c leads to d", references=("d",)),), "chain_progress", labels=("b", "c", "d")).value == value


@pytest.mark.parametrize("scorer", ["keywords", "all", "exact", "string_match", "label", "chain_progress"])
def test_without_references_nothing_can_be_scored(scorer: Scorer) -> None:
    result = grade("an answer", (DISTRACTOR,), scorer=scorer, labels=PLACES)
    assert isinstance(result, Unscored)
    assert "no references" in result.reason


@pytest.mark.parametrize("scorer", ["label", "chain_progress"])
def test_without_labels_their_scorers_do_not_score(scorer: Scorer) -> None:
    result = grade("cellar", NUMBERS, scorer=scorer)
    assert isinstance(result, Unscored)
    assert f"scorer {scorer}" in result.reason


def test_the_rubric_has_the_papers_levels_for_three_keywords() -> None:
    assert [Score(value=found / 3, fact_scores=()).rubric for found in range(4)] == [1, 4, 7, 10]


@given(shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_the_rubric_lies_between_1_and_10_and_never_turns_the_order_round(shares: tuple[float, float]) -> None:
    low, high = sorted(shares)
    assert 1 <= Score(value=low, fact_scores=()).rubric <= Score(value=high, fact_scores=()).rubric <= 10
