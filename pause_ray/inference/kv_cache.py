"""Key-value caches: one for the prefix that prompts share, and one for a batch of answers that branch from it.

The layers of transformers concatenate old and new keys at every forward pass, which copies the whole prefix each time, and their sliding
window drops keys that a shorter prefix needs again. Here a layer owns one buffer, a forward pass writes behind the cached tokens and reads
a view, and truncating sets a number. A sliding layer keeps all tokens too and returns a view of its window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_GROWTH = 1.5
"""The factor by which an unreserved buffer grows, so that n tokens copy fewer than 2n."""


class PrefixLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values [1, heads, capacity, width], of which the first ``num_tokens`` are valid.

    Args:
        window: Tokens that a query of a sliding layer sees, itself included; None for all.
        host: Keep the buffers in the machine's memory and copy a layer's to the device when the model reads it.
    """

    def __init__(self, *, window: int | None = None, host: bool = False) -> None:
        super().__init__()
        self.num_tokens = 0
        self.window = window
        self._host = host
        self._reserved = 0

    @property
    def is_sliding(self) -> bool:
        """Whether transformers passes this layer the mask of its window."""
        return self.window is not None

    @property
    def num_bytes(self) -> int:
        """The bytes of both buffers."""
        return int(self.keys.nbytes + self.values.nbytes) if self.is_initialized else 0

    def reserve(self, num_tokens: int) -> None:
        """Set the capacity in tokens that the buffers get when they next grow."""
        self._reserved = num_tokens

    def truncate(self, num_tokens: int) -> None:
        """Drop all but the first ``num_tokens`` tokens."""
        self.num_tokens = min(self.num_tokens, num_tokens)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers with the dtype and width of the first keys and values [1, heads, tokens, width]."""
        self.keys, self.values = self._buffer_like(key_states, 0), self._buffer_like(value_states, 0)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new tokens [1, heads, tokens, width] and return those that they attend to."""
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
        return (_copy_to(seen[0], key_states.device), _copy_to(seen[1], value_states.device)) if self._host else seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that ``update`` will return, and the position of the first of them."""
        first = self._first_seen(self.num_tokens)
        return self.num_tokens + query_length - first, first

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """Return -1, which means no maximum."""
        return -1

    def _first_seen(self, position: int) -> int:
        """Return the first key that a query at ``position`` or later sees."""
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


class PrefixCache(Cache):  # type: ignore[misc]  # transformers has no types
    """The keys and values of one prefix in all layers of a model."""

    @property
    def num_bytes(self) -> int:
        """The bytes of all buffers, filled or not."""
        return sum(layer.num_bytes for layer in self.prefix_layers)

    def reserve(self, num_tokens: int) -> None:
        """Set the capacity in tokens that the buffers of every layer get when they next grow."""
        for layer in self.prefix_layers:
            layer.reserve(num_tokens)

    def truncate(self, num_tokens: int) -> None:
        """Drop all but the first ``num_tokens`` tokens."""
        for layer in self.prefix_layers:
            layer.truncate(num_tokens)

    @property
    def prefix_layers(self) -> list[PrefixLayer]:
        """The layers that hold keys, in the model's order."""
        return [layer for layer in self.layers if isinstance(layer, PrefixLayer)]


def prefix_cache(config: transformers.PreTrainedConfig, *, host: bool) -> PrefixCache | None:
    """Return an empty cache for a model of this config, or None if a layer cannot be truncated.

    Such a layer has a recurrent state, or does not cache one key per token.
    """
    layers: list[PrefixLayer | DummyLayer] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layers.append(PrefixLayer(window=layer.sliding_window, host=host))
        elif type(layer) is DynamicLayer:
            layers.append(PrefixLayer(host=host))
        elif type(layer) is DummyLayer:  # shares another layer's keys, or has no attention
            layers.append(layer)
        else:
            return None
    return PrefixCache(layers=layers)


