"""The shard pipeline: documents → staged chunks → packed rows → Parquet shards, as streaming Ray Data graphs over shared storage.

A row depends on its number and the seed, so rows are the same however many tasks and machines make them, and the driver
sees file names and counts only. Ray is the caller's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from joblib import cpu_count
from ray.exceptions import RayError

from pause_ray.core.errors import ClusterError, SourceError, SpecError, StorageError, UserError
from pause_ray.core.ray_cluster import explain_missing_package
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import Storage, building, exclusive, is_complete, lock_of, read_json, write_json
from pause_ray.data.documents import check_kept
from pause_ray.data.shards import DOCUMENTS, ShardSet, document_statistics, overlapping_documents, row_statistics, seal
from pause_ray.data.spec import CorpusSpec, ShardJob, shared_with_evaluation
from pause_ray.data.staging import Chunk, StagedCorpus, held_out_from, write_document_list
from pause_ray.data.transforms import (
    cut_shard,
    find_needles,
    make_language_rows,
    make_needle_rows,
    plan_read_tasks,
    plan_shards,
    read_chunks,
    stage,
)
from pause_ray.text.tokenizer import CHARS_PER_TOKEN, REACH_TOKENS

BLOCK_BYTES = 4 * 1024**2
"""Bytes of text in a Ray Data block: a few chunks, so that a corpus of any size flows through."""
MAX_BLOCKS = 1024
"""Most blocks of one Ray Data graph, since the driver keeps a record of each."""

Transform = Callable[[JsonObject], Iterator[JsonObject]]
"""A function that turns one item into any number of others."""


def stream(items: Sequence[JsonObject], transforms: Sequence[Transform]) -> Iterator[JsonObject]:
    """Stream ``items`` through ``transforms`` in Ray tasks; results come as they are ready, in no order.

    Raises:
        UserError: what a transform raised, in this process.
        ClusterError: a node has not what a task needs to begin.
    """
    if not items:
        return
    with _quiet_ray_data():
        dataset = ray.data.from_items(_table(items).to_pylist(), override_num_blocks=min(len(items), MAX_BLOCKS))
        for number, transform in enumerate(transforms):
            dataset = dataset.map_batches(
                _apply,
                fn_kwargs={"transform": transform},
                batch_size=1,
                batch_format="pyarrow",
                # Transforms that ask for different shares of a CPU are not fused, so that one long file is segmented by many tasks.
                num_cpus=1 if number == len(transforms) - 1 else 0.5,
                compute=ray.data.TaskPoolStrategy(size=_tasks_at_once()),
            )
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for item in _items(batch):
                    if isinstance(item, UserError):
                        raise item
                    yield item
        except RayError as error:
            if message := explain_missing_package(str(error)):
                raise ClusterError(message) from error
            raise


def _apply(batch: pa.Table, transform: Transform) -> Iterator[pa.Table]:
    """Apply a transform inside a task; a user's mistake becomes an item, because Ray would bury its one line in a traceback."""
    for item in _items(batch):
        try:
            for result in [item] if isinstance(item, UserError) else transform(item):
                yield _table([result])
        except UserError as error:
            yield _table([error])
        except FileNotFoundError as error:
            where = f"{error.filename or error}: no such file or folder on {socket.gethostname()}"
            yield _table([StorageError(f"{where}; name texts and --storage by paths that are the same on every node")])


def _table(items: Sequence[JsonObject | UserError]) -> pa.Table:
    """Return pickled items as a table, since Ray Data measures and splits blocks by the bytes of Arrow columns."""
    return pa.table({"item": pa.array([pickle.dumps(item) for item in items], pa.large_binary())})


def _items(table: pa.Table) -> list[Any]:
    return [pickle.loads(item) for item in table["item"].to_pylist()]  # noqa: S301 (pickled by this module's own task)


