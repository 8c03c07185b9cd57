"""The boundaries of paragraphs, sentences and token units in a text. Pure text.

Every rule is lossless (the spans join back to the text) and causal (whether a boundary stands at an offset depends on
the text before that offset and the one character after it), so a text and its beginning have the same boundaries.
Only the choice of a paragraph rule looks further, at the first ``EVIDENCE_CHARS`` characters.
"""

from __future__ import annotations

import bisect
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from pause_ray.core.errors import TextError

Unit = Literal["paragraph", "sentence", "tokens"]
ParagraphRule = Literal["blank_line", "newline", "glued"]
DocumentRules = tuple[tuple[int, ParagraphRule], ...]
"""The paragraph rules of documents that were joined to one text: pairs of where a document begins (ascending from 0) and its rule."""

JOINT = "\n\n"
"""Separator of joined documents: a blank line ends a paragraph under every rule."""

EVIDENCE_CHARS = 100_000
"""Number of characters from which a rule is chosen, so that a long haystack costs no more than a short one."""
MIN_GLUED = 2
"""Least number of glued boundaries; a single one may be a typing error."""
MIN_GLUED_SHARE = 0.03
"""Least share of glued boundaries in all sentence ends. The essays that lost their breaks have 0.10 to 0.31; of 116 documentation files
of packages none has over 0.024."""
MIN_LINES_PER_BLANK = 4
"""Line ends per blank line: a paragraph that is broken after every sentence has fewer, a paragraph per line has more."""
MIN_CLOSED_SHARE = 0.5
"""Least share of line ends that also end a sentence: the hard-wrapped essays have 0.04 to 0.20, one paragraph per line nearly 1."""

# A carriage return counts as blank, so CRLF text needs no patterns of its own.
_BLANK_LINE = r"\n[^\S\n]*+\n"
_TERMINAL = r"[.!?…]++[\"'”’»)\]]*+"
_CJK_TERMINAL = r"[。！？｡]++[」』”’）】]*+"
# "…made them deep.The first programs…" and the footnote mark in "…at work.\n[1]No one doubts…"
_GLUED = r"(?:[a-z0-9)\]\"'”’%][.!?]++[\"'”’)\]]*+|\[\d{1,2}\])(?=[A-Z“(])"

_PARAGRAPH_END: dict[ParagraphRule, re.Pattern[str]] = {
    "blank_line": re.compile(_BLANK_LINE),
    "newline": re.compile(r"\n"),
    "glued": re.compile(f"{_BLANK_LINE}|{_GLUED}"),
}
_SENTENCE_END: dict[ParagraphRule, re.Pattern[str]] = {
    "blank_line": re.compile(rf"(?:{_TERMINAL}(?=\s)|{_CJK_TERMINAL}|{_BLANK_LINE})\s*+(?=\S)"),
    "newline": re.compile(rf"(?:{_TERMINAL}(?=\s)|{_CJK_TERMINAL}|\n)\s*+(?=\S)"),
    "glued": re.compile(rf"(?:{_TERMINAL}(?=\s)|{_CJK_TERMINAL}|{_BLANK_LINE})\s*+(?=\S)|{_GLUED}"),
}

_VISIBLE = re.compile(r"\S")
_LAST_WORD = re.compile(r"(?:^|(?<=[\s(\[\"'“‘]))[^\s(\[\"'“‘]{1,12}$")
_LAST_WORD_CHARS = 14
_ABBREVIATIONS = frozenset(
    re.findall(
        r"\S+",
        """
        mr mrs ms dr prof st mt sr jr gen col capt lt sgt rev hon pres gov sen rep vs cf e.g i.e viz ca approx no nos vol pp p
        fig figs eq sec ch ed eds al inc ltd co corp dept univ est jan feb mar apr jun jul aug sep sept oct nov dec
        """,
    )
)


Spans = tuple[tuple[int, int], ...]
"""Beginning and end of each segment of a text, without gap or overlap; a segment includes the white space that follows it. Only the
last one can be blank: white space after the last boundary belongs to no unit."""


def join_documents(documents: Iterable[tuple[str, ParagraphRule]]) -> tuple[str, DocumentRules]:
    """Join texts with their rules to one text, and return with it which rule holds from where."""
    texts, rules, begin = list[str](), list[tuple[int, ParagraphRule]](), 0
    for text, rule in documents:
        texts.append(text)
        rules.append((begin, rule))
        begin += len(text) + len(JOINT)
    return JOINT.join(texts), tuple(rules)


