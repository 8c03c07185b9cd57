"""The transforms of the shard pipeline: plain functions that one Ray Data task applies to one item. They need no Ray.

Running a transform twice writes the same files again, so a lost task may simply be repeated. Errors are those of
``pipeline.build_shards``.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from time import thread_time

from pause_ray.core.errors import TextError
from pause_ray.core.spec import JsonObject
from pause_ray.data.documents import SourceSpec, kept_documents, list_files
from pause_ray.data.packing import draw_row, needle_sft_row, pack_language_modeling, pause_mask, take_window
from pause_ray.data.shards import PackedRow, rows_to_table, table_to_rows, write_rows
from pause_ray.data.spec import ShardJob
from pause_ray.data.staging import Chunk, StagedCorpus, cut_into_chunks, read_chunk, stage_chunk
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.segments import plain
from pause_ray.text.tokenizer import ModelTokenizer, TokenDocument, insert_pauses

FILES_PER_TASK = 64
"""Number of consecutive files that one task reads: essays come by the hundred, and a task costs milliseconds."""


def plan_read_tasks(sources: Sequence[SourceSpec], *, cache: Path) -> list[JsonObject]:
    """Group the files of all sources, in order, as items: their number, the place of their source, the source, and its files.

    Packages are fetched into ``cache``.
    """
    items: list[JsonObject] = []
    for place, source in enumerate(sources):
        files = list_files(source, cache=cache)
        for begin in range(0, len(files), FILES_PER_TASK):
            items.append({"number": len(items), "place": place, "source": source, "files": files[begin : begin + FILES_PER_TASK]})
    return items


def read_chunks(item: JsonObject) -> Iterator[JsonObject]:
    """Turn a read task into its chunks, and then the counts of kept and dropped documents."""
    counts = Counter[str]()
    documents = kept_documents(item["files"], item["source"], counts=counts)
    for number, chunk in enumerate(cut_into_chunks(documents)):
        yield {"name": f"{item['number']:07d}-{number:07d}.parquet", "documents": chunk}
    yield {"counts": counts, "place": item["place"]}


def stage(item: JsonObject, *, folder: Path, policy: PausePolicy | None) -> Iterator[JsonObject]:
    """Turn the text of a chunk into a staged file; other items pass."""
    if "documents" not in item:
        yield item
        return
    yield {"chunk": stage_chunk(folder, name=item["name"], documents=item["documents"], policy=policy)}


def make_needle_rows(item: JsonObject, *, job: ShardJob, staged: Path, chunks: Sequence[Chunk], packed: Path) -> Iterator[JsonObject]:
    """Make rows ``first`` to ``last`` (exclusive) from the text between ``begin`` and ``end``, as a packed file."""
    tokenizer, marker = job.tokenizer(), job.marker()
    corpus = StagedCorpus(staged, chunks, begin=item["begin"], end=item["end"])
    rows, seconds = list[PackedRow](), 0.0
    for number in range(item["first"], item["last"]):
        draw = draw_row(job.spec, seed=job.seed, row=number, held_out=item["held_out"])
        spans = corpus.read_from(draw.start)
        begin = thread_time()
        window = take_window(spans, tokens=draw.row_tokens, tokenizer=tokenizer)
        try:
            row = needle_sft_row(window, draw=draw, prompt=job.prompt, tokenizer=tokenizer, policy=job.policy, marker=marker)
        except TextError as error:
            raise TextError(f"corpus row {number}: {error}") from error
        seconds += thread_time() - begin
        rows.append(row)
    yield _packed(rows, unit=item["unit"], folder=packed, seconds=seconds)


def make_language_rows(item: JsonObject, *, job: ShardJob, staged: Path, packed: Path) -> Iterator[JsonObject]:
    """Pack the part of one staged chunk between its characters ``begin`` and ``end`` into a file of rows."""
    tokenizer, marker = job.tokenizer(), job.marker()
    started = thread_time()
    rows = pack_language_modeling(
        _encoded_between(staged / item["chunk"], begin=item["begin"], end=item["end"], job=job),
        sequence_len=job.spec.sequence_len,
        end_id=_document_end_id(tokenizer),
        group_tokens=len(marker.group_ids),
        budget=job.policy.budget if job.policy else "content",
        leading_ids=tokenizer.leading_ids,
    )
    made = list(rows)
    yield _packed(made, unit=item["unit"], folder=packed, seconds=thread_time() - started)


def cut_shard(item: JsonObject, *, packed: Path, folder: Path) -> Iterator[JsonObject]:
    """Join slices of packed files to one shard with global row numbers."""
    import pyarrow.parquet as pq

    tables, first_row = [], item["first_row"]
    for unit, begin, end in item["slices"]:
        rows = table_to_rows(pq.read_table(packed / _packed_name(unit)).slice(begin, end - begin))
        tables.append(rows_to_table(rows, first_row=first_row))
        first_row += len(rows)
    write_rows(folder / item["file"], tables)
    yield {"file": item["file"]}


def find_needles(item: JsonObject, *, job: ShardJob, folder: Path, needles: Sequence[str]) -> Iterator[JsonObject]:
    """Return the numbers of a shard's rows whose text, as ``plain`` and without pauses, contains one of ``needles``."""
    import pyarrow.parquet as pq

    tokenizer, group_ids = job.tokenizer(), job.marker().group_ids
    wanted = [plain(needle) for needle in needles]
    found = []
    with pq.ParquetFile(folder / item["file"]) as file:
        for batch in file.iter_batches(batch_size=64, columns=["row", "input_ids"]):
            for number, ids in zip(batch["row"].to_pylist(), batch["input_ids"], strict=True):
                tokens = ids.values.to_numpy(zero_copy_only=False)
                text = plain(tokenizer.decode(tokens[~pause_mask(tokens, group_ids=group_ids)]))
                if any(needle in text for needle in wanted):
                    found.append(number)
    yield {"rows": found}


