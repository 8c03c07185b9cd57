"""Keys and values of one path of tokens, written in place and rewound at will. Knows transformers' cache, no model and no task.

transformers' own layers join the old and the new keys into new storage at every forward pass, which copies the whole prefix
each time, and a sliding window forgets what rewinding would need. Here a layer owns one buffer, a forward pass writes behind
what is there and gets a view of it, and going back is setting a number. A sliding layer keeps everything too, and shows the
model its window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_GROWTH = 1.5
"""A buffer that was not reserved grows by this factor, so that a path of n tokens copies less than 2n."""


class PathLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values [1, heads, capacity, width], of which the first ``num_tokens`` count.

    Args:
        window: Tokens that a query of a sliding layer sees, itself included; None for all.
        host: Keep the buffers in the machine's memory, and bring the layer's to the device of its keys when it is its turn.
    """

    is_croppable = True

    def __init__(self, *, window: int | None = None, host: bool = False) -> None:
        super().__init__()
        self.num_tokens = 0
        self.window = window
        self._host = host
        self._reserved = 0

    @property
    def is_sliding(self) -> bool:
        """Asked by transformers, to give this layer the mask of its window."""
        return self.window is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of both buffers."""
        return int(self.keys.nbytes + self.values.nbytes) if self.is_initialized else 0

    def reserve(self, num_tokens: int) -> None:
        """Take room for so many tokens, exactly, the next time that room is needed."""
        self._reserved = num_tokens

    def keep(self, num_tokens: int) -> None:
        """Go back to the first ``num_tokens`` tokens."""
        self.num_tokens = min(self.num_tokens, num_tokens)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the buffers, on the device and with the widths of the first keys [1, heads, tokens, width] and values."""
        self.keys, self.values = self._buffer_like(key_states, 0), self._buffer_like(value_states, 0)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of new tokens [1, heads, tokens, width] and return those that they attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.num_tokens, self.num_tokens + key_states.shape[2]
        capacity = self.keys.shape[2]
        if end > capacity:
            self._resize(self._reserved if self._reserved >= end else max(end, int(capacity * _GROWTH)))
        self.keys[:, :, begin:end] = key_states
        self.values[:, :, begin:end] = value_states
        self.num_tokens = end
        first = self._first_seen(begin)
        seen = self.keys[:, :, first:end], self.values[:, :, first:end]
        return (_brought(seen[0], key_states.device), _brought(seen[1], value_states.device)) if self._host else seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that ``update`` will return, and the position of the first of them."""
        first = self._first_seen(self.num_tokens)
        return self.num_tokens + query_length - first, first

    def get_seq_length(self) -> int:
        """Number of tokens held."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """No maximum, in transformers' way of saying it."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Go back as transformers asks for it: minus the number of tokens to forget."""
        self.keep(self.num_tokens - abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        self.is_initialized = False
        self.num_tokens = 0
        del self.keys, self.values

    def _first_seen(self, position: int) -> int:
        """First key that a query at ``position`` or later sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def _resize(self, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._buffer_like(old, capacity)
            new[:, :, : self.num_tokens] = old[:, :, : self.num_tokens]
            setattr(self, name, new)

    def _buffer_like(self, states: torch.Tensor, capacity: int) -> torch.Tensor:
        shape = (*states.shape[:2], capacity, states.shape[3])
        if not self._host:
            return torch.empty(shape, dtype=states.dtype, device=states.device)
        return torch.empty(shape, dtype=states.dtype, device="cpu", pin_memory=torch.cuda.is_available())


class PathCache(Cache):  # type: ignore[misc]  # transformers has no types
    """The layers of one model, all at the same token."""

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return max((layer.num_tokens for layer in self.path_layers), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        return sum(layer.num_bytes for layer in self.path_layers)

    def reserve(self, num_tokens: int) -> None:
        """Take room for so many tokens in every layer, when it is needed."""
        for layer in self.path_layers:
            layer.reserve(num_tokens)

    def keep(self, num_tokens: int) -> None:
        """Go back to the first ``num_tokens`` tokens."""
        for layer in self.path_layers:
            layer.keep(num_tokens)

    @property
    def path_layers(self) -> list[PathLayer]:
        """The layers that hold keys, in the model's order."""
        return [layer for layer in self.layers if isinstance(layer, PathLayer)]


def path_cache(config: transformers.PreTrainedConfig, *, host: bool) -> PathCache | None:
    """An empty cache for a model of this config, or None where a layer holds something that cannot be rewound.

    That is a recurrent state, or keys that are kept in another form than one per token.
    """
    layers: list[PathLayer | DummyLayer] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layers.append(PathLayer(window=layer.sliding_window, host=host))
        elif type(layer) is DynamicLayer:
            layers.append(PathLayer(host=host))
        elif type(layer) is DummyLayer:  # shares another layer's keys, or has no attention
            layers.append(layer)
        else:
            return None
    return PathCache(layers=layers)


def _brought(states: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``states`` [1, heads, tokens, width] on ``device``, head by head: only there a view of a buffer is one block."""
    arrived = torch.empty(states.shape, dtype=states.dtype, device=device)
    for head in range(states.shape[1]):
        arrived[:, head].copy_(states[:, head], non_blocking=True)
    return arrived


HIDDEN = torch.finfo(torch.bfloat16).min
"""Added to the score of a key that a query must not see. Finite, so that a query that sees no key at all gives no NaN."""


class Row:
    """Keys and values of one answer in the making.

    Args:
        num_tokens: Its tokens so far, which are the path's first ones.
        room_tokens: How many may follow.
    """

    def __init__(self, *, num_tokens: int, room_tokens: int) -> None:
        self.shared_tokens = num_tokens
        self.own_tokens = 0
        self._room_tokens = room_tokens
        self._own: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def num_tokens(self) -> int:
        """Tokens with keys and values."""
        return self.shared_tokens + self.own_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of the row's own buffers."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._own)

    def keep(self, num_tokens: int) -> None:
        """Go back to the first ``num_tokens`` tokens, none of which are the path's last."""
        self.own_tokens = num_tokens - self.shared_tokens

    def part_from(self, path: PathCache, *, at: int) -> None:
        """Take over what the path holds of this row from token ``at`` on, and make room for tokens to come.

        Where memory is too short for all layers, the row stays as it is.
        """
        taken = max(0, self.shared_tokens - at)
        if self._own and not taken:
            return
        parted = []
        for place, layer in enumerate(path.path_layers):
            olds = self._own[place] if self._own else (None, None)
            parted.append(tuple(self._buffer(held, old, taken) for held, old in zip((layer.keys, layer.values), olds, strict=True)))
        self._own = parted  # type: ignore[assignment]  # pairs
        self.shared_tokens -= taken
        self.own_tokens += taken

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys and values [1, heads, tokens, width] of new tokens of one layer; ``keep`` makes them count."""
        end = self.own_tokens + keys.shape[2]
        for buffer, new in zip(self._own[layer], (keys, values), strict=True):
            buffer[:, :, self.own_tokens : end] = new

    def read(self, layer: int, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Own keys and values [heads, tokens, width] of one layer, with those just written."""
        keys, values = self._own[layer]
        end = self.own_tokens + new_tokens
        return keys[0, :, :end], values[0, :, :end]

    def _buffer(self, held: torch.Tensor, old: torch.Tensor | None, taken: int) -> torch.Tensor:
        heads, width = held.shape[1], held.shape[3]
        size = (1, heads, taken + self.own_tokens + self._room_tokens, width)
        new = torch.empty(size, dtype=held.dtype, device=held.device)
        new[:, :, :taken] = held[:, :, self.shared_tokens - taken : self.shared_tokens]
        if old is not None:
            new[:, :, taken : taken + self.own_tokens] = old[:, :, : self.own_tokens]
        return new


class _Part(NamedTuple):
    """A row's place in a forward pass."""

    row: Row
    begin: int
    end: int


class RowsCache(Cache):  # type: ignore[misc]  # transformers has no types
    """Cache for decoding several answers at once: the new tokens of all rows stand behind each other in one sequence.

    Args:
        path: Whose first tokens rows share.
        rows: Each with the number of its new tokens; parted from the path as far as they must be.
    """

    def __init__(self, path: PathCache, rows: Sequence[tuple[Row, int]]) -> None:
        self._path_layers = path.path_layers
        super().__init__(layers=[_RowsLayer(self, place, layer) for place, layer in enumerate(self._path_layers)])
        self.attended_layers = 0
        self._written: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self.parts: list[_Part] = []
        begin = 0
        for row, new_tokens in rows:
            self.parts.append(_Part(row, begin, begin + new_tokens))
            begin += new_tokens
        self._shared = max((row.shared_tokens for row, _ in rows), default=0)
        self._masks: dict[tuple[int | None, torch.device], tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Position of every new token in its own row [1, tokens]."""
        return torch.cat([torch.arange(row.num_tokens, row.num_tokens + end - begin) for row, begin, end in self.parts])[None].to(device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None, softcap: float | None
    ) -> torch.Tensor:
        """Attention of new tokens [1, heads, tokens, width] to their rows, as [1, tokens, heads, width].

        Zeros, and not counted in ``attended_layers``, where the new tokens' ``key`` and ``value`` are not those that were written:
        then the model attends to something that it makes of what it caches (DeepSeek's latent attention).
        """
        if key is not self._written[0] or value is not self._written[1]:
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        self.attended_layers += 1
        path = self._path_layers[layer]
        groups, (heads, tokens, width) = path.keys.shape[1], query.shape[1:]
        grouped = query[0].reshape(groups, heads // groups, tokens, width) * (width**-0.5 if scaling is None else scaling)
        path_mask, own_masks = self._masks_of(path, query)
        keys, values = path.keys[0, :, : self._shared], path.values[0, :, : self._shared]
        shared = _partial(grouped, keys, values, path_mask, softcap)
        seen = []
        for (row, begin, end), mask in zip(self.parts, own_masks, strict=True):
            own = _partial(grouped[:, :, begin:end], *row.read(layer, end - begin), mask, softcap)
            seen.append(_joined(own, _Partial(*(part[:, :, begin:end] for part in shared))))
        return torch.cat(seen, dim=2).to(query.dtype).reshape(heads, tokens, -1).transpose(0, 1)[None].contiguous()

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Give every row its new keys and values [1, heads, tokens, width]."""
        self._written = keys, values
        for row, begin, end in self.parts:
            row.write(layer, keys[:, :, begin:end], values[:, :, begin:end])

    def _masks_of(self, path: PathLayer, query: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Numbers to add to scores: [tokens, path's tokens], and for each row [its new tokens, its own tokens]; one set per window."""
        kind = (path.window, query.device)
        if kind not in self._masks:
            to_path, to_own = [], []
            for row, begin, end in self.parts:
                position = torch.arange(row.num_tokens, row.num_tokens + end - begin, device=query.device)[:, None]
                column = torch.arange(max(self._shared, row.num_tokens + end - begin), device=query.device)
                visible = column <= position
                if path.window is not None:
                    visible &= column > position - path.window
                hidden = torch.zeros(visible.shape, dtype=torch.float32, device=query.device).masked_fill_(~visible, HIDDEN)
                to_own.append(hidden[:, row.shared_tokens : row.num_tokens + end - begin])
                shared = hidden[:, : self._shared].clone()
                shared[:, row.shared_tokens :] = HIDDEN
                to_path.append(shared)
            self._masks[kind] = torch.cat(to_path), to_own
        return self._masks[kind]


class _RowsLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer of a ``RowsCache``, as transformers asks for it."""

    def __init__(self, rows: RowsCache, place: int, path: PathLayer) -> None:
        super().__init__()
        self._rows, self._place, self.is_sliding = rows, place, path.is_sliding
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: rows have their buffers."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values; ``RowsCache.attend`` reads all of them."""
        self._rows.write(self._place, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if there were new tokens only; the masks are ``RowsCache``'s own."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """None, as for ``get_mask_sizes``."""
        return 0

    def get_max_length(self) -> int:
        """No maximum, in transformers' way of saying it."""
        return -1


class _Partial(NamedTuple):
    """Attention to some of the keys: unnormalised values, with what it takes to join it with that to the others, in float32."""

    highest: torch.Tensor
    """Highest score [groups, heads, tokens, 1]."""
    total: torch.Tensor
    """Sum of exponentials of scores, less the highest [groups, heads, tokens, 1]."""
    values: torch.Tensor
    """Their weighted sum of values [groups, heads, tokens, width]."""


def _partial(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, softcap: float | None) -> _Partial:
    """Attention of ``query`` [groups, heads, tokens, width], scaled, to ``keys`` and ``values`` [groups, keys, width]."""
    groups, heads, tokens, width = query.shape
    if not keys.shape[1]:
        nothing = torch.zeros((groups, heads, tokens, 1), dtype=torch.float32, device=query.device)
        return _Partial(nothing + HIDDEN, nothing, torch.zeros((*nothing.shape[:3], values.shape[2]), device=query.device))
    scores = torch.bmm(query.reshape(groups, heads * tokens, width), keys.transpose(1, 2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(groups, heads, tokens, -1) + mask
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp_()
    weighted = torch.bmm(weights.to(values.dtype).view(groups, heads * tokens, -1), values)
    return _Partial(highest, weights.sum(-1, keepdim=True), weighted.float().view(groups, heads, tokens, -1))


def _joined(one: _Partial, other: _Partial) -> torch.Tensor:
    """Attention to the keys of both."""
    highest = torch.maximum(one.highest, other.highest)
    first, second = (one.highest - highest).exp(), (other.highest - highest).exp()
    return (one.values * first + other.values * second) / (one.total * first + other.total * second)


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
