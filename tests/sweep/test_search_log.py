"""The search log keeps every event that was written to its end; rungs and stops are read back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import StorageError
from pause_ray.sweep.search import SearchLog, SearchRecord
from tests.stored_sweep import rung_event, stop_event, store_search

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


def test_a_damaged_line_is_named_by_its_number(tmp_path: Path) -> None:
    log = SearchLog(tmp_path)
    log.append(ASKED)
    log.path.write_bytes(b"{}}\n" + log.path.read_bytes())
    with pytest.raises(StorageError, match=r"search\.jsonl: line 1 "):
        log.events()


def test_a_sweep_without_a_search_has_an_empty_record(tmp_path: Path) -> None:
    assert SearchRecord.read(tmp_path) == SearchRecord()


def test_rungs_and_stops_are_read_and_other_events_are_not(tmp_path: Path) -> None:
    asked = {"event": "asked", "round": 0, "points": [{}]}
    store_search(tmp_path, [asked, rung_event("a", 0, 0.5), rung_event("b", 0, None), stop_event("b", 0), rung_event("a", 1, 0.75)])
    record = SearchRecord.read(tmp_path)
    assert [(its.trial, its.rung, its.step, its.proxy_score) for its in record.rungs] == [
        ("a", 0, 10, 0.5),
        ("b", 0, 10, None),
        ("a", 1, 30, 0.75),
    ]
    assert {key: (its.rung, its.by) for key, its in record.stops.items()} == {"b": (0, "asha")}


def test_a_rung_that_was_scored_twice_counts_as_it_was_first(tmp_path: Path) -> None:
    store_search(tmp_path, [rung_event("a", 0, 0.5), rung_event("a", 0, 0.25)])
    assert [its.proxy_score for its in SearchRecord.read(tmp_path).rungs] == [0.5]


def test_a_line_that_is_being_written_is_passed_over_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    store_search(tmp_path, [rung_event("a", 0, 0.5)])
    path = tmp_path / "search.jsonl"
    path.write_text(path.read_text() + '{"event": "rung", "tri')
    assert len(SearchRecord.read(tmp_path).rungs) == 1
    path.write_text("no event\n" + path.read_text())
    with pytest.raises(StorageError, match=r"search.jsonl: line 1 .* remove the line"):
        SearchRecord.read(tmp_path)


def entry(key: str, arm: str, point: dict[str, Any], replicate: int = 0) -> dict[str, Any]:
    return {"digest": key, "arm": arm, "point": point, "replicate": replicate}


def test_trials_are_left_out_with_the_last_of_their_point(tmp_path: Path) -> None:
    store_search(tmp_path, [stop_event("p14", 0), stop_event("p18", 1), stop_event("p24", 1)])
    entries = [
        *(entry(f"p{every}{rank}", "paused", {"every": every, "rank": rank}) for every in (1, 2) for rank in (4, 8)),
        entry("p14-1", "paused", {"every": 1, "rank": 4}, replicate=1),
        entry("p28-1", "paused", {"every": 2, "rank": 8}, replicate=1),
        *(entry(f"u{every}", "untuned", {"every": every}) for every in (1, 2)),
        *(entry(f"t{rank}", "tuned", {"rank": rank}) for rank in (4, 8)),
        entry("base", "baseline", {}),
    ]
    sweep = {"trials": entries, "spec": {"arm": "paused"}}
    left_out = SearchRecord.read(tmp_path).left_out(sweep)
    assert left_out == {"p14", "p18", "p24", "p14-1", "u1", "t4"}
    assert SearchRecord().left_out(sweep) == set()
