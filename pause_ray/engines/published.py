"""Sizes of a few published models, so that a training can be planned without their gated repositories. Facts only, no code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072}

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-3.2-3B": _LLAMA_3
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "meta-llama/Llama-3.1-70B": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Hub id → the fields of its ``config.json`` that decide sizes, as published there (arXiv 2407.21783, table 3, for 8B and 70B)."""


def published_config(name: str) -> Mapping[str, Any] | None:
    """The config of a hub id, also of its instruct version, or of a size alone such as ``8B``; None for others."""
    wanted = name.lower().removesuffix("-instruct")
    for source, config in PUBLISHED.items():
        if wanted in (source.lower(), source.rpartition("-")[2].lower()):
            return config
    return None
