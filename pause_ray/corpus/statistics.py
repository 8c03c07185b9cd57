"""What a corpus looks like, from the list of its documents and its shards. Polars only; knows no text and no tokenizer.

The numbers make a wrong choice visible: a paragraph rule that finds 129 paragraphs in 49 essays, or a stretch of
thousands of tokens without a pause.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pause_ray.rows import NO_LOSS
from pause_ray.spec import JsonObject

if TYPE_CHECKING:
    import polars as pl

HISTOGRAM_BINS = 8


def document_statistics(documents: Path) -> JsonObject:
    """Of ``documents.parquet``: documents, doubled texts, characters, paragraphs, sentences, and the paragraph rules used."""
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


def row_statistics(shards: Sequence[Path], *, sequence_tokens: int) -> JsonObject:
    """Of the shards: rows, tokens, trained tokens, pauses, stretches without a pause, and how long rows are."""
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
    content, pauses = int(rows["content_tokens"].sum()), int(rows["num_pauses"].sum())
    return {
        "rows": len(rows),
        "row_tokens": int(rows["tokens"].sum()),
        "trained_tokens": int(rows["tokens"].sum()) - int(rows["unlabelled"].sum()),
        "content_tokens": content,
        "pauses": pauses,
        "pauses_per_1k_tokens": _ratio(1000 * pauses, content),
        "rows_without_pause": int((rows["num_pauses"] == 0).sum()),
        "longest_stretch_tokens": _largest(rows["longest_stretch_tokens"]),
        "longest_row_tokens": _largest(rows["tokens"]),
        "documents_per_row": _ratio(int(rows["num_documents"].sum()), len(rows)),
        "row_tokens_histogram": _histogram(rows["tokens"], max(sequence_tokens, _largest(rows["tokens"]))),
    }


def corpus_words(stats: JsonObject) -> str:
    """The statistics that show a wrong paragraph rule or a starved corpus, in one line."""
    rules = ", ".join(f"{count} {rule}" for rule, count in stats["documents_by_paragraph_rule"].items())
    return (
        f"{stats['rows']} rows from {stats['documents']} documents (paragraphs: {rules}), {stats['pauses_per_1k_tokens']:.1f} pauses per "
        f"1K tokens, longest stretch without a pause {stats['longest_stretch_tokens']} tokens, "
        f"{stats['tokens_per_core_second']:,.0f} tokens/s on one core"
    )


def overlapping_documents(documents: Path, digests: frozenset[str]) -> list[str]:
    """Ids of the documents in ``documents.parquet`` whose text is one of ``digests``, in corpus order."""
    import polars as pl

    found = pl.scan_parquet(documents).filter(pl.col("digest").is_in(sorted(digests))).select("id").collect()
    return [str(name) for name in found["id"]]


def _histogram(tokens: pl.Series, longest: int) -> list[JsonObject]:
    """Rows by length, in equal bins up to ``longest``."""
    edges = [-(-longest * step // HISTOGRAM_BINS) for step in range(HISTOGRAM_BINS + 1)]
    return [
        {"from_tokens": low + 1, "to_tokens": high, "rows": int(((tokens > low) & (tokens <= high)).sum())}
        for low, high in itertools.pairwise(edges)
    ]


def _largest(numbers: pl.Series) -> int:
    return max(numbers.to_list(), default=0)


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 3) if whole else 0.0
