"""What one task does, without Ray: shards cut from packed files, and needles found in rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import TextError
from pause_ray.data.documents import Document
from pause_ray.data.shards import PackedRow, ShardSet, row_statistics, rows_to_table, seal, table_to_rows, write_rows
from pause_ray.data.spec import CorpusSpec, ShardJob
from pause_ray.data.staging import stage_chunk
from pause_ray.data.transforms import cut_shard, find_needles, make_language_rows, plan_shards
from pause_ray.text.pauses import PausePolicy
from pause_ray.text.prompts import PromptSpec
from pause_ray.text.tokenizer import ModelTokenizer, insert_pauses, resolve_marker

SPEC = CorpusSpec.parse({"sources": [{"path": "x"}], "objective": "language_modeling"}, origin="test")


def row_of(ids: list[int]) -> PackedRow:
    tokens = np.array(ids, np.int32)
    return PackedRow(input_ids=tokens, labels=tokens, num_pauses=2, num_documents=1, content_tokens=4, longest_stretch_tokens=3)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 8), st.data())
def test_shards_hold_every_row_once_in_order(counts: list[int], rows_per_shard: int, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, sum(counts)))
    every = [(unit, row) for unit, count in enumerate(counts) for row in range(count)]
    plan = plan_shards(counts, num_rows=num_rows, rows_per_shard=rows_per_shard)
    shards = [[(unit, row) for unit, begin, end in item["slices"] for row in range(begin, end)] for item in plan]
    assert [row for shard in shards for row in shard] == every[:num_rows]
    assert all(len(shard) == rows_per_shard for shard in shards[:-1])
    assert [item["first_row"] for item in plan] == list(range(0, num_rows, rows_per_shard))
    behind = plan_shards(counts, num_rows=num_rows, rows_per_shard=rows_per_shard, first_row=7, first_unit=5, name="more")
    for item, moved in zip(plan, behind, strict=True):
        assert moved["first_row"] == item["first_row"] + 7
        assert moved["slices"] == [[unit + 5, begin, end] for unit, begin, end in item["slices"]]
        assert moved["file"].startswith("more-")


def test_a_shard_is_numbered_globally(tmp_path: Path) -> None:
    for unit, ids in enumerate([[1, 2, 3], [4, 5], [6]]):
        write_rows(tmp_path / f"{unit:07d}.parquet", [rows_to_table([row_of([token, token]) for token in ids], first_row=0)])
    out = tmp_path / "set"
    out.mkdir()
    plan = plan_shards([3, 2, 1], num_rows=5, rows_per_shard=4)
    for item in plan:
        assert list(cut_shard(item, packed=tmp_path, folder=out)) == [{"file": item["file"]}]
    seal(out, shards=[out / item["file"] for item in plan], manifest={})
    shards = ShardSet.open(out)
    assert [int(row.input_ids[0]) for row in shards.rows(range(5))] == [1, 2, 3, 4, 5]
    assert row_statistics(shards.paths, sequence_len=4)["pauses_per_1k_tokens"] == 1000 * 2 / 4


@pytest.mark.parametrize(
    "policy", [None, PausePolicy(unit="tokens", unit_tokens=5), PausePolicy(unit="tokens", unit_tokens=5, token="added")]
)
def test_a_needle_is_found_through_pauses_case_white_space_and_unicode_forms(
    tmp_path: Path, byte_model: Path, policy: PausePolicy | None
) -> None:
    tokenizer = ModelTokenizer.load(byte_model)
    job = ShardJob(spec=SPEC, prompt=PromptSpec(), policy=policy, model_dir=byte_model, tokenizer_digest=tokenizer.digest, seed=0)
    texts = [
        "Nothing is hidden here.",
        "Well: the OLD\nbridge  sings at night. So it is.",
        "The old bridge sings.",
        "The old bridge\u00a0sings at night\u2024 The \uff4fld bridge.",
    ]
    marker = resolve_marker(tokenizer, policy)
    encoded = [insert_pauses(tokenizer.encode(text), policy=policy, marker=marker, seed=0).ids for text in texts]
    write_rows(tmp_path / "rows.parquet", [rows_to_table([row_of(ids.tolist()) for ids in encoded], first_row=70)])
    found = list(find_needles({"file": "rows.parquet"}, job=job, folder=tmp_path, needles=["The old bridge sings at night."]))
    assert found == [{"rows": [71, 73]}]


def test_another_tokenizer_on_a_node_is_noticed(byte_model: Path) -> None:
    with pytest.raises(TextError, match="give every node the same files"):
        ShardJob(spec=SPEC, prompt=PromptSpec(), policy=None, model_dir=byte_model, tokenizer_digest="0" * 16, seed=0).tokenizer()


@pytest.mark.parametrize("end", [30, 40, 55, 80])
def test_a_document_that_goes_on_in_held_out_text_does_not_end_in_training_text(tmp_path: Path, byte_model: Path, end: int) -> None:
    tokenizer = ModelTokenizer.load(byte_model)
    job = ShardJob(spec=SPEC, prompt=PromptSpec(), policy=None, model_dir=byte_model, tokenizer_digest=tokenizer.digest, seed=0)
    texts = ["The old bridge sings at night, they say.", "And nobody knows why it does so in May."]
    stage_chunk(tmp_path, name="chunk", documents=[Document(id=text[:3], text=text) for text in texts], policy=None)
    whole = "".join(text + "<|text_end|>" for text in texts)

    def made(begin: int, end: int) -> str:
        [unit] = make_language_rows({"chunk": "chunk", "begin": begin, "end": end, "unit": 0}, job=job, staged=tmp_path, packed=tmp_path)
        assert unit["rows"] == 1
        [row] = table_to_rows(pq.read_table(tmp_path / "0000000.parquet"))
        return tokenizer.decode(row.input_ids, skip_special_tokens=False)

    trained, held_out = made(0, end), made(end, len("".join(texts))) if end < 79 else ""
    assert trained + held_out == whole
