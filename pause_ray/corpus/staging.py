"""Documents on their way to rows: Parquet pieces of about a million characters, and reading on from any place in them.

Pieces depend on the sources alone, never on how many tasks read them, so a place in the corpus is the same place on a
laptop and on a cluster. Knows no token and no Ray.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pause_ray.documents import Document
from pause_ray.rows import whole_file
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.segments import ParagraphRule, detect_paragraph_rule, sentence_starts, split

if TYPE_CHECKING:
    import pyarrow as pa

PIECE_CHARS = 1_000_000
"""A piece is closed when it has this many characters: small enough to be read for one row, large enough to be few."""
SEARCHED_CHARS = 4_000
"""Where the beginning of a sentence is looked for first."""
KEPT_PIECES = 4
"""Pieces a shelf keeps in memory; a context rarely spans more than two."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One staged Parquet file."""

    name: str
    """File name; the order of names is the order of the corpus."""
    num_documents: int
    num_chars: int


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A document, or the part of one after or before a place."""

    text: str
    paragraph_rule: ParagraphRule
    """What ends a paragraph in the whole document; a short part of it may lack the evidence."""


def cut_into_pieces(documents: Iterable[Document], *, piece_chars: int = PIECE_CHARS) -> Iterator[list[Document]]:
    """Consecutive documents in lists that end as soon as they hold ``piece_chars``; never an empty list."""
    piece: list[Document] = []
    chars = 0
    for document in documents:
        piece.append(document)
        chars += len(document.text)
        if chars >= piece_chars:
            yield piece
            piece, chars = [], 0
    if piece:
        yield piece


def stage_piece(folder: Path, *, name: str, documents: Sequence[Document], policy: PausePolicy | None) -> Piece:
    """Segment ``documents`` and write them with what was found: id, digest, chars, paragraph_rule, paragraphs, sentences, text.

    Raises:
        StorageError: the disk is full or not writable.
    """
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # tasks share a machine; one core each
    import polars as pl
    import pyarrow.parquet as pq

    asked = policy.paragraph_rule if policy else "auto"
    rules: list[ParagraphRule] = [detect_paragraph_rule(document.text) if asked == "auto" else asked for document in documents]
    ruled = list(zip(documents, rules, strict=True))
    frame = pl.DataFrame(
        {
            "id": [document.id for document in documents],
            "digest": [document.digest for document in documents],
            "paragraph_rule": rules,
            "paragraphs": [len(split(document.text, unit="paragraph", paragraph_rule=rule).spans) for document, rule in ruled],
            "sentences": [len(sentence_starts(document.text, paragraph_rule=rule)) for document, rule in ruled],
            "text": [document.text for document in documents],
        }
    ).with_columns(chars=pl.col("text").str.len_chars())
    with whole_file(folder / name) as scratch:
        pq.write_table(frame.to_arrow(), scratch, compression="zstd")
    return Piece(name=name, num_documents=len(frame), num_chars=int(frame["chars"].sum()))


def read_piece(path: Path, *, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """``columns`` of the documents of one piece, in order."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=list(columns))
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


def write_document_list(folder: Path, pieces: Sequence[Piece], *, to: Path) -> None:
    """Everything about the staged documents but their text, in corpus order, as one Parquet file.

    Raises:
        StorageError: the disk is full or not writable.
    """
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None
    with whole_file(to) as scratch:
        for piece in pieces:
            table: pa.Table = pq.read_table(folder / piece.name).drop_columns(["text"])
            writer = writer or pq.ParquetWriter(scratch, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()


class Shelf:
    """All staged pieces in order, opened where needed; holds a few pieces in memory, whatever the corpus' size."""

    def __init__(self, folder: Path, pieces: Sequence[Piece]) -> None:
        """Of pieces in corpus order; at least one."""
        self._folder = folder
        self._pieces = pieces
        self._ends = list(accumulate(piece.num_chars for piece in pieces))
        self._kept: dict[int, list[Stretch]] = {}

    def read_from(self, start: float) -> Iterator[Stretch]:
        """The corpus from the sentence at ``start`` on, document by document, round to where it began.

        Args:
            start: Share of all characters, in [0, 1): every character of the corpus is equally likely to be chosen.
        """
        offset = int(start * self._ends[-1])
        number = bisect.bisect_right(self._ends, offset)
        offset -= self._ends[number - 1] if number else 0
        documents = self._documents(number)
        ends = list(accumulate(len(document.text) for document in documents))
        first = bisect.bisect_right(ends, offset)
        offset -= ends[first - 1] if first else 0
        chosen = documents[first]
        begin = _sentence_start_before(chosen, offset)
        yield replace(chosen, text=chosen.text[begin:])
        following = (self._documents(later % len(self._pieces)) for later in range(number + 1, number + len(self._pieces)))
        yield from chain(documents[first + 1 :], chain.from_iterable(following), documents[:first])
        if begin:
            yield replace(chosen, text=chosen.text[:begin])

    def _documents(self, number: int) -> list[Stretch]:
        if number not in self._kept:
            while len(self._kept) >= KEPT_PIECES:
                del self._kept[next(iter(self._kept))]
            found = read_piece(self._folder / self._pieces[number].name, columns=("text", "paragraph_rule"))
            self._kept[number] = [Stretch(text=text, paragraph_rule=cast("ParagraphRule", rule)) for text, rule in found]
        return self._kept[number]


def _sentence_start_before(stretch: Stretch, offset: int) -> int:
    """The last start of a sentence at or before ``offset``; boundaries are causal, so a book is not searched from its beginning."""
    base = max(0, offset - SEARCHED_CHARS)
    begin = sentence_starts(stretch.text[base : offset + 1], paragraph_rule=stretch.paragraph_rule)[-1]
    if begin == 0 < base:
        base, begin = 0, sentence_starts(stretch.text[: offset + 1], paragraph_rule=stretch.paragraph_rule)[-1]
    return base + begin
