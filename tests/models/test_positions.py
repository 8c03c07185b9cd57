"""Scaled positions: what they make of a config and of answers, how far they reach, and which models are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pause_ray.core.errors import ModelError, SpecError
from pause_ray.core.storage import MANIFEST
from pause_ray.inference.engine import Completion, HfEngineSpec, LoadedAs, PromptStep
from pause_ray.models.sources import ROTARY, model_digest, model_limit_tokens, resolve_model, row_limit_tokens, scaled_config
from pause_ray.models.spec import ModelSpec, RopeSpec
from pause_ray.trial.spec import TrialSpec
from tests.inference.prompt_steps import step_of, walk_of
from tests.inference.tiny_model import make_model

WINDOW = 512
KINDS = ("plain", "linear", "dynamic", "yarn")
PLAIN = {"model_type": "llama", "max_position_embeddings": WINDOW}


def rope(kind: str, factor: float = 4.0) -> RopeSpec:
    return RopeSpec.parse({"kind": kind, "factor": factor}, origin="test")


def scaled(folder: Path, kind: str | None, cache: Path, factor: float = 4.0) -> Path:
    fields = {} if kind is None else {"rope": {"kind": kind, "factor": factor}}
    return resolve_model(ModelSpec.parse({"source": str(folder), **fields}, origin="test"), cache=cache)


# ---- configs


@pytest.mark.parametrize(
    "own", [{}, {"rope_theta": 1e6, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_config_keeps_everything_but_positions(own: dict[str, Any], kind: str) -> None:
    before = PLAIN | own | {"hidden_size": 32}
    after = scaled_config(before, rope(kind), origin="test")
    assert after["hidden_size"] == 32
    thetas = [config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta") for config in (before, after)]
    assert thetas[0] == thetas[1]
    assert after["max_position_embeddings"] == (WINDOW if kind == "dynamic" else 4 * WINDOW)
    assert after.get("rope_parameters", {}).get("rope_type", "default") == ("default" if kind == "plain" else kind)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2", "n_positions": 512}, "positions of a gpt2 model"),
        (PLAIN | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "already (llama3)"),
        (PLAIN | {"rope_scaling": {"type": "linear", "factor": 8.0}}, "already (linear)"),
        (PLAIN | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "from layer to layer"),
        ({"model_type": "llama"}, "no max_position_embeddings"),
    ],
)
def test_a_model_whose_positions_cannot_be_scaled_is_refused_in_one_line(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError) as error:
        scaled_config(config, rope("yarn"), origin="model.source x")
    assert reason in str(error.value)
    assert "leave model.rope out" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("factor", [1, 0.5, 65])
def test_a_factor_that_stretches_nothing_is_refused(factor: float) -> None:
    with pytest.raises(SpecError, match="factor"):
        rope("linear", factor)


# ---- folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_folder_reaches_further_and_shares_the_weights(kind: str, tmp_path: Path) -> None:
    folder, cache = make_folder(tmp_path / "model"), tmp_path / "cache"
    found = scaled(folder, kind, cache)
    assert found == scaled(folder, kind, cache)
    assert model_limit_tokens(folder) == row_limit_tokens(folder) == WINDOW
    assert model_limit_tokens(found) == 4 * WINDOW
    assert row_limit_tokens(found) == (WINDOW if kind == "dynamic" else 4 * WINDOW)
    assert (found / "model.safetensors").samefile(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text()) == PLAIN


def test_every_scaling_is_another_model(tmp_path: Path) -> None:
    folder, cache = make_folder(tmp_path / "model"), tmp_path / "cache"
    folders = [folder, *(scaled(folder, kind, cache) for kind in KINDS), scaled(folder, "yarn", cache, factor=2.0)]
    assert len({model_digest(found, cache=cache) for found in folders}) == len(folders)


def test_weights_that_come_later_are_found(tmp_path: Path) -> None:
    """A hub's config is fetched for a plan, its weights only when they are needed."""
    folder, cache = make_folder(tmp_path / "model"), tmp_path / "cache"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    spec = ModelSpec.parse({"source": str(folder), "rope": {"kind": "yarn", "factor": 2}}, origin="test")
    early = resolve_model(spec, cache=cache, weights=False)
    assert model_limit_tokens(early) == 2 * WINDOW
    (folder / "model.safetensors").write_bytes(weights)
    assert (resolve_model(spec, cache=cache) / "model.safetensors").read_bytes() == weights


def make_folder(folder: Path) -> Path:
    """A plain folder with a few weights, whose manifest is its own."""
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PLAIN))
    (folder / "tokenizer.json").write_text("{}")
    (folder / MANIFEST).write_text(json.dumps({"gguf_sha256": "0" * 64, "conversion": 1}))
    save_file({"embed": np.ones((4, 4), dtype=np.float32)}, folder / "model.safetensors", {"format": "pt"})
    return folder