def _tasks_at_once() -> int | None:
    """Return the number of tasks: on this machine one per core, since its logical CPUs may be more; on a cluster Ray decides."""
    return None if os.environ.get("RAY_ADDRESS") else cpu_count()


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Hide Ray Data's bars and plans within the block, since the caller shows one bar. The log file in Ray's session is kept."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    consoles = [handler for handler in logging.getLogger("ray.data").handlers if handler.get_name() == "console"]
    levels = [handler.level for handler in consoles]
    for handler in consoles:
        handler.setLevel(logging.ERROR)
    try:
        with ray.data.DataContext.current(context), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")  # fewer items than cores
            yield
    finally:
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)


log = logging.getLogger("pause_ray")

TOKENS_PER_UNIT = 2**17
"""Tokens of the ``needle_sft`` rows that one task makes, but one row at least: some seconds of work. Ray Data needs two tenths of a
second to notice that a task has ended and to start the next one; shorter tasks leave cores idle, longer ones delay progress."""

Progress = Callable[[int, int], None]
"""Rows made and rows wanted."""
Units = tuple[list[JsonObject], list[JsonObject]]
"""The packed files of the training rows, and those of the validation rows."""


def build_shards(job: ShardJob, *, storage: Storage, progress: Progress) -> ShardSet:
    """Return the job's shard set: found on storage, or made there by Ray tasks.

    A damaged set is made again, with a warning. Another process that makes the same set is waited for. The manifest has
    ``identity``, ``stats`` and ``num_rows``; the returned one also ``overlap``: whether training shares documents,
    facts or needles with ``job.evaluation`` because the spec allows it.

    Raises:
        SpecError: training and evaluation share something, and the spec does not allow it.
        SourceError: sources missing, empty, undecodable, or too short for a row.
        TextError: a marker that occurs in a document, or rows too short for fact and question.
        ModelError: a model folder without tokenizer, or a marker that does not fit it.
        StorageError: the disk is full or not writable.
    """
    facts = job.spec.facts if job.spec.objective == "needle_sft" else None
    shared_facts = shared_with_evaluation(facts, needles=job.evaluation.needles, keywords=job.evaluation.keywords) if facts else []
    if shared_facts:
        _refuse_unless_allowed(job, f"{shared_facts[0]} ({len(shared_facts)} in all); choose other facts")
    job.marker()  # refused before anything is written
    identity = job.identity()
    folder = storage.shards / digest(identity)
    with exclusive(lock_of(folder), waiting=lambda holder: log.info("%s: waiting for %s, which makes it", folder, holder)):
        shards = _intact(folder)
        if shards is None:
            with building(folder) as scratch:
                _build(job, scratch, cache=storage.cache, identity=identity, progress=progress)
            shards = ShardSet.open(folder)
        progress(shards.num_rows, shards.num_rows)
        overlap = _overlap(job, shards)
        if overlap["rows"]:
            _refuse_unless_allowed(job, f"{len(overlap['rows'])} rows hold a needle of the evaluation (first: row {overlap['rows'][0]})")
        _refuse_shared_documents(job, overlap["documents"])
    overlap["facts"] = shared_facts
    return ShardSet(folder, {**shards.manifest, "overlap": any(overlap.values()), "evaluation_overlap": overlap})


def _intact(folder: Path) -> ShardSet | None:
    """Return the set, or None if there is none or it is damaged."""
    if not is_complete(folder):
        return None
    try:
        return ShardSet.open(folder)
    except (SourceError, StorageError) as error:
        log.warning("damaged shard set, made again: %s", error)
        return None


# ---- building


