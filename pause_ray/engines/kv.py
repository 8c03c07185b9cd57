"""Keys and values of one path of tokens, written in place and rewound at will. Knows transformers' cache, no model and no task.

transformers' own layers join the old and the new keys into new storage at every forward pass, which copies the whole prefix
each time, and a sliding window forgets what rewinding would need. Here a layer owns one buffer, a forward pass writes behind
what is there and gets a view of it, and going back is setting a number. A sliding layer keeps everything too, and shows the
model its window.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

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
        """Of both buffers."""
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
        """Of all buffers, filled or not."""
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
