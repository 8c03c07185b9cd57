"""Order the prompts of a grid so that each shared prefix is prefilled once (prefix caching).

The prompts of a grid form a tree of tokens: they share the haystack up to the first fact, and then branch by fact position,
context length and question. Visiting the tree depth first prefills every node once and needs the keys and values of one
prompt only. Sorting prompts by their token ids gives such an order, whatever the task: each prompt shares its longest prefix
with the prompt before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pause_ray.evaluation.suite import Cell
from pause_ray.inference.engine import Reuse, default_prefix_block_size
from pause_ray.models.shape import ModelShape

Ids = NDArray[np.int32]


class PlannedPrompt(NamedTuple):
    """One prompt of a plan."""

    prompt: int
    """Index of the prompt among those that were planned."""
    keep_tokens: int
    """Number of leading tokens that are kept from the prompt before and not prefilled again."""
    num_tokens: int
    """Number of tokens of the whole prompt."""


def plan_prefixes(
    prompts: Sequence[Ids], *, reuse: Reuse = "full", prefix_block_size: int = 1, lengths: Sequence[int] = ()
) -> list[PlannedPrompt]:
    """Return ``prompts`` in the order in which the fewest tokens are prefilled.

    Args:
        prompts: Token ids, each 1-D and not empty.
        reuse: ``full``: every common beginning is computed once; ``depth``: only among prompts of one asked length, as a loop
            over depths does; ``none``: nothing is shared.
        prefix_block_size: Only multiples of this are kept (``Engine.prefix_block_size``).
        lengths: Asked length of each prompt, for ``depth``.
    """
    keys = [prompt.astype(">u4").tobytes() for prompt in prompts]
    groups = list(lengths) if reuse == "depth" else [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: (groups[index], keys[index]))
    planned = list[PlannedPrompt]()
    before = None
    for index in order:
        keep_tokens = 0
        if before is not None and reuse != "none" and groups[before] == groups[index]:
            keep_tokens = _reusable_tokens(prompts[before], prompts[index], prefix_block_size=prefix_block_size)
        planned.append(PlannedPrompt(index, keep_tokens, len(prompts[index])))
        before = index
    return planned


def _reusable_tokens(computed: Ids, prompt: Ids, *, prefix_block_size: int) -> int:
    """Return how many leading tokens of ``prompt`` need no prefill right after ``computed``.

    The last token is always computed, for its logits; so is a whole last chunk of ``computed``, which was computed together
    with a draft of its answer where prompts are kept by chunks.
    """
    length = min(len(computed), len(prompt))
    different = computed[:length] != prompt[:length]
    shared = min(int(different.argmax()) if different.any() else length, length - 1)
    return shared - shared % prefix_block_size


@dataclass(frozen=True, kw_only=True)
class PrefillForecast:
    """Tokens, operations and memory of planned prompts, computed from the model's ``config.json`` alone."""

    num_prompts: int
    asked_tokens: int
    """Tokens of all prompts, which are prefilled where nothing is shared."""
    prefilled_tokens: int
    """Tokens that are prefilled when the prompts are answered in this order."""
    prefill_flops: int
    """Floating-point operations (two per multiply-add) of the forward passes over prompts; attention counts every key that a
    chunk of queries meets. Answers come on top: ``answer_flops`` each at most."""
    answer_flops: int
    """Operations of one answer of full length after the longest prompt, decoded token by token."""
    kv_bytes: int
    """Most bytes of keys and values that are held at a time: those of the longest prompt and its answer and, where several answers
    are decoded together, a second copy and the answers' own tokens."""
    weight_bytes: int


def forecast_prefill(
    planned: Sequence[PlannedPrompt],
    shape: ModelShape,
    *,
    chunk_tokens: int,
    decode_batch: int = 1,
    max_new_tokens: int,
    dtype: str,
    quantize: str | None = None,
) -> PrefillForecast:
    """Compute tokens, operations and memory of planned prompts before anything is loaded."""
    bytes_per_value = 4 if dtype == "float32" else 2
    block = default_prefix_block_size(dtype=dtype, quantize=quantize, chunk_tokens=chunk_tokens)
    longest = max((each.num_tokens for each in planned), default=0)
    held = longest + max_new_tokens
    if decode_batch > 1:
        held += held + decode_batch * max_new_tokens
    return PrefillForecast(
        num_prompts=len(planned),
        asked_tokens=sum(each.num_tokens for each in planned),
        prefilled_tokens=sum(each.num_tokens - each.keep_tokens for each in planned),
        prefill_flops=sum(
            shape.prompt_flops(
                prompt_tokens=each.num_tokens, kept_tokens=each.keep_tokens, chunk_tokens=chunk_tokens, prefix_block_size=block
            )
            for each in planned
        ),
        answer_flops=sum(shape.forward_flops(new_tokens=1, past_tokens=longest + place, logit_rows=1) for place in range(max_new_tokens)),
        kv_bytes=held * shape.kv_bytes_per_token(bytes_per_value),
        weight_bytes=shape.weight_bytes(dtype, quantize),
    )


def by_position(cells: Iterable[Cell]) -> list[Cell]:
    """Sort cells so that neighbours share a long prefix, without building prompts: by position of the first fact, then by length."""
    return sorted(cells, key=lambda cell: (cell.replicate, cell.sample, cell.seed, _position(cell), cell.context_tokens, cell.id))


def split_for_actors(cells: Sequence[Cell], *, num_actors: int) -> list[list[Cell]]:
    """Split cells into at most ``num_actors`` groups of neighbours with about equal work; every cell is in exactly one group."""
    ordered = by_position(cells)
    costs = new_tokens(ordered)
    share = sum(costs) / num_actors
    runs: list[list[Cell]] = [[] for _ in range(num_actors)]
    done = 0.0
    for cell, cost in zip(ordered, costs, strict=True):
        runs[min(num_actors - 1, int((done + cost / 2) / share))].append(cell)
        done += cost
    return [run for run in runs if run]


def new_tokens(cells: Sequence[Cell]) -> list[float]:
    """Estimate how many tokens each cell prefills beyond those of its predecessor, for cells in the order of ``by_position``."""
    costs: list[float] = []
    last_position, last_length = 0.0, 0
    for cell in cells:
        position = _position(cell)
        shared = min(last_length, cell.context_tokens) if position == last_position else min(position, last_position, last_length)
        costs.append(cell.context_tokens - shared)
        last_position, last_length = position, cell.context_tokens
    return costs


def _position(cell: Cell) -> float:
    """Estimate how many tokens precede the first fact that differs from cell to cell."""
    first = cell.facts[0]
    if len(cell.facts) > 1 and all(fact.position_tokens is not None for fact in cell.facts):
        return cell.context_tokens  # the same facts in every cell: only the question differs
    if first.position_tokens is not None:
        return first.position_tokens
    return min(fact.depth_percent for fact in cell.facts) / 100 * cell.context_tokens
