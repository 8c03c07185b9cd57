"""Suites of questions and their cells.

A suite is a task (``evaluation.tasks``) on a grid of context lengths × needle positions. Positions are percent of each length,
as published; or one absolute lattice for all lengths; or random samples. The module is pure: it renders and loads nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, Spec, digest
from pause_ray.data.documents import SourceSpec
from pause_ray.evaluation.question import Fact, PlacedFact, Question
from pause_ray.evaluation.tasks.combine import CombineTask
from pause_ray.evaluation.tasks.keys_values import MOST_FACTS, KeyValueTask, MultiKeyTask, UuidChainTask, UuidTask
from pause_ray.evaluation.tasks.needle_files import MultiTask, SingleTask
from pause_ray.evaluation.tasks.ruler import RulerNiahTask, VariableTrackingTask
from pause_ray.text.prompts import PromptSpec

TaskSpec = Annotated[
    SingleTask | MultiTask | UuidTask | UuidChainTask | RulerNiahTask | VariableTrackingTask | KeyValueTask | MultiKeyTask | CombineTask,
    Field(discriminator="kind"),
]
Scorer = Literal["keywords", "all", "exact", "string_match", "label", "chain_progress"]
_SIGMOID_STEEPNESS = 0.1
"""Steepness per percent of the sigmoid spacing around 50 %, as in the original tester."""
_MULTI_KEY_CHARS_PER_TOKEN = 3
"""Names and numbers make shorter tokens than prose."""


class SuiteSpec(Spec):
    """A task on a grid of context lengths × needle positions, and how to ask (``eval/suites/*.yaml``)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name; the ledger's ``task``."""
    task: TaskSpec
    """Task that draws the facts to hide and the question about them."""
    scorer: Scorer = "keywords"
    """Rule that turns an answer into a score (``evaluation.scorers``). ``label`` is for task combine,
    ``chain_progress`` for task uuid_chain."""
    haystack: tuple[SourceSpec, ...] = ()
    """Documents that contexts are cut from, joined by blank lines in a seeded order. Empty: ``noise``, or the task's own lines."""
    noise: str | None = None
    """Sentences that are repeated for ever, instead of documents."""
    context_tokens: tuple[int, ...] = Field(min_length=1)
    """Asked lengths of the whole rendered prompt in the model's tokens (pauses aside under ``budget: content``). In YAML also
    ``{from: 1000, to: 16000, count: 35}``, evenly spaced."""
    depth_percent: tuple[float, ...] = ()
    """Where the first fact goes, in percent of the context: 0 is its beginning, 100 its end. In YAML also
    ``{from: 0, to: 100, count: 35, spacing: linear}``, or ``spacing: sigmoid``: denser at both ends."""
    lattice_tokens: int | None = Field(default=None, ge=1)
    """Instead of ``depth_percent``: the first fact stands at multiples of this many haystack tokens, the same at every length, and
    at its end. Positions in common make a grid several times cheaper."""
    samples: int | None = Field(default=None, ge=1)
    """Instead of ``depth_percent``: this many questions per length, their facts at random positions."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer."""
    prompt: PromptSpec = PromptSpec()
    """The chat around the context."""
    repeat_haystack: bool = False
    """Repeat the documents when they are shorter than the longest context; otherwise that is an error."""

    @field_validator("context_tokens", "depth_percent", mode="before")
    @classmethod
    def _spelt_out(cls, value: Any, info: ValidationInfo) -> Any:
        """Compute spaced values, and turn a list into the tuple that the strict schema wants."""
        if isinstance(value, dict) and info.field_name == "context_tokens":
            value = [round(length) for length in _spaced(value, low=None, spacings=("linear",))]
        elif isinstance(value, dict):
            value = [round(depth, 3) for depth in _spaced(value, low=0.0, spacings=("linear", "sigmoid"))]
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _grid_is_sane(self) -> Self:
        for depth in self.depth_percent:
            if not 0 <= depth <= 100:
                raise ValueError(f"depth_percent {depth:g} is outside 0 to 100")
        if min(self.context_tokens) < 1:
            raise ValueError(f"context_tokens {min(self.context_tokens)} must be at least 1")
        for name, values in (("context_tokens", self.context_tokens), ("depth_percent", self.depth_percent)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a value twice: {list(values)}")
        axes = {"depth_percent": bool(self.depth_percent), "lattice_tokens": bool(self.lattice_tokens), "samples": bool(self.samples)}
        given = [name for name, is_given in axes.items() if is_given]
        if len(given) != 1:
            raise ValueError(f"needs one of depth_percent, lattice_tokens and samples, given: {given or 'none'}")
        return self

    @model_validator(mode="after")
    def _fits_its_task(self) -> Self:
        has_own = self.task.has_filler
        if sum((bool(self.haystack), self.noise is not None, has_own)) != 1:
            own = f"the lines of task {self.task.kind}" if has_own else f"task {self.task.kind} has no lines of its own"
            raise ValueError(f"facts need one text to be hidden in: haystack, or noise, or the task's lines ({own})")
        if self.noise is not None and not self.noise.strip():
            raise ValueError("noise is empty; write a few sentences")
        if isinstance(self.task, MultiKeyTask) and not 2 <= len(self.depth_percent) <= MOST_FACTS:
            raise ValueError(
                f"task multi_key hides a fact at every depth of one context; give depth_percent, 2 to {MOST_FACTS} depths "
                f"(here: {len(self.depth_percent)})"
            )
        if self.scorer in ("label", "chain_progress") and self.scorer != self.task.label_scorer:
            raise ValueError(f"scorer {self.scorer} reads labels that task {self.task.kind} does not have; use another, such as keywords")
        return self

    @property
    def num_positions(self) -> dict[int, int]:
        """Number of cells of one replicate by context length."""
        return {tokens: len(list(_positions(self, tokens))) for tokens in self.context_tokens}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One question: task × context length × needle position × replicate."""

    task: str
    context_tokens: int
    depth_percent: float
    """Depth of the first fact in percent."""
    replicate: int
    sample: int
    """Index of the random sample; 0 on grids of depths or a lattice."""
    seed: int
    facts: tuple[PlacedFact, ...]
    question: str
    answer_prefix: str
    draft: str
    """Likely answer, used as a speculative draft; not part of the cell's identity."""
    labels: tuple[str, ...]
    scorer: Scorer
    identity: str
    """Digest of everything that changes the answer: suite, model, adapter, pauses, seed (given by the trial)."""

    @functools.cached_property
    def id(self) -> str:
        """Key by which a resumed run knows the cell: equal ids mean the same question put to the same model."""
        asked = dataclasses.asdict(self)
        del asked["draft"]
        return digest(asked)

    @property
    def words(self) -> str:
        """Short description for logs: ``cell of 4096 tokens at depth 50 % (1c3e52d7)``."""
        return f"cell of {self.context_tokens} tokens at depth {self.depth_percent:g} % ({self.id[:8]})"

    @property
    def references(self) -> tuple[str, ...]:
        """The references of all facts, in their order."""
        return tuple(reference for fact in self.facts for reference in fact.references)


def cells(suite: SuiteSpec, *, identity: str, replicate: int, seed: int) -> list[Cell]:
    """Return every cell of one replicate, length by length and position by position."""
    return [
        Cell(
            task=suite.name,
            context_tokens=tokens,
            depth_percent=facts[0].depth_percent,
            replicate=replicate,
            sample=position.sample,
            seed=seed,
            facts=facts,
            question=question.question,
            answer_prefix=question.answer_prefix,
            draft=question.draft,
            labels=question.labels,
            scorer=suite.scorer,
            identity=identity,
        )
        for tokens in suite.context_tokens
        for place, position in enumerate(_positions(suite, tokens))
        for question in (ask_for(suite, seed=seed, replicate=replicate, sample=position.sample, place=place),)
        for facts in (
            _placed_by_key(suite, question, place=place, tokens=tokens)
            if isinstance(suite.task, MultiKeyTask)
            else _placed(question, position, seed=seed, replicate=replicate),
        )
    ]


def ask_for(suite: SuiteSpec, *, seed: int, replicate: int, sample: int, place: int = 0) -> Question:
    """Draw the question of one replicate and sample; it is the same at every length and depth, so that only these differ.

    Only task multi_key asks for another of its facts at each depth, that of index ``place``.
    """
    draw = _random(seed, replicate, sample, "question")
    if isinstance(suite.task, MultiKeyTask):
        return suite.task.questions(draw, count=len(suite.depth_percent))[place]
    return suite.task.question(draw, replicate=replicate)


def known_facts(suite: SuiteSpec, *, seed: int, replicate: int) -> tuple[Fact, ...]:
    """Return every fact that an evaluation may hide: all facts of a needle file, or those that a task draws for this replicate."""
    if isinstance(suite.task, SingleTask | MultiTask):
        return suite.task.known_facts()
    if isinstance(suite.task, MultiKeyTask):
        places = range(len(suite.depth_percent))
        return tuple(ask_for(suite, seed=seed, replicate=replicate, sample=0, place=place).facts[0] for place in places)
    drawn = [ask_for(suite, seed=seed, replicate=replicate, sample=sample) for sample in range(suite.samples or 1)]
    return tuple(fact for question in drawn for fact in question.facts)


class _Position(NamedTuple):
    """Place of a cell's first fact."""

    depth_percent: float | None = None
    """Depth in percent; None where a random depth is drawn for each sample."""
    position_tokens: int | None = None
    sample: int = 0


def _positions(suite: SuiteSpec, tokens: int) -> Iterator[_Position]:
    if suite.samples is not None:
        yield from (_Position(sample=sample) for sample in range(suite.samples))
    elif suite.lattice_tokens is not None:
        for place in range(0, tokens, suite.lattice_tokens):
            yield _Position(round(100 * place / tokens, 3), place)
        yield _Position(100.0)
    else:
        yield from (_Position(depth) for depth in suite.depth_percent)


def _placed(question: Question, position: _Position, *, seed: int, replicate: int) -> tuple[PlacedFact, ...]:
    """Place all facts of a question; drawn depths are the same at every length."""
    draw = _random(seed, replicate, position.sample, "depths")
    drawn = [round(100 * draw.random(), 1) for _ in question.facts]
    first = position.depth_percent
    if first is None:
        depths = sorted(drawn) if question.in_order else drawn
    elif question.in_order or question.spread == "spaced":
        depths = [first + place * (100 - first) / len(drawn) for place in range(len(drawn))]
    else:
        depths = [first, *drawn[1:]]
    return tuple(
        PlacedFact(
            text=fact.text,
            references=fact.references,
            depth_percent=round(depth, 3),
            position_tokens=position.position_tokens if place == 0 else None,
        )
        for place, (fact, depth) in enumerate(zip(question.facts, depths, strict=True))
    )


def _placed_by_key(suite: SuiteSpec, question: Question, *, place: int, tokens: int) -> tuple[PlacedFact, ...]:
    """Place facts at the same haystack tokens whichever of them is asked for; depths would move with the question's length."""
    others = [other for other in range(len(question.facts)) if other != place]
    chars = [len(fact.text) + 1 for fact in question.facts]
    chat = [suite.prompt.system or "", suite.prompt.before, suite.prompt.user_after(question="", instruction=None)]
    around = sum(chars) + 2 * max(chars) + sum(map(len, chat))  # a question has up to two facts' words
    room = max(0, tokens - around // _MULTI_KEY_CHARS_PER_TOKEN)
    return tuple(
        PlacedFact(
            text=fact.text,
            references=fact.references,
            depth_percent=suite.depth_percent[at],
            position_tokens=int(room * suite.depth_percent[at] / 100),
        )
        for fact, at in zip(question.facts, [place, *others], strict=True)
    )


def _random(*parts: object) -> random.Random:
    return random.Random(digest([str(part) for part in parts]))  # noqa: S311 (drawn questions must be the same everywhere)


def _spaced(wanted: dict[str, Any], *, low: float | None, spacings: tuple[str, ...]) -> list[float]:
    """Return the values of ``{from, to, count, spacing}``; the sigmoid spacing keeps the end points, as the original tester does."""
    unknown = set(wanted) - {"from", "to", "count", "spacing"}
    begin, end, count, spacing = wanted.get("from", low), wanted.get("to"), wanted.get("count"), wanted.get("spacing", "linear")
    numbers = [value for value in (begin, end) if isinstance(value, int | float) and not isinstance(value, bool)]
    if unknown or len(numbers) != 2 or numbers[0] >= numbers[1] or type(count) is not int or count < 2 or spacing not in spacings:
        raise ValueError(
            f"spaced values need from < to, count of at least 2 and spacing {' or '.join(spacings)}, given {wanted}; "
            "for example {from: 0, to: 100, count: 35}"
        )
    steps = [numbers[0] + (numbers[1] - numbers[0]) * place / (count - 1) for place in range(count)]
    if spacing == "linear":
        return steps
    if numbers != [0, 100]:
        raise ValueError(f"spacing sigmoid is a curve from 0 to 100 percent, given from {numbers[0]:g} to {numbers[1]:g}")
    return [steps[0], *(100 / (1 + math.exp(-_SIGMOID_STEEPNESS * (step - 50))) for step in steps[1:-1]), steps[-1]]


def proxy_suite(suite: SuiteSpec, *, facts: int, context_tokens: Sequence[int]) -> SuiteSpec:
    """Return the proxy of a suite, a cheap substitute for its cells: ``facts`` keys in the suite's own text, one context per length.

    Early stopping compares unfinished adapters by it. A score of the proxy is never a score of the suite.

    Raises:
        SpecError: a length is not positive, there are too many facts, or the suite's text is its task's own lines.
    """
    if facts > MOST_FACTS:
        raise SpecError(f"scheduler.proxy.facts {facts} is more than the {MOST_FACTS} that one context can hold; lower it")
    if suite.task.has_filler:
        raise SpecError(
            f"scheduler: its proxy hides facts in documents or noise, and suite {suite.name} has only the lines of task {suite.task.kind}; "
            "use a suite with a haystack, or leave scheduler out"
        )
    changes: JsonObject = {
        "name": f"{suite.name}-proxy",
        "task": {"kind": "multi_key"},
        "scorer": "keywords",
        "context_tokens": list(context_tokens),
        "depth_percent": {"from": 0, "to": 100, "count": facts},
        "lattice_tokens": None,
        "samples": None,
        "max_new_tokens": 24,  # a number of seven digits in a short sentence, where every digit may be a token
    }
    return SuiteSpec.parse(suite.resolved() | changes, origin="scheduler.proxy")
