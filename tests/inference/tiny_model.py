"""Tiny random models of several architectures over the tiny tokenizer, and adapters for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pause_ray.models.checkpoint import TRAINING_LOG, copy_tokenizer, seal
from pause_ray.text.tokenizer import MarkerToken, ModelTokenizer
from tests.evaluation.tiny import make_tokenizer_folder

WINDOW = 24
"""Tokens of the tiny sliding windows: shorter than the tests' prompts."""

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"sliding_window": 2 * WINDOW, "pad_token_id": 0, "bos_token_id": 1},
}
"""Architectures that differ in norms, bounded scores, fused projections, windows and the mixing of layers."""


def make_model(folder: Path, *, kind: str = "llama", tied: bool = True, seed: int = 0, limit_tokens: int = 4096, **config: Any) -> Path:
    """Two or three layers of 32 values, weights large enough that answers depend on the whole prompt."""
    import torch
    import transformers

    make_tokenizer_folder(folder)
    sizes = json.loads((folder / "config.json").read_text())
    torch.manual_seed(seed)
    settings = {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": limit_tokens,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "eos_token_id": 0,
    }
    full = transformers.AutoConfig.for_model(kind, **(settings | KINDS.get(kind, {}) | config))
    transformers.AutoModelForCausalLM.from_config(full).save_pretrained(folder)
    return folder


def added_marker(model_dir: Path, text: str = "<PAUSE>") -> MarkerToken:
    tokenizer = ModelTokenizer.load(model_dir)
    ids = tuple(int(token) for token in tokenizer.encode(text).ids)
    return MarkerToken(text=text, token_id=tokenizer.vocab_size, added=True, initial_ids=ids)


def make_adapter(folder: Path, model_dir: Path, *, seed: int, marker: MarkerToken | None = None) -> Path:
    """A LoRA adapter with random weights in both factors, and a random row for ``marker``, saved by plain PEFT."""
    import peft
    import torch

    from pause_ray.models.weights import load_base

    torch.manual_seed(seed)
    base = load_base(model_dir, dtype="float32", marker=marker, device="cpu")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=r".*\.(q_proj|v_proj|qkv_proj|down_proj)",
        trainable_token_indices={"embed_tokens": [marker.token_id]} if marker else None,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def make_checkpoint(folder: Path, model_dir: Path, *, seed: int, marker: MarkerToken) -> Path:
    """``make_adapter`` as training leaves it: with its tokenizer, a log and a manifest that names the marker."""
    make_adapter(folder, model_dir, seed=seed, marker=marker)
    copy_tokenizer(model_dir, folder, marker=marker)
    (folder / TRAINING_LOG).write_text('{"step": 1, "loss": 1.0}\n')
    seal(folder, base_digest="tiny", tokenizer_digest="tiny", marker=marker, spec={}, document_digests=frozenset())
    return folder
