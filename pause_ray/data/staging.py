"""Staged documents: Parquet chunks of about a million characters, which can be read from any place in the corpus.

Chunks depend on the sources alone, never on how many tasks read them, so a place is the same on a laptop and on a cluster.
"""

from __future__ import annotations

import bisect
import functools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import cast

from pause_ray.core.errors import SourceError
from pause_ray.core.storage import whole_file
from pause_ray.data.documents import Document
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.segments import ParagraphRule, detect_paragraph_rule, split

CHUNK_CHARS = 1_000_000
"""Size at which a chunk is closed: small enough to be read for one row, large enough for few chunks."""
SEARCHED_CHARS = 4_000
"""Number of characters before an offset in which the beginning of its sentence is searched first."""
KEPT_CHUNKS = 4
"""Number of chunks in memory; a context rarely spans more than two."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One staged Parquet file."""

    name: str
    """File name; the order of names is the order of the corpus."""
    num_chars: int


@dataclass(frozen=True, kw_only=True)
class Span:
    """A document, or the part of one after or before a place."""

    text: str
    paragraph_rule: ParagraphRule
    """Paragraph rule of the whole document; a short part of it may lack the evidence."""


def cut_into_chunks(documents: Iterable[Document], *, chunk_chars: int = CHUNK_CHARS) -> Iterator[list[Document]]:
    """Group consecutive documents in lists that end as soon as they hold ``chunk_chars``; no list is empty."""
    chunk: list[Document] = []
    chars = 0
    for document in documents:
        chunk.append(document)
        chars += len(document.text)
        if chars >= chunk_chars:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def stage_chunk(folder: Path, *, name: str, documents: Sequence[Document], policy: PausePolicy | None) -> Chunk:
    """Segment ``documents`` and write them with the results: id, digest, chars, paragraph_rule, paragraphs, sentences, text."""
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # tasks share a machine; one core each
    import polars as pl
    import pyarrow.parquet as pq

    policy_rule = policy.paragraph_rule if policy else "auto"
    rules: list[ParagraphRule] = [detect_paragraph_rule(document.text) if policy_rule == "auto" else policy_rule for document in documents]
    ruled = list(zip(documents, rules, strict=True))
    frame = pl.DataFrame(
        {
            "id": [document.id for document in documents],
            "digest": [document.digest for document in documents],
            "paragraph_rule": rules,
            "paragraphs": [len(split(document.text, unit="paragraph", paragraph_rule=rule)) for document, rule in ruled],
            "sentences": [len(split(document.text, unit="sentence", paragraph_rule=rule)) for document, rule in ruled],
            "text": [document.text for document in documents],
        }
    ).with_columns(chars=pl.col("text").str.len_chars())
    with whole_file(folder / name) as scratch:
        pq.write_table(frame.to_arrow(), scratch, compression="zstd")
    return Chunk(name=name, num_chars=int(frame["chars"].sum()))


def read_chunk(path: Path, *, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Read ``columns`` of the documents of one chunk, in order."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=list(columns))
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


def write_document_list(folder: Path, chunks: Sequence[Chunk], *, to: Path) -> None:
    """Write everything about the staged documents except their text, in corpus order, as one Parquet file."""
    import polars as pl

    with whole_file(to) as scratch:
        pl.scan_parquet([folder / chunk.name for chunk in chunks]).drop("text").sink_parquet(scratch, compression="zstd")


class StagedCorpus:
    """Staged chunks in order, or a part of their text; a few chunks are in memory at a time, whatever the corpus' size."""

    def __init__(self, folder: Path, chunks: Sequence[Chunk], *, begin: int = 0, end: int | None = None) -> None:
        """Open chunks in corpus order, at least one, between two characters counted through all of them; ``end`` None means the last."""
        self._folder = folder
        self._chunks = chunks
        self._ends = list(accumulate(chunk.num_chars for chunk in chunks))
        self._begin = begin
        self._end = self._ends[-1] if end is None else end
        self._documents = functools.lru_cache(maxsize=KEPT_CHUNKS)(self._read)

    def read_from(self, start: float) -> Iterator[Span]:
        """Yield the text from the sentence at ``start``, a share of all characters in [0, 1), and then the text before that sentence."""
        place = max(self._begin, self.sentence_start(self._begin + int(start * (self._end - self._begin))))
        yield from self._between(place, self._end)
        yield from self._between(self._begin, place)

    def sentence_start(self, offset: int) -> int:
        """Return where the sentence of the character at ``offset`` begins, in characters of all chunks."""
        number, chunk_begin = self._chunk_at(offset)
        documents = self._documents(number)
        ends = list(accumulate((len(document.text) for document in documents), initial=chunk_begin))
        index = bisect.bisect_right(ends, offset) - 1
        return ends[index] + _sentence_start_before(documents[index], offset - ends[index])

    def _between(self, begin: int, end: int) -> Iterator[Span]:
        """Yield documents, or the parts of them, between two characters."""
        number, offset = self._chunk_at(begin)
        while offset < end:
            for document in self._documents(number):
                text = document.text[max(0, begin - offset) : max(0, end - offset)]
                if text:
                    yield replace(document, text=text)
                offset += len(document.text)
            number += 1

    def _chunk_at(self, offset: int) -> tuple[int, int]:
        """Return the number of the chunk that has the character at ``offset``, and where the chunk begins."""
        number = bisect.bisect_right(self._ends, offset)
        return number, self._ends[number - 1] if number else 0

    def _read(self, number: int) -> list[Span]:
        found = read_chunk(self._folder / self._chunks[number].name, columns=("text", "paragraph_rule"))
        return [Span(text=text, paragraph_rule=cast("ParagraphRule", rule)) for text, rule in found]


def held_out_from(corpus: StagedCorpus, *, num_chars: int, share: float, least_chars: int) -> int:
    """Return the beginning of the sentence from which text is kept for validation rows: about ``share`` of the ``num_chars`` characters.

    Raises:
        SourceError: that, or the ``least_chars`` that one row may need, is more than half of the text.
    """
    kept = max(math.ceil(share * num_chars), least_chars)
    border = corpus.sentence_start(max(0, num_chars - kept))
    if 2 * max(kept, num_chars - border) > num_chars:
        raise SourceError(
            f"corpus.validation_rows need about {max(kept, num_chars - border):,} characters that training does not touch, but the text "
            f"has {num_chars:,}; add documents, lower corpus.sequence_len, or set corpus.validation_rows: 0"
        )
    return border


def _sentence_start_before(span: Span, offset: int) -> int:
    """Return the last start of a sentence at or before ``offset``; boundaries are causal, so a book is not searched from its beginning."""
    for base in (max(0, offset - SEARCHED_CHARS), 0):
        begin, _ = split(span.text[base : offset + 1], unit="sentence", paragraph_rule=span.paragraph_rule)[-1]
        if begin:
            return base + begin
    return 0
