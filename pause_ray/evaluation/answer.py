"""Answer cells: build their prompts, plan shared prefixes, ask the engine and grade the completions.

The module knows neither Ray nor files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from pause_ray.core.process import about
from pause_ray.evaluation.haystack import ask
from pause_ray.evaluation.ledger import CellResult, FactResult
from pause_ray.evaluation.prefix_plan import by_position, plan_prefixes
from pause_ray.evaluation.scorers import Score, Unscored, grade
from pause_ray.evaluation.suite import Cell
from pause_ray.inference.engine import Completion, Engine, EngineError, PromptStep, Reuse
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import BuiltPrompt, PromptBuilder
from pause_ray.text.tokenizer import Marker, ModelTokenizer


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the answers of a ledger row come from: the arm, the model, the adapter and the pauses."""

    arm: str
    model: str
    """The model's source, as in the spec."""
    adapter: str | None
    """Digest of the checkpoint, or None for the base model."""
    pauses: str
    """The pause policy in a few words or as digest; ``none`` for no pauses."""


@dataclass(frozen=True, kw_only=True)
class CellRunner:
    """Builds the prompts of cells over one haystack and pause policy, and turns completions into text and scores."""

    builder: PromptBuilder
    tokenizer: ModelTokenizer
    policy: PausePolicy | None
    marker: Marker
    max_new_tokens: int

    def prompts(self, cells: Sequence[Cell]) -> list[BuiltPrompt]:
        """Build the prompt of each cell; the shortest and the longest come first, so that an impossible grid fails at once.

        Raises:
            TextError: a prompt cannot be built.
        """
        by_length = sorted(cells, key=lambda cell: cell.context_tokens)
        built: dict[str, BuiltPrompt] = {}
        for cell in (*by_length[:1], *by_length[-1:], *by_position(cells)):
            if cell.id not in built:
                built[cell.id] = ask(cell, self.builder)
        return [built[cell.id] for cell in cells]

    def step(self, cell: Cell, prompt: BuiltPrompt, *, keep_tokens: int, drafts: bool) -> PromptStep:
        """Return the prompt and its draft in the form that an engine takes."""
        draft = tuple(int(token) for token in self.tokenizer.encode(cell.draft).ids) if drafts and cell.draft else ()
        return PromptStep(prompt=prompt, keep_tokens=keep_tokens, draft_ids=draft, max_new_tokens=self.max_new_tokens)

    def shown(self, completion: Completion) -> str:
        """Return the answer's text with the markers that it copied; decoding drops markers that are vocabulary entries."""
        token = self.marker.token
        if token is None or token.token_id not in completion.ids:
            return completion.text
        edges = [-1, *(place for place, token_id in enumerate(completion.ids) if token_id == token.token_id), len(completion.ids)]
        return token.text.join(self.tokenizer.decode(completion.ids[before + 1 : after]) for before, after in itertools.pairwise(edges))

    def graded(self, cell: Cell, completion: Completion) -> Score | Unscored:
        """Grade the answer's text without the markers that it copied."""
        said = completion.text.replace(self.policy.marker.strip(), "") if self.policy else completion.text
        return grade(said, cell.facts, scorer=cell.scorer, labels=cell.labels, question=cell.question)


class PlannedCell(NamedTuple):
    """A cell and what the engine is asked for it."""

    cell: Cell
    step: PromptStep


def plan_cells(
    cells: Sequence[Cell], *, runner: CellRunner, prefix_block_size: int, reuse: Reuse = "full", drafts: bool = True
) -> list[PlannedCell]:
    """Return the cells of one haystack in the order of their prefix plan.

    Raises:
        TextError: a prompt cannot be built.
    """
    prompts = runner.prompts(cells)
    lengths = [cell.context_tokens for cell in cells]
    planned = plan_prefixes([prompt.ids for prompt in prompts], reuse=reuse, prefix_block_size=prefix_block_size, lengths=lengths)
    return [
        PlannedCell(cells[each.prompt], runner.step(cells[each.prompt], prompts[each.prompt], keep_tokens=each.keep_tokens, drafts=drafts))
        for each in planned
    ]


