"""What is asked: suites, tasks and cells. Pure specs and their expansion; renders nothing, loads nothing.

Single-needle protocol after github.com/gkamradt/LLMTest_NeedleInAHaystack: one fact at a sentence boundary near the
asked depth of a context of the asked length, the question last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from pause_ray.documents import SourceSpec
from pause_ray.spec import Spec, digest
from pause_ray.text.plain import plain
from pause_ray.text.prompts import PromptSpec


class NeedleSpec(Spec):
    """One fact, its question, and the keywords a right answer contains."""

    needle: str = Field(min_length=1)
    """The sentence that is hidden; inserted as a sentence of its own."""
    question: str = Field(min_length=1)
    """What is asked after the context."""
    keywords: tuple[str, ...] = Field(min_length=1)
    """The score is the share of these that the answer contains; letter case, white space and Unicode compatibility forms aside."""

    @model_validator(mode="after")
    def _question_does_not_answer(self) -> Self:
        told = [word for word in self.keywords if plain(word) in plain(self.question)]
        if told:
            raise ValueError(f"the question already contains the keywords {told}; a model could answer without the context")
        missing = [word for word in self.keywords if plain(word) not in plain(self.needle)]
        if missing:
            raise ValueError(f"the needle does not contain the keywords {missing}; no answer from it could score")
        return self


class NeedleFile(Spec):
    """A file of needles (``eval/needles/*.yaml``)."""

    needles: tuple[NeedleSpec, ...] = Field(min_length=1)


class SuiteSpec(Spec):
    """A grid of context lengths × needle depths, and how to ask (``eval/suites/*.yaml``)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name; the ledger's ``task``."""
    haystack: tuple[SourceSpec, ...] = Field(min_length=1)
    """Documents that contexts are cut from, joined by blank lines in a seeded order."""
    needles: NeedleFile
    """The facts; replicate r uses needle r modulo their number. In YAML, the path of a file."""
    context_tokens: tuple[int, ...] = Field(min_length=1)
    """Asked lengths of the whole rendered prompt in the model's tokens (pauses aside under ``budget: content``)."""
    depth_percent: tuple[float, ...] = Field(min_length=1)
    """Where the needle goes, in percent of the context: 0 is its beginning, 100 its end."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer."""
    prompt: PromptSpec = PromptSpec()
    """The chat around the context."""
    repeat_haystack: bool = False
    """Repeat the documents when they are shorter than the longest context; otherwise that is an error."""

    @model_validator(mode="after")
    def _grid_is_sane(self) -> Self:
        for depth in self.depth_percent:
            if not 0 <= depth <= 100:
                raise ValueError(f"depth_percent {depth:g} is outside 0 to 100")
        for tokens in self.context_tokens:
            if tokens < 1:
                raise ValueError(f"context_tokens {tokens} must be at least 1")
        for name, values in (("context_tokens", self.context_tokens), ("depth_percent", self.depth_percent)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a value twice: {list(values)}")
        return self


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One question: task × context length × needle position × replicate."""

    task: str
    context_tokens: int
    depth_percent: float
    replicate: int
    seed: int
    needle: NeedleSpec
    identity: str
    """Digest of all that changes the answer: suite, model, adapter, pauses, seed (given by the trial)."""

    @property
    def id(self) -> str:
        """The resume key: same id, same question put to the same model."""
        return digest(
            [self.identity, self.task, self.context_tokens, self.depth_percent, self.replicate, self.seed, self.needle.resolved()]
        )


def cells(suite: SuiteSpec, *, identity: str, replicate: int, seed: int) -> list[Cell]:
    """Every cell of one replicate, in the order length by length, depth by depth."""
    needle = suite.needles.needles[replicate % len(suite.needles.needles)]
    return [
        Cell(task=suite.name, context_tokens=tokens, depth_percent=depth, replicate=replicate, seed=seed, needle=needle, identity=identity)
        for tokens in suite.context_tokens
        for depth in suite.depth_percent
    ]
