"""Every family of models trains, saves, reloads and scores; the marker's row under every stage; 4-bit bases; what fits no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.storage import Storage
from pause_ray.inference.engine import Completion, HfEngineSpec, LoadedAs
from pause_ray.models.checkpoint import ADAPTER_WEIGHTS, Checkpoint
from pause_ray.text.tokenizer import MarkerToken
from pause_ray.training.launch import fit
from pause_ray.training.spec import LoraSpec, TrainJob, TrainSpec, ZeroSpec
from tests.inference.prompt_steps import step_of
from tests.inference.tiny_model import added_marker, make_model
from tests.training.tiny_llama import make_rows, make_shards

pytestmark = pytest.mark.torch

FAMILIES = [
    ("llama", 0, "added", True),
    ("qwen2", 1, "reserved", True),
    ("qwen3", 2, "added", False),
    ("mistral", 3, "added", False),
    ("gemma2", 3, "added", True),
    ("gemma3_text", 2, "reserved", True),
    ("phi3", 3, "text", False),
]
"""Kind, ZeRO stage, kind of marker, embeddings tied: every value of each beside several of the others."""
OFTEN_TRIED = ("llama", "mistral")
"""Kinds that ``make test`` trains; ``make test-all`` trains all."""
PROMPT = [5, 9, 30, 41, 7, 77, 12, 300, 299, 6]


def reserved_marker() -> MarkerToken:
    """``<|start|>``, which the tiny tokenizer has."""
    return MarkerToken(text="<|start|>", token_id=1, added=False, initial_ids=(1,))


def marker_of(model_dir: Path, token: str) -> MarkerToken | None:
    return {"added": added_marker, "reserved": lambda _: reserved_marker(), "text": lambda _: None}[token](model_dir)


def train(model_dir: Path, root: Path, *, marker: MarkerToken | None, base_digest: str = "tiny", **settings: Any) -> Checkpoint:
    """Three steps on rows that hold the marker."""
    shards = root / "set"
    if not shards.exists():
        make_shards(shards, make_rows(12, marker_id=marker.token_id if marker else None))
    usual = {
        "max_steps": 3,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 2e-2,
        "precision": "float32",
        "lora": LoraSpec(rank=4, alpha=8),
    }
    job = TrainJob(
        train=TrainSpec(**(usual | settings)),
        model_dir=model_dir,
        base_digest=base_digest,
        shards=shards,
        marker=marker,
        policy=None,
        seed=0,
        threads=1,
    )
    return fit(job, storage=Storage.open(root / "runs"), num_workers=0, cpus_per_worker=1, gpus_per_worker=0, progress=lambda *_: None)


def tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    import safetensors.torch

    return {name: tensor.float() for name, tensor in safetensors.torch.load_file(checkpoint.folder / ADAPTER_WEIGHTS).items()}


def with_plain_peft(model_dir: Path, checkpoint: Checkpoint) -> Any:
    """As a user without this project loads it."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    rows = base.get_input_embeddings().weight.shape[0]
    if checkpoint.marker and checkpoint.marker.token_id >= rows:
        base.resize_token_embeddings(checkpoint.marker.token_id + 1, mean_resizing=False)
    return peft.PeftModel.from_pretrained(base, checkpoint.folder).eval()


@pytest.mark.parametrize(
    ("kind", "stage", "token", "tied"),
    [pytest.param(*family, marks=() if family[0] in OFTEN_TRIED else pytest.mark.slow) for family in FAMILIES],
)
def test_a_family_trains_saves_reloads_and_scores(tmp_path: Path, kind: str, stage: int, token: str, tied: bool) -> None:
    import torch

    from pause_ray.inference.hf import HfEngine
    from pause_ray.models.weights import load_adapter, load_base

    model_dir = make_model(tmp_path / "model", kind=kind, tied=tied)
    marker = marker_of(model_dir, token)
    checkpoint = train(model_dir, tmp_path, marker=marker, zero=ZeroSpec(stage=stage))
    asked = torch.tensor([[*PROMPT, marker.token_id, 17] if marker else PROMPT])

    base = load_base(model_dir, dtype="float32", marker=marker, device="cpu")
    with torch.no_grad():
        untrained = base(asked).logits
        ours = load_adapter(base, checkpoint.folder)(asked).logits
        theirs = with_plain_peft(model_dir, checkpoint)(asked).logits
    vocabulary = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    assert (ours - untrained).abs().max() > 1e-2
    assert torch.allclose(ours[..., :vocabulary], theirs[..., :vocabulary], atol=1e-5), "an added marker's untied output row is ours alone"

    engine = HfEngine(HfEngineSpec(chunk_tokens=16), device="cpu", threads=1)
    engine.use(LoadedAs(model_dir=model_dir, dtype="float32", marker=marker, adapter_dir=checkpoint.folder))
    ((_, answer),) = engine.answer([step_of(asked[0].tolist(), most=1)])
    assert isinstance(answer, Completion)
    assert [*answer.ids, 0][0] == int(ours[0, -1].argmax())


