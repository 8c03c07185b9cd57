"""Cells in, answered cells out: the order in which one engine is asked, and the asking. Knows no Ray and no files."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pause_ray.engines.engine import Completion, Engine, EngineError
from pause_ray.needle.haystack import Haystack, ask
from pause_ray.needle.ledger import CellResult
from pause_ray.needle.score import SCORER, Score, Unscored, grade
from pause_ray.needle.task import Cell, SuiteSpec
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import BuiltPrompt
from pause_ray.text.tokens import Marker, ModelTokenizer


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the ledger says about who was asked, beyond the cell itself."""

    arm: str
    model: str
    """The model's source, as in the spec."""
    adapter: str | None
    """Digest of the checkpoint, or None for the base model."""
    pauses: str
    """The pause policy in a few words or as digest; ``none`` for no pauses."""


def order_for_reuse(cells: Iterable[Cell]) -> list[Cell]:
    """An order in which each prompt shares as much of its beginning as possible with the one before.

    Within one haystack all prompts are equal up to the first needle, so needles go from deep to shallow: a prompt then
    shares everything up to its own needle with the one before. Prompts with the needle at the same token also share
    what follows it, so they go from short to long.
    """
    return sorted(
        cells, key=lambda cell: (cell.replicate, cell.seed, -cell.depth_percent * cell.context_tokens, cell.context_tokens, cell.id)
    )


def new_tokens(cells: Sequence[Cell]) -> list[float]:
    """About how many prompt tokens each cell adds to what its predecessor computed, for cells in reuse order."""
    costs: list[float] = []
    last_position, last_length = 0.0, 0
    for cell in cells:
        position = cell.depth_percent / 100 * cell.context_tokens
        shared = min(last_length, cell.context_tokens) if position == last_position else min(position, last_position)
        costs.append(cell.context_tokens - shared)
        last_position, last_length = position, cell.context_tokens
    return costs


def split_for_actors(cells: Sequence[Cell], *, num_actors: int) -> list[list[Cell]]:
    """At most ``num_actors`` runs of neighbours in reuse order, of about equal work, no cell left out or doubled."""
    ordered = order_for_reuse(cells)
    costs = new_tokens(ordered)
    share = sum(costs) / num_actors
    runs: list[list[Cell]] = [[] for _ in range(num_actors)]
    done = 0.0
    for cell, cost in zip(ordered, costs, strict=True):
        runs[min(num_actors - 1, int((done + cost / 2) / share))].append(cell)
        done += cost
    return [run for run in runs if run]


def answer_cells(
    cells: Iterable[Cell],
    *,
    engine: Engine,
    suite: SuiteSpec,
    haystack: Haystack,
    tokenizer: ModelTokenizer,
    policy: PausePolicy | None,
    marker: Marker,
    condition: Condition,
) -> Iterator[CellResult]:
    """Ask the engine every cell of one haystack; results come in the order of asking.

    The shortest and the longest prompt are built before the first question, so that a suite that cannot be built
    fails before an accelerator has worked for it.

    Raises:
        TextError: a prompt cannot be built.
        ModelError: a prompt is longer than the model takes.
    """
    ordered = order_for_reuse(cells)

    def prompt_of(cell: Cell) -> BuiltPrompt:
        return ask(cell, haystack=haystack, suite=suite, tokenizer=tokenizer, policy=policy, marker=marker)

    for extreme in sorted(ordered, key=lambda cell: cell.context_tokens)[:: max(1, len(ordered) - 1)]:
        prompt_of(extreme)
    for cell in ordered:
        prompt = prompt_of(cell)
        try:
            completion = engine.complete(prompt.ids.tolist(), max_new_tokens=suite.max_new_tokens)
        except EngineError as error:
            yield _result(cell, prompt, None, Unscored(reason=str(error)), condition=condition, engine=engine.name)
            continue
        verdict = grade(_without_markers(completion.text, policy), cell.needle)
        shown = dataclasses.replace(completion, text=_with_markers(completion, tokenizer=tokenizer, marker=marker))
        yield _result(cell, prompt, shown, verdict, condition=condition, engine=engine.name)


def _with_markers(completion: Completion, *, tokenizer: ModelTokenizer, marker: Marker) -> str:
    """The answer's text with the markers that it copied, which an engine leaves out where they are entries of the vocabulary."""
    if marker.token is None or marker.token.token_id not in completion.ids:
        return completion.text
    edges = [-1, *(place for place, token_id in enumerate(completion.ids) if token_id == marker.token.token_id), len(completion.ids)]
    return marker.token.text.join(tokenizer.decode(completion.ids[before + 1 : after]) for before, after in itertools.pairwise(edges))


def _without_markers(response: str, policy: PausePolicy | None) -> str:
    """What of an answer is graded: a copied marker is no part of what was said, of whichever kind it is."""
    return response.replace(policy.marker.strip(), "") if policy else response


def _result(
    cell: Cell, prompt: BuiltPrompt, completion: Completion | None, verdict: Score | Unscored, *, condition: Condition, engine: str
) -> CellResult:
    return CellResult(
        cell_id=cell.id,
        task=cell.task,
        arm=condition.arm,
        replicate=cell.replicate,
        seed=cell.seed,
        model=condition.model,
        adapter=condition.adapter,
        pauses=condition.pauses,
        context_tokens=cell.context_tokens,
        prompt_tokens=prompt.prompt_tokens,
        content_tokens=prompt.content_tokens,
        num_pauses=prompt.num_pauses,
        rule=prompt.rule,
        depth_percent=cell.depth_percent,
        needle_token=prompt.needle_token,
        needle=cell.needle.needle,
        question=cell.needle.question,
        references=cell.needle.keywords,
        response=completion.text if completion else None,
        score=verdict.value if isinstance(verdict, Score) else None,
        rubric=verdict.rubric if isinstance(verdict, Score) else None,
        unscored_reason=verdict.reason if isinstance(verdict, Unscored) else None,
        scorer=SCORER,
        engine=engine,
        prefilled_tokens=completion.prefilled_tokens if completion else 0,
        decoded_tokens=completion.decoded_tokens if completion else 0,
        seconds=completion.seconds if completion else 0.0,
    )
