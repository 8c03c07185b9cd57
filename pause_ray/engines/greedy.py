"""Greedy answers of one loaded model, along a path of tokens that is kept from prompt to prompt. Knows no file and no text.

Prompts are computed in chunks, only the rows of logits that are read are made, and a draft of the answer is verified in the
forward pass of the last chunk. Going on after a mismatch, text that followed the last tokens earlier is the next draft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from pause_ray.engines.drafts import prompt_lookup
from pause_ray.engines.engine import EngineError
from pause_ray.engines.kv import PathCache, path_cache

Ids = NDArray[np.int32]

LOOKUP_TOKENS = 8
"""Tokens guessed at a time once the given draft is left: about what one more forward pass takes for nothing."""


@dataclass(kw_only=True)
class Answer:
    """Greedy tokens as they become known."""

    most: int
    """Tokens at most."""
    end_ids: frozenset[int]
    reference: Sequence[int]
    """How the answer probably begins; verified or not, ``reference_margin`` is measured against it."""
    ids: list[int] = field(default_factory=list)
    """Without the end token."""
    margin: float | None = None
    reference_margin: float | None = None
    prefilled_tokens: int = 0
    forwards: int = 0
    _follows: bool = True

    def take(self, logits: torch.Tensor, guessed: Sequence[int]) -> bool:
        """Take what ``logits`` [1 + guessed, vocabulary] say, as far as it is what was guessed, and one token more.

        Returns:
            Whether the answer is complete.

        Raises:
            EngineError: a logit is not a number.
        """
        best = logits.argmax(-1).tolist()
        highest = logits.topk(2).values.float().tolist()
        for row, token in enumerate(best):
            first, second = highest[row]
            if not math.isfinite(first):
                raise EngineError("the model's logits are not numbers; score in float32 or bfloat16")
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


class GreedyReader:
    """A model with the keys and values of the last prompt.

    Args:
        model: Causal language model, with an adapter or without.
        config: Of the model.
        chunk_tokens: Prompt tokens in one forward pass.
        grain_tokens: Keep multiples of this only: 1, or ``chunk_tokens``. Then what is kept are whole chunks that were computed
            without a draft, so every key and value comes out of a forward pass of the same shape whatever is reused.
        host: Keep keys and values in the machine's memory.
    """

    def __init__(
        self, model: Any, config: transformers.PreTrainedConfig, *, chunk_tokens: int, grain_tokens: int, host: bool = False
    ) -> None:
        self.model = model
        self._config = config
        self._chunk_tokens = chunk_tokens
        self._grain_tokens = grain_tokens
        self.reserved_tokens = 0
        self._host = host
        self._no_rows = torch.empty(0, dtype=torch.long)
        self.forget()

    @property
    def kv_bytes(self) -> int:
        """Of the buffers of keys and values, filled or not."""
        return self._cache.num_bytes if isinstance(self._cache, PathCache) else 0

    def reserve(self, num_tokens: int) -> None:
        """Make room for prompts with answers of up to so many tokens, if there is not more already."""
        self.reserved_tokens = max(num_tokens, self.reserved_tokens)
        if isinstance(self._cache, PathCache):
            self._cache.reserve(self.reserved_tokens)

    def forget(self) -> None:
        """Drop the keys and values, and their memory."""
        self._cache: PathCache | transformers.DynamicCache = path_cache(self._config, host=self._host) or self._unkept()
        self._held: Ids = np.empty(0, dtype=np.int32)
        self.reserved_tokens = 0

    def answer(self, prompt: Ids, answer: Answer, *, keep_tokens: int, drafts: bool) -> Answer:
        """Fill ``answer`` with the greedy continuation of ``prompt``.

        Args:
            prompt: Token ids, 1-D, not empty.
            answer: Empty.
            keep_tokens: Leading tokens that are the last prompt's; fewer are kept where fewer are held.
            drafts: Verify ``answer.reference``, then text from the prompt. Without, tokens are computed one by one.

        Raises:
            EngineError: a logit is not a number.
        """
        drafts = drafts and isinstance(self._cache, PathCache)
        guessed = tuple(answer.reference[: answer.most - 1]) if drafts else ()
        kept = self._keep(prompt, keep_tokens)
        answer.prefilled_tokens = len(prompt) - kept
        logits = self._read(prompt, begin=kept, guessed=guessed)
        # A whole last chunk was computed together with a draft.
        self._held = prompt if self._grain_tokens == 1 else prompt[: (len(prompt) - 1) // self._grain_tokens * self._grain_tokens]
        said = prompt
        while not answer.take(logits, guessed):
            said = np.concatenate([prompt, np.asarray(answer.ids, dtype=np.int32)])
            guessed = prompt_lookup(said, most=min(LOOKUP_TOKENS, answer.most - len(answer.ids) - 1)) if drafts else ()
            if isinstance(self._cache, PathCache):
                self._cache.keep(len(said) - 1)
            logits = self._forward([*said[-1:], *guessed], rows=1 + len(guessed))
            answer.forwards += 1
        return answer

    def _keep(self, prompt: Ids, asked_tokens: int) -> int:
        """Go back to what of ``prompt`` needs no computing, and say how much that is."""
        most = min(asked_tokens, len(self._held), len(prompt) - 1)
        different = self._held[:most] != prompt[:most]
        kept = int(different.argmax()) if different.any() else most
        kept -= kept % self._grain_tokens
        self._held = prompt[:kept]
        if isinstance(self._cache, PathCache):
            self._cache.keep(kept)
            return kept
        self._cache = self._unkept()
        return 0

    def _read(self, prompt: Ids, *, begin: int, guessed: Sequence[int]) -> torch.Tensor:
        """Logits [1 + guessed, vocabulary] after the prompt and after each guessed token."""
        last = begin + (len(prompt) - 1 - begin) // self._chunk_tokens * self._chunk_tokens
        for start in range(begin, last, self._chunk_tokens):
            self._forward(prompt[start : start + self._chunk_tokens], rows=0)
        return self._forward([*prompt[last:], *guessed], rows=1 + len(guessed))

    def _forward(self, ids: Sequence[int] | Ids, *, rows: int) -> torch.Tensor:
        """Logits [rows, vocabulary] of the last ``rows`` of ``ids``, which go on from the cache."""
        new = torch.as_tensor(np.asarray(ids, dtype=np.int64))[None].to(self.model.device)
        wanted = rows or self._no_rows  # 0 would mean all of them
        output = self.model(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=wanted)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _unkept(self) -> transformers.DynamicCache:
        return transformers.DynamicCache(config=self._config)
