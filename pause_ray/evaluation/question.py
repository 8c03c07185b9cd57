"""One question and the facts it is about, before they have a place. Pure data; knows no grid, no file and no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LabelScorer = Literal["label", "furthest"]
"""Scorers that read ``Question.labels``."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A text that is hidden in a context."""

    text: str
    """Inserted as a sentence, or a line, of its own."""
    references: tuple[str, ...] = ()
    """What of it a right answer contains; none for a distractor or a step on the way."""


@dataclass(frozen=True, kw_only=True)
class PlacedFact:
    """A fact of one cell: what is hidden, and where."""

    text: str
    references: tuple[str, ...]
    depth_percent: float
    """Of the context's haystack tokens; on a lattice, of the asked length."""
    position_tokens: int | None = None
    """Haystack tokens before it, on a lattice; None where ``depth_percent`` decides."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is hidden and asked; drawn by a task from a seed."""

    facts: tuple[Fact, ...]
    """At least one. The first stands at the cell's depth."""
    question: str
    """What is asked after the context."""
    answer_prefix: str = ""
    """Beginning of the answer that is given to the model; part of the prompt."""
    draft: str = ""
    """The answer that is likely: verified as a speculative draft, which never changes an answer."""
    labels: tuple[str, ...] = ()
    """All answers that the task knows, for the ``label`` scorer; what leads to the answer, in order, for ``furthest``."""
    spread: Literal["random", "spaced"] = "random"
    """Where the other facts go when the first has a depth: anywhere, or evenly from there to the end."""
    in_order: bool = False
    """The facts keep their order in the text wherever they are put."""

    @property
    def references(self) -> tuple[str, ...]:
        """Of all facts."""
        return tuple(reference for fact in self.facts for reference in fact.references)
