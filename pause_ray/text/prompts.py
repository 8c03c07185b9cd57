"""A question about a long context, in token ids: haystack, hidden needle, pauses, chat frame, exact length.

The same code builds evaluation prompts and ``needle_sft`` training rows. Knows no grid, no score and no model weights.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from pause_ray.errors import TextError
from pause_ray.spec import Spec
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.segments import DocumentRules, detect_paragraph_rule, sentence_starts
from pause_ray.text.tokens import Marker, ModelTokenizer, TokenDocument, cut, encode_document, visible_starts

_SPARE_TOKENS = 64
"""Haystack taken beyond the cut, so that the tokens before the cut are those of the whole haystack."""
_CHARS_PER_TOKEN = 5
"""First guess of how many characters to take; English prose has 4 to 4.5 per token."""


class PromptSpec(Spec):
    """The chat around a context: a system message and one user message that ends with the question."""

    system: str | None = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct."
    """System message, or null for none."""
    before: str = ""
    """User text before the context."""
    after: str = "\n\n{instruction}{question}"
    """User text after the context; must contain {question}; {instruction} is the pause policy's, or nothing."""

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if "{question}" not in self.after:
            raise ValueError("prompt.after must contain {question}")
        return self

    def user_after(self, *, question: str, instruction: str | None) -> str:
        """What follows the context in the user's message."""
        values = {"{question}": question.strip(), "{instruction}": f"{instruction.strip()} " if instruction else ""}
        return re.sub(r"\{question\}|\{instruction\}", lambda match: values[match.group()], self.after)


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltPrompt:
    """A prompt ready for an engine, and what is in it. All counts are tokens of the model's own tokenizer."""

    ids: NDArray[np.int32]
    context_tokens: int
    """Asked length of the whole prompt."""
    prompt_tokens: int
    """Its real length; the asked one plus pauses and instruction under ``budget: content``, at most the asked one under ``total``."""
    content_tokens: int
    """Of the context, needle included, pauses not."""
    num_pauses: int
    """Marker groups in the context."""
    needle_token: int
    """Index in ``ids`` of the needle's first token."""
    prefix_tokens: int
    """Tokens before the context."""
    rule: str
    """What ends a paragraph in the documents that the context reads, ``+`` between several. The needle's place follows it in
    every arm, and so does a policy that names no rule of its own."""


def build_prompt(
    *,
    haystack: str,
    needle: str,
    question: str,
    context_tokens: int,
    depth_percent: float,
    prompt: PromptSpec,
    tokenizer: ModelTokenizer,
    policy: PausePolicy | None,
    marker: Marker,
    seed: int,
    rules: DocumentRules | None = None,
) -> BuiltPrompt:
    """Hide ``needle`` in the beginning of ``haystack`` and ask ``question`` after it.

    The needle goes, as a sentence of its own, to the last sentence start at or before ``depth_percent`` of the context's
    haystack tokens; where that is depends on the number of tokens before it and not on the length of the context. It is
    put into the text, so the pause policy treats it like any other content. Costs time in proportion to ``context_tokens``,
    however long the haystack is.

    Args:
        haystack: Text without the marker; may be much longer than needed.
        needle: One sentence.
        question: What is asked.
        context_tokens: Length of the whole prompt, without pauses and their instruction under ``budget: content``, with them
            under ``total``.
        depth_percent: 0 (beginning) to 100 (end).
        prompt: The chat around the context.
        tokenizer: Of the model.
        policy: Pauses, or None.
        marker: ``resolve_marker(tokenizer, policy)``.
        seed: Of a random placement.
        rules: Of the documents that ``haystack`` was joined from (``segments.join_documents``); None for one document.

    Raises:
        TextError: context too short for needle and question, haystack too short, depth outside 0 to 100, marker or
            control token in a text.
    """
    needle = needle.strip()
    if not needle:
        raise TextError("the needle is empty; give a sentence to hide")
    if not 0 <= depth_percent <= 100:
        raise TextError(f"depth_percent {depth_percent:g} is outside 0 to 100")
    budget = policy.budget if policy else "content"
    prefix, suffix, frame_tokens = _frame(prompt, question, tokenizer=tokenizer, policy=policy, marker=marker)
    needle_tokens = len(tokenizer.encode(f"{needle} ").ids)
    room, least = context_tokens - frame_tokens, frame_tokens + needle_tokens
    if context_tokens < least:
        raise TextError(f"context_tokens {context_tokens} is too short for needle and question; ask for at least {least}")
    # From whole documents and whatever the policy: the same place and the same pauses at every length and in every arm.
    rules = rules or ((0, detect_paragraph_rule(haystack)),)
    hay = _Haystack.take(haystack, room + _SPARE_TOKENS, tokenizer=tokenizer, rules=rules)
    encode = functools.partial(encode_document, tokenizer=tokenizer, policy=policy, marker=marker, seed=seed)
    around = room - needle_tokens
    if budget == "total":
        around = cut(encode(hay.text, rules=hay.rules), tokens=around, budget=budget).num_content
    hidden = _hide(needle, hay, target=int(around * depth_percent / 100), room=room, budget=budget, encode=encode)
    if hidden is None:
        raise TextError(f"context_tokens {context_tokens} is too short: its pauses leave no room for the needle; try budget: content")
    context, first, exhausted = hidden
    if exhausted and (context.num_content if budget == "content" else len(context.ids)) < room:
        raise TextError(
            f"the haystack has only {hay.num_tokens} tokens and context_tokens {context_tokens} needs {room - needle_tokens}; "
            "add documents, ask for shorter contexts or set repeat_haystack"
        )
    content = np.flatnonzero(~context.is_pause)
    ids = np.concatenate([np.array(prefix, dtype=np.int32), context.ids, np.array(suffix, dtype=np.int32)])
    return BuiltPrompt(
        ids=ids,
        context_tokens=context_tokens,
        prompt_tokens=len(ids),
        content_tokens=context.num_content,
        num_pauses=context.num_pauses,
        needle_token=len(prefix) + int(content[first]),
        prefix_tokens=len(prefix),
        rule=hay.rule_of(context.num_content - needle_tokens),
    )


