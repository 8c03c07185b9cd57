"""From an answer to a score, by the reference's keywords. Deterministic; needs no model, so rescoring is free.

On the paper's released answers the keyword share correlates with its GPT judge at 0.965, and the judge's false
positives (answers scored 5 or more without the keywords) are what it does not reproduce.
"""

from __future__ import annotations

from dataclasses import dataclass

from pause_ray.needle.task import NeedleSpec
from pause_ray.text.plain import plain

SCORER = "keywords"


@dataclass(frozen=True, kw_only=True)
class Score:
    """How right an answer is."""

    value: float
    """Share of the keywords that the answer contains, 0 to 1."""

    @property
    def rubric(self) -> int:
        """The share on the protocol's scale of 1 to 10: 1 + 9 × share, rounded half up.

        None of the keywords is 1, all are 10; of three keywords one is 4 and two are 7, as in the paper's rubric.
        """
        return int(1.5 + 9 * self.value)


@dataclass(frozen=True, kw_only=True)
class Unscored:
    """No score, and why: counted and shown, never averaged, never zero."""

    reason: str


def grade(response: str, needle: NeedleSpec) -> Score:
    """Share of ``needle.keywords`` in ``response``; letter case, white space and Unicode compatibility forms aside.

    An empty response is an answer without keywords and scores 0; a response that never came is ``Unscored`` and does
    not get here.
    """
    answer = plain(response)
    found = sum(plain(keyword) in answer for keyword in needle.keywords)
    return Score(value=found / len(needle.keywords))
