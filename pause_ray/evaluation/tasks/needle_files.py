"""Tasks that hide needles from a file and ask for one of them or for several together.

``single`` follows github.com/gkamradt/LLMTest_NeedleInAHaystack v0.1, ``multi`` its multi-needle variant and that of the pause-tuning paper
(arXiv 2502.20405), with a score for each needle.
"""

from __future__ import annotations

import random
from typing import Literal, Self

from pydantic import Field, model_validator

from pause_ray.core.spec import Spec
from pause_ray.evaluation.question import Fact, Question, Task
from pause_ray.text.segments import plain


class NeedleSpec(Spec):
    """One fact, its question, and the keywords that a right answer contains."""

    needle: str = Field(min_length=1)
    """Sentence that is hidden."""
    question: str = Field(min_length=1)
    """Question, which follows the context."""
    keywords: tuple[str, ...] = Field(min_length=1)
    """Texts whose share in the answer is the score; letter case, white space and Unicode compatibility forms are ignored."""

    @model_validator(mode="after")
    def _question_does_not_answer(self) -> Self:
        check_asked(self.question, {self.needle: self.keywords})
        return self


class NeedleFile(Spec):
    """A file of needles (``eval/needles/*.yaml``)."""

    needles: tuple[NeedleSpec, ...] = Field(min_length=1)
    """Needles; replicate r asks for needle r modulo their number."""


class NeedleGroup(Spec):
    """Several facts that one question asks for."""

    question: str = Field(min_length=1)
    """Text of the question, which follows the context."""
    needles: dict[str, tuple[str, ...]] = Field(min_length=2)
    """Keywords of each sentence that is hidden."""

    @model_validator(mode="after")
    def _facts_are_distinguishable(self) -> Self:
        check_asked(self.question, self.needles)
        for needle, keywords in self.needles.items():
            if not keywords:
                raise ValueError(f"the needle {needle!r} has no keywords; list those of a right answer")
            for other in self.needles:
                shared = [word for word in keywords if other != needle and plain(word) in plain(other)]
                if shared:
                    raise ValueError(f"the needle {other!r} contains the keywords {shared} of {needle!r}; facts could not be scored apart")
        return self


class NeedleGroupFile(Spec):
    """A file of groups of needles (``eval/needles/*.yaml``)."""

    groups: tuple[NeedleGroup, ...] = Field(min_length=1)
    """Groups; replicate r asks for group r modulo their number."""


class SingleTask(Task):
    """One needle of a file, hidden at the cell's depth; replicate r asks for needle r modulo their number."""

    kind: Literal["single"]
    needles: NeedleFile
    """In YAML, the path of a file."""

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """Return the replicate's fact; nothing is drawn."""
        spec = self.needles.needles[replicate % len(self.needles.needles)]
        return Question(facts=(Fact(text=spec.needle, references=spec.keywords),), question=spec.question, draft=spec.needle)

    def known_facts(self) -> tuple[Fact, ...]:
        """Return the facts of every replicate; none of them may occur in training text."""
        return tuple(Fact(text=spec.needle, references=spec.keywords) for spec in self.needles.needles)


class MultiTask(Task):
    """Several facts in one context, one question for all of them, and a score for each."""

    kind: Literal["multi"]
    groups: NeedleGroupFile
    """In YAML, the path of a file; replicate r asks for group r modulo their number."""
    spread: Literal["random", "spaced"] = "spaced"
    """Depths of the facts after the first: ``random``, or ``spaced`` evenly from the first to the end, as in the original."""

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """Return the replicate's group; nothing is drawn."""
        group = self.groups.groups[replicate % len(self.groups.groups)]
        facts = tuple(Fact(text=text, references=keywords) for text, keywords in group.needles.items())
        draft = " ".join(fact.text for fact in facts)
        return Question(facts=facts, question=group.question, draft=draft, spread=self.spread)

    def known_facts(self) -> tuple[Fact, ...]:
        """Return the facts of every replicate; none of them may occur in training text."""
        return tuple(Fact(text=text, references=words) for group in self.groups.groups for text, words in group.needles.items())


def check_asked(question: str, facts: dict[str, tuple[str, ...]]) -> None:
    """Raise ``ValueError`` if a question contains keywords of its answer, or if a fact lacks its keywords."""
    for needle, keywords in facts.items():
        given = [word for word in keywords if plain(word) in plain(question)]
        if given:
            raise ValueError(f"the question already contains the keywords {given}; a model could answer without the context")
        missing = [word for word in keywords if plain(word) not in plain(needle)]
        if missing:
            raise ValueError(f"the needle does not contain the keywords {missing}; no answer from it could score")
