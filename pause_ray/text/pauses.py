"""Pause policies, and the places of pauses in a text. Pure text; tokens are only seen as start offsets.

Every rule is causal: whether a pause stands at an offset depends only on what is before it, on the one character after it and on
the seed, so two texts with a common beginning have the same pauses in it. (Two things can break this: a regular expression that
looks ahead, and ``paragraph_rule: auto`` on one document cut within ``segments.EVIDENCE_CHARS``.)
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from pause_ray.core.errors import TextError
from pause_ray.core.spec import Spec
from pause_ray.text.segments import DocumentRules, split


class PausePolicy(Spec):
    """The places of pauses and their content (pause-tuning: arXiv 2502.20405)."""

    placement: Literal["every", "random", "pattern"] = "every"
    """``every``: after every k-th unit; ``random``: at random words, the control; ``pattern``: after a regular expression."""
    unit: Literal["paragraph", "sentence", "tokens"] = "paragraph"
    """The unit that ``every`` counts."""
    paragraph_rule: Literal["auto", "blank_line", "newline", "glued"] = "auto"
    """The end of a paragraph (and so of a sentence); ``auto`` decides per document from the evidence in it."""
    unit_tokens: int = Field(default=200, ge=1)
    """Content tokens in a unit when ``unit`` is ``tokens``."""
    every: int = Field(default=1, ge=1)
    """The pause frequency: one pause after every k-th unit."""
    rate: float | None = Field(default=None, gt=0, le=500)
    """Mean number of pauses per 1,000 content tokens when ``placement`` is ``random``."""
    pattern: str | None = None
    """Regular expression, for ``placement: pattern``; a group goes after each match. ``\\]`` is what the paper's script did."""
    count: int = Field(default=1, ge=1, le=64)
    """Markers in one pause."""
    marker: str = Field(default="<PAUSE>", min_length=1)
    """The marker's text, inserted exactly as written."""
    token: Literal["text", "added", "reserved"] = "text"
    """``text``: ordinary text; ``added``: a new vocabulary entry; ``reserved``: an entry the vocabulary already has."""
    budget: Literal["content", "total"] = "content"
    """``content``: pauses and instruction come on top of the asked length, of contexts and of training rows, so that the content
    is the same in every arm; ``total``: they are inside it."""
    instruction: str | None = None
    """A sentence before the question that tells the model what a pause is for (an arm of the paper)."""

    @model_validator(mode="after")
    def _fields_fit_placement(self) -> Self:
        is_every, is_tokens = self.placement == "every", self.unit == "tokens"
        for name, needed, is_met in (
            ("unit", "placement: every", is_every),
            ("every", "placement: every", is_every),
            ("paragraph_rule", "unit: paragraph or sentence", is_every and not is_tokens),
            ("unit_tokens", "unit: tokens", is_every and is_tokens),
            ("rate", "placement: random", self.placement == "random"),
            ("pattern", "placement: pattern", self.placement == "pattern"),
        ):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and not is_met:
                raise ValueError(f"{name} = {value!r} has an effect only with {needed}; remove it")
        return self

    @model_validator(mode="after")
    def _placement_is_complete(self) -> Self:
        if self.placement == "random" and self.rate is None:
            raise ValueError("placement: random needs rate, the mean number of pauses per 1,000 content tokens, for example rate: 5")
        if self.placement == "pattern":
            if self.pattern is None:
                raise ValueError(r"placement: pattern needs pattern, a regular expression such as '\]'")
            try:
                matches_nothing = re.compile(self.pattern).fullmatch("") is not None
            except re.error as error:
                raise ValueError(f"pattern = {self.pattern!r} is no regular expression: {error}") from error
            if matches_nothing:
                raise ValueError(
                    f"pattern = {self.pattern!r} matches the empty text, so it would pause everywhere; make it match something"
                )
        return self

    @model_validator(mode="after")
    def _marker_is_visible(self) -> Self:
        if not self.marker.strip():
            raise ValueError(f"marker = {self.marker!r} is only white space and could not be told from the text; use visible characters")
        if self.token != "text" and self.marker != self.marker.strip():
            raise ValueError(
                f"marker = {self.marker!r}: a vocabulary entry ({self.token}) takes no white space around it; remove the spaces"
            )
        if self.instruction is not None and not self.instruction.strip():
            raise ValueError("instruction is empty; write a sentence or leave it out")
        return self

    @property
    def group(self) -> str:
        """The text of one pause: ``count`` markers."""
        return self.marker * self.count


def pause_offsets(
    text: str, policy: PausePolicy, *, token_starts: Sequence[int] | None = None, seed: int = 0, rules: DocumentRules | None = None
) -> tuple[int, ...]:
    """Return the offsets of the characters in ``text`` before which pauses stand, ascending and unique.

    Args:
        text: Text without the marker.
        policy: Where markers go and what they are.
        token_starts: Ascending character offset at which each content token starts; needed for ``unit: tokens`` and ``placement: random``.
        seed: Seed of the random placement.
        rules: Paragraph rules of the documents that ``text`` was joined from, for ``paragraph_rule: auto``; None detects them in ``text``.

    Raises:
        TextError: the marker already occurs in ``text``, stripping would not give ``text`` back, or tokens are missing.
    """
    found = text.find(policy.marker.strip())
    if found >= 0:
        raise TextError(
            f"the text already contains the marker {policy.marker.strip()!r} at character {found}; choose another pauses.marker"
        )
    if policy.rate is not None:
        if token_starts is None:
            raise TextError("placement random: the text must be tokenised first; pass token_starts")
        offsets = list(_random_offsets(text, token_starts, policy.rate, seed))
    elif policy.pattern is not None:
        offsets = sorted({match.end() for match in re.finditer(policy.pattern, text)})
    else:
        rule = policy.paragraph_rule if policy.paragraph_rule != "auto" or rules is None else rules
        spans = split(text, unit=policy.unit, paragraph_rule=rule, unit_tokens=policy.unit_tokens, token_starts=token_starts)
        ends = [end for start, end in spans if not text[start:end].isspace()]
        offsets = ends[policy.every - 1 :: policy.every]
    if strip(insert(text, offsets, policy), policy) != text:
        raise TextError(
            f"the marker {policy.marker!r} runs into the text beside it and could not be taken out again; choose another pauses.marker"
        )
    return tuple(offsets)


def insert(text: str, offsets: Sequence[int], policy: PausePolicy) -> str:
    """Return the text with pauses before the characters at ``offsets``."""
    return policy.group.join(text[start:end] for start, end in itertools.pairwise((0, *offsets, len(text))))


def strip(paused: str, policy: PausePolicy) -> str:
    """Return the text without its pauses: the inverse of ``insert``."""
    return paused.replace(policy.group, "")


# A word's first character, or any character of a script that is written without spaces.
_WORD_START = re.compile(r"(?<![^\W_])[^\W_]|[\u0e00-\u0eff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def _random_offsets(text: str, token_starts: Sequence[int], rate: float, seed: int) -> Iterator[int]:
    """Yield word starts at or after tokens that are drawn with geometric gaps of mean 1000 / ``rate``.

    Two draws in one word make two pauses: the second goes to the next word, so that the rate holds.
    """
    draw = random.Random(seed)  # noqa: S311 (its sequence is the same in every Python version; NumPy promises that for no Generator)
    scale = 1 / math.log1p(-rate / 1000)
    token, last = 0, 0
    while True:
        token += 1 + int(math.log(1 - draw.random()) * scale)
        if token >= len(token_starts):
            return
        word = _WORD_START.search(text, max(int(token_starts[token]), last + 1))
        if word is None:
            return
        last = word.start()
        yield last
