"""The spec of a corpus, the facts that training rows hide, and the job of making a shard set with its identity. Needs no Ray."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pause_ray.core.errors import SpecError, TextError
from pause_ray.core.spec import JsonObject, Spec, digest
from pause_ray.data.documents import SourceSpec, source_identity
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import PromptSpec
from pause_ray.text.segments import folded, plain
from pause_ray.text.tokenizer import Marker, ModelTokenizer, resolve_marker

SLOT = re.compile(r"\{(\w+)\}")
"""A slot in a fact's sentence or question."""


class FactSpec(Spec):
    """Facts that are hidden in training contexts: every template × every combination of its slots' words."""

    needle: str = Field(min_length=1)
    """The sentence that is hidden, with {slots}; also what the model learns to answer."""
    question: str = Field(min_length=1)
    """The question, with the slots that identify the fact but not those that answer it."""
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
    """The training task. ``needle_sft``: paused context with a hidden fact, a question, the fact as answer, loss on the answer and its
    end token only. ``language_modeling``: the next token of the paused text, documents packed end to end; pauses are read, never
    predicted, so that a tuned model does not write them (as in arXiv 2310.02226)."""
    sequence_len: int = Field(default=1024, ge=64)
    """Longest row, in tokens. Under ``pauses.budget: content`` pauses and their instruction come on top, so that arms train on
    the same content; under ``total`` they are inside. What the tokenizer puts before every text comes on top in ``language_modeling``."""
    min_context_tokens: int = Field(default=256, ge=32)
    """Shortest ``needle_sft`` row; lengths are drawn evenly between this and ``sequence_len``."""
    num_sequences: int = Field(default=480, ge=1)
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
        if self.min_context_tokens > self.sequence_len:
            raise ValueError(f"min_context_tokens {self.min_context_tokens} exceeds sequence_len {self.sequence_len}")
        return self


HELD_OUT_SHARE = 8
"""Number of facts of which one is kept for validation rows, where there are any."""
DRAWS = 1000
"""Number of draws after which a file of facts counts as having none of the wanted kind."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact with its slots filled."""

    needle: str
    question: str


def draw_fact(facts: FactFile, *, rng: random.Random, held_out: bool | None = None) -> Fact:
    """Draw one template, evenly, then one word per slot, evenly; slots are drawn in the order of their names.

    Draw again until the fact is one for validation rows (``held_out`` true) or none of them (false); None takes any.

    Raises:
        SpecError: there seems to be none of that kind.
    """
    for _ in range(DRAWS):
        chosen = rng.choice(facts.facts)
        words = {name: rng.choice(chosen.slots[name]) for name in sorted(chosen.slots)}
        fact = Fact(needle=_filled(chosen.needle, words), question=_filled(chosen.question, words))
        # The fact alone decides whether it belongs to validation rows, so that training and validation never share one.
        is_held_out = hashlib.sha256(fact.needle.encode()).digest()[0] % HELD_OUT_SHARE == 0
        if held_out is None or is_held_out == held_out:
            return fact
    raise SpecError(
        f"corpus.facts: too few to keep one in {HELD_OUT_SHARE} for validation rows alone; give slots more words, "
        "or set corpus.validation_rows: 0"
    )


def shared_with_evaluation(facts: FactFile, *, needles: Sequence[str], keywords: Sequence[str]) -> list[str]:
    """Return one sentence for each place where training facts touch the evaluation's.

    They touch where a keyword is in a template or in a slot's words, and where a template can make an evaluation needle.
    Letter case, runs of white space and Unicode compatibility forms do not count.
    """
    found = []
    for fact in facts.facts:
        texts = [fact.needle, *(word for words in fact.slots.values() for word in words)]
        for keyword in sorted(set(keywords)):
            holder = next((text for text in texts if plain(keyword) in plain(text)), None)
            if holder is not None:
                found.append(f"the training fact {fact.needle!r} has the evaluation's keyword {keyword!r} in {holder!r}")
        pattern = _pattern(fact)
        found += [
            f"the training fact {fact.needle!r} can make the evaluation's needle {needle!r}"
            for needle in needles
            if pattern.search(plain(needle))
        ]
    return found


def _filled(template: str, words: dict[str, str]) -> str:
    return SLOT.sub(lambda slot: words[slot[1]], template)


def _pattern(fact: FactSpec) -> re.Pattern[str]:
    """Return the needles that a template can make, as an expression over ``plain`` text."""
    pieces = SLOT.split(" ".join(fact.needle.split()))
    for index, piece in enumerate(pieces):
        is_slot = index % 2 == 1
        pieces[index] = f"(?:{'|'.join(re.escape(plain(word)) for word in fact.slots[piece])})" if is_slot else re.escape(folded(piece))
    return re.compile("".join(pieces))


RECIPE_VERSIONS = {"needle_sft": 4, "language_modeling": 5}
"""Version of each objective's rows; raised when the code makes other rows from the same inputs."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The documents, needles and keywords of the evaluation, which training must not have seen."""

    document_digests: frozenset[str] = frozenset()
    """Digests of the documents that haystacks are made of."""
    needles: tuple[str, ...] = ()
    """Sentences that are hidden and asked for."""
    keywords: tuple[str, ...] = ()
    """Words of right answers, which no training fact may contain."""

    @property
    def digest(self) -> str:
        """Identity of the evaluation, whatever the order."""
        return digest([sorted(self.document_digests), sorted(self.needles), sorted(self.keywords)])


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """The inputs of a shard set, and the evaluation that it is kept apart from."""

    spec: CorpusSpec
    prompt: PromptSpec
    """The chat around a context: ``spec.prompt``, or the evaluation's where that is None."""
    policy: PausePolicy | None
    model_dir: Path
    """Folder with the tokenizer; weights are not read."""
    tokenizer_digest: str
    seed: int
    evaluation: Evaluation = Evaluation()

    def tokenizer(self) -> ModelTokenizer:
        """Return the model's tokenizer, which is loaded once per process; refuse another one than that of ``tokenizer_digest``."""
        return _tokenizer(self.model_dir, self.tokenizer_digest)

    def marker(self) -> Marker:
        """Return the policy's pause in that tokenizer."""
        return resolve_marker(self.tokenizer(), self.policy)

    def identity(self) -> JsonObject:
        """Return every input that changes the rows, and no other: not the evaluation, so that a checkpoint outlives its suite.

        Raises:
            SourceError: a source that cannot be found.
        """
        aside = {"sources", "prompt", "rows_per_shard", "allow_evaluation_overlap"}
        policy_aside: set[str] = set()
        if self.spec.objective == "language_modeling":  # asks no question
            aside |= {"facts", "min_context_tokens"}
            policy_aside = {"instruction"}
        return {
            "version": RECIPE_VERSIONS[self.spec.objective],
            "spec": self.spec.model_dump(mode="json", exclude=aside),
            "prompt": self.prompt.model_dump(mode="json") if self.spec.objective == "needle_sft" else None,
            "sources": [source_identity(source) for source in self.spec.sources],
            "pauses": self.policy.model_dump(mode="json", exclude=policy_aside) if self.policy else None,
            "tokenizer": self.tokenizer_digest,
            "seed": self.seed,
        }


@lru_cache(maxsize=2)
def _tokenizer(model_dir: Path, digest: str) -> ModelTokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task is one core; its threads would fight with other tasks
    tokenizer = ModelTokenizer.load(model_dir)
    if tokenizer.digest != digest:
        raise TextError(f"{model_dir}: its tokenizer is another one on this machine; give every node the same files")
    return tokenizer
