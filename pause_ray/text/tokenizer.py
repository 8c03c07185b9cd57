"""Token ids of texts, chats and pauses, from a model's tokenizer and chat template.

A text is tokenised once, as a whole and without pauses; pauses are then inserted between its tokens. So the content
tokens are the same under every pause policy, and an arm differs from another in its pauses only.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from pause_ray.core.errors import ModelError, TextError
from pause_ray.core.spec import digest
from pause_ray.text.chat import ChatTemplate
from pause_ray.text.pauses import PausePolicy, pause_offsets
from pause_ray.text.segments import DocumentRules

_WHITE_SPACE = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)


@dataclass(frozen=True, kw_only=True)
class MarkerToken:
    """A marker that is one vocabulary entry: ``added`` (needs a new embedding row) or ``reserved`` (row exists)."""

    text: str
    token_id: int
    added: bool
    initial_ids: tuple[int, ...]
    """The marker's text in ordinary tokens; the mean of their rows is an added row's value before training."""


@dataclass(frozen=True)
class Marker:
    """One pause in token ids."""

    group_ids: tuple[int, ...]
    """Token ids of one pause; empty when there are no pauses."""
    token: MarkerToken | None
    """None when the marker is ordinary text or there is none."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """A text and its tokens, without special tokens."""

    text: str
    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    """Character at which each token's visible part starts (a token of white space alone: its first); ascending, not always unique."""

    def token_at(self, char: int) -> int:
        """Return the first token whose visible part starts at or after ``char``."""
        return int(np.searchsorted(self.starts, char))


