"""Training rows from the text and tokens of documents. Pure: no file and no Ray.

What is drawn for a row (length, place, fact, depth) depends on its number and the seed alone, not on the pause policy: arms
that differ in pauses train on the same facts in the same contexts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pause_ray.core.errors import SourceError, TextError
from pause_ray.data.shards import NO_LOSS, PackedRow
from pause_ray.data.spec import CorpusSpec, Fact, draw_fact
from pause_ray.data.staging import Span
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import BuiltPrompt, HiddenText, PromptBuilder, PromptSpec
from pause_ray.text.segments import JOINT, DocumentRules, join_documents
from pause_ray.text.tokenizer import CHARS_PER_TOKEN, REACH_TOKENS, Marker, ModelTokenizer, TokenDocument


@dataclass(frozen=True, kw_only=True)
class RowDraw:
    """The random choices of one ``needle_sft`` row."""

    row_tokens: int
    """Length of the row: prompt, answer and end token; pauses and instruction come on top under ``budget: content``."""
    start: float
    """Beginning of the context as a share of the corpus' characters, in [0, 1)."""
    depth_percent: float
    fact: Fact
    seed: int
    """Seed of a random placement of pauses."""


@dataclass(frozen=True)
class Window:
    """A part of the corpus that is long enough for one context."""

    text: str
    rules: DocumentRules
    """Where in ``text`` each document, or the rest of one, begins, and the paragraph rule of the whole document."""
    token_starts: NDArray[np.int64]
    """Offset of each token of the tokenised beginning of ``text``."""


def draw_row(spec: CorpusSpec, *, seed: int, row: int, held_out: bool = False) -> RowDraw:
    """Return the draw of training row number ``row``, or of that validation row; ``spec.facts`` must be set."""
    if spec.facts is None:
        raise ValueError("a needle_sft row needs facts")
    kind = "validation" if held_out else "needle_sft"
    rng = random.Random(f"{kind} row {row} of seed {seed}")  # noqa: S311 (reproducible, not secret)
    return RowDraw(
        row_tokens=rng.randint(spec.min_context_tokens, spec.sequence_len),
        start=rng.random(),
        depth_percent=rng.uniform(0, 100),
        fact=draw_fact(spec.facts, rng=rng, held_out=held_out if spec.validation_rows else None),
        seed=rng.getrandbits(63),
    )


def take_window(spans: Iterable[Span], *, tokens: int, tokenizer: ModelTokenizer) -> Window:
    """Return as much of ``spans``, joined by blank lines, as holds ``tokens`` tokens and a few more.

    Raises:
        SourceError: all of ``spans`` together hold fewer.
    """
    coming, parts, chars = iter(spans), list[Span](), (tokens + REACH_TOKENS) * CHARS_PER_TOKEN
    held = 0
    while True:
        while held < chars and (span := next(coming, None)) is not None:
            parts.append(span)
            held += len(span.text) + len(JOINT)
        text, rules = join_documents((part.text, part.paragraph_rule) for part in parts)
        token_starts = tokenizer.encode(text[:chars]).starts
        is_all = chars >= len(text) and held < chars
        if len(token_starts) >= tokens + (0 if is_all else REACH_TOKENS):
            return Window(text, rules, token_starts)
        if is_all:
            raise SourceError(
                f"the corpus holds {len(token_starts)} tokens in all, but a row needs a context of up to {tokens}; "
                "add documents or lower sequence_len"
            )
        chars *= 2


def needle_sft_row(
    window: Window, *, draw: RowDraw, prompt: PromptSpec, tokenizer: ModelTokenizer, policy: PausePolicy | None, marker: Marker
) -> PackedRow:
    """Return a paused context with a hidden fact, the question, and the fact as answer; only the answer and its end token have a loss.

    Under ``budget: content`` the row holds the same content whatever the pauses, which come on top; under ``total`` it has at
    most ``draw.row_tokens`` tokens with them.

    Raises:
        TextError: the row is too short for the fact, its question and the answer.
    """
    answer = np.append(tokenizer.encode(draw.fact.needle).ids, tokenizer.answer_end_id).astype(np.int32)
    builder = PromptBuilder(
        window.text, rules=window.rules, prompt=prompt, tokenizer=tokenizer, policy=policy, marker=marker, seed=draw.seed
    )
    hidden = HiddenText(text=draw.fact.needle, depth_percent=draw.depth_percent)
    built = builder.build([hidden], question=draw.fact.question, context_tokens=draw.row_tokens - len(answer))
    labels = np.concatenate([np.full(len(built.ids), NO_LOSS, dtype=np.int32), answer])
    return PackedRow(
        input_ids=np.concatenate([built.ids, answer]).astype(np.int32),
        labels=labels,
        num_pauses=built.num_pauses,
        num_documents=_documents_read(window, built, needle_tokens=len(answer) - 1),
        content_tokens=built.content_tokens,
        longest_stretch_tokens=longest_stretch(pause_mask(built.ids, group_ids=marker.group_ids)),
    )


