"""Sizes and operations of a forward pass, predicted from a model's ``config.json``. Loads no model and needs no torch.

For decoder models in the manner of Llama whose layers attend to everything or to a window. Operations are those that
``torch.utils.flop_counter`` counts where ``inference.hf`` computes: two per multiply-add of every matrix product, and attention
of every query to every key that its forward pass brings, masked or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pause_ray.core.errors import ModelError
from pause_ray.models.sources import read_config

_GEMMA_2 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256_000, "sliding_window": 4096}
_GEMMA_3 = _GEMMA_2 | {"vocab_size": 262_208, "sliding_window_pattern": 6}
_QWEN = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "phi3": {},
    "gemma2": _GEMMA_2 | {"sliding_window_pattern": 2, "tie_word_embeddings": True},
    "gemma3_text": _GEMMA_3 | {"tie_word_embeddings": True},
}
"""Supported kinds of model, with the fields that their configs may leave to the defaults of transformers' configuration classes."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per value of each precision."""
_QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes per weight (bitsandbytes). ``nf4`` has four bits, eight bits of scale for every block of 64, and a float32 scale for 256 of
those scales."""
_ATTENTIONS = ("full_attention", "sliding_attention")
_FUSED = {"phi3"}
"""Kinds with one layer for query, key and value, and one for gate and up."""
_FOUR_NORMS = {"gemma2", "gemma3_text"}
"""Kinds with norms before and after attention and MLP; others have norms before them."""
_NORMED_HEADS = {"qwen3", "gemma3_text"}
"""Kinds that normalise the queries and keys of each head."""


def prompt_passes(begin: int, end: int, *, chunk_tokens: int, prefix_block_size: int) -> list[tuple[int, int]]:
    """Return the spans of the forward passes over a prompt's tokens from ``begin`` to ``end``.

    Equal parts of about ``chunk_tokens``, at most half as much again: a short rest would read all weights for little. Where only
    multiples of ``prefix_block_size`` are kept, whole chunks and the rest, so that what is kept always has the same shape.
    """
    if prefix_block_size > 1:
        return [(start, min(start + chunk_tokens, end)) for start in range(begin, end, chunk_tokens)]
    parts = max(1, round((end - begin) / chunk_tokens))
    cuts = [begin + (end - begin) * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(cuts))


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    """Whether input and output embeddings are one table."""
    windows: tuple[int | None, ...]
    """Number of tokens that a query of each layer sees, itself included; None for all."""
    kind: str
    """The ``model_type`` of the config."""
    bias_weights: int
    """Number of biases in one layer."""

    @classmethod
    def load(cls, model_dir: Path) -> Self:
        """Read ``config.json``; for a model of text and images, its ``text_config``.

        Raises:
            ModelError: a kind of model that is not understood, or a field that is missing or no number; named.
        """
        path = model_dir / "config.json"
        return cls.from_config(read_config(path), origin=str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, origin: str = "config.json") -> Self:
        """Read the content of a ``config.json``; ``origin`` names it in errors.

        Raises:
            ModelError: as ``load``.
        """
        fields = _Fields.of(config, origin=origin)
        heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
        kv_heads, intermediate = fields.count("num_key_value_heads", otherwise=heads), fields.count("intermediate_size")
        head_dim = fields.count("head_dim", otherwise=hidden // heads)
        return cls(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=intermediate,
            vocab_size=fields.count("vocab_size"),
            tied=bool(fields.values.get("tie_word_embeddings", False)),
            windows=fields.windows(fields.count("num_hidden_layers")),
            kind=fields.values["model_type"],
            bias_weights=fields.bias_weights(hidden=hidden, queries=heads * head_dim, keys=kv_heads * head_dim, intermediate=intermediate),
        )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.windows)

    def forward_flops(self, *, new_tokens: int, past_tokens: int, logit_rows: int) -> int:
        """Return the operations of one forward pass over ``new_tokens`` after ``past_tokens``, with logits for ``logit_rows`` of them."""
        attention = sum(new_tokens + (past_tokens if window is None else min(past_tokens, window - 1)) for window in self.windows)
        attention *= 4 * self.num_heads * self.head_dim * new_tokens
        linear = 2 * new_tokens * self.num_layers * self._layer_weights
        return linear + attention + 2 * logit_rows * self.hidden_size * self.vocab_size

    def prompt_flops(
        self, *, prompt_tokens: int, kept_tokens: int, chunk_tokens: int, prefix_block_size: int = 1, draft_tokens: int = 0
    ) -> int:
        """Return the operations of a prompt whose first ``kept_tokens`` are computed already, with a draft of its answer after its end."""
        total = 0
        for begin, end in prompt_passes(kept_tokens, prompt_tokens, chunk_tokens=chunk_tokens, prefix_block_size=prefix_block_size):
            rows = 1 + draft_tokens if end == prompt_tokens else 0
            new = end - begin + max(0, rows - 1)
            total += self.forward_flops(new_tokens=new, past_tokens=begin, logit_rows=rows)
        return total

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Return the bytes of one token's keys and values in all layers; layers with a window keep all of them too."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    def weight_bytes(self, dtype: str, quantize: str | None = None) -> int:
        """Return the bytes of the loaded weights; norms and biases are left out, embeddings stay in ``dtype`` when quantized."""
        per_weight = BYTES[dtype] if quantize is None else _QUANTIZED_BYTES[quantize]
        return round(self.num_layers * self._layer_weights * per_weight + self.table_weights * BYTES[dtype])

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of one decoder layer, by name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.kind in _FUSED:
            reading = {"qkv_proj": (hidden, queries + 2 * keys), "o_proj": (queries, hidden)}
            return reading | {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}
        reading = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden)}
        return reading | {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}

    @property
    def table_weights(self) -> int:
        """Number of weights of the embeddings: one table, or two where the output has its own."""
        return (1 if self.tied else 2) * self.vocab_size * self.hidden_size

    @property
    def num_norms(self) -> int:
        """Number of norms of the hidden state in one layer."""
        return 4 if self.kind in _FOUR_NORMS else 2

    @property
    def normalizes_heads(self) -> bool:
        """Whether the queries and keys of each head are normalised."""
        return self.kind in _NORMED_HEADS

    @property
    def caps_scores(self) -> bool:
        """Whether attention bounds its scores."""
        return self.kind == "gemma2"

    @property
    def norm_weights(self) -> int:
        """Number of weights of the norms of one layer."""
        return self.num_norms * self.hidden_size + (2 * self.head_dim if self.normalizes_heads else 0)

    @property
    def num_parameters(self) -> int:
        """Number of all weights."""
        layer = self._layer_weights + self.norm_weights + self.bias_weights
        return self.num_layers * layer + self.hidden_size + self.table_weights

    def lora_parameters(self, rank: int, *, targets: Sequence[str] | None = None, dora: bool = False) -> int:
        """Return the parameters of an adapter on the layers ``targets``, or on all; ``dora`` adds a magnitude per output."""
        chosen = (size for name, size in self.linear_layers.items() if targets is None or name in targets)
        return self.num_layers * sum(rank * (inputs + outputs) + (outputs if dora else 0) for inputs, outputs in chosen)

    @property
    def _layer_weights(self) -> int:
        """Number of weights of one layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.linear_layers.values())


