"""From an answer to a score, by what was hidden. Deterministic; needs no model, so rescoring is free.

On the pause-tuning paper's released answers the keyword share correlates with its GPT judge at 0.965, and the judge's
false positives (answers scored 5 or more without the keywords) are what it does not reproduce. A beginning of the answer
that was given to the model is part of the prompt, not of what is scored.

A reference occurs wherever its letters do, in a longer word or number too (``42`` in ``1423``), as in RULER, needlehaystack 2.0 and
*Lost in the Middle*. So references should be long; those that tasks draw have five letters or digits at least.
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
"""Where a model goes on to write another example of the task. BABILong cuts at any ``Question``, but after lowering the case."""


class HasReferences(Protocol):
    """A hidden fact."""

    @property
    def references(self) -> tuple[str, ...]:
        """What of it a right answer contains; none for a distractor."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How right an answer is."""

    value: float
    """0 to 1."""
    fact_scores: tuple[float | None, ...]
    """Of each fact, the share of its references that the answer contains, whatever the scorer; None for one without references."""

    @property
    def rubric(self) -> int:
        """The value on the protocol's scale of 1 to 10: 1 + 9 × value, rounded half up.

        None of the keywords is 1, all are 10; of three keywords one is 4 and two are 7, as in the paper's rubric.
        """
        return int(1.5 + 9 * self.value)


@dataclass(frozen=True, kw_only=True)
class Unscored:
    """No score, and why: counted and shown, never averaged, never zero."""

    reason: str


def grade(
    response: str, facts: Sequence[HasReferences], *, scorer: Scorer, labels: Sequence[str] = (), question: str = ""
) -> Score | Unscored:
    """Score one answer.

    An empty response is an answer without references and scores 0; a response that never came is ``Unscored`` and does
    not get here.

    Args:
        response: What the model wrote, without an answer prefix.
        facts: What was hidden, in any order except for ``exact``.
        scorer: ``keywords``: share of all references that occur, after ``text.plain.plain``. ``all``: 1 if all of them do.
            ``exact``: 1 if the answer is the references, in order, and nothing else; letter case, punctuation, white space and
            an ``and`` between them aside (SQuAD's exact match, arXiv 1606.05250, without its rule for articles).
            ``string_match``: RULER's metric for retrieval and tracking (arXiv 2404.06654), the share of references that occur
            letter by letter, case aside. ``label``: BABILong's (arXiv 2406.10149), 1 if the first sentence holds the reference and
            no other label; labels that the question names don't count. ``furthest``: of the labels, which lead one to the next, the
            place of the last one that occurs, as a share (needlehaystack 2.0, which counts the first in the question as well).
        labels: All answers that the task knows; for ``label`` and ``furthest``.
        question: What was asked; for ``label``.

    Returns:
        ``Unscored`` where there are no references or labels to go by.
    """
    references = [reference for fact in facts for reference in fact.references]
    if not references:
        return Unscored(reason="no references: nothing says what a right answer contains")
    if scorer in ("label", "furthest") and not labels:
        return Unscored(reason=f"no labels: scorer {scorer} compares them with the answer")
    normal = _letters if scorer == "string_match" else plain
    fact_scores = tuple(_share(fact.references, response, normal=normal) if fact.references else None for fact in facts)
    share = _share(references, response, normal=normal)
    if scorer in ("keywords", "string_match"):
        value = share
    elif scorer == "all":
        value = float(share == 1)
    elif scorer == "exact":
        value = float(_words(response) == _words(" ".join(references)))
    elif scorer == "label":
        value = float(_labels_told(response, labels=labels, question=question) == {plain(reference) for reference in references})
    else:
        value = _furthest(response, labels=labels)
    return Score(value=value, fact_scores=fact_scores)


def _share(references: Sequence[str], response: str, *, normal: Callable[[str], str]) -> float:
    answer = normal(response)
    return sum(normal(reference) in answer for reference in references) / len(references)


def _letters(text: str) -> str:
    return text.lower()


def _words(text: str) -> list[str]:
    """Words without punctuation and ``and``."""
    kept = "".join(letter for letter in plain(text) if not unicodedata.category(letter).startswith("P"))
    return [word for word in kept.split() if word != "and"]


def _labels_told(response: str, *, labels: Sequence[str], question: str) -> set[str]:
    """Labels in the first sentence that are not in the question."""
    sentence = _EXAMPLE_BEGINS.split(plain(response).split(".")[0])[0]
    return {name for name in map(plain, labels) if name in sentence and name not in plain(question)}


def _furthest(response: str, *, labels: Sequence[str]) -> float:
    answer = plain(response)
    reached: Iterable[int] = (place for place, label in enumerate(labels, start=1) if plain(label) in answer)
    return max(reached, default=0) / len(labels)
