"""What a forward pass takes, predicted from a model's ``config.json``. Pure: loads no model and needs no torch.

For decoder models in the manner of Llama whose layers attend to everything or to a window. Operations are those that
``torch.utils.flop_counter`` counts where ``engines.hf`` computes: two per multiply-add of every matrix product, and attention
of every query to every key that its forward pass brings, masked or not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pause_ray.errors import ModelError

_GEMMA_3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208, "sliding_window_pattern": 6}
"""What published Gemma 3 configs leave to the defaults of transformers' ``Gemma3TextConfig``."""
_LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "phi3": {},
    "gemma3_text": _GEMMA_3 | {"tie_word_embeddings": True},
}
"""Kinds of model that are understood, with the values of fields that their configs may leave out."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NF4_BYTES = 0.5 + 4 / 64
"""Per weight: four bits, and a float32 scale for every block of 64 (bitsandbytes)."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    """Whether input and output embeddings are one table."""
    windows: tuple[int | None, ...]
    """Per layer: tokens that a query sees, itself included; None for all."""

    @classmethod
    def load(cls, model_dir: Path) -> Self:
        """Read ``config.json``; of a model for text and images, its ``text_config``.

        Raises:
            ModelError: a kind of model that is not understood, or a field that is missing or no number; named.
        """
        path = model_dir / "config.json"
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read as JSON ({error}); copy the model again") from error
        if not isinstance(whole, dict):
            raise ModelError(f"{path}: holds no JSON object; copy the model again")
        return cls.from_config(whole, origin=str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, origin: str = "config.json") -> Self:
        """Read the content of a ``config.json``; ``origin`` names it in errors.

        Raises:
            ModelError: as ``load``.
        """
        fields = _Fields.of(config, origin=origin)
        heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
        return cls(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", otherwise=heads),
            head_dim=fields.count("head_dim", otherwise=hidden // heads),
            intermediate_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size"),
            tied=bool(fields.values.get("tie_word_embeddings", False)),
            windows=fields.windows(fields.count("num_hidden_layers")),
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.windows)

    def forward_flops(self, *, new_tokens: int, past_tokens: int, logit_rows: int) -> int:
        """Of one forward pass over ``new_tokens`` after ``past_tokens``, with logits for ``logit_rows`` of them."""
        attention = sum(new_tokens + self._past_seen(past_tokens, window) for window in self.windows)
        attention *= 4 * self.num_heads * self.head_dim * new_tokens
        linear = 2 * new_tokens * self.num_layers * self._layer_weights
        return linear + attention + 2 * logit_rows * self.hidden_size * self.vocab_size

    def prompt_flops(self, *, prompt_tokens: int, kept_tokens: int, chunk_tokens: int, draft_tokens: int = 0) -> int:
        """Of a prompt whose first ``kept_tokens`` are computed already, with a draft of its answer behind the last chunk."""
        total = 0
        for begin in range(kept_tokens, prompt_tokens, chunk_tokens):
            end = min(begin + chunk_tokens, prompt_tokens)
            rows = 1 + draft_tokens if end == prompt_tokens else 0
            new = end - begin + max(0, rows - 1)
            total += self.forward_flops(new_tokens=new, past_tokens=begin, logit_rows=rows)
        return total

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Keys and values of one token in all layers; layers with a window keep all of them too."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    def weight_bytes(self, dtype: str, quantize: str | None = None) -> int:
        """Of the loaded weights, without norms and biases (less than a thousandth); embeddings stay in ``dtype`` when quantized."""
        per_weight = _BYTES[dtype] if quantize is None else _NF4_BYTES
        tables = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return round(self.num_layers * self._layer_weights * per_weight + tables * _BYTES[dtype])

    @property
    def _layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @staticmethod
    def _past_seen(past_tokens: int, window: int | None) -> int:
        return past_tokens if window is None else min(past_tokens, window - 1)


@dataclass(frozen=True)
class _Fields:
    """A config with its defaults, which names what is wrong in it."""

    values: Mapping[str, Any]
    origin: str

    @classmethod
    def of(cls, config: Mapping[str, Any], *, origin: str) -> Self:
        text = config.get("text_config")
        values = config if text is None else {name: config[name] for name in ("tie_word_embeddings",) if name in config} | text
        kind = values.get("model_type")
        if not isinstance(kind, str) or kind not in _LEFT_OUT:
            known = ", ".join(_LEFT_OUT)
            raise ModelError(f"{origin}: model_type {kind!r} is not one whose cost can be predicted ({known}); run without the forecast")
        return cls({**_LEFT_OUT[kind], **values}, origin)

    def count(self, name: str, *, otherwise: int | None = None) -> int:
        value = self.values.get(name)
        value = otherwise if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.origin}: {name} is {value!r}, and a positive whole number is needed; correct the file")
        return value

    def windows(self, num_layers: int) -> tuple[int | None, ...]:
        """Window of each layer, from ``layer_types`` or, in configs that have none, from what its model type says instead."""
        types = self.values.get("layer_types") or self._types(num_layers)
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != num_layers:
            raise ModelError(
                f"{self.origin}: layer_types {sorted(set(types))} of {len(types)} layers cannot be predicted; correct the file"
            )
        return tuple(self.count("sliding_window") if kind == "sliding_attention" else None for kind in types)

    def _types(self, num_layers: int) -> list[str]:
        if self.values.get("sliding_window") is None or self.values.get("use_sliding_window", True) is False:
            return ["full_attention"] * num_layers
        pattern = self.values.get("sliding_window_pattern")
        whole = self.values.get("max_window_layers", 0) if "use_sliding_window" in self.values else 0
        sliding = [(layer + 1) % pattern != 0 if pattern else layer >= whole for layer in range(num_layers)]
        return ["sliding_attention" if slides else "full_attention" for slides in sliding]
