"""Scores an answer by comparing it with references. The scorers are deterministic and need no model, so rescoring is cheap.

On the pause-tuning paper's released answers, the share of keywords correlates with its GPT judge at 0.965. It does not reproduce the
judge's false positives, which are answers that the judge gave 5 or more although they lack the keywords. If the prompt ends with the
beginning of an answer, that beginning is not scored.

A reference also counts when it occurs within a longer word or number (``42`` in ``1423``), as in RULER, needlehaystack 2.0 and
*Lost in the Middle*. References should therefore be long; those that the tasks draw have at least five letters or digits.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pause_ray.needle.task import Scorer
from pause_ray.text.plain import plain

_EXAMPLE_BEGINS = re.compile(r"<context>|<example>|question:")
"""Text with which a model begins another example of the task. BABILong looks for ``Question`` in lower-case text, so it never finds it."""


class HasReferences(Protocol):
    """A hidden fact, as far as scorers need it."""

    @property
    def references(self) -> tuple[str, ...]:
        """Return the texts from the fact that a right answer contains; a distractor has none."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of scoring one answer."""

    value: float
    """The score, from 0 (wrong) to 1 (right)."""
    fact_scores: tuple[float | None, ...]
    """The share of each fact's references that the answer contains, for every scorer; None for a fact without references."""

    @property
    def rubric(self) -> int:
        """Return the value on the needle-in-a-haystack scale from 1 to 10: 1 + 9 × value, rounded half up.

        An answer with no keyword gets 1 and an answer with all of them 10; with one or two of three keywords it gets 4 or 7, as in the
        paper's rubric.
        """
        return int(1.5 + 9 * self.value)


@dataclass(frozen=True, kw_only=True)
class Unscored:
    """An answer that has no score. Such answers are counted and reported; they do not enter averages and are not zeros."""

    reason: str
    """The reason why there is no score."""


def grade(
    response: str, facts: Sequence[HasReferences], *, scorer: Scorer, labels: Sequence[str] = (), question: str = ""
) -> Score | Unscored:
    """Score one answer.

    An empty response contains no reference and scores 0. A cell without a response is unscored, and its caller does not call this.

    Args:
        response: The text that the model wrote, without the answer prefix that the prompt gave it.
        facts: The hidden facts; their order matters only to ``exact``.
        scorer: The rule by which the answer is scored.
            ``keywords``: the share of all references that occur in the answer, after normalisation by ``text.plain.plain``.
            ``all``: 1 if all references occur.
            ``exact``: 1 if the answer consists of the references in their order, ignoring letter case, punctuation, white space and the
            word ``and`` (SQuAD's exact match, arXiv 1606.05250, without its rule for articles).
            ``string_match``: RULER's metric for retrieval and tracking (arXiv 2404.06654): the share of references that occur letter by
            letter, ignoring case.
            ``label``: BABILong's metric (arXiv 2406.10149): 1 if the first sentence contains the reference and no other label; labels
            that the question names are ignored.
            ``furthest``: the labels form a chain, and the score is the position of the last one that occurs, as a share of the chain's
            length (as in needlehaystack 2.0, which also counts the label in the question).
        labels: All possible answers of the task, for ``label`` and ``furthest``.
        question: The question, for ``label``.

    Returns:
        The score, or ``Unscored`` if there are no references, or no labels for a scorer that needs them.
    """
    references = [reference for fact in facts for reference in fact.references]
    if not references:
        return Unscored(reason="no references: nothing says what a right answer contains")
    if scorer in ("label", "furthest") and not labels:
        return Unscored(reason=f"no labels: scorer {scorer} compares them with the answer")
    normal = _lowercase if scorer == "string_match" else plain
    fact_scores = tuple(_share(fact.references, response, normal=normal) if fact.references else None for fact in facts)
    share = _share(references, response, normal=normal)
    if scorer in ("keywords", "string_match"):
        value = share
    elif scorer == "all":
        value = float(share == 1)
    elif scorer == "exact":
        value = float(_words(response) == _words(" ".join(references)))
    elif scorer == "label":
        value = float(_named_labels(response, labels=labels, question=question) == {plain(reference) for reference in references})
    else:
        value = _furthest(response, labels=labels)
    return Score(value=value, fact_scores=fact_scores)


def _share(references: Sequence[str], response: str, *, normal: Callable[[str], str]) -> float:
    answer = normal(response)
    return sum(normal(reference) in answer for reference in references) / len(references)


def _lowercase(text: str) -> str:
    return text.lower()


def _words(text: str) -> list[str]:
    """Return the normalised words without punctuation and without the word ``and``."""
    kept = "".join(letter for letter in plain(text) if not unicodedata.category(letter).startswith("P"))
    return [word for word in kept.split() if word != "and"]


def _named_labels(response: str, *, labels: Sequence[str], question: str) -> set[str]:
    """Return the labels that the first sentence names and the question does not."""
    sentence = _EXAMPLE_BEGINS.split(plain(response).split(".")[0])[0]
    return {name for name in map(plain, labels) if name in sentence and name not in plain(question)}


def _furthest(response: str, *, labels: Sequence[str]) -> float:
    answer = plain(response)
    reached: Iterable[int] = (place for place, label in enumerate(labels, start=1) if plain(label) in answer)
    return max(reached, default=0) / len(labels)
