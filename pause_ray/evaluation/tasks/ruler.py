"""The needle tasks of RULER and its variable tracking (arXiv 2404.06654, github.com/NVIDIA/RULER), with reworded sentences and keys."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from pause_ray.evaluation.question import Fact, Question, Task
from pause_ray.evaluation.tasks.keys_values import (
    KeyKind,
    ValueKind,
    distinct,
    drawn_uuid,
    fact_name,
    fact_number,
    filler_names,
    filler_number,
    listed,
)

_CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"
_VARIABLE_LETTERS = 5
"""As in the original, which also draws vowels."""
_MAKE = {"words": fact_name, "numbers": fact_number, "uuids": drawn_uuid}
_NOUN = {"words": "code word", "numbers": "code number", "uuids": "access code"}


class RulerNiahTask(Task):
    """Keys and their values in sentences of one form; the question asks for the values of some keys."""

    kind: Literal["ruler_niah"]
    keys: int = Field(default=1, ge=1)
    """Number of keys in the context; those that are not asked for are distractors."""
    values: int = Field(default=1, ge=1)
    """Number of values of every key, each in a sentence of its own."""
    queries: int = Field(default=1, ge=1)
    """Number of keys that the question asks for."""
    key_kind: KeyKind = "words"
    """``words``: an adjective and a noun; or ``uuids``."""
    value_kind: ValueKind = "numbers"
    """``numbers``: seven digits; ``uuids``; or ``words``: as for keys."""
    filler: Literal["suite", "needles"] = "suite"
    """Text that hides the facts. ``suite``: the suite's documents or noise; ``needles``: lines of the same form with other keys."""

    @property
    def has_filler(self) -> bool:
        """Whether the task brings its own lines."""
        return self.filler == "needles"

    @model_validator(mode="after")
    def _queries_have_keys(self) -> Self:
        if self.queries > self.keys:
            raise ValueError(f"queries {self.queries} exceed keys {self.keys}; give at least as many keys")
        if self.filler == "needles" and self.value_kind == "words":
            raise ValueError("filler: needles needs value_kind numbers or uuids; words as values would run out")
        return self

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """Draw keys and values; the facts that are asked for come first."""
        make_key, make_value = _MAKE[self.key_kind], _MAKE[self.value_kind]
        drawn = distinct([make_key] * self.keys + [make_value] * (self.keys * self.values), draw)
        keys, values = drawn[: self.keys], iter(drawn[self.keys :])
        facts = tuple(
            Fact(text=self._sentence(key, value), references=(value,) if place < self.queries else ())
            for place, key in enumerate(keys)
            for value in [next(values) for _ in range(self.values)]
        )
        asked = listed(keys[: self.queries])
        references = [reference for fact in facts for reference in fact.references]
        noun = _NOUN[self.value_kind]
        if len(references) == 1:
            question, answer_prefix = f"Which {noun} of {asked} does the text give?", f"The {noun} of {asked} is"
        else:
            question, answer_prefix = f"Which {noun}s of {asked} does the text give? Name all of them.", f"The {noun}s of {asked} are"
        return Question(facts=facts, question=question, answer_prefix=answer_prefix, draft=f" {listed(references)}.")

    def filler_lines(self, draw: random.Random) -> Iterator[str]:
        """Yield sentences like the facts', about keys and values that no fact has, without end."""
        names = filler_names(draw)
        while True:
            key = next(names) if self.key_kind == "words" else drawn_uuid(draw)
            yield self._sentence(key, filler_number(draw) if self.value_kind == "numbers" else drawn_uuid(draw))

    def _sentence(self, key: str, value: str) -> str:
        return f"One of the {_NOUN[self.value_kind]}s of {key} is {value}."


class VariableTrackingTask(Task):
    """Variables that are set to a number or to another variable; the question asks for all that end up with one number."""

    kind: Literal["variable_tracking"]
    chains: int = Field(default=1, ge=1)
    """Number of chains, each of one number and its variables; the question asks for the first."""
    hops: int = Field(default=4, ge=1)
    """Number of assignments of a variable to a variable in every chain, which has one variable more."""

    def question(self, draw: random.Random, *, replicate: int) -> Question:
        """Draw chains and interleave them at random; every chain stays in order, and the one that is asked for begins first."""
        length = self.hops + 1
        names = distinct([_variable] * (self.chains * length), draw)
        numbers = draw.sample(range(10_000, 100_000), self.chains)
        chains = [_assignments(names[chain * length : (chain + 1) * length], number) for chain, number in enumerate(numbers)]
        turns = [chain for chain in range(self.chains) for _ in range(length)][1:]
        draw.shuffle(turns)
        begun = [iter(chain) for chain in chains]
        facts = tuple(
            Fact(text=text, references=(name,) if chain == 0 else ()) for chain in [0, *turns] for name, text in [next(begun[chain])]
        )
        asked = ", VAR ".join(names[:length])
        return Question(
            facts=facts,
            question=f"Which variables are set to {numbers[0]}, be it directly or through other variables? List the names of all of them.",
            answer_prefix=f"The {length} variables that are set to {numbers[0]} are VAR",
            draft=f" {asked}.",
            spread="spaced",
            in_order=True,
        )


def _variable(draw: random.Random) -> str:
    return "".join(draw.choices(_CONSONANTS, k=_VARIABLE_LETTERS))


def _assignments(names: list[str], number: int) -> list[tuple[str, str]]:
    """Return variables and their assignments, in order."""
    sources = [str(number), *(f"VAR {name}" for name in names[:-1])]
    return [(name, f"VAR {name} = {source}.") for name, source in zip(names, sources, strict=True)]
