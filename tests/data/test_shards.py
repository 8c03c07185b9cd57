"""Shard sets: what is written is read back, by global row number, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pause_ray.core.errors import SourceError, StorageError
from pause_ray.core.storage import MANIFEST, read_json, whole_file, write_json
from pause_ray.data.shards import GROUP_ROWS, NO_LOSS, PackedRow, ShardSet, rows_to_table, seal, write_rows


def some_rows(count: int) -> list[PackedRow]:
    """Rows of different lengths that name their own number."""
    made = []
    for number in range(count):
        ids = np.arange(number, number + 2 + number % 7, dtype=np.int32)
        labels = np.where(np.arange(len(ids)) < 1, NO_LOSS, ids).astype(np.int32)
        made.append(
            PackedRow(
                input_ids=ids,
                labels=labels,
                num_pauses=number % 3,
                num_documents=1 + number % 2,
                content_tokens=len(ids),
                longest_stretch_tokens=number,
                document_starts=np.arange(1 + number % 2, dtype=np.int32),
            )
        )
    return made


def write_set(folder: Path, rows: list[PackedRow], *, rows_per_shard: int) -> ShardSet:
    folder.mkdir(parents=True)
    paths = []
    for start in range(0, len(rows), rows_per_shard):
        paths.append(folder / f"rows-{start}.parquet")
        write_rows(paths[-1], [rows_to_table(rows[start : start + rows_per_shard], first_row=start)])
    seal(folder, shards=paths, manifest={"made_by": "a test"})
    return ShardSet.open(folder)


def same(left: PackedRow, right: PackedRow) -> bool:
    return (
        np.array_equal(left.input_ids, right.input_ids)
        and np.array_equal(left.labels, right.labels)
        and np.array_equal(left.document_starts, right.document_starts)
        and left.input_ids.dtype == right.input_ids.dtype == left.document_starts.dtype == np.int32
        and (left.num_pauses, left.num_documents, left.content_tokens, left.longest_stretch_tokens)
        == (right.num_pauses, right.num_documents, right.content_tokens, right.longest_stretch_tokens)
    )


@pytest.mark.parametrize("rows_per_shard", [1, 7, GROUP_ROWS, 100])
def test_rows_come_back_by_their_number_however_the_set_is_cut(tmp_path: Path, rows_per_shard: int) -> None:
    written = some_rows(2 * GROUP_ROWS + 3)
    shards = write_set(tmp_path / "set", written, rows_per_shard=rows_per_shard)
    assert shards.num_rows == len(written)
    assert shards.manifest["made_by"] == "a test"
    assert all(same(read, row) for read, row in zip(shards.rows(range(len(written))), written, strict=True))
    order = [5, 0, len(written) - 1, 5]
    assert all(same(read, written[index]) for read, index in zip(shards.rows(order), order, strict=True))


def test_held_out_rows_stand_behind_the_training_rows(tmp_path: Path) -> None:
    folder, rows = tmp_path / "set", some_rows(7)
    folder.mkdir()
    paths = [folder / "rows.parquet", folder / "validation.parquet"]
    for path, part, first in zip(paths, (rows[:5], rows[5:]), (0, 5), strict=True):
        write_rows(path, [rows_to_table(part, first_row=first)])
    seal(folder, shards=paths[:1], validation_shards=paths[1:], manifest={})
    shards = ShardSet.open(folder)
    assert (shards.num_rows, shards.validation_rows) == (5, 2)
    assert all(same(shards.row(number), rows[number]) for number in range(7))
    with pytest.raises(IndexError, match="of 7"):
        shards.row(7)


def test_shards_of_another_format_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "set", some_rows(3), rows_per_shard=2)
    manifest = read_json(tmp_path / "set" / MANIFEST)
    del manifest["format"]
    write_json(tmp_path / "set" / MANIFEST, manifest)
    with pytest.raises(SourceError, match=r"format 1.*make them again"):
        ShardSet.open(tmp_path / "set")


@pytest.mark.parametrize("index", [-1, 4])
def test_a_row_outside_the_set_is_an_error(tmp_path: Path, index: int) -> None:
    shards = write_set(tmp_path / "set", some_rows(4), rows_per_shard=2)
    with pytest.raises(IndexError, match="of 4"):
        shards.row(index)


def test_a_folder_without_manifest_is_no_shard_set(tmp_path: Path) -> None:
    write_set(tmp_path / "set", some_rows(3), rows_per_shard=2)
    (tmp_path / "set" / MANIFEST).unlink()
    with pytest.raises(SourceError, match="no shard set"):
        ShardSet.open(tmp_path / "set")


def test_a_truncated_an_edited_and_a_missing_shard_are_told_apart(tmp_path: Path) -> None:
    shard = write_set(tmp_path / "set", some_rows(6), rows_per_shard=3).paths[1]
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-10])
    with pytest.raises(SourceError, match=f"{shard.name}: {len(intact) - 10} bytes"):
        ShardSet.open(tmp_path / "set")
    shard.write_bytes(intact[:40] + bytes([intact[40] ^ 1]) + intact[41:])
    with pytest.raises(SourceError, match=f"{shard.name}: its content"):
        ShardSet.open(tmp_path / "set")
    shard.unlink()
    with pytest.raises(SourceError, match=f"{shard.name}: missing"):
        ShardSet.open(tmp_path / "set")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk is full"), whole_file(tmp_path / "rows.parquet") as scratch:
        scratch.symlink_to("/dev/full")
        pq.write_table(rows_to_table(some_rows(2), first_row=0), scratch)
    assert list(tmp_path.iterdir()) == []


def test_the_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    sets = [write_set(tmp_path / name, some_rows(20), rows_per_shard=8) for name in "ab"]
    assert sets[0].manifest["shards"] == sets[1].manifest["shards"]


def test_the_longest_row_of_all_shards_is_known(tmp_path: Path) -> None:
    from tests.training.tiny_llama import make_rows, make_shards

    rows = make_rows(21)
    assert ShardSet.open(make_shards(tmp_path / "set", rows)).longest_row_tokens() == max(len(row.input_ids) for row in rows)
