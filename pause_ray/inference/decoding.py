"""Greedy decoding with a loaded model whose keys and values are kept from prompt to prompt.

Prompts are prefilled in chunks, only the logits that are read are computed, and a draft of the answer is verified in the forward pass of
the last chunk (speculative decoding). After a mismatch, prompt lookup proposes the next draft. Answers that are not complete after the
first pass wait until enough of them can be decoded in one batch.
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
from pause_ray.inference.kv_cache import BatchCache, Branch, PrefixCache, prefix_cache
from pause_ray.inference.prefix_attention import has_prefix_attention
from pause_ray.models.shape import prompt_passes

Ids = NDArray[np.int32]

SHORTEST_MATCH = 2
"""The shortest match of prompt lookup in tokens: after a single token nearly anything may follow."""
LONGEST_MATCH = 8
"""The longest match of prompt lookup in tokens; longer matches predict no better."""


def prompt_lookup(tokens: Ids, *, max_tokens: int) -> tuple[int, ...]:
    """Return up to ``max_tokens`` tokens that followed the longest earlier match of the last ``tokens``; empty without a match.

    Answers quote their prompt, so this is often the text to come (Saxena 2023, "Prompt lookup decoding"). Among equally long matches the
    last one counts.
    """
    if max_tokens < 1 or len(tokens) <= SHORTEST_MATCH:
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
    return tuple(int(token) for token in tokens[begin : begin + max_tokens])


LOOKUP_TOKENS = 8
"""The largest number of tokens that prompt lookup drafts at a time, once the answer leaves the given draft."""
BATCH_TOKENS = 24
"""The number of tokens, drafts included, in one forward pass of a batch. On 2 CPU cores and 135M parameters 24 tokens take about 2.5
times as long as one; eight answers that copy their prompt then advance by three tokens each."""


@dataclass(kw_only=True)
class Answer:
    """An answer while it is decoded."""

    max_tokens: int
    """Largest number of tokens of the answer."""
    end_ids: frozenset[int]
    reference: Sequence[int]
    """Likely beginning of the answer, against which ``reference_margin`` is measured."""
    ids: list[int] = field(default_factory=list)
    """Tokens so far, without the end token."""
    margin: float | None = None
    reference_margin: float | None = None
    prefilled_tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    """Computing time; the time of a batch is divided equally among its answers."""
    finished: bool = False
    """Whether the answer is complete or has failed."""
    error: EngineError | None = None
    """Reason why there is no answer."""
    _matches_reference: bool = True

    def accept(self, logits: torch.Tensor, draft: Sequence[int]) -> None:
        """Accept the greedy tokens of ``logits`` [1 + draft, vocabulary] up to and including the first that differs from ``draft``."""
        self.finished = self._finishes_with(logits, draft)

    def _finishes_with(self, logits: torch.Tensor, draft: Sequence[int]) -> bool:
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
            if len(self.ids) == self.max_tokens:
                return True
            if row < len(draft) and token != draft[row]:
                return False
        return False

    def _compare(self, token: int, logits: torch.Tensor) -> None:
        index = len(self.ids)
        if self._matches_reference and index < len(self.reference) and token != self.reference[index]:
            self._matches_reference = False
            self.reference_margin = float(logits[token].float() - logits[self.reference[index]].float())


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """An answer that waits to be decoded in a batch."""

    answer: Answer
    prompt: Ids
    branch: Branch
    drafts: bool


def _concatenate(prompt: Ids, answer: Answer) -> Ids:
    return np.concatenate([prompt, np.asarray(answer.ids, dtype=np.int32)])


class GreedyDecoder:
    """Decodes greedily with a model and the cached keys and values of the last prompt.

    Args:
        model: The causal language model, with or without an adapter.
        config: The configuration of the base model.
        chunk_tokens: The approximate number of prompt tokens in one forward pass; see ``models.shape.prompt_passes``.
        prefix_block_size: 1 or ``chunk_tokens``. With the latter only whole chunks are kept that were prefilled without a draft, so every
            key and value comes out of a forward pass of the same shape whatever is reused.
        host: Keep keys and values in the machine's memory.
        decode_batch: The number of answers in one forward pass, where the model has this package's attention
            (``inference.prefix_attention``); 1 with ``host``.
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
        self._decode_batch = decode_batch
        self._batch_works: bool | None = None
        self.reset()

    @property
    def kv_bytes(self) -> int:
        """The bytes of the buffers of keys and values, filled or not."""
        branches = sum(waiting.branch.num_bytes for waiting in self._waiting)
        return self._cache.num_bytes + branches if isinstance(self._cache, PrefixCache) else 0

    def reserve(self, num_tokens: int) -> None:
        """Reserve buffers for a prompt and its answer of together up to ``num_tokens`` tokens."""
        self.reserved_tokens = max(num_tokens, self.reserved_tokens)
        if isinstance(self._cache, PrefixCache):
            self._cache.reserve(self.reserved_tokens)

    def drop_waiting(self) -> None:
        """Drop the answers that wait for a batch."""
        self._waiting: list[_Waiting] = []

    def reset(self) -> None:
        """Drop the keys and values with their memory, and the answers that wait for a batch."""
        self.drop_waiting()
        self._cache: PrefixCache | transformers.DynamicCache = prefix_cache(self._config, host=self._host) or self._plain_cache()
        self._cached_ids: Ids = np.empty(0, dtype=np.int32)
        self.reserved_tokens = 0

    def decode(self, prompt: Ids, answer: Answer, *, keep_tokens: int, drafts: bool, wait: bool = False) -> None:
        """Fill ``answer`` with the greedy continuation of ``prompt``.

        Args:
            prompt: Token ids, 1-D, not empty.
            answer: The answer without tokens.
            keep_tokens: The number of leading tokens shared with the last prompt; fewer are kept if fewer are cached.
            drafts: Verify ``answer.reference``, then text from the prompt, instead of computing tokens one by one.
            wait: Leave the tokens after the first forward pass to a batch, which ``make_room`` and ``finish`` decode.
        """
        start = time.perf_counter()
        drafts = drafts and isinstance(self._cache, PrefixCache)
        draft = tuple(answer.reference[: answer.max_tokens - 1]) if drafts else ()
        kept = self._truncate(prompt, keep_tokens)
        answer.prefilled_tokens = len(prompt) - kept
        answer.accept(self._prefill(prompt, begin=kept, draft=draft), draft)
        # A last chunk, even a whole one, was computed together with a draft.
        self._cached_ids = (
            prompt if self._prefix_block_size == 1 else prompt[: (len(prompt) - 1) // self._prefix_block_size * self._prefix_block_size]
        )
        if not answer.finished and wait and self._can_batch():
            branch = Branch(num_tokens=len(prompt) + len(answer.ids) - 1, max_new_tokens=answer.max_tokens - len(answer.ids))
            self._waiting.append(_Waiting(answer=answer, prompt=prompt, branch=branch, drafts=drafts))
        else:
            while not answer.finished:
                self._step(prompt, answer, drafts=drafts)
        answer.seconds += time.perf_counter() - start

    def make_room(self, prompt: Ids, *, keep_tokens: int) -> None:
        """Decode the waiting answers until one more can wait once the cache holds ``prompt``."""
        kept = self._num_kept(prompt, keep_tokens)
        while len(self._waiting) >= self._decode_batch or self._suffix_tokens(kept) > self.reserved_tokens:
            self._step_batch()

    def finish(self) -> None:
        """Decode the waiting answers until all are complete."""
        while self._waiting:
            self._step_batch()

    def _suffix_tokens(self, kept: int) -> int:
        """Return how many tokens the waiting answers would hold themselves if the cache were truncated to ``kept`` tokens."""
        return sum(waiting.branch.num_tokens - min(waiting.branch.shared_tokens, kept) for waiting in self._waiting)

    def _step(self, prompt: Ids, answer: Answer, *, drafts: bool) -> None:
        """Run one forward pass for the last prompt's answer."""
        ids = _concatenate(prompt, answer)
        draft = prompt_lookup(ids, max_tokens=min(LOOKUP_TOKENS, answer.max_tokens - len(answer.ids) - 1)) if drafts else ()
        if isinstance(self._cache, PrefixCache):
            self._cache.truncate(len(ids) - 1)
        answer.accept(self._forward([*ids[-1:], *draft], rows=1 + len(draft)), draft)
        answer.forwards += 1

    def _step_batch(self) -> None:
        """Run one forward pass for all waiting answers."""
        start = time.perf_counter()
        max_draft = min(LOOKUP_TOKENS, BATCH_TOKENS // len(self._waiting) - 1)
        new: list[list[int]] = []
        for waiting in self._waiting:
            waiting.branch.split(self._prefix_cache(), at=waiting.branch.shared_tokens)
            ids, room = _concatenate(waiting.prompt, waiting.answer), waiting.answer.max_tokens - len(waiting.answer.ids) - 1
            new.append([int(ids[-1]), *(prompt_lookup(ids, max_tokens=min(max_draft, room)) if waiting.drafts else ())])
        branches = list(zip((waiting.branch for waiting in self._waiting), map(len, new), strict=True))
        logits = self._forward_batch([token for tokens in new for token in tokens], BatchCache(self._prefix_cache(), branches))
        begin = 0
        for waiting, tokens in zip(self._waiting, new, strict=True):
            waiting.answer.accept(logits[begin : begin + len(tokens)], tokens[1:])
            waiting.answer.forwards += 1
            waiting.branch.set_num_tokens(len(waiting.prompt) + len(waiting.answer.ids) - 1)
            begin += len(tokens)
        for waiting in self._waiting:
            waiting.answer.seconds += (time.perf_counter() - start) / len(self._waiting)
        self._waiting = [waiting for waiting in self._waiting if not waiting.answer.finished]

    def _can_batch(self) -> bool:
        """Return whether answers can be decoded in a batch, which is tried once on a single token."""
        if self._decode_batch == 1 or not isinstance(self._cache, PrefixCache):
            return False
        if self._batch_works is None:
            branch, num_layers = Branch(num_tokens=0, max_new_tokens=1), len(self._cache.layers)
            branch.split(self._cache, at=0)
            batch = BatchCache(self._cache, [(branch, 1)])
            if has_prefix_attention(self._config) and len(self._cache.prefix_layers) == num_layers:
                self._forward_batch([0], batch)
            self._batch_works = batch.attended_layers == num_layers
        return self._batch_works

    def _prefix_cache(self) -> PrefixCache:
        if not isinstance(self._cache, PrefixCache):
            raise TypeError("answers wait for a batch only where the cache can be truncated")
        return self._cache

    def _truncate(self, prompt: Ids, keep_tokens: int) -> int:
        """Truncate the cache to the prefix that ``prompt`` shares with it, and return the number of tokens kept."""
        kept = self._num_kept(prompt, keep_tokens)
        self._cached_ids = prompt[:kept]
        if isinstance(self._cache, PrefixCache):
            for waiting in self._waiting:
                if waiting.branch.shared_tokens > kept:
                    waiting.branch.split(self._cache, at=kept)
            self._cache.truncate(kept)
            return kept
        self._cache = self._plain_cache()
        return 0

    def _num_kept(self, prompt: Ids, keep_tokens: int) -> int:
        limit = min(keep_tokens, len(self._cached_ids), len(prompt) - 1)
        different = self._cached_ids[:limit] != prompt[:limit]
        kept = int(different.argmax()) if different.any() else limit
        return kept - kept % self._prefix_block_size

    def _prefill(self, prompt: Ids, *, begin: int, draft: Sequence[int]) -> torch.Tensor:
        """Return the logits [1 + draft, vocabulary] after the prompt and after each drafted token."""
        *passes, last = prompt_passes(begin, len(prompt), chunk_tokens=self._chunk_tokens, prefix_block_size=self._prefix_block_size)
        for start, end in passes:
            self._forward(prompt[start:end], rows=0)
        return self._forward([*prompt[last[0] :], *draft], rows=1 + len(draft))

    def _forward(self, ids: Sequence[int] | Ids, *, rows: int) -> torch.Tensor:
        """Return the logits [rows, vocabulary] of the last ``rows`` of ``ids``, which continue the cached tokens."""
        new = torch.as_tensor(np.asarray(ids, dtype=np.int64))[None].to(self.model.device)
        logits_to_keep = rows or torch.empty(0, dtype=torch.long)  # 0 would mean all of them
        output = self.model(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=logits_to_keep)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _forward_batch(self, ids: Sequence[int], batch: BatchCache) -> torch.Tensor:
        """Return the logits [tokens, vocabulary] of the new tokens of all branches, branch after branch."""
        device = self.model.device
        new = torch.as_tensor(ids, dtype=torch.long)[None].to(device)
        output = self.model(input_ids=new, position_ids=batch.position_ids(device), past_key_values=batch, use_cache=True, batch=batch)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _plain_cache(self) -> transformers.DynamicCache:
        return transformers.DynamicCache(config=self._config)
