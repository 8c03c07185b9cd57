"""The attention of models whose prefix is cached, and the private interfaces of torch and transformers that it needs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pause_ray.inference.kv_cache import BatchCache, partial_attention

NAME = "pause_ray_prefix"
"""The name under which transformers knows this attention."""
_WIDEST_FLASH = 256
"""The largest width of a head for which there are flash kernels."""


def use_prefix_attention(model: transformers.PreTrainedModel) -> None:
    """Set this attention in ``model``, unless it does something that neither ``sdpa`` nor this module can, such as sinks (gpt-oss)."""
    if not (model._supports_sdpa or getattr(model.config, "attn_logit_softcapping", None)):
        return
    transformers.AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)


def has_prefix_attention(config: transformers.PreTrainedConfig) -> bool:
    """Return whether every layer of a model uses this attention on all keys of its window."""
    chunked = getattr(config, "attention_chunk_size", None)  # Llama 4: a window that does not slide
    return config._attn_implementation == NAME and not chunked


def flop_counter() -> FlopCounterMode:
    """Return a counter of floating-point operations that also counts attention on a CPU, which torch's own does not."""

    def count_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop(query, key, value))

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention})


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> torch.Tensor | None:
    """Return None if every query sees all keys up to its own and a kernel can do that, otherwise a mask [batch, 1, queries, keys]."""
    in_window = local_size is None or kv_length < local_size
    at_the_end = q_offset + q_length == kv_offset + kv_length
    plain = allow_is_causal_skip and attention_mask is None and in_window and at_the_end
    if plain and (q_length in (1, kv_length) or _has_flash(torch.device(device), dtype)):
        return None
    mask: torch.Tensor = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        device=device,
        dtype=dtype,
        **others,
    )
    # Numbers to add, because attention would otherwise convert a boolean mask in every layer.
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether flash kernels run on the device: from Ampere on, in 16 bits."""
    return device.type == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_after_past(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None) -> torch.Tensor:
    """Return the causal attention of the last tokens of a sequence to all of it, all [1, heads, tokens, width].

    ``scaled_dot_product_attention(is_causal=True)`` would align the first query with the first key; this kernel aligns the last query
    with the last key. It requires widths that are multiples of 8.
    """
    width, short = query.shape[3], -query.shape[3] % 8
    scale = width**-0.5 if scaling is None else scaling
    padded = [torch.nn.functional.pad(states, (0, short)) if short else states for states in (query, key, value)]
    seen: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*padded, 0.0, is_causal=True, scale=scale)[0]
    return seen[..., :width]


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, scaling: float | None, softcap: float
) -> torch.Tensor:
    """Return attention whose scores are bounded before the softmax (Gemma 2), which no kernel of torch does; shapes as ``_attend``."""
    heads, tokens, groups, keys = query.shape[1], query.shape[2], key.shape[1], key.shape[2]
    grouped = query.reshape(groups, heads // groups, tokens, query.shape[3]) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.full((1, 1, tokens, keys), -torch.inf, device=query.device).triu(keys - tokens + 1)
    seen = partial_attention(grouped, key[0], value[0], mask, softcap)
    return (seen.values / seen.total).to(value.dtype).view(1, heads, tokens, -1).transpose(1, 2).contiguous()


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    is_causal: bool | None = None,
    batch: BatchCache | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of ``query`` [1, heads, tokens, width] as [1, tokens, heads, width]; keys and values may have fewer heads."""
    if batch is not None:
        return batch.attend(module.layer_idx, query, key, value, scaling=scaling, softcap=others.get("softcap")), None  # type: ignore[arg-type]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and query.shape[0] == 1 and others.get("softcap") is not None:
        return _capped(query, key, value, attention_mask, scaling=scaling, softcap=others["softcap"]), None
    if not causal or query.shape[0] > 1 or others.get("position_bias") is not None:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
        return attended
    heads, tokens, groups, keys = query.shape[1], query.shape[2], key.shape[1], key.shape[2]
    if attention_mask is None and 1 < tokens < keys:
        if query.shape[3] <= _WIDEST_FLASH:
            seen = _flash_after_past(query, key, value, scaling=scaling)
            return seen.transpose(1, 2).contiguous(), None
        attention_mask = torch.ones(1, 1, tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    if attention_mask is not None:
        # With groups as the batch dimension, views give each query head its keys, and all heads share the mask.
        shape = (groups, heads // groups, -1, -1)
        shared_key, shared_value = (states.transpose(0, 1).expand(shape) for states in (key, value))
        grouped = query.reshape(groups, heads // groups, tokens, query.shape[3])
        seen = scaled_dot_product_attention(grouped, shared_key, shared_value, attn_mask=attention_mask, scale=scaling)
    elif tokens == 1:
        stacked = query.reshape(1, groups, heads // groups, query.shape[3])
        seen = scaled_dot_product_attention(stacked, key, value, scale=scaling)
    else:
        seen = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=heads > groups)
    return seen.reshape(1, heads, tokens, value.shape[3]).transpose(1, 2).contiguous(), None
