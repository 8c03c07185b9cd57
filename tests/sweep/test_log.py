"""The search's log keeps every event that was written to its end, whatever happened to the one after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.core.errors import StorageError
from pause_ray.sweep.search_log import SearchLog

ASKED = {"event": "asked", "round": 0, "points": [{"pauses.every": 1}]}
TOLD = {"event": "told", "point": {"pauses.every": 1}, "value": None}


def test_events_come_back_in_order_whoever_reads(tmp_path: Path) -> None:
    log = SearchLog(tmp_path / "sweep")
    assert log.events() == []
    log.append(ASKED)
    log.append(TOLD)
    assert log.events() == SearchLog(tmp_path / "sweep").events() == [ASKED, TOLD]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_line_that_was_cut_off_counts_as_not_written(tmp_path: Path, cut: int) -> None:
    log = SearchLog(tmp_path)
    log.append(ASKED)
    log.append(TOLD)
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    again = SearchLog(tmp_path)
    assert again.events() == [ASKED]
    again.append(TOLD)
    assert SearchLog(tmp_path).events() == [ASKED, TOLD]


def test_a_damaged_line_is_told_with_its_number(tmp_path: Path) -> None:
    log = SearchLog(tmp_path)
    log.append(ASKED)
    log.path.write_bytes(b"{}}\n" + log.path.read_bytes())
    with pytest.raises(StorageError, match=r"search\.jsonl: line 1 "):
        log.events()