def _build(job: ShardJob, scratch: Path, *, cache: Path, identity: JsonObject, progress: Progress) -> None:
    """Fill ``scratch`` with the list of documents, shards and, last, the manifest."""
    staged, packed = scratch / "staged", scratch / "packed"
    staged.mkdir()
    packed.mkdir()
    progress(0, job.spec.num_sequences)
    chunks = _stage_documents(job, staged, cache=cache)
    write_document_list(staged, chunks, to=scratch / DOCUMENTS)
    _refuse_shared_documents(job, overlapping_documents(scratch / DOCUMENTS, job.evaluation.document_digests))
    pack = _pack_needle_rows if job.spec.objective == "needle_sft" else _pack_language_rows
    rows, held_out = pack(job, staged=staged, packed=packed, chunks=chunks, progress=progress)
    plans = _plan(job.spec, [unit["rows"] for unit in rows], [unit["rows"] for unit in held_out])
    for _ in stream([item for plan in plans for item in plan], [partial(cut_shard, packed=packed, folder=scratch)]):
        pass
    shutil.rmtree(staged)
    shutil.rmtree(packed)
    shards, validation_shards = ([scratch / item["file"] for item in plan] for plan in plans)
    seconds = sum(unit["seconds"] for unit in rows + held_out)
    stats = {
        **document_statistics(scratch / DOCUMENTS),
        **row_statistics(shards, sequence_len=job.spec.sequence_len),
        "tokens_per_core_second": round(sum(unit["tokens"] for unit in rows + held_out) / max(seconds, 1e-9)),
    }
    seal(scratch, shards=shards, validation_shards=validation_shards, manifest={"identity": identity, "stats": stats})


def _plan(spec: CorpusSpec, counts: Sequence[int], held_out: Sequence[int]) -> tuple[list[JsonObject], list[JsonObject]]:
    """Return the shards of the training rows, and those of the validation rows, which follow them."""
    num_rows, size = min(spec.num_sequences, sum(counts)), spec.rows_per_shard
    validation_rows = min(spec.validation_rows, sum(held_out))
    if spec.validation_rows and not validation_rows:
        raise SourceError("corpus.validation_rows: the last part of the text gives no row; add documents or set it to 0")
    return plan_shards(counts, num_rows=num_rows, rows_per_shard=size), plan_shards(
        held_out, num_rows=validation_rows, rows_per_shard=size, first_row=num_rows, first_unit=len(counts), name="validation"
    )


def _stage_documents(job: ShardJob, staged: Path, *, cache: Path) -> list[Chunk]:
    """Segment and stage every document of the sources; return the chunks in corpus order."""
    sources = job.spec.sources
    chunks, counts = list[Chunk](), [Counter[str]() for _ in sources]
    for done in stream(plan_read_tasks(sources, cache=cache), [read_chunks, partial(stage, folder=staged, policy=job.policy)]):
        if "counts" in done:
            counts[done["place"]].update(done["counts"])
        else:
            chunks.append(done["chunk"])
    for source, found in zip(sources, counts, strict=True):
        check_kept(source, found)
    return sorted(chunks, key=lambda chunk: chunk.name)


def _split(spec: CorpusSpec, staged: Path, chunks: Sequence[Chunk]) -> tuple[int, int]:
    """Return the character where the held-out text begins, and the number of characters."""
    num_chars = sum(chunk.num_chars for chunk in chunks)
    if not spec.validation_rows:
        return num_chars, num_chars
    share = spec.validation_rows / (spec.num_sequences + spec.validation_rows)
    least = (spec.sequence_len + REACH_TOKENS) * CHARS_PER_TOKEN
    return held_out_from(StagedCorpus(staged, chunks), num_chars=num_chars, share=share, least_chars=least), num_chars


