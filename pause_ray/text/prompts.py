"""Prompts in token ids: a question about a long context with haystack, hidden texts, pauses, chat frame and exact length.

The same code builds evaluation prompts and ``needle_sft`` training rows. Knows no grid, no score and no model weights.
"""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from pause_ray.core.errors import TextError
from pause_ray.core.spec import Spec, digest
from pause_ray.core.storage import space_errors, whole_file
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.segments import DocumentRules, detect_paragraph_rule, split
from pause_ray.text.tokenizer import (
    REACH_TOKENS,
    Encoding,
    Insertion,
    LazyEncoding,
    Marker,
    ModelTokenizer,
    TokenDocument,
    cut,
    insert_pauses,
    insert_texts,
)

_KEPT_DOCUMENTS = 8
"""Number of encoded contexts in memory (13 bytes a token): consecutive prompts often have the same texts at the same places."""
_KEPT_FRAMES = 64
"""Number of chat frames in memory, one for each question."""


class PromptSpec(Spec):
    """The chat around a context: a system message and one user message that ends with the question."""

    system: str | None = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct."
    """System message, or null for none."""
    before: str = ""
    """User text before the context."""
    after: str = "\n\n{instruction}{question}"
    """User text after the context. It must contain {question}; {instruction} is the pause policy's, or nothing."""

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if "{question}" not in self.after:
            raise ValueError("prompt.after must contain {question}")
        return self

    def user_after(self, *, question: str, instruction: str | None) -> str:
        """Return the text that follows the context in the user's message."""
        values = {"{question}": question.strip(), "{instruction}": f"{instruction.strip()} " if instruction else ""}
        return re.sub(r"\{question\}|\{instruction\}", lambda match: values[match.group()], self.after)


@dataclass(frozen=True, kw_only=True)
class HiddenText:
    """A text to hide in a context, and its place."""

    text: str
    """A sentence or, in a haystack of lines, a line."""
    depth_percent: float
    """Depth in the context's haystack tokens: 0 is the beginning, 100 the end."""
    position_tokens: int | None = None
    """Number of haystack tokens before the text, instead of the depth; beyond the context's end it stands at the end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltPrompt:
    """A prompt ready for an engine, and its measures. All counts are tokens of the model's own tokenizer."""

    ids: NDArray[np.int32]
    context_tokens: int
    """Requested length of the whole prompt."""
    content_tokens: int
    """Tokens of the context with hidden texts and without pauses."""
    num_pauses: int = 0
    needle_tokens: tuple[int, ...] = ()
    """Index in ``ids`` of each hidden text's first token, in the order in which the texts were given."""
    prefix_tokens: int = 0
    """Tokens before the context."""
    suffix_tokens: int = 0
    """Tokens after the context, with the given beginning of the answer."""
    rule: str = ""
    """Paragraph rules of the documents that the context reads, joined by ``+``. The places of hidden texts follow them in every arm, and
    so does a policy that names no rule of its own."""
    system: str | None = None
    user_before: str = ""
    """The user's text before the context."""
    user_after: str = ""
    answer_prefix: str = ""
    """The beginning of the assistant's turn, which the prompt gives to the model."""

    @classmethod
    def plain(cls, ids: NDArray[np.int32], *, system: str | None = None, user: str = "") -> Self:
        """Return a prompt without hidden texts: its tokens, and for a chat server the messages instead."""
        return cls(ids=ids, context_tokens=len(ids), content_tokens=len(ids), system=system, user_before=user)

    @property
    def prompt_tokens(self) -> int:
        """Length: the requested one plus pauses and instruction under ``budget: content``, at most the requested one under ``total``."""
        return len(self.ids)

    @property
    def needle_token(self) -> int:
        """Index in ``ids`` of the first hidden text's first token."""
        return self.needle_tokens[0]


