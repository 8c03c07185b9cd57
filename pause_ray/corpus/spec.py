"""What a corpus is made of and how it becomes training rows. Only specs; reads no file."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from pause_ray.documents import SourceSpec
from pause_ray.spec import Spec
from pause_ray.text.prompts import PromptSpec

SLOT = re.compile(r"\{(\w+)\}")
"""A slot in a fact's sentence or question."""


class FactSpec(Spec):
    """Facts that are hidden in training contexts: every template × every combination of its slots' words."""

    needle: str = Field(min_length=1)
    """The sentence that is hidden, with {slots}; also what the model learns to answer."""
    question: str = Field(min_length=1)
    """What is asked, with the slots that identify the fact but not those that answer it."""
    slots: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Words per slot."""

    @model_validator(mode="after")
    def _slots_fit(self) -> Self:
        in_needle, in_question = set(SLOT.findall(self.needle)), set(SLOT.findall(self.question))
        unknown = sorted((in_needle | in_question) - set(self.slots))
        if unknown:
            raise ValueError(f"{self.needle!r} and its question use the slots {unknown}, which slots does not fill")
        unused = sorted(set(self.slots) - in_needle)
        if unused:
            raise ValueError(f"{self.needle!r} does not use the slots {unused}; remove them")
        empty = sorted(name for name, words in self.slots.items() if not words)
        if empty:
            raise ValueError(f"{self.needle!r} has no words for the slots {empty}")
        if in_needle <= in_question:
            raise ValueError(f"the question {self.question!r} names every slot, so it tells the answer; leave one for the context to tell")
        return self


class FactFile(Spec):
    """A file of fact templates (``eval/needles/*.yaml``)."""

    facts: tuple[FactSpec, ...] = Field(min_length=1)
    """The templates."""


class CorpusSpec(Spec):
    """Documents → paused, tokenised, packed rows."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    """Where documents come from."""
    objective: Literal["needle_sft", "language_modeling"] = "needle_sft"
    """``needle_sft``: paused context with a hidden fact, a question, the fact as answer, loss on the answer and its end
    token only. ``language_modeling``: the next token of the paused text, documents packed end to end; pauses are read, never
    predicted, so that a tuned model does not write them (as in arXiv 2310.02226)."""
    sequence_tokens: int = Field(default=1024, ge=64)
    """Longest row, in tokens. Under ``pauses.budget: content`` pauses and their instruction come on top, so that arms train on
    the same content; under ``total`` they are inside. What the tokenizer puts before every text comes on top in ``language_modeling``."""
    min_context_tokens: int = Field(default=256, ge=32)
    """Shortest ``needle_sft`` row; lengths are drawn evenly between this and ``sequence_tokens``."""
    rows: int = Field(default=480, ge=1)
    """``needle_sft``: samples to make. ``language_modeling``: most rows to keep. The paper's 60 steps of 8 are 480."""
    validation_rows: int = Field(default=0, ge=0)
    """Rows that are held out to see how training goes: from the last part of the text, which no training row touches, and with facts
    that no training row hides. ``language_modeling``: most of them."""
    facts: FactFile | None = None
    """Facts to hide, for ``needle_sft``; in YAML, the path of a file. They must not be those of the evaluation."""
    prompt: PromptSpec | None = None
    """The chat around a ``needle_sft`` context; null for that of the evaluation."""
    rows_per_shard: int = Field(default=256, ge=1)
    """Rows in one Parquet shard of a new set. Rows do not depend on it, so an existing set is not made again."""
    allow_evaluation_overlap: bool = False
    """Permit documents or needles that the evaluation uses; every report then says so."""

    @model_validator(mode="after")
    def _fields_fit_objective(self) -> Self:
        if self.objective == "needle_sft" and self.facts is None:
            raise ValueError("objective needle_sft needs facts, for example eval/needles/training_facts.yaml")
        if self.min_context_tokens > self.sequence_tokens:
            raise ValueError(f"min_context_tokens {self.min_context_tokens} exceeds sequence_tokens {self.sequence_tokens}")
        return self