class ModelTokenizer:
    """A model's fast tokenizer and chat template, from its folder."""

    def __init__(self, source: str, template: ChatTemplate | None, end_ids: tuple[int, ...]) -> None:
        from tokenizers import Tokenizer

        self._source = source
        self._template = template
        self._ends = end_ids
        # Two of them: one object cannot treat "<|im_end|>" as text in a document and as a token in a template.
        self._plain, self._control = Tokenizer.from_str(source), Tokenizer.from_str(source)
        self._plain.encode_special_tokens = True
        for tokenizer in (self._plain, self._control):
            tokenizer.no_truncation()
            tokenizer.no_padding()

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        # A Tokenizer's own pickle forgets encode_special_tokens.
        return type(self), (self._source, self._template, self._ends)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``tokenizer.json``, the chat template and the end tokens of a model folder.

        Raises:
            ModelError: no tokenizer, or a file that is no JSON.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                f"{folder}: has no tokenizer.json; make one with transformers: "
                f"AutoTokenizer.from_pretrained(MODEL).save_pretrained({str(folder)!r})"
            )
        content = _read_settings(file)
        if "model" not in content:
            raise ModelError(f"{file}: holds no tokenizer model; fetch the model again")
        settings = _read_settings(folder / "tokenizer_config.json")
        ends = _end_ids(folder, settings, entries=content.get("added_tokens", []))
        return cls(file.read_text(encoding="utf-8"), ChatTemplate.find(folder, settings), ends)

    @functools.cached_property
    def digest(self) -> str:
        """Identity of everything that turns text into ids: tokenizer, chat template, end tokens."""
        template = self._template
        return digest([self._source, template.source if template else None, dict(template.names) if template else None, list(self._ends)])

    @functools.cached_property
    def vocab_size(self) -> int:
        """The id that a new entry would get."""
        return max(self._control.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """Control tokens by their text, longest first."""
        special = {token.content: token_id for token_id, token in self._control.get_added_tokens_decoder().items() if token.special}
        return dict(sorted(special.items(), key=lambda item: -len(item[0])))

    @functools.cached_property
    def _forbidden(self) -> NDArray[np.int64]:
        """Ids that a document must not produce: control tokens, except the one for unknown characters."""
        return np.array(sorted({*self._special.values(), *self._ends} - {self._unknown_id}), dtype=np.int64)

    def encode(self, text: str) -> Encoding:
        """Tokenise ``text`` as ordinary text: ``<|im_end|>`` in it is ten characters, not the end of a turn.

        Raises:
            TextError: the tokenizer makes a control token out of the text although it was told not to, or the text
                holds half a surrogate pair.
        """
        try:
            encoding = self._plain.encode(text, add_special_tokens=False)
        except TypeError as error:
            half = re.search("[\ud800-\udfff]", text)
            raise TextError(f"the text holds half a surrogate pair at character {half and half.start()}; repair its encoding") from error
        ids = np.array(encoding.ids, dtype=np.int32)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        control = np.flatnonzero(np.isin(ids, self._forbidden))
        if control.size:
            token = self._control.id_to_token(int(ids[control[0]]))
            raise TextError(f"the text contains the control token {token} at character {starts[control[0]]}; remove it from the text")
        return Encoding(text, ids, _visible_starts(text, np.maximum.accumulate(starts)) if starts.size else starts)

    def decode(self, ids: Sequence[int] | NDArray[np.int32], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; an id outside the vocabulary, such as an added marker's, is left out."""
        text: str = self._control.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """Return the id of ``text`` if the vocabulary has it as one entry, special or not."""
        ids: list[int] = self._control.encode(text, add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 and ids[0] != self._unknown_id else None

    @functools.cached_property
    def chat_ids(self) -> frozenset[int]:
        """Ids that have a meaning: control tokens of the chat template, beginning and end tokens."""
        frame = {token_id for side in self.chat_frame(None, "a", "a") for token_id in side}
        return frozenset(frame & {*self._special.values()}) | {*self.end_ids, *self.leading_ids}

    @functools.cached_property
    def unused(self) -> tuple[str, ...]:
        """Entries that the model's makers reserved, judged by their names."""
        return tuple(text for text in self._special if re.search(r"reserved|unused|dummy|placeholder", text))

    def chat_frame(
        self, system: str | None, user_before: str, user_after: str, *, marker: MarkerToken | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids before and after a context that stands in the user's message.

        The model's chat template is rendered as transformers does, ready for the assistant's answer, and split at the
        context. A model without a template gets system message, text and context as plain text, after the tokens that
        its tokenizer puts before every text. ``marker`` is recognised in the texts as its token.

        Raises:
            ModelError: the template refuses the messages or does not pass the context through.
            TextError: a text contains a control token.
        """
        for text in (system or "", user_before, user_after):
            found = [token for token in self._special if token in text and (marker is None or token != marker.text)]
            if found:
                raise TextError(f"the prompt text {_shortened(text)!r} contains the control token {found[0]}; remove it")
        if self._template is None:
            head = f"{system}\n\n" if system else ""
            return (*self.leading_ids, *self._framed(head + user_before, marker)), self._framed(user_after, marker)
        before, after = self._template.render_around(system, user_before, user_after)
        return self._framed(before, marker), self._framed(after, marker)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids at which an answer ends."""
        return tuple(sorted({*self._ends, self.answer_end_id}))

    @functools.cached_property
    def answer_end_id(self) -> int:
        """The token that ends an assistant's turn; an answer is trained to end with it.

        Raises:
            ModelError: neither template nor configuration names one.
        """
        if self._template is not None:
            for token_id in self._control.encode(self._template.after_answer(), add_special_tokens=False).ids[:4]:
                if token_id in self._special.values() or token_id in self._ends:
                    return int(token_id)
        if not self._ends:
            raise ModelError("the model has no end token: give eos_token_id in its generation_config.json or config.json")
        return self._ends[0]

    @functools.cached_property
    def leading_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer puts before every text, such as a beginning-of-sequence token."""
        bare = self._control.encode("a", add_special_tokens=False).ids
        full = self._control.encode("a", add_special_tokens=True).ids
        return tuple(full[: next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)])

    def _framed(self, text: str, marker: MarkerToken | None) -> tuple[int, ...]:
        """Return the tokens of a rendered template, in which control tokens and the marker are single tokens."""
        if marker is None:
            return tuple(self._control.encode(text, add_special_tokens=False).ids)
        ids: list[int] = []
        for part in re.split(f"({re.escape(marker.text)})", text):
            ids += [marker.token_id] if part == marker.text else self._control.encode(part, add_special_tokens=False).ids
        return tuple(ids)

    @functools.cached_property
    def _unknown_id(self) -> int | None:
        model = json.loads(self._source)["model"]
        if model["type"] == "Unigram":
            return None if model["unk_id"] is None else int(model["unk_id"])
        unknown = model.get("unk_token")
        return None if unknown is None else self._control.token_to_id(unknown)


def resolve_marker(tokenizer: ModelTokenizer, policy: PausePolicy | None) -> Marker:
    """Return the token ids of one pause.

    Raises:
        ModelError: ``added`` but already in the vocabulary; ``reserved`` but not one entry of it, or one that the chat uses.
    """
    if policy is None:
        return Marker((), None)
    ordinary = tuple(tokenizer.encode(policy.marker).ids.tolist())
    if policy.token == "text":
        return Marker(tuple(tokenizer.encode(policy.group).ids.tolist()), None)
    existing = tokenizer.token_id(policy.marker)
    if policy.token == "added":
        if existing is not None:
            raise ModelError(
                f"pauses.marker {policy.marker!r} is already entry {existing} of the vocabulary; use token: reserved or another marker"
            )
        token = MarkerToken(text=policy.marker, token_id=tokenizer.vocab_size, added=True, initial_ids=ordinary)
    else:
        hint = f", such as {tokenizer.unused[0]!r}" if tokenizer.unused else ""
        if existing is None:
            raise ModelError(
                f"pauses.marker {policy.marker!r} is {len(ordinary)} tokens of this model, not one; token: reserved needs an entry of the "
                f"vocabulary{hint}; or use token: added"
            )
        if existing in tokenizer.chat_ids:
            raise ModelError(f"pauses.marker {policy.marker!r} has a meaning in this model's chats; choose an unused entry{hint}")
        token = MarkerToken(text=policy.marker, token_id=existing, added=False, initial_ids=ordinary)
    return Marker((token.token_id,) * policy.count, token)


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """Content tokens with pauses between them."""

    ids: NDArray[np.int32]
    is_pause: NDArray[np.bool_]
    """Same length as ``ids``."""
    content_starts: NDArray[np.int64]
    """Character at which each content token's visible part starts."""

    @property
    def num_content(self) -> int:
        """Number of tokens that are not pauses."""
        return len(self.content_starts)

    @property
    def num_pauses(self) -> int:
        """Number of pauses; no two touch, so each run of pause tokens is one."""
        return int(np.count_nonzero(np.diff(self.is_pause.astype(np.int8), prepend=0) == 1))


def insert_pauses(
    encoding: Encoding, *, policy: PausePolicy | None, marker: Marker, seed: int, rules: DocumentRules | None = None
) -> TokenDocument:
    """Insert pauses between the tokens of a text.

    A pause goes before the first token whose visible part starts at or after its offset; pauses that would fall between
    the same two tokens are one. ``marker`` is ``resolve_marker(tokenizer, policy)``; ``seed`` and ``rules`` are those of ``pause_offsets``.

    Raises:
        TextError: the marker is in the text.
    """
    ids, starts = encoding.ids, encoding.starts
    if policy is None:
        return TokenDocument(ids, np.zeros(len(ids), dtype=np.bool_), starts)
    offsets = pause_offsets(encoding.text, policy, token_starts=starts.tolist(), seed=seed, rules=rules)
    places = np.unique(np.searchsorted(starts, np.array(offsets, dtype=np.int64)))
    group = np.array(marker.group_ids, dtype=np.int32)
    at = np.repeat(places, len(group))
    is_pause = np.insert(np.zeros(len(ids), dtype=np.bool_), at, values=True)
    return TokenDocument(np.insert(ids, at, np.tile(group, len(places))), is_pause, starts)


def _visible_starts(text: str, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each token's first character that is no white space; a token of white space alone keeps its start."""
    blank = np.isin(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), _WHITE_SPACE)
    # next_visible[i]: the first visible character at or after i
    positions = np.where(blank, len(text), np.arange(len(text)))
    next_visible = np.append(np.minimum.accumulate(positions[::-1])[::-1], len(text))
    ends = np.append(starts[1:], len(text))
    visible = next_visible[starts]
    return np.where(visible < np.maximum(ends, starts + 1), visible, starts)


def cut(document: TokenDocument, *, tokens: int, budget: Literal["content", "total"]) -> TokenDocument:
    """Return the beginning of a document, ending in a content token; a pause is kept whole or not at all.

    ``tokens`` counts content tokens under ``budget="content"``, and all tokens under ``total``.
    """
    content = np.flatnonzero(~document.is_pause)
    kept = min(tokens, len(content)) if budget == "content" else int(np.searchsorted(content, tokens))
    length = int(content[kept - 1]) + 1 if kept > 0 else 0
    return TokenDocument(document.ids[:length], document.is_pause[:length], document.content_starts[: max(kept, 0)])


def _read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one."""
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{file}: is no JSON ({error}); fetch the model again") from error
    return data if isinstance(data, dict) else {}


def _end_ids(folder: Path, settings: dict[str, Any], *, entries: list[dict[str, Any]]) -> tuple[int, ...]:
    """Return the end-of-sequence ids from the first file that names one; the generation settings are asked first."""
    for name in ("generation_config.json", "config.json"):
        value = _read_settings(folder / name).get("eos_token_id")
        if value is not None:
            return tuple(int(token_id) for token_id in (value if isinstance(value, list) else [value]))
    token = settings.get("eos_token")
    text = token["content"] if isinstance(token, dict) else token
    return tuple(entry["id"] for entry in entries if entry["content"] == text)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


REACH_TOKENS = 64
"""Number of tokens beyond which a text does not change how another is tokenised: words, numbers and runs of marks are shorter."""
_AGREEING_TOKENS = 32
"""Number of consecutive tokens that must be the same before a window counts as back in step."""
_BLANK = re.compile(r"\s")
"""White space that must stand before these tokens: tokenizers that cut runs of digits or letters from the left restart after it."""
CHARS_PER_TOKEN = 5
"""First guess of the characters per token; English prose has 4 to 4.5."""


@dataclass(frozen=True)
class Insertion:
    """A text to insert."""

    offset: int
    """Offset in the text without insertions; the inserted text stands before the character there."""
    text: str


class LazyEncoding:
    """The tokens of a text's beginning. The text is encoded as far as tokens are requested, and at most twice as far."""

    def __init__(self, whole: str, *, encode: Callable[[str], Encoding]) -> None:
        """Create it; nothing is encoded yet."""
        self._whole = whole
        self._encode = encode
        self.read = Encoding("", np.zeros(0, np.int32), np.zeros(0, np.int64))
        """The encoded part; up to ``REACH_TOKENS`` tokens at its end may differ in the whole text."""

    @property
    def is_all(self) -> bool:
        """Whether the whole text is encoded."""
        return len(self.read.text) == len(self._whole)

    def first(self, tokens: int) -> Encoding:
        """Return the first ``tokens`` tokens of the whole text, or all if it has fewer."""
        chars = max((tokens + REACH_TOKENS) * CHARS_PER_TOKEN, 2 * len(self.read.text))
        while not self.is_all and len(self.read.ids) < tokens + REACH_TOKENS:
            self.read = self._encode(self._whole[:chars])
            chars *= 2
        if tokens >= len(self.read.ids):
            return self.read
        return Encoding(self.read.text[: int(self.read.starts[tokens])], self.read.ids[:tokens], self.read.starts[:tokens])


def insert_texts(base: Encoding, insertions: Sequence[Insertion], *, tokenizer: ModelTokenizer) -> Encoding:
    """Insert texts into ``base`` and return the result, encoded as if it had been written that way.

    Around insertions, a window with two reaches on either side is encoded, and the base's tokens are replaced up to the nearer
    reach (at an end of the text, up to the end). If base and window do not agree there, the whole text is encoded.

    ``insertions`` are ordered by offset; those at the same offset keep their order.

    Raises:
        TextError: a control token comes about.
    """
    edges = [0, *(insertion.offset for insertion in insertions), len(base.text)]
    parts = [base.text[begin:end] for begin, end in itertools.pairwise(edges)]
    text = parts[0] + "".join(insertion.text + part for insertion, part in zip(insertions, parts[1:], strict=True))
    ids, starts, done, shift = list[NDArray[np.int32]](), list[NDArray[np.int64]](), 0, 0
    for group in _neighbours(base, insertions):
        left, right = base.token_at(group[0].offset), base.token_at(group[-1].offset)
        has_left, has_right = left >= 2 * REACH_TOKENS, right + 2 * REACH_TOKENS < len(base.ids)
        begin = int(base.starts[left - 2 * REACH_TOKENS]) if has_left else 0
        end = int(base.starts[right + 2 * REACH_TOKENS]) if has_right else len(base.text)
        added = sum(len(insertion.text) for insertion in group)
        window = tokenizer.encode(text[begin + shift : end + shift + added])
        first: tuple[int, int] | None = (0, 0)
        last: tuple[int, int] | None = (len(base.ids), len(window.ids))
        if has_left:
            first = _junction(base, window, token=left - REACH_TOKENS, shift=begin, blank_from=begin)
        if has_right:
            last = _junction(base, window, token=right + REACH_TOKENS, shift=begin - added, blank_from=group[-1].offset)
        if first is None or last is None:
            return tokenizer.encode(text)
        ids += [base.ids[done : first[0]], window.ids[first[1] : last[1]]]
        starts += [base.starts[done : first[0]] + shift, window.starts[first[1] : last[1]] + (begin + shift)]
        done, shift = last[0], shift + added
    return Encoding(text, np.concatenate([*ids, base.ids[done:]]), np.concatenate([*starts, base.starts[done:] + shift]))


def _neighbours(base: Encoding, insertions: Sequence[Insertion]) -> Iterator[list[Insertion]]:
    """Group insertions so that the windows of two groups do not meet."""
    group, last = list[Insertion](), 0
    for insertion in insertions:
        token = base.token_at(insertion.offset)
        if group and token - last > 4 * REACH_TOKENS:
            yield group
            group = []
        group.append(insertion)
        last = token
    if group:
        yield group


def _junction(base: Encoding, window: Encoding, *, token: int, shift: int, blank_from: int) -> tuple[int, int] | None:
    """Return the token of the base and that of the window from which both are the same, or None if they do not agree.

    The window is a part of the text with insertions; its offsets are lower than the base's by ``shift``. White space must stand
    between the offset ``blank_from`` and the token.
    """
    char = int(base.starts[token])
    token, place, size = base.token_at(char), window.token_at(char - shift), _AGREEING_TOKENS
    same_ids = np.array_equal(base.ids[token : token + size], window.ids[place : place + size])
    agree = same_ids and np.array_equal(base.starts[token : token + size] - shift, window.starts[place : place + size])
    return (token, place) if agree and _BLANK.search(base.text, blank_from, char) else None
