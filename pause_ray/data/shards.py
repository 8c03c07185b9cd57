"""The file format between corpus and training: packed rows in Parquet shards under one manifest.

A row's number is global: row ``i`` of a set is the same row however the set is cut into shards.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pause_ray.core.errors import SourceError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import MANIFEST, file_sha256, is_complete, read_json, whole_file, write_json

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa


FORMAT = 2
"""Version of the columns; a set of another format is made again."""
NO_LOSS = -100
"""Label of a position that is not trained on (the default ``ignore_index`` of a cross entropy)."""
DOCUMENTS = "documents.parquet"
"""File that lists the documents of a shard set: one row each, with ``digest``."""
GROUP_ROWS = 16
"""Rows of one Parquet row group, the least that is decoded to read one row."""


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One training sequence."""

    input_ids: NDArray[np.int32]
    """Tokens, shape (length,)."""
    labels: NDArray[np.int32]
    """The same tokens where the loss counts, ``NO_LOSS`` elsewhere, shape (length,); not shifted."""
    num_pauses: int
    num_documents: int
    """Documents whose text is in the row."""
    content_tokens: int = 0
    """Tokens that come from documents or a hidden fact: neither pauses nor prompt nor answer."""
    longest_stretch_tokens: int = 0
    """The most tokens in a row without a pause between them."""
    document_starts: NDArray[np.int32] = field(default_factory=lambda: np.zeros(1, np.int32))
    """Where in the row a document, or the rest of one, begins: ascending from 0, shape (documents,). Tokens see their own document
    only, and positions count from its start. A context that quotes several documents is one."""


