"""The beginning of a long text in tokens, and the same with other texts put into it. Knows no pauses and no prompts.

A text that is put in changes tokens only near it. So only a window around it is tokenised, and the tokens further away are
those of the text without it; where the window does not come back to them, the whole is tokenised.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pause_ray.text.tokens import ModelTokenizer, visible_starts

REACH_TOKENS = 64
"""Further away than this a text does not change how another is tokenised: words, numbers and runs of marks are shorter."""
_AGREEING_TOKENS = 32
"""So many tokens in a row must be the same before a window counts as back in step."""
_BLANK = re.compile(r"\s")
"""Must stand before them: tokenizers that cut a run of digits or letters from its beginning start afresh after a blank."""
_CHARS_PER_TOKEN = 5
"""First guess of how many characters to take; English prose has 4 to 4.5 per token."""


@dataclass(frozen=True, eq=False)
class TokenText:
    """A text and its tokens."""

    text: str
    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    """Character at which each token's visible part starts; ascending, not always unique."""

    @classmethod
    def of(cls, text: str, *, tokenizer: ModelTokenizer) -> TokenText:
        """Tokenise ``text`` as a whole."""
        encoding = tokenizer.encode(text)
        return cls(text, encoding.ids, visible_starts(text, encoding.starts))


@dataclass(frozen=True)
class Insertion:
    """A text to put in."""

    offset: int
    """Before the character at this offset of the text without insertions."""
    text: str


class Beginning:
    """How a text begins, in tokens; reads on as far as it is asked to, and no more than twice as far."""

    def __init__(self, whole: str, *, tokenizer: ModelTokenizer, read: Callable[[str], TokenText] | None = None) -> None:
        """``read`` does what ``TokenText.of`` does, which is the default."""
        self._whole = whole
        self._read = read or functools.partial(TokenText.of, tokenizer=tokenizer)
        self.read = TokenText.of("", tokenizer=tokenizer)
        """What was read up to now, with up to ``REACH_TOKENS`` tokens at its end that may be others in the whole."""

    @property
    def is_all(self) -> bool:
        """Whether nothing is left to read."""
        return len(self.read.text) == len(self._whole)

    def first(self, tokens: int) -> TokenText:
        """The first ``tokens`` tokens of the whole text, or all if it has fewer."""
        chars = max((tokens + REACH_TOKENS) * _CHARS_PER_TOKEN, 2 * len(self.read.text))
        while not self.is_all and len(self.read.ids) < tokens + REACH_TOKENS:
            self.read = self._read(self._whole[:chars])
            chars *= 2
        if tokens >= len(self.read.ids):
            return self.read
        return TokenText(self.read.text[: int(self.read.starts[tokens])], self.read.ids[:tokens], self.read.starts[:tokens])


def put_in(base: TokenText, insertions: Sequence[Insertion], *, tokenizer: ModelTokenizer) -> TokenText:
    """``base`` with texts put in, tokenised as if it had been written that way.

    Args:
        base: A text and its tokens.
        insertions: By ascending offset; at one offset, in the order in which they are to stand.
        tokenizer: Of ``base``.

    Raises:
        TextError: a control token comes about.
    """
    edges = [0, *(insertion.offset for insertion in insertions), len(base.text)]
    parts = [base.text[begin:end] for begin, end in itertools.pairwise(edges)]
    text = parts[0] + "".join(insertion.text + part for insertion, part in zip(insertions, parts[1:], strict=True))
    ids, starts, done, shift = list[NDArray[np.int32]](), list[NDArray[np.int64]](), 0, 0
    for group in _neighbours(base, insertions):
        window = _Window.around(group, base)
        chars = sum(len(insertion.text) for insertion in group)
        begin, end = window.begin_char + shift, window.end_char + shift + chars
        middle = _in_step(window, base, TokenText.of(text[begin:end], tokenizer=tokenizer), chars=chars)
        if middle is None:
            return TokenText.of(text, tokenizer=tokenizer)
        ids += [base.ids[done : window.splice_from], middle.ids]
        starts += [base.starts[done : window.splice_from] + shift, middle.starts + begin]
        done, shift = window.splice_to, shift + chars
    ids.append(base.ids[done:])
    starts.append(base.starts[done:] + shift)
    return TokenText(text, np.concatenate(ids), np.concatenate(starts))


def _neighbours(base: TokenText, insertions: Sequence[Insertion]) -> Iterator[list[Insertion]]:
    """Insertions in groups so far apart that the windows of two do not meet."""
    group, last = list[Insertion](), 0
    for insertion in insertions:
        token = _token_at(base, insertion.offset)
        if group and token - last > 4 * REACH_TOKENS:
            yield group
            group = []
        group.append(insertion)
        last = token
    if group:
        yield group


@dataclass(frozen=True)
class _Window:
    """Tokens of the base around some insertions: read from ``begin_char`` to ``end_char``, replaced between the two splices."""

    begin_char: int
    last_offset: int
    """Of the insertions."""
    splice_from: int
    splice_to: int
    end_char: int

    @classmethod
    def around(cls, group: Sequence[Insertion], base: TokenText) -> _Window:
        """Two reaches on either side are read and one is replaced; at an end of the text, all up to there."""
        size = len(base.ids)
        left, right = _token_at(base, group[0].offset), _token_at(base, group[-1].offset)
        is_inner, goes_on = left >= 2 * REACH_TOKENS, right + 2 * REACH_TOKENS < size
        return cls(
            begin_char=int(base.starts[left - 2 * REACH_TOKENS]) if is_inner else 0,
            last_offset=group[-1].offset,
            splice_from=_token_at(base, int(base.starts[left - REACH_TOKENS])) if is_inner else 0,
            splice_to=_token_at(base, int(base.starts[right + REACH_TOKENS])) if goes_on else size,
            end_char=int(base.starts[right + 2 * REACH_TOKENS]) if goes_on else len(base.text),
        )


def _in_step(window: _Window, base: TokenText, read: TokenText, *, chars: int) -> TokenText | None:
    """What replaces the base's tokens between the splices, or None if the window's tokens do not agree with them there."""
    first, last = 0, len(read.ids)
    if window.splice_from > 0:
        char, offset = int(base.starts[window.splice_from]), window.begin_char
        first = _token_at(read, char - offset)
        if not _BLANK.search(base.text, window.begin_char, char) or not _agree(base, window.splice_from, read, first, offset=offset):
            return None
    if window.splice_to < len(base.ids):
        char, offset = int(base.starts[window.splice_to]), window.begin_char - chars
        last = _token_at(read, char - offset)
        if not _BLANK.search(base.text, window.last_offset, char) or not _agree(base, window.splice_to, read, last, offset=offset):
            return None
    return TokenText("", read.ids[first:last], read.starts[first:last])


def _agree(base: TokenText, token: int, read: TokenText, place: int, *, offset: int) -> bool:
    """Whether the tokens from ``token`` in the base are those from ``place`` in a window that begins at ``offset``."""
    size = _AGREEING_TOKENS
    same_ids = np.array_equal(base.ids[token : token + size], read.ids[place : place + size])
    return same_ids and np.array_equal(base.starts[token : token + size] - offset, read.starts[place : place + size])


def _token_at(text: TokenText, char: int) -> int:
    """The first token whose visible part starts at or after ``char``."""
    return int(np.searchsorted(text.starts, char))
