"""An engine without a neural network for tests: it answers by a rule and does everything else as a real engine does.

It tokenizes, counts, keeps prefixes, truncates and refuses, and fails on a plan that keeps tokens which are not cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pause_ray.core.errors import ModelError
from pause_ray.inference.engine import Completion, EngineError, LoadedAs, PromptStep
from pause_ray.text.tokenizer import ModelTokenizer

UNKNOWN = "I don't know."


@dataclass(kw_only=True)
class ScriptedEngine:
    """Answers with the fact that belongs to the prompt's question if the prompt holds it outside the blind depths."""

    facts: Mapping[str, str]
    """The fact that answers each question, word for word as it is hidden."""
    blind_percent: tuple[float, float] = (0.0, 0.0)
    """Facts that begin between these percentages of the prompt's characters (upper end exclusive) are missed."""
    blind_from_tokens: int = 0
    """Shorter prompts have no blind depths."""
    fails_from_tokens: int | None = None
    """Prompts of this length or more fail as if memory were short."""
    limit_tokens: int = 1_000_000
    """The longest prompt with its answer."""
    prefix_block_size: int = 1
    """Block size of prefix caching."""
    name: str = "scripted"
    _tokenizer: ModelTokenizer | None = field(default=None, init=False, repr=False)
    _model_dir: Path | None = field(default=None, init=False, repr=False)
    _computed: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32), init=False, repr=False)

    def use(self, wanted: LoadedAs) -> None:
        """Read the model folder's tokenizer; weights and adapter are ignored."""
        if wanted.model_dir != self._model_dir:
            self._tokenizer = ModelTokenizer.load(wanted.model_dir)
            self._model_dir = wanted.model_dir
        self._computed = self._computed[:0]

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        """Yield the rule's answers, each cut to its ``max_new_tokens``, or an error from ``fails_from_tokens`` on.

        Raises:
            ModelError: A prompt is as long as ``limit_tokens``.
        """
        if self._tokenizer is None:
            raise RuntimeError("ScriptedEngine.answer before ScriptedEngine.use")
        for place, step in enumerate(steps):
            yield place, self._outcome(step, tokenizer=self._tokenizer)

    def _outcome(self, step: PromptStep, *, tokenizer: ModelTokenizer) -> Completion | EngineError:
        prompt = step.prompt.ids
        if len(prompt) >= self.limit_tokens:
            raise ModelError(f"a prompt of {len(prompt)} tokens does not fit a model whose limit is {self.limit_tokens} with the answer")
        if self.fails_from_tokens is not None and len(prompt) >= self.fails_from_tokens:
            self._computed = self._computed[:0]
            return EngineError(f"out of memory on a prompt of {len(prompt)} tokens")
        kept = min(step.keep_tokens, len(self._computed), len(prompt) - 1)
        kept -= kept % self.prefix_block_size
        if not np.array_equal(self._computed[:kept], prompt[:kept]):
            raise RuntimeError(f"a step keeps {step.keep_tokens} tokens, and its prompt does not begin with the {kept} that are cached")
        self._computed = prompt
        answer_ids = tokenizer.encode(self._answer(tokenizer.decode(prompt), num_tokens=len(prompt))).ids
        ids = tuple(int(token) for token in answer_ids[: min(step.max_new_tokens, self.limit_tokens - len(prompt))])
        return Completion(
            text=tokenizer.decode(ids),
            ids=ids,
            prefilled_tokens=len(prompt) - kept,
            decoded_tokens=len(ids),
            seconds=0.0,
            forwards=len(ids),
        )

    def _answer(self, text: str, *, num_tokens: int) -> str:
        asked = max(self.facts, key=lambda question: text.rfind(question), default="")
        place = text.find(self.facts[asked]) if asked and asked in text else -1
        if place < 0:
            return UNKNOWN
        low, high = self.blind_percent
        blind = num_tokens >= self.blind_from_tokens and low <= 100 * place / len(text) < high
        return UNKNOWN if blind else self.facts[asked]
