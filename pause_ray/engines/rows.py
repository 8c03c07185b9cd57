"""Several unfinished answers, each a row of its own, that go on together in one forward pass. Knows tensors, no model and no task.

Decoding reads all weights for every pass, so eight answers at a time cost little more than one. A row's keys and values are the
first tokens of a path (``engines.kv``), which rows share and no one copies, and behind them its own; when the path goes back to
another place, the row takes along what it would lose. The path's keys are read once for all rows, and the two parts of a
row's attention are joined by their sums of exponentials (Dao et al. 2023, "Flash-Decoding"), which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pause_ray.engines.kv import PathCache, PathLayer

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
        """Of its own buffers."""
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
    """What a model needs to go on with several rows: new tokens of all rows stand behind each other in one sequence.

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
