"""Greedy decoding of one loaded model whose keys and values are kept from prompt to prompt.

Prompts are prefilled in chunks, only the logits that are read are computed, and a draft of the answer is verified in the forward
pass of the last chunk (speculative decoding). After a mismatch, prompt lookup proposes the next draft. Answers that are not
complete after the first pass wait for others and are then decoded together. The module knows no file and no text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from pause_ray.inference.engine import EngineError
from pause_ray.inference.kv_cache import NAME, PathCache, Row, RowsCache, path_cache
from pause_ray.models.shape import prompt_passes

Ids = NDArray[np.int32]

SHORTEST_MATCH = 2
"""Shortest match of prompt lookup in tokens: after a single token nearly anything may follow."""
LONGEST_MATCH = 8
"""Longest match of prompt lookup in tokens; longer matches predict no better."""


def prompt_lookup(tokens: Ids, *, most: int) -> tuple[int, ...]:
    """Return the tokens that followed the last tokens where these occurred before, up to ``most``; empty where they did not.

    Answers quote their prompt, so the text after the longest earlier match is often the text to come (Saxena 2023,
    "Prompt lookup decoding"). Among equally long matches the last one counts.

    Args:
        tokens: Prompt and answer so far, 1-D.
        most: Largest number of tokens to return.
    """
    if most < 1 or len(tokens) <= SHORTEST_MATCH:
        return ()
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    matched = 1
    while matched < LONGEST_MATCH:
        longer = ends[ends >= matched]
        longer = longer[tokens[longer - matched] == tokens[-1 - matched]]
        if not longer.size:
            break
        ends, matched = longer, matched + 1
    if matched < SHORTEST_MATCH:
        return ()
    begin = int(ends[-1]) + 1
    return tuple(int(token) for token in tokens[begin : begin + most])


LOOKUP_TOKENS = 8
"""Most tokens that prompt lookup drafts at a time, once the answer leaves the given draft."""
FREE_TOKENS = 24
"""Tokens in one forward pass of several answers, drafted ones included. On 2 CPU cores and 135M parameters 24 tokens take about 2.5
times as long as one; eight answers that copy their prompt then advance by three tokens each."""


@dataclass(kw_only=True)
class Answer:
    """An answer while it is decoded."""

    most: int
    """Most tokens of the answer."""
    end_ids: frozenset[int]
    reference: Sequence[int]
    """Likely beginning of the answer; ``reference_margin`` is measured against it, verified or not."""
    ids: list[int] = field(default_factory=list)
    """Tokens so far, without the end token."""
    margin: float | None = None
    reference_margin: float | None = None
    prefilled_tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    """Computing time; of a forward pass that several answers share, an equal part."""
    settled: bool = False
    """Whether the answer is complete or has failed."""
    error: EngineError | None = None
    """Reason why there is no answer."""
    _follows: bool = True

    def take(self, logits: torch.Tensor, guessed: Sequence[int]) -> None:
        """Accept the greedy tokens of ``logits`` [1 + guessed, vocabulary] up to and including the first that differs from ``guessed``."""
        self.settled = self._is_complete_after(logits, guessed)

    def _is_complete_after(self, logits: torch.Tensor, guessed: Sequence[int]) -> bool:
        best = logits.argmax(-1).tolist()
        highest = logits.topk(2).values.float().tolist()
        for row, token in enumerate(best):
            first, second = highest[row]
            if not math.isfinite(first):
                self.error = EngineError("the model's logits are not numbers; score in float32 or bfloat16")
                return True
            self.margin = first - second if self.margin is None else min(self.margin, first - second)
            self._compare(token, logits[row])
            if token in self.end_ids:
                return True
            self.ids.append(token)
            if len(self.ids) == self.most:
                return True
            if row < len(guessed) and token != guessed[row]:
                return False
        return False

    def _compare(self, token: int, logits: torch.Tensor) -> None:
        place = len(self.ids)
        if self._follows and place < len(self.reference) and token != self.reference[place]:
            self._follows = False
            self.reference_margin = float(logits[token].float() - logits[self.reference[place]].float())


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """An answer that waits to be decoded together with others."""

    answer: Answer
    prompt: Ids
    row: Row
    drafts: bool

    def said(self) -> Ids:
        """Return the tokens of the prompt and of the answer so far."""
        return np.concatenate([self.prompt, np.asarray(self.answer.ids, dtype=np.int32)])


class GreedyDecoder:
    """Decodes greedily with a model and the keys and values of the last prompt.

    Args:
        model: Causal language model, with an adapter or without.
        config: Configuration of the model.
        chunk_tokens: Prompt tokens in one forward pass, about; see ``models.shape.prompt_passes``.
        prefix_block_size: Block size of prefix caching: 1, or ``chunk_tokens``. With the latter only whole chunks are kept that were
            prefilled without a draft, so every key and value comes out of a forward pass of the same shape whatever is reused.
        host: Keep keys and values in the machine's memory.
        decode_batch: Answers that are decoded in one forward pass, where the model's attention was replaced
            (``inference.kv_cache``); 1 with ``host``.
    """

    def __init__(
        self,
        model: Any,
        config: transformers.PreTrainedConfig,
        *,
        chunk_tokens: int,
        prefix_block_size: int,
        host: bool = False,
        decode_batch: int = 1,
    ) -> None:
        self.model = model
        self._config = config
        self._chunk_tokens = chunk_tokens
        self._prefix_block_size = prefix_block_size
        self.reserved_tokens = 0
        self._host = host
        self._no_rows = torch.empty(0, dtype=torch.long)
        self._decode_batch = decode_batch
        self._can_batch: bool | None = None
        self.forget()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the buffers of keys and values, filled or not."""
        own = sum(waiting.row.num_bytes for waiting in self._waiting)
        return self._cache.num_bytes + own if isinstance(self._cache, PathCache) else 0

    def reserve(self, num_tokens: int) -> None:
        """Reserve buffers for prompts with answers of up to ``num_tokens`` tokens."""
        self.reserved_tokens = max(num_tokens, self.reserved_tokens)
        if isinstance(self._cache, PathCache):
            self._cache.reserve(self.reserved_tokens)

    def give_up(self) -> None:
        """Drop the answers that wait to be decoded."""
        self._waiting: list[_Waiting] = []

    def forget(self) -> None:
        """Drop the keys and values, and their memory, and the answers that wait."""
        self.give_up()
        self._cache: PathCache | transformers.DynamicCache = path_cache(self._config, host=self._host) or self._unkept()
        self._held: Ids = np.empty(0, dtype=np.int32)
        self.reserved_tokens = 0

    def answer(self, prompt: Ids, answer: Answer, *, keep_tokens: int, drafts: bool, wait: bool = False) -> None:
        """Fill ``answer`` with the greedy continuation of ``prompt``.

        Args:
            prompt: Token ids, 1-D, not empty.
            answer: Empty.
            keep_tokens: Leading tokens that are the last prompt's; fewer are kept where fewer are held.
            drafts: Verify ``answer.reference``, then text from the prompt. Without, tokens are computed one by one.
            wait: Leave what is missing after the first forward pass to ``finish``.
        """
        start = time.perf_counter()
        drafts = drafts and isinstance(self._cache, PathCache)
        guessed = tuple(answer.reference[: answer.most - 1]) if drafts else ()
        kept = self._keep(prompt, keep_tokens)
        answer.prefilled_tokens = len(prompt) - kept
        answer.take(self._read(prompt, begin=kept, guessed=guessed), guessed)
        # A whole last chunk was computed together with a draft.
        self._held = (
            prompt if self._prefix_block_size == 1 else prompt[: (len(prompt) - 1) // self._prefix_block_size * self._prefix_block_size]
        )
        if not answer.settled and wait and self._batches():
            row = Row(num_tokens=len(prompt) + len(answer.ids) - 1, room_tokens=answer.most - len(answer.ids))
            self._waiting.append(_Waiting(answer=answer, prompt=prompt, row=row, drafts=drafts))
        while not (answer.settled or (self._waiting and self._waiting[-1].answer is answer)):
            self._go_on(prompt, answer, drafts=drafts)
        answer.seconds += time.perf_counter() - start

    def make_way(self, prompt: Ids, *, keep_tokens: int) -> None:
        """Decode the waiting answers together until there is room for one more after the cache holds ``prompt``."""
        kept = self._kept_of(prompt, keep_tokens)
        while len(self._waiting) >= self._decode_batch or self._own_tokens(kept) > self.reserved_tokens:
            self._go_on_together()

    def finish(self) -> None:
        """Decode the waiting answers together until all are complete."""
        while self._waiting:
            self._go_on_together()

    def _own_tokens(self, kept: int) -> int:
        """Return how many tokens the waiting answers would hold themselves if the cache went back to its first ``kept`` tokens."""
        return sum(waiting.row.num_tokens - min(waiting.row.shared_tokens, kept) for waiting in self._waiting)

    def _go_on(self, prompt: Ids, answer: Answer, *, drafts: bool) -> None:
        """Run one more forward pass for the last prompt's answer."""
        said = np.concatenate([prompt, np.asarray(answer.ids, dtype=np.int32)])
        guessed = prompt_lookup(said, most=min(LOOKUP_TOKENS, answer.most - len(answer.ids) - 1)) if drafts else ()
        if isinstance(self._cache, PathCache):
            self._cache.keep(len(said) - 1)
        answer.take(self._forward([*said[-1:], *guessed], rows=1 + len(guessed)), guessed)
        answer.forwards += 1

    def _go_on_together(self) -> None:
        """Run one more forward pass for all waiting answers together."""
        start = time.perf_counter()
        most = min(LOOKUP_TOKENS, FREE_TOKENS // len(self._waiting) - 1)
        new: list[list[int]] = []
        for waiting in self._waiting:
            waiting.row.part_from(self._path(), at=waiting.row.shared_tokens)
            said, room = waiting.said(), waiting.answer.most - len(waiting.answer.ids) - 1
            new.append([int(said[-1]), *(prompt_lookup(said, most=min(most, room)) if waiting.drafts else ())])
        parts = list(zip((waiting.row for waiting in self._waiting), map(len, new), strict=True))
        logits = self._forward_rows([token for tokens in new for token in tokens], RowsCache(self._path(), parts))
        begin = 0
        for waiting, tokens in zip(self._waiting, new, strict=True):
            waiting.answer.take(logits[begin : begin + len(tokens)], tokens[1:])
            waiting.answer.forwards += 1
            waiting.row.keep(len(waiting.prompt) + len(waiting.answer.ids) - 1)
            begin += len(tokens)
        for waiting in self._waiting:
            waiting.answer.seconds += (time.perf_counter() - start) / len(self._waiting)
        self._waiting = [waiting for waiting in self._waiting if not waiting.answer.settled]

    def _batches(self) -> bool:
        """Return whether answers can be decoded together, which is tried once on one token without a past."""
        if self._decode_batch == 1 or not isinstance(self._cache, PathCache):
            return False
        if self._can_batch is None:
            row, num_layers = Row(num_tokens=0, room_tokens=1), len(self._cache.layers)
            row.part_from(self._cache, at=0)
            rows = RowsCache(self._cache, [(row, 1)])
            chunked = getattr(self._config, "attention_chunk_size", None)  # Llama 4: a window that does not slide
            if self._config._attn_implementation == NAME and len(self._cache.path_layers) == num_layers and not chunked:
                self._forward_rows([0], rows)
            self._can_batch = rows.attended_layers == num_layers
        return self._can_batch

    def _path(self) -> PathCache:
        if not isinstance(self._cache, PathCache):
            raise TypeError("answers wait only where keys and values are kept")
        return self._cache

    def _keep(self, prompt: Ids, asked_tokens: int) -> int:
        """Crop the cache to the prefix that ``prompt`` shares with it, and return the number of its tokens."""
        kept = self._kept_of(prompt, asked_tokens)
        self._held = prompt[:kept]
        if isinstance(self._cache, PathCache):
            for waiting in self._waiting:
                if waiting.row.shared_tokens > kept:
                    waiting.row.part_from(self._cache, at=kept)
            self._cache.keep(kept)
            return kept
        self._cache = self._unkept()
        return 0

    def _kept_of(self, prompt: Ids, asked_tokens: int) -> int:
        most = min(asked_tokens, len(self._held), len(prompt) - 1)
        different = self._held[:most] != prompt[:most]
        kept = int(different.argmax()) if different.any() else most
        return kept - kept % self._prefix_block_size

    def _read(self, prompt: Ids, *, begin: int, guessed: Sequence[int]) -> torch.Tensor:
        """Logits [1 + guessed, vocabulary] after the prompt and after each guessed token."""
        *passes, last = prompt_passes(begin, len(prompt), chunk_tokens=self._chunk_tokens, prefix_block_size=self._prefix_block_size)
        for start, end in passes:
            self._forward(prompt[start:end], rows=0)
        return self._forward([*prompt[last[0] :], *guessed], rows=1 + len(guessed))

    def _forward(self, ids: Sequence[int] | Ids, *, rows: int) -> torch.Tensor:
        """Logits [rows, vocabulary] of the last ``rows`` of ``ids``, which go on from the cache."""
        new = torch.as_tensor(np.asarray(ids, dtype=np.int64))[None].to(self.model.device)
        wanted = rows or self._no_rows  # 0 would mean all of them
        output = self.model(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=wanted)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _forward_rows(self, ids: Sequence[int], rows: RowsCache) -> torch.Tensor:
        """Logits [tokens, vocabulary] of new tokens of several answers, one row's behind another's."""
        device = self.model.device
        new = torch.as_tensor(ids, dtype=torch.long)[None].to(device)
        output = self.model(input_ids=new, position_ids=rows.position_ids(device), past_key_values=rows, use_cache=True, rows=rows)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _unkept(self) -> transformers.DynamicCache:
        return transformers.DynamicCache(config=self._config)