def split(
    text: str,
    *,
    unit: Unit,
    paragraph_rule: Literal["auto"] | ParagraphRule | DocumentRules = "auto",
    unit_tokens: int = 200,
    token_starts: Sequence[int] | None = None,
) -> Spans:
    """Cut ``text`` into units; an empty text has none.

    Args:
        text: Any text.
        unit: The kind of segment.
        paragraph_rule: What ends a paragraph (and so a sentence, too); ``auto`` decides from the evidence. For joined
            documents, the rules of ``join_documents``; those that begin after the text's end count for nothing.
        unit_tokens: Tokens per segment, for ``unit="tokens"``.
        token_starts: Ascending character offset at which each token of ``text`` starts, for ``unit="tokens"``.

    Raises:
        TextError: ``unit="tokens"`` without ``token_starts``.
    """
    if unit == "tokens":
        if token_starts is None:
            raise TextError("unit tokens: the text must be tokenised first; pass token_starts")
        return _joined(text, (int(start) for start in token_starts[unit_tokens::unit_tokens]))
    if paragraph_rule == "auto":
        paragraph_rule = detect_paragraph_rule(text)
    rules: DocumentRules = ((0, paragraph_rule),) if isinstance(paragraph_rule, str) else paragraph_rule
    rules = rules[: max(1, bisect.bisect_left(rules, len(text), key=lambda document: document[0]))]
    return _joined(text, _boundaries(text, rules, _sentence_boundaries if unit == "sentence" else _paragraph_boundaries))


def detect_paragraph_rule(text: str) -> ParagraphRule:
    """Decide what ends a paragraph, from the first ``EVIDENCE_CHARS`` characters.

    ``glued``: sentence ends directly followed by a capital outnumber blank lines and are no typing errors.
    ``newline``: blank lines are rare, and most single line ends also end a sentence, so they are not the work of a hard
    wrap. ``blank_line``: everything else. A blank line ends a paragraph under every rule.
    """
    head = text[:EVIDENCE_CHARS]
    blank_lines = len(re.findall(r"\S[^\S\n]*+\n[^\S\n]*+\n", head))
    # A whole plain word must follow, or "System.Collections.Generic" would be evidence.
    glued = len(re.findall(rf"{_GLUED}[“(]?(?:[A-Z][a-z]*|[A-Z][a-z]*['’][a-z]+)[ ,\n]", head))
    sentence_ends = glued + len(re.findall(rf"{_TERMINAL}\s", head))
    if glued >= MIN_GLUED and glued > blank_lines and glued >= MIN_GLUED_SHARE * sentence_ends:
        return "glued"
    line_ends = len(re.findall(r"\S[^\S\n]*+\n(?=[^\S\n]*+\S)", head))
    closed_line_ends = len(re.findall(rf"(?:{_TERMINAL}|{_CJK_TERMINAL})[^\S\n]*+\n(?=[^\S\n]*+\S)", head))
    if line_ends and line_ends >= MIN_LINES_PER_BLANK * blank_lines and closed_line_ends >= MIN_CLOSED_SHARE * line_ends:
        return "newline"
    return "blank_line"


def _joined(text: str, boundaries: Iterable[int]) -> Spans:
    """Return the spans between 0, the boundaries and the end of the text."""
    edges = sorted({0, len(text)}.union(boundaries))
    return tuple(itertools.pairwise(edges))


def _boundaries(text: str, rules: DocumentRules, within: Callable[[str, int, int, ParagraphRule], Iterator[int]]) -> Iterator[int]:
    """Yield the boundaries that ``within`` finds in each document, except those that would leave a blank unit."""
    last = 0
    ends = [begin for begin, _ in rules[1:]] + [len(text)]
    for (begin, rule), end in zip(rules, ends, strict=True):
        for boundary in within(text, begin, end, rule):
            if boundary > last and not text[last:boundary].isspace():
                yield boundary
                last = boundary


def _paragraph_boundaries(text: str, begin: int, end: int, rule: ParagraphRule) -> Iterator[int]:
    """Yield the ends of paragraphs; further blank lines belong to the next one, so that no lookahead is needed."""
    yield begin
    for match in _PARAGRAPH_END[rule].finditer(text, begin, end):
        yield match.end()


def _sentence_boundaries(text: str, begin: int, end: int, rule: ParagraphRule) -> Iterator[int]:
    """Yield the offset of the first visible character of every sentence."""
    first = _VISIBLE.search(text, begin, end)
    if first is not None:
        yield first.start()
    for match in _SENTENCE_END[rule].finditer(text, begin, end):
        if _ends_a_sentence(text, match.start(), match.end()) or _PARAGRAPH_END[rule].search(text, match.start(), match.end()):
            yield match.end()


def _ends_a_sentence(text: str, stop: int, following: int) -> bool:
    """Return whether the punctuation at ``stop`` ends a sentence, given the first visible character after it."""
    if text[following].islower():
        return False
    if text[stop] != "." or text.startswith("..", stop):
        return True
    found = _LAST_WORD.search(text[max(0, stop - _LAST_WORD_CHARS) : stop])
    word = found.group() if found else ""
    if len(word) == 1 and word.isalpha() and word.isupper() and word != "I":
        return False  # an initial: "J. R. R. Tolkien"
    if word.isdecimal() and len(word) <= 3:
        line = text.rfind("\n", 0, stop) + 1
        return text[line:stop].strip() != word  # the number of a list item
    return word.casefold() not in _ABBREVIATIONS


def plain(text: str) -> str:
    """Return ``folded`` text with single blanks between words and none at the ends."""
    return " ".join(folded(text).split())


def folded(text: str) -> str:
    """Return the text without letter case and Unicode compatibility forms (NFKC)."""
    return unicodedata.normalize("NFKC", text).casefold()