@pytest.mark.slow
def test_the_text_part_of_a_multimodal_model_is_trained_and_its_stored_names_are_understood(tmp_path: Path) -> None:
    """Gemma 3 from 4B up: other names in the files than in memory, and a vision tower with layers of the same names."""
    import transformers

    model_dir = make_model(tmp_path / "model", kind="gemma3_text")
    text = json.loads((model_dir / "config.json").read_text())
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5}
    whole = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    transformers.AutoModelForCausalLM.from_config(whole).save_pretrained(model_dir)
    first, last = (
        tensors(train(model_dir, tmp_path / str(stage), marker=added_marker(model_dir), zero=ZeroSpec(stage=stage))) for stage in (0, 3)
    )
    assert first.keys() == last.keys()
    assert all(float((first[name] - last[name]).abs().max()) < 1e-4 for name in first)
    assert len(first) == 2 * 7 * text["num_hidden_layers"] + 1
    assert not [name for name in first if "vision" in name]


@pytest.mark.slow
@pytest.mark.parametrize("token", ["added", "reserved", "text"])
def test_the_markers_row_alone_is_trained_and_saved_under_every_stage(tmp_path: Path, token: str) -> None:
    model_dir = make_model(tmp_path / "model")
    marker = marker_of(model_dir, token)
    stages = [tensors(train(model_dir, tmp_path / str(stage), marker=marker, zero=ZeroSpec(stage=stage))) for stage in range(4)]
    rows = {name: tensor for name, tensor in stages[0].items() if ".lora_" not in name}
    assert [tuple(tensor.shape) for tensor in rows.values()] == ([(1, 32)] if marker else [])
    for others in stages[1:]:
        assert others.keys() == stages[0].keys()
        assert all(float((others[name] - stages[0][name]).abs().max()) < 1e-4 for name in others)


def losses(checkpoint: Checkpoint) -> list[float]:
    return [row["loss"] for row in checkpoint.losses()]


@pytest.mark.slow
def test_a_four_bit_base_trains_alike_under_every_stage(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    marker = added_marker(model_dir)
    settings: dict[str, Any] = {"precision": "bfloat16", "lora": LoraSpec(rank=4, alpha=8)}
    whole = losses(train(model_dir, tmp_path / "whole", marker=marker, **settings))
    first, *others = (
        losses(train(model_dir, tmp_path / str(stage), marker=marker, quantize="nf4", zero=ZeroSpec(stage=stage), **settings))
        for stage in range(4)
    )
    assert first == pytest.approx(whole, rel=0.25)
    assert first[0] != whole[0], "four bits round"
    assert first[-1] < first[0]
    for stage in others:
        assert stage == pytest.approx(first, abs=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"quantize": "int8", "zero": ZeroSpec(stage=2)},
        {"quantize": "nf4", "lora": LoraSpec(rank=4, dora=True), "zero": ZeroSpec(stage=2)},
        {"lora": LoraSpec(rank=4, dora=True, rslora=True, dropout=0.1), "zero": ZeroSpec(stage=3)},
        {"gradient_checkpointing": True, "zero": ZeroSpec(stage=3, offload_parameters="cpu")},
    ],
)
def test_options_go_together_and_train(tmp_path: Path, settings: dict[str, Any]) -> None:
    from pause_ray.models.weights import load_adapter, load_base

    model_dir = make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    marker = added_marker(model_dir)
    usual = {"precision": "bfloat16", "max_steps": 6}
    checkpoint = train(model_dir, tmp_path, marker=marker, **(usual | settings))
    assert losses(checkpoint)[-1] < losses(checkpoint)[0]
    base = load_base(model_dir, dtype="bfloat16", marker=marker, device="cpu", quantize=settings.get("quantize"))
    assert load_adapter(base, checkpoint.folder).training is False


@pytest.mark.slow
def test_a_marker_that_is_the_padding_token_is_trained_all_the_same(tmp_path: Path) -> None:
    """An embedding layer gives its padding row no gradient."""
    model_dir = make_model(tmp_path / "model", kind="phi3", pad_token_id=1, bos_token_id=2)
    checkpoint = train(model_dir, tmp_path, marker=reserved_marker(), zero=ZeroSpec(stage=1))
    (row,) = (tensor for name, tensor in tensors(checkpoint).items() if ".lora_" not in name)
    base = with_plain_peft(model_dir, checkpoint).get_base_model()
    assert (row[0] - base.get_input_embeddings().original_module.weight[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "stage", "said"),
    [
        ({"lora": LoraSpec(rank=33)}, 0, "train.lora.rank 33: above the model's hidden size 32"),
        ({"lora": LoraSpec(targets=("q_proj", "c_attn"))}, 3, r"\['c_attn'\] name no linear layer.*'q_proj'"),
        ({"lora": LoraSpec(targets=("lm_head",))}, 0, r"\['lm_head'\] name no linear layer"),
        (
            {"quantize": "nf4", "precision": "bfloat16", "lora": LoraSpec(dora=True)},
            3,
            "dora with quantize nf4 under ZeRO stage 3 needs GPUs",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_weight_is_read(
    tmp_path: Path, changes: dict[str, Any], stage: int, said: str
) -> None:
    from pause_ray.training.model import load_trainable

    model_dir = make_model(tmp_path / "model")
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(SpecError, match=said):
        load_trainable(TrainSpec(**changes), model_dir=model_dir, marker=None, seed=0, device="cpu", stage=stage)