def row_schema() -> pa.Schema:
    """Return the columns of a shard; ``row`` is the global row number."""
    import pyarrow as pa

    tokens, count = pa.list_(pa.field("element", pa.int32(), nullable=False)), pa.int32()
    columns = {
        "row": pa.int64(),
        "input_ids": tokens,
        "labels": tokens,
        "document_starts": tokens,
        "num_pauses": count,
        "num_documents": count,
        "content_tokens": count,
        "longest_stretch_tokens": count,
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def rows_to_table(rows: Sequence[PackedRow], *, first_row: int) -> pa.Table:
    """Return a table of ``row_schema`` whose rows are numbered from ``first_row``."""
    import pyarrow as pa

    schema = row_schema()
    columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in schema.names if name != "row"}
    columns["row"] = range(first_row, first_row + len(rows))
    return pa.table([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


def table_to_rows(table: pa.Table) -> list[PackedRow]:
    """Return the rows of a table of ``row_schema``, in its order."""
    lists = ["input_ids", "labels", "document_starts"]
    counts = table.drop_columns(["row", *lists]).to_pylist()
    arrays = zip(*(table[name] for name in lists), strict=True)
    return [
        PackedRow(**{name: cell.values.to_numpy(zero_copy_only=False) for name, cell in zip(lists, cells, strict=True)}, **count)
        for cells, count in zip(arrays, counts, strict=True)
    ]


def write_rows(path: Path, tables: Iterable[pa.Table]) -> int:
    """Write one shard from tables in row order and return its number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([row_schema().empty_table(), *tables])
    with whole_file(path) as scratch:
        pq.write_table(table, scratch, row_group_size=GROUP_ROWS, compression="zstd")
    return int(table.num_rows)


def file_entry(path: Path) -> dict[str, Any]:
    """Return a manifest's entry of one file: name, size and digest."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def seal(folder: Path, *, shards: Sequence[Path], manifest: Mapping[str, Any], validation_shards: Sequence[Path] = ()) -> None:
    """Write the manifest that makes ``folder`` a shard set: its shards in row order, its documents, and ``manifest``'s own fields.

    The numbers of the held-out rows, in ``validation_shards``, follow those of the training rows.
    """
    import pyarrow.parquet as pq

    entries, held_out = (
        [{**file_entry(path), "rows": int(pq.read_metadata(path).num_rows)} for path in paths] for paths in (shards, validation_shards)
    )
    documents = [file_entry(folder / DOCUMENTS)] if (folder / DOCUMENTS).is_file() else []
    counts = {"num_rows": sum(entry["rows"] for entry in entries), "validation_rows": sum(entry["rows"] for entry in held_out)}
    write_json(folder / MANIFEST, {**manifest, "format": FORMAT, **counts, "documents": documents, "shards": entries + held_out})


class ShardSet:
    """A complete, intact shard set. Rows are read when asked for; nothing is kept in memory but the manifest."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Create it for a folder that was checked; use ``open``."""
        self.folder = folder
        self.manifest: dict[str, Any] = dict(manifest)
        self._ends = list(accumulate(entry["rows"] for entry in self.manifest["shards"]))

    @classmethod
    def open(cls, folder: Path) -> ShardSet:
        """Read the manifest and check every file against it.

        Raises:
            SourceError: no manifest, or a shard that is missing, truncated or edited.
            StorageError: the manifest is not JSON.
        """
        if not is_complete(folder):
            raise SourceError(f"{folder}: no shard set there (no {MANIFEST}); make one with: pause-ray corpus")
        manifest = read_json(folder / MANIFEST)
        if not all(isinstance(manifest.get(key), list) for key in ("shards", "documents")):
            raise SourceError(f"{folder / MANIFEST}: not the manifest of a shard set; remove the folder and run again")
        if manifest.get("format") != FORMAT:
            raise SourceError(f"{folder}: shards of format {manifest.get('format', 1)}, but this is format {FORMAT}; make them again")
        for entry in [*manifest["shards"], *manifest["documents"]]:
            _check_file(folder / entry["file"], entry)
        return cls(folder, manifest)

    @property
    def num_rows(self) -> int:
        """Number of training rows; their numbers are 0 to ``num_rows`` - 1."""
        return (self._ends[-1] if self._ends else 0) - self.validation_rows

    @property
    def validation_rows(self) -> int:
        """Number of held-out rows; their numbers begin at ``num_rows``."""
        return int(self.manifest["validation_rows"])

    @property
    def paths(self) -> list[Path]:
        """The shards, in row order."""
        return [self.folder / entry["file"] for entry in self.manifest["shards"]]

    def row(self, index: int) -> PackedRow:
        """Return the row with this global number."""
        import pyarrow.parquet as pq

        if not 0 <= index < self.num_rows + self.validation_rows:
            raise IndexError(f"row {index} of {self.num_rows + self.validation_rows}")
        shard = bisect.bisect_right(self._ends, index)
        within = index - (self._ends[shard - 1] if shard else 0)
        with pq.ParquetFile(self.paths[shard]) as file:
            table = file.read_row_group(within // GROUP_ROWS)
        return table_to_rows(table.slice(within % GROUP_ROWS, 1))[0]

    def rows(self, indices: Iterable[int]) -> list[PackedRow]:
        """Return ``row`` of each index, in the order of the indices."""
        return [self.row(index) for index in indices]

    def longest_row_tokens(self) -> int:
        """Return the length of the longest row in tokens; reads every shard."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        lengths = (pc.max(pc.list_value_length(pq.read_table(path, columns=["input_ids"])["input_ids"])).as_py() for path in self.paths)
        return max((length for length in lengths if length is not None), default=0)

    def document_digests(self) -> frozenset[str]:
        """Return the digests of the documents that the rows were made from; empty when none were recorded."""
        import pyarrow.parquet as pq

        if not self.manifest["documents"]:
            return frozenset()
        return frozenset(pq.read_table(self.folder / DOCUMENTS, columns=["digest"])["digest"].to_pylist())


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise SourceError(f"{path}: missing from its shard set; remove the folder and run again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise SourceError(f"{path}: {size} bytes, but its manifest says {entry['bytes']}; remove the folder and run again")
    if file_entry(path)["sha256"] != entry["sha256"]:
        raise SourceError(f"{path}: its content is not what its manifest says; remove the folder and run again")


HISTOGRAM_BINS = 8


def document_statistics(documents: Path) -> JsonObject:
    """Summarize ``documents.parquet``: documents, duplicates, characters, paragraphs, sentences, and the paragraph rules used."""
    import polars as pl

    table = pl.scan_parquet(documents)
    totals = table.select(
        documents=pl.len(),
        distinct_documents=pl.col("digest").n_unique(),
        chars=pl.col("chars").sum(),
        paragraphs=pl.col("paragraphs").sum(),
        sentences=pl.col("sentences").sum(),
    ).collect()
    rules = table.group_by("paragraph_rule").agg(documents=pl.len()).sort("paragraph_rule").collect()
    found: JsonObject = totals.to_dicts()[0]
    return {
        **found,
        "chars_per_paragraph": _ratio(found["chars"], found["paragraphs"]),
        "documents_by_paragraph_rule": dict(rules.iter_rows()),
    }


def row_statistics(shards: Sequence[Path], *, sequence_len: int) -> JsonObject:
    """Summarize the shards: rows, tokens, trained tokens, pauses, the longest stretch without a pause, and the lengths of rows."""
    import polars as pl

    lengths = pl.scan_parquet(list(shards)).select(
        "num_pauses",
        "num_documents",
        "content_tokens",
        "longest_stretch_tokens",
        tokens=pl.col("input_ids").list.len(),
        unlabelled=pl.col("labels").list.count_matches(NO_LOSS),
    )
    rows = lengths.collect(engine="streaming")
    longest = max(rows["tokens"], default=0)
    content, pauses = int(rows["content_tokens"].sum()), int(rows["num_pauses"].sum())
    return {
        "rows": len(rows),
        "row_tokens": int(rows["tokens"].sum()),
        "trained_tokens": int(rows["tokens"].sum()) - int(rows["unlabelled"].sum()),
        "content_tokens": content,
        "pauses": pauses,
        "pauses_per_1k_tokens": _ratio(1000 * pauses, content),
        "rows_without_pause": int((rows["num_pauses"] == 0).sum()),
        "longest_stretch_tokens": max(rows["longest_stretch_tokens"], default=0),
        "longest_row_tokens": longest,
        "documents_per_row": _ratio(int(rows["num_documents"].sum()), len(rows)),
        "row_tokens_histogram": _histogram(rows["tokens"], max(sequence_len, longest)),
    }


def format_corpus(stats: JsonObject) -> str:
    """Return one line with the statistics that show a wrong paragraph rule or a starved corpus."""
    rules = ", ".join(f"{count} {rule}" for rule, count in stats["documents_by_paragraph_rule"].items())
    return (
        f"{stats['rows']} rows from {stats['documents']} documents (paragraphs: {rules}), {stats['pauses_per_1k_tokens']:.1f} pauses per "
        f"1K tokens, longest stretch without a pause {stats['longest_stretch_tokens']} tokens, "
        f"{stats['tokens_per_core_second']:,.0f} tokens/s on one core"
    )


def overlapping_documents(documents: Path, digests: frozenset[str]) -> list[str]:
    """Return the ids of documents in ``documents.parquet`` whose text is one of ``digests``, in corpus order."""
    import polars as pl

    found = pl.scan_parquet(documents).filter(pl.col("digest").is_in(sorted(digests))).select("id").collect()
    return [str(name) for name in found["id"]]


def _histogram(tokens: pl.Series, longest: int) -> list[JsonObject]:
    """Count rows by length, in equal bins up to ``longest``."""
    edges = [-(-longest * step // HISTOGRAM_BINS) for step in range(HISTOGRAM_BINS + 1)]
    counts, _ = np.histogram(tokens, bins=np.array(edges) + 0.5)
    return [
        {"from_tokens": low + 1, "to_tokens": high, "rows": int(rows)}
        for (low, high), rows in zip(itertools.pairwise(edges), counts, strict=True)
    ]


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 3) if whole else 0.0
