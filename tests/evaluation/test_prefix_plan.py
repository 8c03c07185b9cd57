"""A plan has every prompt once, keeps only what is common, and prefills every token of the tree once."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.evaluation.prefix_plan import (
    Ids,
    PlannedPrompt,
    PrefillForecast,
    by_position,
    forecast_prefill,
    new_tokens,
    plan_prefixes,
    split_for_actors,
)
from pause_ray.evaluation.question import PlacedFact
from pause_ray.evaluation.suite import Cell
from pause_ray.models.shape import ModelShape

END = 7
"""Ends every prompt and stands nowhere else, as a question does: no prompt is the beginning of another."""

prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=12, unique_by=tuple).map(
    lambda bodies: [np.array([*body, END], dtype=np.int32) for body in bodies]
)


def distinct_prefixes(prompts: Sequence[Ids]) -> int:
    return len({tuple(prompt[:length]) for prompt in prompts for length in range(1, len(prompt) + 1)})


def prefilled(planned: Sequence[PlannedPrompt]) -> int:
    return sum(each.num_tokens - each.keep_tokens for each in planned)


@given(prompts=prompts_of_few_tokens, grain=st.integers(1, 4), reuse=st.sampled_from(["full", "depth", "none"]))
def test_following_the_plan_gives_every_prompt(prompts: list[Ids], grain: int, reuse: str) -> None:
    planned = plan_prefixes(prompts, reuse=reuse, prefix_block_size=grain, lengths=[len(prompt) for prompt in prompts])  # type: ignore[arg-type]
    assert sorted(each.prompt for each in planned) == list(range(len(prompts)))
    held = np.empty(0, dtype=np.int32)
    for each in planned:
        assert each.keep_tokens % grain == 0
        assert each.keep_tokens < each.num_tokens, "the last token's logits are needed"
        assert each.keep_tokens <= max(0, len(held) - 1)
        held = np.concatenate([held[: each.keep_tokens], prompts[each.prompt][each.keep_tokens :]])
        assert held.tolist() == prompts[each.prompt].tolist()


@given(prompts=prompts_of_few_tokens)
def test_every_token_of_the_tree_is_computed_once(prompts: list[Ids]) -> None:
    assert prefilled(plan_prefixes(prompts)) == distinct_prefixes(prompts)


@given(prompts=prompts_of_few_tokens)
def test_reuse_by_depth_shares_within_a_length_only(prompts: list[Ids]) -> None:
    lengths = [len(prompt) for prompt in prompts]
    groups = [[prompt for prompt in prompts if len(prompt) == length] for length in set(lengths)]
    assert prefilled(plan_prefixes(prompts, reuse="depth", lengths=lengths)) == sum(map(distinct_prefixes, groups))


@given(prompts=prompts_of_few_tokens, seed=st.integers(0, 9))
def test_without_reuse_everything_is_computed(prompts: list[Ids], seed: int) -> None:
    planned = plan_prefixes(random.Random(seed).sample(prompts, len(prompts)), reuse="none")
    assert prefilled(planned) == sum(each.num_tokens for each in planned) == sum(map(len, prompts))


def test_equal_prompts_compute_one_token_each_beyond_the_first() -> None:
    prompt = np.arange(100, dtype=np.int32)
    assert prefilled(plan_prefixes([prompt, prompt, prompt])) == 102


def test_large_ids_sort_as_numbers() -> None:
    """Byte order matters: 256 is less than 65,535, and bytes of the wrong end would tear neighbours apart."""
    trunk = [70_000, 3]
    prompts = [np.array([*trunk, last], dtype=np.int32) for last in (256, 65_535, 1)]
    assert prefilled(plan_prefixes(prompts)) == 3 + 1 + 1


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def test_a_forecast_is_of_what_is_computed_and_held(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shape = ModelShape.load(tmp_path)

    def expect(planned: list[PlannedPrompt], *, chunk: int = 8) -> PrefillForecast:
        return forecast_prefill(planned, shape, chunk_tokens=chunk, max_new_tokens=4, dtype="float32")

    prompts = [np.arange(40, dtype=np.int32), np.append(np.arange(30, dtype=np.int32), END)]
    shared, alone = expect(plan_prefixes(prompts)), expect(plan_prefixes(prompts, reuse="none"))
    assert shared.prefill_flops < alone.prefill_flops
    assert shared.kv_bytes == alone.kv_bytes == (40 + 4) * 2 * 2 * 2 * 16 * 4, "keys and values, layers, heads, size, bytes"
    together = forecast_prefill(plan_prefixes(prompts), shape, chunk_tokens=8, decode_batch=3, max_new_tokens=4, dtype="float32")
    assert together.kv_bytes == (44 + 44 + 3 * 4) * 2 * 2 * 2 * 16 * 4, "as much again that is answers' own, and what they say"
    whole = shape.forward_flops(new_tokens=40, past_tokens=0, logit_rows=1)
    assert expect(plan_prefixes(prompts[:1]), chunk=40).prefill_flops == whole
    in_chunks = sum(shape.forward_flops(new_tokens=8, past_tokens=past, logit_rows=past == 32) for past in range(0, 40, 8))
    assert expect(plan_prefixes(prompts[:1]), chunk=8).prefill_flops == in_chunks


def grid(lengths: list[int], depths: list[float]) -> list[Cell]:
    return [
        Cell(
            task="t",
            context_tokens=length,
            depth_percent=depth,
            replicate=0,
            sample=0,
            seed=0,
            facts=(PlacedFact(text="Fact.", references=("Fact",), depth_percent=depth),),
            question="Which?",
            answer_prefix="",
            draft="",
            labels=(),
            scorer="keywords",
            identity="",
        )
        for length in lengths
        for depth in depths
    ]


grids = st.builds(
    grid,
    st.lists(st.integers(100, 9000), min_size=1, max_size=5, unique=True),
    st.lists(st.floats(0, 100), min_size=1, max_size=5, unique=True),
)


@given(asked=grids, seed=st.integers(0, 9), num_actors=st.integers(1, 6))
def test_actors_share_the_cells_whatever_their_order(asked: list[Cell], seed: int, num_actors: int) -> None:
    shuffled = random.Random(seed).sample(asked, len(asked))
    runs = split_for_actors(shuffled, num_actors=num_actors)
    assert [cell for run in runs for cell in run] == by_position(asked)
    assert sorted(by_position(asked), key=lambda cell: cell.id) == sorted(asked, key=lambda cell: cell.id)
    assert len(runs) <= num_actors
    assert all(runs)


@pytest.mark.parametrize("num_actors", [2, 5])
def test_cells_of_one_position_stay_together_but_for_those_at_an_edge(num_actors: int) -> None:
    """They share the most: everything up to the shorter one's end."""
    lengths, places = [1000, 2000, 3000, 4000], range(0, 1000, 100)
    asked = [
        dataclasses.replace(cell, facts=(dataclasses.replace(cell.facts[0], position_tokens=place),))
        for place in places
        for cell in grid(lengths, [100 * place / lengths[-1]])
    ]
    runs = split_for_actors(random.Random(0).sample(asked, len(asked)), num_actors=num_actors)
    positions = [{cell.facts[0].position_tokens for cell in run} for run in runs]
    assert len(runs) == num_actors
    assert sum(map(len, positions)) <= len(places) + num_actors - 1


@pytest.mark.parametrize("num_actors", [2, 5])
def test_actors_share_the_work_about_evenly(num_actors: int) -> None:
    asked = grid([1000 * step for step in range(1, 17)], [float(step) for step in range(0, 101, 10)])
    work = [sum(new_tokens(run)) for run in split_for_actors(asked, num_actors=num_actors)]
    assert max(work) < 1.4 * min(work)
