"""On a GPU: flash attention after a past, keys in pinned memory and running out of memory give the answers of a whole computation."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.inference.engine import Completion, EngineError, HfEngineSpec, LoadedAs, PromptStep
from tests.inference.prompt_steps import step_of, walk_of
from tests.inference.test_hf import prompts
from tests.inference.tiny_model import KINDS, make_model

torch = pytest.importorskip("torch")
hf = pytest.importorskip("pause_ray.inference.hf")
weights = pytest.importorskip("pause_ray.models.weights")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def answers(folder: Path, steps: list[PromptStep], *, device: str = "cuda:0", dtype: str = "float32", **spec: object) -> list[Completion]:
    engine = hf.HfEngine(HfEngineSpec.model_validate({"chunk_tokens": 16, **spec}), device=device)
    engine.use(LoadedAs(model_dir=folder, dtype=dtype))
    outcomes = [outcome for _, outcome in engine.answer(steps)]
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_answers_are_those_of_the_cpu(tmp_path: Path, kind: str) -> None:
    folder = make_model(tmp_path / "model", kind=kind)
    steps = walk_of(prompts(6))
    expected = [answer.ids for answer in answers(folder, steps, device="cpu")]
    assert [answer.ids for answer in answers(folder, steps)] == expected
    assert [answer.ids for answer in answers(folder, steps, kv="host")] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_answers_and_margins_are_equal_whatever_is_kept(tmp_path: Path, kind: str) -> None:
    folder = make_model(tmp_path / "model", kind=kind)
    asked = prompts(6)
    none = answers(folder, [step_of(ids, draft=[9, 9]) for ids in asked], dtype="bfloat16")
    for kv in ("device", "host"):
        kept = answers(folder, walk_of(asked, grain=16, drafts=[[9, 9]] * len(asked)), dtype="bfloat16", kv=kv)
        assert [(answer.ids, answer.margin) for answer in kept] == [(answer.ids, answer.margin) for answer in none]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_flash_attention_are_those_of_the_plainest(tmp_path: Path, kind: str) -> None:
    from pause_ray.inference.kv_cache import prefix_cache
    from pause_ray.inference.prefix_attention import use_prefix_attention

    model = weights.load_base(make_model(tmp_path / "model", kind=kind), dtype="bfloat16", marker=None, device="cuda:0")
    ids = torch.as_tensor(prompts(1)[0], device="cuda:0")[None]
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        whole = model(input_ids=ids, use_cache=False).logits[0].float()
        use_prefix_attention(model)
        cache = prefix_cache(model.config, host=False)
        parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits[0] for part in ids.split([50, 9, 1, 40, 100], dim=1)]
    path = torch.cat(parts).float()
    assert (path - whole).abs().mean() < 0.03 * whole.std(), "rounding alone moves them by half of that, one key too many by twice"


def test_too_long_a_prompt_leaves_memory_for_the_next(tmp_path: Path) -> None:
    engine = hf.HfEngine(HfEngineSpec(chunk_tokens=16), device="cuda:0")
    engine.use(LoadedAs(model_dir=make_model(tmp_path / "model", limit_tokens=10**14), dtype="float32"))
    asked = prompts(1)
    endless = step_of(asked[0], most=10**13)
    outcomes = [outcome for _, outcome in engine.answer([step_of(asked[0]), endless, step_of(asked[1])])]
    assert isinstance(outcomes[1], EngineError)
    assert "out of memory" in str(outcomes[1])
    assert isinstance(outcomes[0], Completion)
    assert isinstance(outcomes[2], Completion)
    assert engine.kv_bytes < 10**9