def answer_cells(asked: Sequence[PlannedCell], *, engine: Engine, runner: CellRunner, provenance: Provenance) -> Iterator[CellResult]:
    """Ask the engine and yield each result as soon as it is answered; engines that batch may change the order.

    Raises:
        ModelError: a prompt is longer than the model takes, or the engine cannot be asked at all.
    """
    for place, outcome in engine.answer([step for _, step in asked]):
        cell, step = asked[place]
        yield _row(cell, step.prompt, outcome, runner=runner, provenance=provenance, engine=engine.name)


@runtime_checkable
class NumericsCheckEngine(Engine, Protocol):
    """An engine that can compute an answer in other shapes."""

    def answer_with_other_shapes(self, step: PromptStep) -> Completion:
        """Answer the same prompt with other chunk shapes: the result is equal up to rounding.

        Raises:
            EngineError: no answer could be computed.
        """


def check_numerics(cells: Sequence[Cell], *, engine: Engine, runner: CellRunner, provenance: Provenance) -> Iterator[CellResult]:
    """Yield the cells' results computed in other shapes; unscored where none could be computed.

    Raises:
        TypeError: the engine cannot compute in other shapes.
        TextError, ModelError: as for ``plan_cells`` and ``answer_cells``.
    """
    if not isinstance(engine, NumericsCheckEngine):
        raise TypeError(f"engine {engine.name} cannot compute an answer in other shapes")
    for cell in cells:
        with about(cell.words):
            prompt = ask(cell, runner.builder)
            try:
                outcome: Completion | EngineError = engine.answer_with_other_shapes(runner.step(cell, prompt, keep_tokens=0, drafts=False))
            except EngineError as error:
                outcome = error
        yield _row(cell, prompt, outcome, runner=runner, provenance=provenance, engine=engine.name)


def _row(
    cell: Cell, prompt: BuiltPrompt, outcome: Completion | EngineError, *, runner: CellRunner, provenance: Provenance, engine: str
) -> CellResult:
    completion = None if isinstance(outcome, EngineError) else outcome
    verdict = runner.graded(cell, completion) if completion else Unscored(reason=str(outcome))
    scores = verdict.fact_scores if isinstance(verdict, Score) else (None,) * len(cell.facts)
    return CellResult(
        **vars(provenance),
        cell_id=cell.id,
        task=cell.task,
        replicate=cell.replicate,
        sample=cell.sample,
        seed=cell.seed,
        context_tokens=cell.context_tokens,
        prompt_tokens=prompt.prompt_tokens,
        content_tokens=prompt.content_tokens,
        num_pauses=prompt.num_pauses,
        rule=prompt.rule,
        depth_percent=cell.depth_percent,
        needle_token=prompt.needle_token,
        facts=tuple(
            FactResult(text=fact.text, references=fact.references, depth_percent=fact.depth_percent, token=token, score=score)
            for fact, token, score in zip(cell.facts, prompt.needle_tokens, scores, strict=True)
        ),
        question=cell.question,
        references=cell.references,
        labels=cell.labels,
        response=runner.shown(completion) if completion else None,
        score=verdict.value if isinstance(verdict, Score) else None,
        rubric=verdict.rubric if isinstance(verdict, Score) else None,
        unscored_reason=verdict.reason if isinstance(verdict, Unscored) else None,
        scorer=cell.scorer,
        engine=engine,
        prefilled_tokens=completion.prefilled_tokens if completion else 0,
        decoded_tokens=completion.decoded_tokens if completion else 0,
        seconds=completion.seconds if completion else 0.0,
        margin=completion.margin if completion else None,
        reference_margin=completion.reference_margin if completion else None,
        cost=completion.cost if completion else None,
    )
