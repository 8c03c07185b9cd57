"""Answers that are computed side by side: every prompt gets its own once, whatever fails and whoever stops listening."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pause_ray.inference.engine import Completion, EngineError, HfEngineSpec, LoadedAs, PromptStep
from tests.inference.prompt_steps import shared, step_of, walk_of
from tests.inference.tiny_model import WINDOW, make_adapter, make_model

torch = pytest.importorskip("torch")
hf = pytest.importorskip("pause_ray.inference.hf")
kv_cache = pytest.importorskip("pause_ray.inference.kv_cache")
pytestmark = pytest.mark.torch
CHUNK = 16
POISON = 391
UNUSUAL: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama4_text": {
        "attention_chunk_size": WINDOW,
        "head_dim": 16,
        "intermediate_size_mlp": 64,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "moe_layers": [],
    },
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
    },
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
}
"""Sinks beside the keys, windows that do not slide, keys made of something smaller that is cached, a scale of its own."""


def engine_for(model_dir: Path, **spec: Any) -> hf.HfEngine:
    engine = hf.HfEngine(HfEngineSpec(chunk_tokens=CHUNK, **spec), device="cpu", threads=1)
    engine.use(LoadedAs(model_dir=model_dir, dtype="float32"))
    return engine


def branches(draw: random.Random, count: int, *, highest: int = 390) -> list[list[int]]:
    """Prompts that share beginnings of all lengths, in no good order."""
    trunks = [[draw.randrange(2, highest) for _ in range(70)] for _ in range(2)]
    return [
        draw.choice(trunks)[: draw.randrange(71)] + [draw.randrange(2, highest) for _ in range(draw.randrange(1, 40))] for _ in range(count)
    ]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_attention_is_left_to_transformers_or_done_right(tmp_path: Path, kind: str) -> None:
    import transformers

    folder = make_model(tmp_path / "model", kind=kind, **UNUSUAL[kind])
    asked = sorted(branches(random.Random(0), 6))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expected = [
        [token for token in model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :].tolist() if token]
        for ids in asked
    ]
    for together in (1, 4):
        found = dict(engine_for(folder, decode_batch=together).answer(walk_of(asked, most=30, drafts=[[9]] * len(asked))))
        assert [list(found[place].ids) for place in range(len(asked))] == expected
    assert len(set(map(tuple, expected))) > 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_whatever_fails_every_prompt_gets_its_own_answer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
) -> None:
    """Memory that is short in mid-pass or when a branch is split from the prefix, logits that are no numbers, at once or after a while."""
    draw = random.Random(seed)
    monkeypatch.setattr(hf._Base, "prefix_block_size", lambda *_: CHUNK if seed % 2 else 1)
    folder = make_model(tmp_path / "model", kind=kind, tied=False, seed=seed)
    asked = branches(draw, 24, highest=200)
    asked[5] = [*asked[5], POISON, *asked[6]]
    alone = engine_for(folder, decode_batch=1, drafts=False)
    said = [token for _, answer in alone.answer([step_of(asked[place], most=8) for place in (0, 1, 2)]) for token in answer.ids[1:6]]
    spoiled = next(token for token in said if token > 200)
    engine = engine_for(folder, decode_batch=draw.choice([2, 3, 8]))
    for one in (alone, engine):
        with torch.no_grad():
            one.model.get_input_embeddings().weight[[POISON, spoiled]] = torch.nan
    expected = dict(alone.answer([step_of(ids, most=24) for ids in asked]))
    steps = []
    for place, ids in enumerate(asked):
        before, answer = asked[max(0, place - 1)], expected[place]
        draft = draw.choice([(), (9,), answer.ids[:3] if isinstance(answer, Completion) else (9, 9)])
        steps.append(step_of(ids, keep=draw.choice([0, shared(before, ids), 99]), draft=draft, most=24))

    raised: list[int] = []

    def short(*_: Any) -> None:
        if draw.random() < 0.015:
            raised.append(1)
            raise torch.OutOfMemoryError("no memory is left")

    split = kv_cache.Branch.split
    monkeypatch.setattr(kv_cache.Branch, "split", lambda *args, **options: (short(), split(*args, **options))[1])
    engine.model.model.layers[1].register_forward_pre_hook(short)
    found = list(engine.answer(steps))
    assert sorted(place for place, _ in found) == list(range(len(asked)))
    kinds = set()
    for place, outcome in found:
        wanted = expected[place]
        kinds.add(str(outcome)[:13] if isinstance(outcome, EngineError) else "answered")
        if isinstance(outcome, Completion):
            assert isinstance(wanted, Completion)
            assert outcome.ids == wanted.ids
        else:
            assert str(outcome) in (str(wanted), f"out of memory on a prompt of {len(asked[place])} tokens")
    assert {"answered", "the model's l"} <= kinds
    assert raised
    assert sum(isinstance(outcome, Completion) for _, outcome in found) > 5


def test_keys_in_host_memory_mean_one_answer_at_a_time() -> None:
    assert HfEngineSpec(kv="host").answers_together(dtype="float32", quantize=None) == 1
    assert HfEngineSpec().answers_together(dtype="float32", quantize=None) > 1
    assert HfEngineSpec(decode_batch=3).answers_together(dtype="bfloat16", quantize=None) == 3
    with pytest.raises(ValueError, match=r"decode_batch 4: .* kv: device only"):
        HfEngineSpec(kv="host", decode_batch=4)


def some_steps(*, seed: int) -> list[PromptStep]:
    return walk_of(sorted(branches(random.Random(seed), 7)), most=24)


def test_answers_that_no_one_took_do_not_reach_the_next_caller(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    expected = dict(engine_for(folder).answer(some_steps(seed=2)))
    engine = engine_for(folder)
    left = engine.answer(some_steps(seed=1))
    next(left)
    found = dict(engine.answer(some_steps(seed=2)))
    assert {place: answer.ids for place, answer in found.items()} == {place: answer.ids for place, answer in expected.items()}
    assert sum(answer.forwards for answer in found.values()) == sum(answer.forwards for answer in expected.values())


@pytest.mark.parametrize("meanwhile", ["another call", "other shapes", "an adapter"])
def test_whoever_is_overtaken_is_told(tmp_path: Path, meanwhile: str) -> None:
    """Rather than getting fewer answers, or those of another model."""
    folder = make_model(tmp_path / "model")
    engine = engine_for(folder)
    first = engine.answer(some_steps(seed=1))
    taken = [next(first)]
    if meanwhile == "another call":
        next(engine.answer(some_steps(seed=2)))
    elif meanwhile == "other shapes":
        engine.answer_with_other_shapes(some_steps(seed=2)[0])
    else:
        engine.use(LoadedAs(model_dir=folder, dtype="float32", adapter_dir=make_adapter(tmp_path / "adapter", folder, seed=1)))
    with pytest.raises(RuntimeError, match="something else before all answers were taken"):
        taken.extend(first)
    assert len(taken) < 7
