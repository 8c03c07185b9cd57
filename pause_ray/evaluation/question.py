"""A question, the facts that it asks about, and the base class of the tasks that draw questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pause_ray.core.spec import Spec
from pause_ray.text.prompts import HiddenText

LabelScorer = Literal["label", "chain_progress"]
"""Scorers that read ``Question.labels``."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A text that is hidden in a context."""

    text: str
    """Text that is inserted as a sentence, or a line, of its own."""
    references: tuple[str, ...] = ()
    """Strings that a right answer contains; empty for a distractor or an intermediate step."""


@dataclass(frozen=True, kw_only=True)
class PlacedFact(Fact, HiddenText):
    """A fact of one cell and its place."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """The facts that are hidden and the question about them, drawn by a task from a seed."""

    facts: tuple[Fact, ...]
    """At least one. The first stands at the cell's depth."""
    question: str
    """Text of the question, which follows the context."""
    answer_prefix: str = ""
    """Beginning of the answer, which is part of the prompt."""
    draft: str = ""
    """Likely answer, verified as a speculative draft; it never changes an answer."""
    labels: tuple[str, ...] = ()
    """All answers that the task knows, for the ``label`` scorer; the steps that lead to the answer, in order, for ``chain_progress``."""
    spread: Literal["random", "spaced"] = "random"
    """Places of the other facts when the first has a depth: anywhere, or evenly spaced from there to the end."""
    in_order: bool = False
    """Whether the facts keep their order in the text wherever they are put."""

    @property
    def references(self) -> tuple[str, ...]:
        """The references of all facts, in their order."""
        return tuple(reference for fact in self.facts for reference in fact.references)


class Task(Spec):
    """The base class of tasks; a task draws its question from a seed."""

    label_scorer: ClassVar[LabelScorer | None] = None
    """The scorer that the question's labels are for; None for tasks without labels."""

    @property
    def has_filler(self) -> bool:
        """Whether the task brings its own filler lines, so that its suite needs no haystack."""
        return False