def _frame(
    prompt: PromptSpec, question: str, *, tokenizer: ModelTokenizer, policy: PausePolicy | None, marker: Marker
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Tokens before and after the context, and how many of them the asked length includes.

    The instruction is the pauses' own: like them, it is inside that length only under ``budget: total``.
    """

    def around(instruction: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        after = prompt.user_after(question=question, instruction=instruction)
        return tokenizer.chat_frame(prompt.system, prompt.before, after, marker=marker.token)

    prefix, suffix = around(policy.instruction if policy else None)
    counted = around(None) if policy and policy.instruction and policy.budget == "content" else (prefix, suffix)
    return prefix, suffix, sum(map(len, counted))


def _hide(
    needle: str, hay: _Haystack, *, target: int, room: int, budget: Literal["content", "total"], encode: Callable[..., TokenDocument]
) -> tuple[TokenDocument, int, bool] | None:
    """The cut context, the needle's first content token in it, and whether all of the haystack is in it; None if no place fits."""
    while True:
        landing = hay.sentence_start_before(target)
        document = encode(f"{hay.text[:landing]}{needle} {hay.text[landing:]}", rules=hay.rules_around(landing, len(needle) + 1))
        context = cut(document, tokens=room, budget=budget)
        first, last = _tokens_of(document, landing, landing + len(needle))
        if last < context.num_content:
            return context, first, context.num_content == document.num_content
        if landing == 0:
            return None
        # Pauses beside the needle, or tokens that merge differently around it, took its place: go one sentence back.
        target = hay.tokens_before(landing) - 1


@dataclass(frozen=True, eq=False)
class _Haystack:
    """The beginning of a haystack, and where its tokens start."""

    text: str
    starts: NDArray[np.int64]
    rules: DocumentRules

    @classmethod
    def take(cls, haystack: str, tokens: int, *, tokenizer: ModelTokenizer, rules: DocumentRules) -> Self:
        """At least ``tokens`` tokens of it, or all if it has fewer."""
        chars = tokens * _CHARS_PER_TOKEN
        while True:
            text = haystack[:chars]
            starts = visible_starts(text, tokenizer.encode(text).starts)
            if len(starts) >= tokens or len(text) == len(haystack):
                return cls(text, starts, rules[: max(1, bisect.bisect_left(rules, len(text), key=lambda document: document[0]))])
            chars *= 2

    @property
    def num_tokens(self) -> int:
        return len(self.starts)

    def sentence_start_before(self, token: int) -> int:
        """The last offset at or before the start of ``token`` where a sentence begins."""
        char = int(self.starts[token]) if token < len(self.starts) else len(self.text)
        begins = sentence_starts(self.text[: char + 1], paragraph_rule=self.rules)
        return max((start for start in begins if start <= char), default=0)

    def rules_around(self, offset: int, chars: int) -> DocumentRules:
        """The rules when ``chars`` characters are put in at ``offset``; there they belong to the document that begins or goes on."""
        return tuple((begin + chars if begin > offset else begin, rule) for begin, rule in self.rules)

    def rule_of(self, tokens: int) -> str:
        """Names of the rules of the documents that the first ``tokens`` tokens reach."""
        reached = min(tokens, self.num_tokens)
        char = int(self.starts[reached - 1]) if reached > 0 else 0
        return "+".join(sorted({rule for begin, rule in self.rules if begin <= char}))

    def tokens_before(self, char: int) -> int:
        return int(np.searchsorted(self.starts, char))


def _tokens_of(document: TokenDocument, start: int, end: int) -> tuple[int, int]:
    """Indices among the content tokens of those that hold the characters ``start`` and ``end`` - 1."""
    starts = document.content_starts
    holding = int(np.searchsorted(starts, start, side="right")) - 1
    first = int(np.searchsorted(starts, starts[holding]))
    return first, int(np.searchsorted(starts, end - 1, side="right")) - 1