# ---- specs


def trial(**fields: Any) -> TrialSpec:
    suite = {
        "name": "tiny",
        "task": {"kind": "uuid"},
        "noise": "Rain falls.",
        "context_tokens": [400],
        "samples": 1,
    }
    return TrialSpec.parse({"model": {"source": "x", "rope": {"kind": "dynamic", "factor": 2}}, "eval": suite, **fields}, origin="test")


def test_dynamic_positions_share_nothing_between_lengths() -> None:
    with pytest.raises(SpecError, match=r"engine\.reuse to depth"):
        trial()
    assert trial(engine={"reuse": "depth"}).model.rope == rope("dynamic", 2)


def test_a_server_scales_its_own_positions() -> None:
    with pytest.raises(SpecError, match=r"model\.rope dynamic has no effect on an endpoint"):
        trial(engine={"kind": "endpoint", "url": "http://127.0.0.1:1/v1", "model": "x"})


# ---- answers


def prompts(lengths: list[int]) -> list[list[int]]:
    """Prompts of these lengths that begin alike."""
    ids = [int(token) for token in np.random.default_rng(0).integers(3, 60, max(lengths))]
    return [[*ids[: length - 4], *[5 + place] * 4] for place, length in enumerate(lengths)]


def answers(folder: Path, asked: list[PromptStep], *, together: int = 1) -> list[Completion]:
    from pause_ray.inference.hf import HfEngine

    engine = HfEngine(HfEngineSpec(decode_batch=together, chunk_tokens=100), device="cpu")
    engine.use(LoadedAs(model_dir=folder, dtype="float32"))
    found = dict(engine.answer(asked))
    return [answer for answer in (found[place] for place in range(len(asked))) if isinstance(answer, Completion)]


@pytest.mark.torch
@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_scaled_as_transformers_does_in_one_pass(family: str, kind: str, tmp_path: Path) -> None:
    """The reference sees the whole length at once; the engine reads in chunks of 100 tokens."""
    import torch
    import transformers

    folder = scaled(make_model(tmp_path / "model", kind=family, limit_tokens=WINDOW), kind, tmp_path / "cache")
    [prompt] = prompts([1023])
    [answer] = answers(folder, [step_of(prompt, most=1)])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():  # 1,024 tokens with room for the answer
        logits = model(input_ids=torch.tensor([[*prompt, 3]])).logits[0, -2]
    first, second = logits.topk(2).values.tolist()
    assert answer.ids == (int(logits.argmax()),)
    assert answer.margin == pytest.approx(first - second, abs=1e-3)


@pytest.mark.torch
def test_every_scaling_changes_what_is_read(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", limit_tokens=WINDOW)
    read = {kind: answers(scaled(folder, kind, tmp_path / "cache"), [step_of(prompts([1016])[0], most=8)])[0].margin for kind in KINDS}
    assert len({round(margin or 0, 5) for margin in read.values()}) == len(KINDS)


@pytest.mark.torch
@pytest.mark.parametrize("together", [1, 4])
def test_dynamic_answers_do_not_depend_on_what_was_asked_before(together: int, tmp_path: Path) -> None:
    folder = scaled(make_model(tmp_path / "model", limit_tokens=WINDOW), "dynamic", tmp_path / "cache")
    lengths = [300, 1500, 1400, 310, 900, 2000, 290]
    alone = [answers(folder, [step_of(prompt, most=8)])[0] for prompt in prompts(lengths)]
    shared = answers(folder, walk_of(prompts(lengths), most=8), together=together)
    assert [answer.ids for answer in shared] == [answer.ids for answer in alone]
    for one, other in zip(shared, alone, strict=True):
        assert one.margin == pytest.approx(other.margin, abs=1e-4)
    assert sum(answer.prefilled_tokens for answer in shared) < sum(answer.prefilled_tokens for answer in alone)


@pytest.mark.torch
def test_training_sees_dynamic_positions_unscaled(tmp_path: Path) -> None:
    """Its rows are within the window; a longer batch of rows end to end must not change them."""
    import torch

    from pause_ray.models.weights import empty_base, load_base

    folder = make_model(tmp_path / "model", limit_tokens=WINDOW)
    dynamic = scaled(folder, "dynamic", tmp_path / "cache")
    plain = load_base(folder, dtype="float32", marker=None, device="cpu").get_decoder().rotary_emb
    for load in (
        lambda: load_base(dynamic, dtype="float32", marker=None, device="cpu"),
        lambda: empty_base(dynamic, dtype="float32", marker=None),
    ):
        layer = load().get_decoder().rotary_emb
        layer(torch.zeros(1), torch.tensor([[2 * WINDOW]]))
        assert torch.equal(layer.inv_freq, plain.inv_freq)