def _copy_to(states: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a view of a buffer to ``device`` head by head, since only one head's part of it is contiguous."""
    copied = torch.empty(states.shape, dtype=states.dtype, device=device)
    for head in range(states.shape[1]):
        copied[:, head].copy_(states[:, head], non_blocking=True)
    return copied


HIDDEN = torch.finfo(torch.bfloat16).min
"""The number added to the score of a key that a query must not see; finite, so that a query that sees no key gives no NaN."""


class Branch:
    """The keys and values of one answer while it is decoded: the first ``shared_tokens`` in the prefix cache, the rest in own buffers.

    Args:
        num_tokens: The tokens so far, all of them in the prefix cache.
        max_new_tokens: The largest number of tokens that may follow.
    """

    def __init__(self, *, num_tokens: int, max_new_tokens: int) -> None:
        self.shared_tokens = num_tokens
        self.suffix_tokens = 0
        self._max_new_tokens = max_new_tokens
        self._suffix: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def num_tokens(self) -> int:
        """The number of tokens with keys and values."""
        return self.shared_tokens + self.suffix_tokens

    @property
    def num_bytes(self) -> int:
        """The bytes of the branch's own buffers."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._suffix)

    def set_num_tokens(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens, which end behind the shared ones."""
        self.suffix_tokens = num_tokens - self.shared_tokens

    def split(self, prefix: PrefixCache, *, at: int) -> None:
        """Copy this branch's tokens from ``at`` on out of the prefix cache, and allocate room for the tokens to come.

        If memory is too short for all layers, the branch stays as it is.
        """
        copied = max(0, self.shared_tokens - at)
        if self._suffix and not copied:
            return
        suffix = []
        for index, layer in enumerate(prefix.prefix_layers):
            old_keys, old_values = self._suffix[index] if self._suffix else (None, None)
            suffix.append((self._buffer(layer.keys, old_keys, copied), self._buffer(layer.values, old_values, copied)))
        self._suffix = suffix
        self.shared_tokens -= copied
        self.suffix_tokens += copied

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the keys and values [1, heads, tokens, width] of new tokens of one layer; ``set_num_tokens`` makes them valid."""
        end = self.suffix_tokens + keys.shape[2]
        for buffer, new in zip(self._suffix[layer], (keys, values), strict=True):
            buffer[:, :, self.suffix_tokens : end] = new

    def read(self, layer: int, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the suffix's keys and values [heads, tokens, width] of one layer, with those just written."""
        keys, values = self._suffix[layer]
        end = self.suffix_tokens + new_tokens
        return keys[0, :, :end], values[0, :, :end]

    def _buffer(self, cached: torch.Tensor, old: torch.Tensor | None, copied: int) -> torch.Tensor:
        size = (1, cached.shape[1], copied + self.suffix_tokens + self._max_new_tokens, cached.shape[3])
        new = torch.empty(size, dtype=cached.dtype, device=cached.device)
        new[:, :, :copied] = cached[:, :, self.shared_tokens - copied : self.shared_tokens]
        if old is not None:
            new[:, :, copied : copied + self.suffix_tokens] = old[:, :, : self.suffix_tokens]
        return new


class _Slice(NamedTuple):
    """The new tokens of one branch in a forward pass."""

    branch: Branch
    begin: int
    end: int


class BatchCache(Cache):  # type: ignore[misc]  # transformers has no types
    """The cache of one forward pass over the new tokens of several branches, which are concatenated to one sequence.

    Args:
        prefix: The cache of the tokens that branches share.
        branches: Each branch with the number of its new tokens.
    """

    def __init__(self, prefix: PrefixCache, branches: Sequence[tuple[Branch, int]]) -> None:
        self._prefix_layers = prefix.prefix_layers
        super().__init__(layers=[_BatchLayer(self, index, layer) for index, layer in enumerate(self._prefix_layers)])
        self.attended_layers = 0
        self._written: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self.slices: list[_Slice] = []
        begin = 0
        for branch, new_tokens in branches:
            self.slices.append(_Slice(branch, begin, begin + new_tokens))
            begin += new_tokens
        self._shared = max((branch.shared_tokens for branch, _ in branches), default=0)
        self._masks: dict[tuple[int | None, torch.device], tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Return the position of every new token in its branch [1, tokens]."""
        positions = [torch.arange(branch.num_tokens, branch.num_tokens + end - begin) for branch, begin, end in self.slices]
        return torch.cat(positions)[None].to(device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None, softcap: float | None
    ) -> torch.Tensor:
        """Return the attention of new tokens [1, heads, tokens, width] to their branches, as [1, tokens, heads, width].

        If ``key`` and ``value`` are not those that were written, the result is zeros and ``attended_layers`` does not count the layer: the
        model then attends to something that it derives from what it caches (DeepSeek's latent attention).
        """
        if key is not self._written[0] or value is not self._written[1]:
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        self.attended_layers += 1
        prefix = self._prefix_layers[layer]
        groups, (heads, tokens, width) = prefix.keys.shape[1], query.shape[1:]
        grouped = query[0].reshape(groups, heads // groups, tokens, width) * (width**-0.5 if scaling is None else scaling)
        prefix_mask, suffix_masks = self._masks_of(prefix, query)
        keys, values = prefix.keys[0, :, : self._shared], prefix.values[0, :, : self._shared]
        shared = partial_attention(grouped, keys, values, prefix_mask, softcap)
        seen = []
        for (branch, begin, end), mask in zip(self.slices, suffix_masks, strict=True):
            suffix = partial_attention(grouped[:, :, begin:end], *branch.read(layer, end - begin), mask, softcap)
            seen.append(_merge(suffix, PartialAttention(*(part[:, :, begin:end] for part in shared))))
        return torch.cat(seen, dim=2).to(query.dtype).reshape(heads, tokens, -1).transpose(0, 1)[None].contiguous()

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the new keys and values [1, heads, tokens, width] to their branches."""
        self._written = keys, values
        for branch, begin, end in self.slices:
            branch.write(layer, keys[:, :, begin:end], values[:, :, begin:end])

    def _masks_of(self, prefix: PrefixLayer, query: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return what is added to scores: [tokens, prefix tokens], and per branch [new tokens, suffix tokens]; cached per window."""
        kind = (prefix.window, query.device)
        if kind not in self._masks:
            to_prefix, to_suffix = [], []
            for branch, begin, end in self.slices:
                num_tokens = branch.num_tokens + end - begin
                position = torch.arange(branch.num_tokens, num_tokens, device=query.device)[:, None]
                column = torch.arange(max(self._shared, num_tokens), device=query.device)
                visible = column <= position
                if prefix.window is not None:
                    visible &= column > position - prefix.window
                mask = torch.zeros(visible.shape, dtype=torch.float32, device=query.device).masked_fill_(~visible, HIDDEN)
                to_suffix.append(mask[:, branch.shared_tokens : num_tokens])
                shared = mask[:, : self._shared].clone()
                shared[:, branch.shared_tokens :] = HIDDEN
                to_prefix.append(shared)
            self._masks[kind] = torch.cat(to_prefix), to_suffix
        return self._masks[kind]


class _BatchLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer of a ``BatchCache``, in the form that transformers expects."""

    def __init__(self, batch: BatchCache, index: int, prefix: PrefixLayer) -> None:
        super().__init__()
        self._batch, self._index, self.is_sliding = batch, index, prefix.is_sliding
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: branches have their buffers."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values; ``BatchCache.attend`` reads all of them."""
        self._batch.write(self._index, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return sizes as if there were new tokens only; ``BatchCache`` makes the masks."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0, as for ``get_mask_sizes``."""
        return 0

    def get_max_length(self) -> int:
        """Return -1, which means no maximum."""
        return -1


class PartialAttention(NamedTuple):
    """Attention to some of the keys, in float32, which can be merged with the attention to other keys (as in flash decoding)."""

    highest: torch.Tensor
    """Highest score [groups, heads, tokens, 1]."""
    total: torch.Tensor
    """Sum of exponentials of scores minus the highest [groups, heads, tokens, 1]."""
    values: torch.Tensor
    """Sum of values weighted by these exponentials [groups, heads, tokens, width]."""


def partial_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, softcap: float | None
) -> PartialAttention:
    """Return the attention of ``query`` [groups, heads, tokens, width], scaled, to ``keys`` and ``values`` [groups, keys, width]."""
    groups, heads, tokens, width = query.shape
    if not keys.shape[1]:
        nothing = torch.zeros((groups, heads, tokens, 1), dtype=torch.float32, device=query.device)
        return PartialAttention(nothing + HIDDEN, nothing, torch.zeros((*nothing.shape[:3], values.shape[2]), device=query.device))
    scores = torch.bmm(query.reshape(groups, heads * tokens, width), keys.transpose(1, 2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(groups, heads, tokens, -1) + mask
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp_()
    weighted = torch.bmm(weights.to(values.dtype).view(groups, heads * tokens, -1), values)
    return PartialAttention(highest, weights.sum(-1, keepdim=True), weighted.float().view(groups, heads, tokens, -1))


def _merge(one: PartialAttention, other: PartialAttention) -> torch.Tensor:
    """Return the attention to the keys of both."""
    highest = torch.maximum(one.highest, other.highest)
    first, second = (one.highest - highest).exp(), (other.highest - highest).exp()
    return (one.values * first + other.values * second) / (one.total * first + other.total * second)
