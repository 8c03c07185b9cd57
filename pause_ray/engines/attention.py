"""Attention of new tokens to a path of keys, with no copy of the path. Knows tensors and transformers' interface, no model.

transformers' ``sdpa`` copies keys and values for every query head of a group, and gives every forward pass that continues a
path a mask of all its queries and keys, which keeps flash kernels away. Here query heads look at views of their group's keys,
and on a GPU plain causal attention needs no mask. The numbers are those of ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pause_ray.engines.rows import RowsCache

NAME = "pause_ray_path"
_WIDEST_FLASH = 256
"""Width of heads up to which there are flash kernels."""


def use_path_attention(model: transformers.PreTrainedModel) -> None:
    """Let ``model`` attend this way; one whose attention cannot be exchanged, or does what ``sdpa`` cannot, stays as it is.

    That is for example a sink beside the keys (gpt-oss). Bounded scores, which ``sdpa`` cannot either, are known here.
    """
    if not (model._supports_sdpa or getattr(model.config, "attn_logit_softcapping", None)):
        return
    transformers.AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)


def flop_counter() -> FlopCounterMode:
    """A counter of floating-point operations; torch's own does not see attention on a CPU."""

    def of_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop(query, key, value))

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_attention})


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
    """None where every query sees exactly the keys up to its own and a kernel knows that, otherwise [batch, 1, queries, keys]."""
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
    # As numbers to add, since attention would make these of a mask in every layer anew.
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention's kernels run there: from Ampere on, in 16 bits."""
    return device.type == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_after_past(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None) -> torch.Tensor:
    """Causal attention of the last tokens of a path to all of it, all [1, heads, tokens, width].

    ``scaled_dot_product_attention(is_causal=True)`` would let the first query see the first key only; this kernel of torch
    aligns the last query with the last key. It takes widths that are multiples of 8.
    """
    width, short = query.shape[3], -query.shape[3] % 8
    scale = width**-0.5 if scaling is None else scaling
    padded = [torch.nn.functional.pad(states, (0, short)) if short else states for states in (query, key, value)]
    seen: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*padded, 0.0, is_causal=True, scale=scale)[0]
    return seen[..., :width]


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, scaling: float | None, softcap: float
) -> torch.Tensor:
    """Gemma 2's: scores are bounded before the softmax, which no kernel of torch does. Shapes as ``_attend``."""
    heads, tokens, groups, keys = query.shape[1], query.shape[2], key.shape[1], key.shape[2]
    grouped = query.reshape(groups, heads // groups * tokens, query.shape[3]) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(torch.bmm(grouped, key[0].transpose(1, 2)).float() / softcap)
    if mask is None:
        seen = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
        mask = torch.zeros(seen.shape, device=query.device).masked_fill_(~seen, -torch.inf)[None, None]
    weights = (scores.view(groups, heads // groups, tokens, keys) + mask).softmax(-1).to(value.dtype)
    answer = torch.bmm(weights.view(groups, -1, keys), value[0])
    return answer.view(1, heads, tokens, -1).transpose(1, 2).contiguous()


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
    rows: RowsCache | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``query`` [1, heads, tokens, width] as [1, tokens, heads, width]; keys and values may have fewer heads."""
    if rows is not None:
        return rows.attend(module.layer_idx, query, key, value, scaling=scaling, softcap=others.get("softcap")), None  # type: ignore[arg-type]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and query.shape[0] == 1 and others.get("softcap") is not None:
        return _capped(query, key, value, attention_mask, scaling=scaling, softcap=others["softcap"]), None
    if not causal or query.shape[0] > 1 or others.get("position_bias") is not None:
        stock: Callable[..., tuple[torch.Tensor, None]] = sdpa_attention_forward
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others)
    heads, tokens, groups, keys = query.shape[1], query.shape[2], key.shape[1], key.shape[2]
    if attention_mask is None and 1 < tokens < keys:
        if query.shape[3] <= _WIDEST_FLASH:
            seen = _flash_after_past(query, key, value, scaling=scaling)
            return seen.transpose(1, 2).contiguous(), None
        attention_mask = torch.ones(1, 1, tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    if attention_mask is not None:
        # Groups as batch: views are enough to give each query head its keys, and the mask is everyone's.
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