def _pack_needle_rows(job: ShardJob, *, staged: Path, packed: Path, chunks: Sequence[Chunk], progress: Progress) -> Units:
    """Pack every row of ``needle_sft`` into files, in row order."""
    spec, items = job.spec, list[JsonObject]()
    border, num_chars = _split(spec, staged, chunks)
    size = max(1, TOKENS_PER_UNIT // spec.sequence_len)
    for held_out, rows, begin, end in ((False, spec.num_sequences, 0, border), (True, spec.validation_rows, border, num_chars)):
        for first in range(0, rows, size):
            place = {"unit": len(items), "first": first, "last": min(first + size, rows)}
            items.append({**place, "held_out": held_out, "begin": begin, "end": end})
    transform = partial(make_needle_rows, job=job, staged=staged, chunks=chunks, packed=packed)
    units = _packed_files(items, transform, made=0, rows=spec.num_sequences, progress=progress)
    number = sum(not item["held_out"] for item in items)
    return units[:number], units[number:]


def _pack_language_rows(job: ShardJob, *, staged: Path, packed: Path, chunks: Sequence[Chunk], progress: Progress) -> Units:
    """Pack rows of ``language_modeling`` into files, chunk by chunk in an order drawn from the seed, until there are enough."""
    border, num_chars = _split(job.spec, staged, chunks)
    transform = partial(make_language_rows, job=job, staged=staged, packed=packed)
    pack = partial(_pack_between, job=job, chunks=chunks, transform=transform)
    units = pack(0, border, rows=job.spec.num_sequences, unit=0, progress=progress)
    return units, pack(border, num_chars, rows=job.spec.validation_rows, unit=len(units), progress=lambda made, wanted: None)


def _pack_between(
    begin: int, end: int, *, rows: int, job: ShardJob, chunks: Sequence[Chunk], transform: Transform, unit: int, progress: Progress
) -> list[JsonObject]:
    """Pack ``rows`` rows, or as many as there are, from the text between two characters of the corpus."""
    offsets = accumulate((chunk.num_chars for chunk in chunks), initial=0)
    parts: list[JsonObject] = [
        {"chunk": chunk.name, "begin": max(0, begin - offset), "end": min(chunk.num_chars, end - offset)}
        for chunk, offset in zip(chunks, offsets, strict=False)
        if offset < end and offset + chunk.num_chars > begin
    ]
    waiting = sorted(parts, key=lambda part: digest([job.seed, part["chunk"]]))
    units, made = list[JsonObject](), 0
    while waiting and made < rows:
        chars, items = (rows - made) * job.spec.sequence_len * CHARS_PER_TOKEN, list[JsonObject]()
        while waiting and chars > 0:
            part = waiting.pop(0)
            items.append({"unit": unit + len(items), **part})
            chars -= part["end"] - part["begin"]
        unit += len(items)
        units += _packed_files(items, transform, made=made, rows=rows, progress=progress)
        made = sum(done["rows"] for done in units)
    return units


def _packed_files(items: Sequence[JsonObject], transform: Transform, *, made: int, rows: int, progress: Progress) -> list[JsonObject]:
    """Return the packed files of ``items`` in order, and report the rows that are made, after ``made`` earlier ones, of ``rows``."""
    files = list[JsonObject]()
    for done in stream(items, [transform]):
        files.append(done)
        made += done["rows"]
        progress(min(made, rows), rows)
    return sorted(files, key=lambda done: int(done["unit"]))


# ---- training and evaluation held apart


def _overlap(job: ShardJob, shards: ShardSet) -> JsonObject:
    """Return documents and rows of the set that the evaluation uses too; they are cached in the set's folder, for each evaluation."""
    cached = shards.folder / f"evaluation-{job.evaluation.digest}.json"
    if cached.is_file():
        return read_json(cached)
    rows: list[int] = []
    if job.evaluation.needles:
        search = partial(find_needles, job=job, folder=shards.folder, needles=job.evaluation.needles)
        for found in stream([{"file": path.name} for path in shards.paths], [search]):
            rows += found["rows"]
    documents = overlapping_documents(shards.folder / DOCUMENTS, job.evaluation.document_digests)
    overlap: JsonObject = {"documents": documents, "rows": sorted(rows)}
    write_json(cached, overlap)
    return overlap


def _refuse_shared_documents(job: ShardJob, documents: Sequence[str]) -> None:
    if documents:
        _refuse_unless_allowed(
            job,
            f"{len(documents)} of its documents are in the evaluation's haystack too (first: {documents[0]}); "
            "give corpus and haystack other shares (from_percent, to_percent)",
        )


def _refuse_unless_allowed(job: ShardJob, what: str) -> None:
    if not job.spec.allow_evaluation_overlap:
        raise SpecError(f"corpus: {what}, or set corpus.allow_evaluation_overlap: true, which every report will say")