@dataclass(frozen=True)
class _Frame:
    """A prompt without its context."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    num_tokens: int
    """Tokens of prefix and suffix that the requested length includes."""
    user_after: str = ""


class PromptBuilder:
    """Builds prompts over one haystack under one pause policy; what they share is computed once.

    Each hidden text goes, as a sentence of its own, to the last sentence start at or before its place. Where that is depends on the
    number of haystack tokens before it and not on the length of the context. The pause policy treats it like any other content.
    """

    def __init__(
        self,
        haystack: str,
        *,
        rules: DocumentRules | None,
        joiner: str = " ",
        prompt: PromptSpec,
        tokenizer: ModelTokenizer,
        policy: PausePolicy | None,
        marker: Marker,
        seed: int,
        encode: Callable[[str], Encoding] | None = None,
    ) -> None:
        """Create a builder; nothing is tokenised yet.

        Args:
            haystack: Text without the marker; may be much longer than needed.
            rules: Paragraph rules of the documents that ``haystack`` was joined from (``segments.join_documents``); None for one document.
            joiner: Separator of a hidden text and its successor. With a line end, the haystack is made of lines, and hidden texts
                become lines of it; otherwise they become sentences.
            prompt: The chat around a context.
            tokenizer: The model's tokenizer.
            policy: Pauses, or None.
            marker: ``resolve_marker(tokenizer, policy)``.
            seed: Seed of a random placement.
            encode: Replaces ``tokenizer.encode`` for beginnings of the haystack.
        """
        # From whole documents and whatever the policy: the same place and the same pauses at every length and in every arm.
        self._rules: DocumentRules = rules or ((0, detect_paragraph_rule(haystack)),)
        self._joiner = joiner
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._policy = policy
        self._marker = marker
        self._seed = seed
        self._budget: Literal["content", "total"] = policy.budget if policy else "content"
        self._beginning = LazyEncoding(haystack, encode=encode or tokenizer.encode)
        self._starts: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))
        self._documents: dict[tuple[Insertion, ...], tuple[TokenDocument, int]] = {}
        """Encoded contexts by their insertions, each with the number of haystack tokens that were requested."""
        self._frame = functools.lru_cache(maxsize=_KEPT_FRAMES)(self._framed)
        self._num_tokens = functools.lru_cache(maxsize=_KEPT_FRAMES)(lambda text: len(tokenizer.encode(text).ids))

    def build(self, facts: Sequence[HiddenText], *, question: str, context_tokens: int, answer_prefix: str = "") -> BuiltPrompt:
        """Hide ``facts`` in the beginning of the haystack and ask ``question`` after it.

        Args:
            facts: Those that come to stand at the same place keep their order.
            question: What is asked.
            context_tokens: Length of the whole prompt, without pauses and their instruction under ``budget: content``, with
                them under ``total``.
            answer_prefix: The beginning of the assistant's turn; it is part of the prompt.

        Raises:
            TextError: context too short for facts and question, haystack too short, depth outside 0 to 100, marker or
                control token in a text.
        """
        texts = [f"{_checked(fact)}{self._joiner}" for fact in facts]
        frame = self._frame(question, answer_prefix)
        fact_tokens = sum(map(self._num_tokens, texts))
        room, least = context_tokens - frame.num_tokens, frame.num_tokens + fact_tokens
        if context_tokens < least:
            raise TextError(f"context_tokens {context_tokens} is too short for needle and question; ask for at least {least}")
        self._beginning.first(room + REACH_TOKENS)
        around = needed = room - fact_tokens
        if self._budget == "total":
            around = cut(self._encoded((), tokens=room), tokens=needed, budget="total").num_content
        places = [self._landing(_target(fact, around)) for fact in facts]
        hidden = self._hide(texts, places, room=room)
        if hidden is None:
            raise TextError(f"context_tokens {context_tokens} is too short: its pauses leave no room for the needle; try budget: content")
        context, first_tokens, is_exhausted = hidden
        if is_exhausted and (context.num_content if self._budget == "content" else len(context.ids)) < room:
            raise TextError(
                f"the haystack has only {len(self._beginning.read.ids)} tokens and context_tokens {context_tokens} needs {needed}; "
                "add documents, ask for shorter contexts or set repeat_haystack"
            )
        content = np.flatnonzero(~context.is_pause)
        return BuiltPrompt(
            ids=np.concatenate([np.array(frame.prefix, np.int32), context.ids, np.array(frame.suffix, np.int32)]),
            context_tokens=context_tokens,
            content_tokens=context.num_content,
            num_pauses=context.num_pauses,
            needle_tokens=tuple(len(frame.prefix) + int(content[first]) for first in first_tokens),
            prefix_tokens=len(frame.prefix),
            suffix_tokens=len(frame.suffix),
            rule=self._rule_of(context.num_content - fact_tokens),
            system=self._prompt.system,
            user_before=self._prompt.before,
            user_after=frame.user_after,
            answer_prefix=answer_prefix,
        )

    def _framed(self, question: str, answer_prefix: str) -> _Frame:
        """Return the tokens before and after the context.

        The instruction is the pauses' own: like them, it is inside the asked length only under ``budget: total``.
        """

        def around(instruction: str | None) -> tuple[tuple[int, ...], tuple[int, ...], str]:
            after = self._prompt.user_after(question=question, instruction=instruction)
            frame = self._tokenizer.chat_frame(self._prompt.system, self._prompt.before, after, marker=self._marker.token)
            return *frame, after

        instruction = self._policy.instruction if self._policy else None
        prefix, suffix, user_after = around(instruction)
        counted = around(None) if instruction and self._budget == "content" else (prefix, suffix)
        begun = tuple(self._tokenizer.encode(answer_prefix).ids.tolist())
        return _Frame(prefix, suffix + begun, len(counted[0]) + len(counted[1]) + len(begun), user_after)

    def _hide(self, texts: Sequence[str], places: list[int], *, room: int) -> tuple[TokenDocument, list[int], bool] | None:
        """The cut context, each text's first content token in it, and whether all of the haystack is in it; None if they do not fit."""
        while True:
            order = sorted(range(len(texts)), key=lambda index: places[index])
            document = self._encoded(tuple(Insertion(places[index], texts[index]) for index in order), tokens=room)
            context = cut(document, tokens=room, budget=self._budget)
            first, last, shift = [0] * len(texts), -1, 0
            for index in order:
                begin = places[index] + shift
                first[index], last = _tokens_of(document, begin, begin + len(texts[index]) - len(self._joiner))
                shift += len(texts[index])
            if last < context.num_content:  # the last one stands behind all others
                return context, first, context.num_content == document.num_content
            furthest = max(places)
            if furthest == 0:
                return None
            # Pauses beside a text, or tokens that merge differently around it, took its place: go one sentence back.
            earlier = self._landing(int(np.searchsorted(self._beginning.read.starts, furthest)) - 1)
            places = [earlier if place == furthest else place for place in places]

    def _encoded(self, insertions: tuple[Insertion, ...], *, tokens: int) -> TokenDocument:
        """Return the haystack with ``insertions`` and pauses: its first ``tokens`` content tokens, or more."""
        document, base_tokens = self._documents.pop(insertions, (None, 0))
        if document is None or base_tokens < tokens:
            base_tokens = max(tokens, 2 * base_tokens)
            whole = insert_texts(self._beginning.first(base_tokens + REACH_TOKENS), insertions, tokenizer=self._tokenizer)
            rules = _shifted(self._rules, insertions)
            document = insert_pauses(whole, policy=self._policy, marker=self._marker, seed=self._seed, rules=rules)
        self._documents[insertions] = document, base_tokens
        if len(self._documents) > _KEPT_DOCUMENTS:
            del self._documents[next(iter(self._documents))]
        return document

    def _landing(self, token: int) -> int:
        """Return the last offset at or before the start of haystack token ``token`` where a sentence, or a line, begins."""
        read = self._beginning.read
        if self._starts[0] != len(read.text):
            unit: Literal["paragraph", "sentence"] = "paragraph" if self._joiner == "\n" else "sentence"
            spans = split(read.text, unit=unit, paragraph_rule=self._rules)
            self._starts = (len(read.text), np.array([begin for begin, _ in spans], np.int64))
        char = int(read.starts[token]) if token < len(read.starts) else len(read.text)
        place = int(np.searchsorted(self._starts[1], char, side="right")) - 1
        return int(self._starts[1][place]) if place >= 0 else 0

    def _rule_of(self, tokens: int) -> str:
        """Return the names of the rules of the documents that the first ``tokens`` haystack tokens reach."""
        starts = self._beginning.read.starts
        reached = min(tokens, len(starts))
        char = int(starts[reached - 1]) if reached > 0 else 0
        return "+".join(sorted({rule for begin, rule in self._rules if begin <= char}))


