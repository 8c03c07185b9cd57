"""The ledger keeps every answer once, through interrupted writes and full disks."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pause_ray.core.errors import StorageError
from pause_ray.evaluation.ledger import CellResult, FactResult, Ledger, to_parquet


def result(number: int, **changes: object) -> CellResult:
    values = {
        "cell_id": f"cell{number}",
        "task": "tiny",
        "arm": "baseline",
        "replicate": 0,
        "seed": 0,
        "model": "m",
        "adapter": None,
        "pauses": "none",
        "context_tokens": 1024,
        "prompt_tokens": 1024,
        "content_tokens": 1000,
        "num_pauses": 0,
        "rule": "blank_line+glued",
        "depth_percent": 50.0,
        "needle_token": 500,
        "facts": (FactResult(text="The word is café.", references=("café",), depth_percent=50.0, token=500, score=1.0),),
        "question": "Which word?",
        "references": ("café",),
        "response": "café\n\u2028line",
        "score": 1.0,
        "rubric": 10,
        "unscored_reason": None,
        "scorer": "keywords",
        "engine": "scripted",
        "prefilled_tokens": 1024,
        "decoded_tokens": 3,
        "seconds": 0.5,
    }
    return CellResult(**(values | changes))  # type: ignore[arg-type]


def unscored(number: int, **changes: object) -> CellResult:
    return result(number, **({"response": None, "score": None, "rubric": None, "unscored_reason": "out of memory"} | changes))


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """Files of this process may not grow beyond ``num_bytes``: writes come back short, then fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_come_back_as_they_were_in_their_order(tmp_path: Path) -> None:
    written = [result(0), unscored(1), result(2, references=("a", "b"))]
    for row in written:
        Ledger(tmp_path / "trial" / "cells.jsonl").append(row)
    assert Ledger(tmp_path / "trial" / "cells.jsonl").rows() == written
    assert Ledger(tmp_path / "trial" / "cells.jsonl").done_ids() == {"cell0", "cell2"}


def test_no_file_is_an_empty_ledger(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "cells.jsonl").rows() == []
    assert list(tmp_path.iterdir()) == []


def test_a_cell_is_kept_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "cells.jsonl")
    ledger.append(result(0))
    for writer in (ledger, Ledger(ledger.path)):
        with pytest.raises(ValueError, match="cell0 is already in"):
            writer.append(result(0, response="another"))
    assert ledger.rows() == [result(0)]


def test_a_cell_that_could_not_be_scored_is_not_done_and_its_later_row_stands_for_it(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    for row in (unscored(0), result(1), unscored(0, unscored_reason="lost")):
        Ledger(path).append(row)
    assert Ledger(path).done_ids() == {"cell1"}
    assert Ledger(path).rows() == [result(1), unscored(0, unscored_reason="lost")]
    ledger = Ledger(path)
    ledger.append(result(0))
    assert ledger.rows() == [result(1), result(0)]
    assert ledger.done_ids() == {"cell0", "cell1"}
    for writer in (ledger, Ledger(path)):
        with pytest.raises(ValueError, match="cell0 is already in"):
            writer.append(unscored(0))


def test_a_row_of_another_version_is_an_error_that_names_the_column(tmp_path: Path) -> None:
    row = dataclasses.asdict(result(0)) | {"needle": "The word is café."}
    (tmp_path / "cells.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(StorageError, match=r"line 1 is no cell result .*'needle'"):
        Ledger(tmp_path / "cells.jsonl").rows()


def test_wherever_the_last_write_stopped_the_other_rows_are_there_and_its_cell_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    for number in range(2):
        Ledger(path).append(result(number))
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for length in [first_line, *range(first_line + 1, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert Ledger(path).done_ids() == {"cell0"}
        assert path.read_bytes() == whole[:length], "reading must not touch a file that another process may be writing"
        Ledger(path).append(result(1))
        assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    for number in range(3):
        Ledger(path).append(result(number))
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (b'{"cell_id": "cell1"}\n', lines[1][:40] + b"\n", b"\n", b"\xff\n", b"[]\n"):
        path.write_bytes(lines[0] + broken + lines[2])
        with pytest.raises(StorageError, match=r"cells.jsonl: line 2 "):
            Ledger(path).rows()


def test_a_doubled_line_is_an_error_that_names_the_cell(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Ledger(path).append(result(0))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(StorageError, match="line 2 has cell cell0 for the second time"):
        Ledger(path).rows()


def test_a_full_disk_is_an_error_and_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "cells.jsonl")
    ledger.append(result(0))
    before = ledger.path.read_bytes()
    with disk_of(len(before) + 100), pytest.raises(StorageError, match=r"cells.jsonl.*free space"):
        ledger.append(result(1))
    assert ledger.path.read_bytes() == before
    ledger.append(result(1))
    assert ledger.rows() == [result(0), result(1)]


@pytest.mark.parametrize("changes", [{"score": None}, {"score": 1.5}, {"unscored_reason": "lost"}])
def test_a_result_has_a_score_between_0_and_1_or_a_reason(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cell0"):
        result(0, **changes)


def test_the_table_holds_every_column_of_every_row(tmp_path: Path) -> None:
    rows = [unscored(0), result(1)]
    to_parquet(rows, tmp_path / "tables" / "cells.parquet")
    table = pq.read_table(tmp_path / "tables" / "cells.parquet")
    assert table.column_names == [field.name for field in dataclasses.fields(CellResult)]
    assert [CellResult.from_row(row) for row in table.to_pylist()] == rows
    to_parquet([], tmp_path / "none.parquet")
    assert pq.read_table(tmp_path / "none.parquet").schema == table.schema
