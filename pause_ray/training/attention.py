"""Attention of documents that lie end to end in one row, each within itself. Knows tensors, transformers' interface and process groups.

transformers makes a mask of tokens × tokens for such a row, which excludes fast kernels and takes memory with the square of the
row's length. Here each document is a causal attention of its own on a view of the row, without any mask. Where workers share the
tokens of a row, they exchange tokens for heads before and back after (DeepSpeed Ulysses, arXiv 2309.14509), so that each of them
sees whole documents with a part of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch.distributed import ProcessGroup
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from pause_ray.core.errors import ModelError
from pause_ray.training.memory import BLOCK

NAME = "pause_ray_documents"
LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Values of ``layer_types`` in transformers' configs that this attention implements."""


@dataclass(frozen=True)
class Layout:
    """The documents in the tokens of one forward pass; every layer gets it as the model's keyword argument ``layout``."""

    documents: tuple[tuple[int, int], ...]
    """(first token, token after the last) of each document, contiguous from 0; tokens after the last document attend to nothing."""
    group: ProcessGroup | None = None
    """Workers that hold equal parts of the tokens, in rank order; None where this worker holds all."""


@dataclass(frozen=True)
class _Rule:
    """Parameters of one layer's attention."""

    scale: float | None
    dropout: float
    window: int | None
    """Tokens that a query attends to, itself included; None for all before it."""
    softcap: float | None
    """Soft bound of the scores (Gemma 2)."""


def sequence_group(size: int) -> ProcessGroup | None:
    """Return the group of ``size`` neighbours in rank that share rows with this worker; None for size 1. All workers must call it."""
    if size == 1:
        return None
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    groups = [torch.distributed.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    group: ProcessGroup = groups[rank // size]
    return group


def use_document_attention(model: transformers.PreTrainedModel) -> None:
    """Make ``model`` use this attention; every forward pass then needs the argument ``layout``.

    Raises:
        ModelError: an architecture whose attention cannot be replaced, or is not causal full or sliding attention.
    """
    transformers.AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if config._attn_implementation != NAME or others:
        kind = f"layers of type {', '.join(sorted(others))}" if others else "an attention that cannot be replaced"
        raise ModelError(f"model type {config.model_type} has {kind}, which training does not support; choose another model")


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``query`` [1, heads, tokens, width] as [1, tokens, heads, width]; keys and values may have fewer heads."""
    unknown = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if unknown or attention_mask is not None or not getattr(module, "is_causal", True):
        what = unknown[0] if unknown else "a mask of its own"
        raise ModelError(f"{type(module).__name__} attends with {what}, which training does not support; choose another model")
    rule = _Rule(scaling, dropout, sliding_window, softcap)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _by_document(query, key, value, layout.documents, rule)

    if layout.group is None:
        return attend(query, key, value), None
    from deepspeed.sequence.layer import DistributedAttention

    exchange = DistributedAttention(attend, layout.group, scatter_idx=2, gather_idx=1)
    attended: torch.Tensor = exchange(*even_heads(query, key, value, workers=layout.group.size()), 0)
    return attended[:, :, : query.shape[2]].contiguous(), None


def _by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: tuple[tuple[int, int], ...], rule: _Rule
) -> torch.Tensor:
    """Attend within each document; tensors are [1, tokens, heads, width], and tokens after the last document get zeros."""
    lengths = [end - begin for begin, end in documents]
    lengths.append(query.shape[1] - sum(lengths))
    # Split, not sliced: the gradient of each slice would be a tensor of the whole row.
    parts = zip(*(torch.split(states.transpose(1, 2), lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [_in_document(queries, keys, values, rule) for _, (queries, keys, values) in zip(documents, parts, strict=False)]
    together = torch.cat(attended, dim=2).transpose(1, 2)
    return pad(together, (0, 0, 0, 0, 0, lengths[-1])) if lengths[-1] else together


def _in_document(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: _Rule) -> torch.Tensor:
    """Attend in one document [1, heads, tokens, width]: with kernels that need no mask, or under a window or soft cap block by block.

    Blocks make memory grow linearly with the document's length.
    """
    if rule.softcap is None and (rule.window is None or query.shape[2] <= rule.window):
        grouped = query.shape[1] > key.shape[1]
        return scaled_dot_product_attention(query, key, value, dropout_p=rule.dropout, is_causal=True, scale=rule.scale, enable_gqa=grouped)
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    attended = []
    for begin in range(0, tokens, BLOCK):
        end = min(begin + BLOCK, tokens)
        first = 0 if rule.window is None else max(0, begin - rule.window + 1)
        block = query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end]
        if rule.softcap is None:
            mask = _kept_mask(end - begin, end - first, rule.window, query.device, query.dtype)
            attended.append(scaled_dot_product_attention(*block, attn_mask=mask, dropout_p=rule.dropout, scale=rule.scale))
        else:
            attended.append(checkpoint(_capped, *block, rule, use_reentrant=False))
    return torch.cat(attended, dim=2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask (queries, keys) for the last ``queries`` of ``keys`` tokens."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(queries, keys, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)


_kept_mask = lru_cache(maxsize=8)(_mask)
"""Cached masks: every layer, and every block but the first and the last, uses the same one."""


def _capped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: _Rule) -> torch.Tensor:
    """Attend with bounded scores, which no kernel of torch does; the backward pass recomputes it, mask included."""
    scale, cap = query.shape[3] ** -0.5 if rule.scale is None else rule.scale, float(rule.softcap or 0)
    mask = _mask(query.shape[2], key.shape[2], rule.window, query.device, query.dtype)
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / cap)) * cap + mask
    weights = torch.dropout(scores.softmax(dim=3, dtype=torch.float32).to(query.dtype), rule.dropout, train=True)
    return weights @ value


def even_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, workers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return heads that ``workers`` can share equally, each with the keys of its queries; heads are dimension 2.

    Key heads are repeated where there are fewer of them than workers; zeros fill up to equal shares, so that no worker has
    more heads than in the largest share of an uneven division.
    """
    heads, groups = query.shape[2], key.shape[2]
    if groups % workers and groups < workers:
        times = workers // groups if not (workers % groups or heads % workers) else heads // groups
        key, value = (states.repeat_interleave(times, dim=2) for states in (key, value))
        groups *= times
    spare = -groups % workers
    key, value = (pad(states, (0, 0, 0, spare)) for states in (key, value))
    return pad(query, (0, 0, 0, spare * (heads // groups))), key, value