@dataclass(frozen=True)
class _Fields:
    """A config with its defaults; its methods name a wrong field in their errors."""

    values: Mapping[str, Any]
    origin: str

    @classmethod
    def of(cls, config: Mapping[str, Any], *, origin: str) -> Self:
        text = config.get("text_config")
        if text is not None and not isinstance(text, Mapping):
            raise ModelError(f"{origin}: text_config is {text!r}, and an object is needed; correct the file")
        values = config if text is None else {name: config[name] for name in ("tie_word_embeddings",) if name in config} | dict(text)
        kind = values.get("model_type")
        if not isinstance(kind, str) or kind not in _LEFT_OUT:
            known = ", ".join(_LEFT_OUT)
            raise ModelError(f"{origin}: model_type {kind!r} is not one whose cost can be predicted ({known}); run it without a plan")
        return cls({**_LEFT_OUT[kind], **values}, origin)

    def count(self, name: str, *, otherwise: int | None = None) -> int:
        value = self.values.get(name)
        value = otherwise if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.origin}: {name} is {value!r}, and a positive whole number is needed; correct the file")
        return value

    def bias_weights(self, *, hidden: int, queries: int, keys: int, intermediate: int) -> int:
        """Return the biases of one layer: Qwen 2 always has those of queries, keys and values; other configs declare them."""
        if self.values["model_type"] == "qwen2":
            return queries + 2 * keys
        attention = queries + 2 * keys + hidden if self.values.get("attention_bias") else 0
        return attention + (2 * intermediate + hidden if self.values.get("mlp_bias") else 0)

    def windows(self, num_layers: int) -> tuple[int | None, ...]:
        """Return the window of each layer, from ``layer_types`` or from the older fields of its model type."""
        types = self.values.get("layer_types")
        if not types:
            slides = self.values.get("sliding_window") is not None and self.values.get("use_sliding_window", True) is not False
            pattern = self.count("sliding_window_pattern") if slides and "sliding_window_pattern" in self.values else None
            whole = self.values.get("max_window_layers", 0)
            sliding = [slides and ((layer + 1) % pattern != 0 if pattern else layer >= whole) for layer in range(num_layers)]
            types = ["sliding_attention" if slides else "full_attention" for slides in sliding]
        if not isinstance(types, list) or len(types) != num_layers or any(kind not in _ATTENTIONS for kind in types):
            raise ModelError(
                f"{self.origin}: layer_types {types!r} cannot be predicted: {num_layers} of {' or '.join(_ATTENTIONS)} are needed; "
                "correct the file"
            )
        return tuple(self.count("sliding_window") if kind == "sliding_attention" else None for kind in types)


_LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072}
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-3.2-3B": _LLAMA_3
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "meta-llama/Llama-3.1-70B": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Fields of ``config.json`` that decide sizes, by hub id, as published there (arXiv 2407.21783, table 3, for 8B and 70B)."""


def published_config(name: str) -> Mapping[str, Any] | None:
    """Return the config of a hub id (instruct version included) or of a size such as ``8B``; None for others."""
    wanted = name.lower().removesuffix("-instruct")
    return next((config for source, config in PUBLISHED.items() if wanted in (source.lower(), source.rpartition("-")[2].lower())), None)