def _checked(fact: HiddenText) -> str:
    text = fact.text.strip()
    if not text:
        raise TextError("the needle is empty; give a sentence to hide")
    if not 0 <= fact.depth_percent <= 100:
        raise TextError(f"depth_percent {fact.depth_percent:g} is outside 0 to 100")
    return text


def _target(fact: HiddenText, around: int) -> int:
    """Return the number of haystack tokens before a fact, in a context that has ``around`` of them."""
    return int(around * fact.depth_percent / 100) if fact.position_tokens is None else min(fact.position_tokens, around)


def _shifted(rules: DocumentRules, insertions: Sequence[Insertion]) -> DocumentRules:
    """Return the rules after texts were inserted; a text at a document's beginning belongs to it."""
    return tuple((begin + sum(len(each.text) for each in insertions if each.offset < begin), rule) for begin, rule in rules)


def _tokens_of(document: TokenDocument, start: int, end: int) -> tuple[int, int]:
    """Return the indices, among the content tokens, of those that hold the characters ``start`` and ``end`` - 1."""
    starts = document.content_starts
    holding = int(np.searchsorted(starts, start, side="right")) - 1
    first = int(np.searchsorted(starts, starts[holding]))
    return first, int(np.searchsorted(starts, end - 1, side="right")) - 1


FORMAT = 1
"""Version in the digest of a cached encoding; raised when the same text begins to be tokenised differently."""
LONG_CHARS = 100_000
"""Length from which an encoding is cached: a shorter text takes less than a tenth of a second, little more than reading a file."""


def encode_cached(text: str, *, tokenizer: ModelTokenizer, folder: Path) -> Encoding:
    """Return ``tokenizer.encode(text)``; a long text is read from ``folder`` if it was tokenised before.

    Raises:
        TextError: a control token is in the text.
        StorageError: disk full or not writable.
    """
    if len(text) < LONG_CHARS:
        return tokenizer.encode(text)
    path = folder / f"{digest([FORMAT, tokenizer.digest, text])}.npz"
    kept = _load(path)
    if kept is not None:
        return Encoding(text, *kept)
    read = tokenizer.encode(text)
    with space_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as scratch, scratch.open("wb") as file:
        np.savez(file, ids=read.ids, starts=read.starts)
    return read


def _load(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return ids and starts, or None if there is no such file or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["ids"], arrays["starts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