def pack_language_modeling(
    documents: Iterable[tuple[TokenDocument, bool]],
    *,
    sequence_len: int,
    end_id: int,
    group_tokens: int,
    budget: Literal["content", "total"],
    leading_ids: Sequence[int] = (),
) -> Iterator[PackedRow]:
    """Yield rows of ``sequence_len`` with documents end to end and ``end_id`` after each complete one; the last row is what remains.

    Under ``budget: content`` a row holds so many tokens that are no pause, the same ones whatever the pauses; under
    ``total`` pauses are among them. A marker group is never split. Pauses carry no loss, and neither does the first token of a
    document in a row; ``document_starts`` says where those are. ``leading_ids``, what the model expects before every text, come on top
    before each document, and each rest of one, since its tokens see nothing before it.

    Raises:
        TextError: one marker group is longer than a row that it must fit in.
    """
    if budget == "total" and group_tokens > sequence_len:
        raise TextError(
            f"one marker group is {group_tokens} tokens, but a row holds {sequence_len}; lower pauses.count or raise sequence_len"
        )
    row_of = partial(_language_row, end_id=end_id, group_tokens=group_tokens, leading_ids=leading_ids)
    ids, is_pause, source = np.empty(0, np.int32), np.empty(0, bool), np.empty(0, np.int64)
    for number, (document, is_ended) in enumerate(documents):
        end_ids = np.array([end_id] * is_ended, np.int32)
        ids = np.concatenate([ids, document.ids, end_ids])
        is_pause = np.concatenate([is_pause, document.is_pause, np.zeros(len(end_ids), bool)])
        source = np.concatenate([source, np.full(len(document.ids) + len(end_ids), number)])
        done = 0
        for end in _row_ends(is_pause, sequence_len, group_tokens, budget):
            yield row_of(ids[done:end], is_pause[done:end], source[done:end])
            done = end
        ids, is_pause, source = ids[done:], is_pause[done:], source[done:]
    if np.count_nonzero(~is_pause) > 1:  # a single token predicts nothing
        yield row_of(ids, is_pause, source)


def longest_stretch(is_pause: NDArray[np.bool_]) -> int:
    """Return the length of the longest run of tokens that are no pause."""
    edges = np.flatnonzero(np.concatenate([[True], is_pause, [True]]))
    return int(np.diff(edges).max()) - 1


def _row_ends(is_pause: NDArray[np.bool_], sequence_len: int, group_tokens: int, budget: Literal["content", "total"]) -> Iterator[int]:
    """Yield the ends of full rows that something follows; a row of content ends in its last content token."""
    if budget == "content":
        yield from (np.flatnonzero(~is_pause)[sequence_len - 1 : -1 : sequence_len] + 1).tolist()
        return
    done = 0
    while len(is_pause) - done > sequence_len:
        done = _end_of_row(is_pause, done, sequence_len, group_tokens)
        yield done


def _end_of_row(is_pause: NDArray[np.bool_], begin: int, length: int, group_tokens: int) -> int:
    """Return the end of the row that begins at ``begin``: after ``length`` tokens, or before the group that stands across that place."""
    end = begin + length
    if not (is_pause[end - 1] and is_pause[end]):
        return end
    before = np.flatnonzero(~is_pause[begin:end])
    run = begin + (int(before[-1]) + 1 if len(before) else 0)
    return run + (end - run) // group_tokens * group_tokens


def _language_row(
    ids: NDArray[np.int32],
    is_pause: NDArray[np.bool_],
    source: NDArray[np.int64],
    *,
    end_id: int,
    group_tokens: int,
    leading_ids: Sequence[int],
) -> PackedRow:
    """Return the row of these tokens, with ``leading_ids`` before each of its documents."""
    starts, size = np.flatnonzero(np.diff(source, prepend=-1)).astype(np.int32), len(leading_ids)
    labels = np.where(is_pause, NO_LOSS, ids).astype(np.int32)
    labels[starts] = NO_LOSS  # nothing stands before it that it could be predicted from
    places = np.repeat(starts, size)
    return PackedRow(
        input_ids=np.insert(ids, places, np.tile(leading_ids, len(starts)).astype(np.int32)),
        labels=np.insert(labels, places, NO_LOSS),
        num_pauses=int(is_pause.sum()) // max(group_tokens, 1),
        num_documents=len(starts),
        content_tokens=int((~is_pause & (ids != end_id)).sum()),
        longest_stretch_tokens=longest_stretch(is_pause),
        document_starts=starts + size * np.arange(len(starts), dtype=np.int32),
    )


def _documents_read(window: Window, built: BuiltPrompt, *, needle_tokens: int) -> int:
    """Return how many of the window's documents the context reaches."""
    tokens = max(1, built.content_tokens - needle_tokens)
    last = int(window.token_starts[min(tokens, len(window.token_starts)) - 1])
    return sum(begin <= last for begin, _ in window.rules)


def pause_mask(ids: NDArray[np.int32], *, group_ids: Sequence[int]) -> NDArray[np.bool_]:
    """Return which of ``ids`` belong to a pause."""
    mask = np.zeros(len(ids), dtype=bool)
    size = len(group_ids)
    if 0 < size <= len(ids):
        windows = np.lib.stride_tricks.sliding_window_view(ids, size)
        begins = np.flatnonzero((windows == np.array(group_ids)).all(axis=1))
        mask[np.add.outer(begins, np.arange(size))] = True
    return mask
