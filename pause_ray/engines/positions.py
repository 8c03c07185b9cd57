"""Rotary positions beyond the window that a model was trained on: what they make of its ``config.json``. Pure.

transformers reads the scaling from the config, so a model with scaled positions is a model folder with another config. What
this adds is refusing models whose positions cannot be scaled, and knowing how far scaled ones reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pause_ray.engines.engine import RopeSpec
from pause_ray.errors import ModelError

WINDOW = "max_position_embeddings"
"""The config's field for the window."""
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
"""Kinds of model whose rotary frequencies follow from the config alone, in one way for all layers."""


def scaled_config(config: Mapping[str, Any], rope: RopeSpec, *, origin: str) -> dict[str, Any]:
    """The content of a ``config.json`` for a model whose positions are scaled as ``rope`` says; ``origin`` names it in errors.

    Raises:
        ModelError: a kind of model that has no rotary positions or has them in another way, or that scales them already.
    """
    kind = config.get("model_type")
    if kind not in ROTARY:
        raise ModelError(
            f"{origin}: positions of a {kind} model cannot be scaled here (those of {', '.join(ROTARY)} can); leave model.rope out"
        )
    own = _own(config)
    if not isinstance(config.get(WINDOW), int) or any(isinstance(value, Mapping) for value in own.values()):
        raise ModelError(f"{origin}: no {WINDOW}, or positions that differ from layer to layer; leave model.rope out")
    if _type(own) != "default":
        raise ModelError(
            f"{origin}: scales its positions already ({_type(own)}), and was trained so; leave model.rope out, or choose a model without"
        )
    window = config[WINDOW]
    plain = {name: value for name, value in own.items() if name not in ("type", "rope_type")}
    changed: dict[str, Any] = {name: value for name, value in config.items() if name != "rope_scaling"}
    if rope.kind == "dynamic":  # its window stays: beyond it frequencies begin to change
        return changed | {"rope_parameters": plain | {"rope_type": "dynamic", "factor": rope.factor}}
    changed[WINDOW] = int(window * rope.factor)
    if rope.kind == "plain":
        return changed
    trained = {"original_max_position_embeddings": window} if rope.kind == "yarn" else {}
    return changed | {"rope_parameters": plain | {"rope_type": rope.kind, "factor": rope.factor} | trained}


def reach(config: Mapping[str, Any], window: int) -> int:
    """Tokens that a model of ``window`` reads: more than that only under dynamic frequencies, whose config keeps the window."""
    own = _own(config)
    factor = own.get("factor")
    if _type(own) == "dynamic" and isinstance(factor, int | float) and factor > 1:
        return int(window * factor)
    return window


def _own(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of its positions, in transformers' new place or the old one."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found if isinstance(found, Mapping) else {}


def _type(own: Mapping[str, Any]) -> str:
    return str(own.get("rope_type") or own.get("type") or "default")