def plan_shards(
    counts: Sequence[int], *, num_rows: int, rows_per_shard: int, first_row: int = 0, first_unit: int = 0, name: str = "rows"
) -> list[JsonObject]:
    """Return which slices of the packed files, which have ``counts`` rows in row order, make which shard of the first ``num_rows``.

    ``first_row`` is the global number of the first row, ``first_unit`` the number of the first packed file, ``name`` the shards' prefix.
    """
    ends = list(accumulate(counts))
    plan: list[JsonObject] = []
    for first in range(0, num_rows, rows_per_shard):
        last = min(first + rows_per_shard, num_rows)
        slices, unit = [], bisect.bisect_right(ends, first)
        while unit < len(counts) and (begin := ends[unit] - counts[unit]) < last:
            slices.append([first_unit + unit, max(first - begin, 0), min(last, ends[unit]) - begin])
            unit += 1
        plan.append({"file": f"{name}-{len(plan):06d}.parquet", "first_row": first_row + first, "slices": slices})
    return plan


def _encoded_between(path: Path, *, begin: int, end: int, job: ShardJob) -> Iterator[tuple[TokenDocument, bool]]:
    """Yield a chunk's documents, or their parts between two of its characters, in tokens, and whether the document's end is included."""
    tokenizer, marker, offset = job.tokenizer(), job.marker(), 0
    for name, digest, text in read_chunk(path, columns=("id", "digest", "text")):
        part = text[max(0, begin - offset) : max(0, end - offset)]
        offset += len(text)
        if not part:
            continue
        # A random placement is drawn from the seed and the text, not from its place in the corpus.
        seed = (job.seed + int(digest, 16)) % 2**63
        try:
            document = insert_pauses(tokenizer.encode(part), policy=job.policy, marker=marker, seed=seed)
        except TextError as error:
            raise TextError(f"document {name}: {error}") from error
        yield document, offset <= end


def _document_end_id(tokenizer: ModelTokenizer) -> int:
    """Return the token that ends a text rather than a turn, where a model has two: ``<|end_of_text|>``, not ``<|eot_id|>``."""
    return next((end for end in tokenizer.end_ids if end != tokenizer.answer_end_id), tokenizer.answer_end_id)


def _packed(rows: Sequence[PackedRow], *, unit: int, folder: Path, seconds: float) -> JsonObject:
    write_rows(folder / _packed_name(unit), [rows_to_table(rows, first_row=0)])
    return {"unit": unit, "rows": len(rows), "tokens": sum(len(row.input_ids) for row in rows), "seconds": seconds}


def _packed_name(unit: int) -> str:
    return f"{unit:07d}.parquet"
