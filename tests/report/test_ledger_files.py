"""Arms found by what people call them, compared on whatever ledgers they are, and shown in 80 columns."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from pause_ray.core.errors import StorageError, UserError
from pause_ray.core.storage import Storage
from pause_ray.evaluation.ledger import CellResult, Ledger
from pause_ray.report.comparison import (
    ComparedArm,
    compare_ledgers,
    comparison_json,
    comparison_notes,
    comparison_view,
    find_arm,
    find_sweep,
)
from tests.stored_sweep import cell, grid, rows, store_sweep, store_trial

LENGTHS, DEPTHS = (1024, 2048), (10.0, 50.0, 90.0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "runs")


def arm_rows(arm: str, score: float, *, replicate: int = 0, trial: str = "") -> list[CellResult]:
    return rows(grid(LENGTHS, DEPTHS, lambda *_: score), trial=trial or f"{arm}{replicate}", arm=arm, replicate=replicate)


def write(path: Path, results: Sequence[CellResult]) -> Path:
    ledger = Ledger(path)
    for result in results:
        ledger.append(result)
    return path


def a_sweep(storage: Storage) -> Path:
    """A baseline and a tuned arm at two ranks, two replicates each; the last trial is not finished."""
    planned = [(f"b{r}", "baseline", {}, r) for r in (0, 1)]
    planned += [(f"t{rank}{r}", "pause_tuned", {"pauses.every": 1, "train.lora.rank": rank}, r) for rank in (4, 16) for r in (0, 1)]
    planned.append(("late", "random", {}, 0))
    for trial, arm, _, replicate in planned[:-1]:
        store_trial(storage, trial, arm_rows(arm, 0.5, replicate=replicate, trial=trial))
    return store_sweep(storage, planned)


def shown(result: list[ComparedArm], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(comparison_view(result, width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_file_a_trial_and_a_folder_of_replicates_are_arms(tmp_path: Path, storage: Storage) -> None:
    one = write(tmp_path / "one.jsonl", arm_rows("x", 1.0))
    write(tmp_path / "trial" / "cells.jsonl", arm_rows("x", 1.0))
    for replicate in (0, 1):
        write(tmp_path / "runs of x" / f"r{replicate}.jsonl", arm_rows("x", 1.0, replicate=replicate))
        write(tmp_path / "trials of x" / f"t{replicate}" / "cells.jsonl", arm_rows("x", 1.0, replicate=replicate))
    assert find_arm(str(one), storage).ledgers == (one,)
    assert len(find_arm(str(tmp_path / "trial"), storage).rows) == 6
    for folder in ("runs of x", "trials of x"):
        found = find_arm(str(tmp_path / folder), storage)
        assert len(found.ledgers) == 2
        assert {row.replicate for row in found.rows} == {0, 1}


def test_ledgers_of_one_replicate_number_are_replicates_by_their_order(tmp_path: Path, storage: Storage) -> None:
    for name in ("a", "b"):
        write(tmp_path / "x" / f"{name}.jsonl", arm_rows("x", 1.0, trial=name))
    found = find_arm(str(tmp_path / "x"), storage)
    assert {(row.cell_id[0], row.replicate) for row in found.rows} == {("a", 0), ("b", 1)}


def test_ledgers_of_one_replicate_that_have_different_cells_stay_one(tmp_path: Path, storage: Storage) -> None:
    early, late = arm_rows("x", 1.0)[:3], arm_rows("x", 1.0)[3:]
    write(tmp_path / "x" / "early.jsonl", early)
    write(tmp_path / "x" / "late.jsonl", late)
    assert {row.replicate for row in find_arm(str(tmp_path / "x"), storage).rows} == {0}


def test_a_folder_of_several_arms_or_of_copies_is_refused(tmp_path: Path, storage: Storage) -> None:
    write(tmp_path / "mixed" / "1.jsonl", arm_rows("base", 1.0))
    write(tmp_path / "mixed" / "2.jsonl", arm_rows("tuned", 1.0))
    with pytest.raises(UserError, match=r"several arms \(base, tuned\)"):
        find_arm(str(tmp_path / "mixed"), storage)
    for name in ("1", "2"):
        write(tmp_path / "copies" / f"{name}.jsonl", arm_rows("base", 1.0))
    with pytest.raises(UserError, match=r"2.jsonl and .*1.jsonl have the same rows"):
        find_arm(str(tmp_path / "copies"), storage)


def test_an_arm_of_a_sweep_is_found_by_the_beginnings_of_both_names(storage: Storage) -> None:
    folder = a_sweep(storage)
    whole = find_arm("demo:pause_tuned every=1 rank=4", storage)
    assert [path.parent.name for path in whole.ledgers] == ["t40", "t41"]
    assert len(whole.rows) == 12
    assert find_arm(f"{folder.name}:base", storage).rows == find_arm("de:baseline", storage).rows
    assert find_arm(f"{folder}:base", storage).rows == find_arm("de:baseline", storage).rows
    assert find_sweep("demo", storage) == find_sweep(str(folder), storage)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo:pause", "several arms have labels that begin with this; .*pause_tuned every=1 rank=4; pause_tuned every=1 rank=16"),
        ("demo:nothing", "no such arm; .*baseline; pause_tuned every=1 rank=4; .*random"),
        ("demo", "names no arm; .*one of: baseline; "),
        ("demo:", "names no arm"),
        ("demo:random", "none of its 1 trials has finished"),
        ("other:baseline", "no such sweep .*demo-0011223344556677"),
        ("nowhere.jsonl", "no such ledger file.*demo-0011223344556677"),
    ],
)
def test_what_is_not_found_is_answered_with_what_there_is(storage: Storage, name: str, message: str) -> None:
    a_sweep(storage)
    with pytest.raises(UserError, match=message):
        find_arm(name, storage)


def test_a_ledger_that_answers_a_question_twice_is_refused(tmp_path: Path, storage: Storage) -> None:
    both = write(tmp_path / "both.jsonl", [*arm_rows("one", 0.5), *arm_rows("two", 1.0)])
    with pytest.raises(UserError, match=r"both.jsonl: has 2 answers of replicate 0 for single at 1024 tokens .*\(arms: one and two\)"):
        find_arm(str(both), storage)


def test_ledgers_of_several_replicates_each_are_counted_through(tmp_path: Path, storage: Storage) -> None:
    for name in "xy":
        write(tmp_path / f"{name}.jsonl", [cell(1024, 50, 1.0, trial=f"{name}{number}", replicate=number) for number in (0, 1)])
    found = find_arm(str(tmp_path), storage).rows
    assert [(row.cell_id[:2], row.replicate) for row in found] == [("x0", 0), ("x1", 1), ("y0", 2), ("y1", 3)]


def test_a_name_that_is_one_sweeps_whole_name_is_that_sweep(storage: Storage) -> None:
    folder = store_sweep(storage, [])
    store_sweep(storage, [], name="demo_long")
    assert find_sweep("demo", storage) == folder
    with pytest.raises(UserError, match="several sweeps have names that begin with this"):
        find_sweep("dem", storage)


def test_empty_and_broken_ledgers_are_named(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"cell_id": "x"}\n')
    with pytest.raises(StorageError, match=r"empty.jsonl: has no rows"):
        find_arm(str(tmp_path / "empty.jsonl"), storage)
    with pytest.raises(UserError, match="has no ledger"):
        find_arm(str(tmp_path / "folder"), storage)
    with pytest.raises(StorageError, match=r"broken.jsonl: line 1"):
        find_arm(str(tmp_path / "broken.jsonl"), storage)


@pytest.fixture
def three(tmp_path: Path, storage: Storage) -> list[ComparedArm]:
    """A scores 0.25 everywhere; B 1; C was asked something else."""
    a = write(tmp_path / "a.jsonl", arm_rows("baseline", 0.25))
    b = write(tmp_path / "b.jsonl", arm_rows("pause_tuned", 1.0))
    c = write(tmp_path / "c.jsonl", [cell(8192, 50, 1.0, trial="c", task="multi")])
    return compare_ledgers([str(a), str(b), str(c)], storage)


def test_all_are_compared_with_the_first_and_what_cannot_be_is_said(three: list[ComparedArm]) -> None:
    _, b, c = three
    assert b.contrast is not None
    assert b.comparison is not None
    # Six questions, all better by 0.75: 2 of 64 sign patterns; only this comparison could be made, so that Holm's factor is 1.
    assert (b.comparison.difference, b.comparison.p, b.contrast.corrected_p) == (0.75, 2 / 64, 2 / 64)
    assert b.contrast.differs
    assert c.comparison is None
    assert any(
        "C cannot be compared with A: the arms have no tasks in common: multi against single" in note for note in comparison_notes(three)
    )
    assert any("one replicate" in note for note in comparison_notes(three))


def test_corrected_p_counts_the_arms(tmp_path: Path, storage: Storage) -> None:
    names = [str(write(tmp_path / f"{arm}.jsonl", arm_rows(arm, score))) for arm, score in (("a", 0.25), ("b", 0.75), ("c", 0.5))]
    result = compare_ledgers(names, storage)
    assert [its.contrast.corrected_p for its in result if its.contrast] == [4 / 64, 4 / 64]
    assert not any(its.contrast.differs for its in result if its.contrast)


def test_the_table_fits_and_says_what_each_number_is(three: list[ComparedArm]) -> None:
    text = shown(three)
    assert max(len(line) for line in text.splitlines()) <= 80
    lines = {line.strip().split("  ")[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["cells scored"][-9:] == ["6", "of", "6", "6", "of", "6", "1", "of", "1"]
    assert lines["mean score"][-3:] == ["0.25", "1.00", "1.00"]
    # Rubrics: 1.5 + 9/4 cut off is 3, against 10.
    assert lines["paper's metric"][-3:] == ["+233.3", "%", "–"]
    assert lines["1,024"] == ["1,024", "0.25", "1.00", "+0.75", "–"]
    assert "pause_tuned" in text
    assert "note: C cannot be compared" in text


def test_many_arms_go_into_several_tables_and_a_wide_terminal_takes_more(tmp_path: Path, storage: Storage) -> None:
    names = [str(write(tmp_path / f"{arm}.jsonl", arm_rows(arm, score / 10))) for score, arm in enumerate("vwxyz", start=1)]
    result = compare_ledgers(names, storage)
    assert shown(result).count("paired questions") == 2
    assert shown(result, width=120).count("paired questions") == 1
    assert all(len(line) <= 120 for line in shown(result, width=120).splitlines())


def test_machines_get_everything_as_plain_json(three: list[ComparedArm]) -> None:
    data = json.loads(json.dumps(comparison_json(three), allow_nan=False))
    a, b, c = data["arms"]
    assert a["comparison"] is None
    assert (b["comparison"]["effects"]["difference"]["value"], b["differs"]) == (0.75, True)
    assert [(its["context_tokens"], its["value"]) for its in b["cells"]] == [(1024, 0.75)] * 3 + [(2048, 0.75)] * 3
    assert (b["spent"]["decoded_tokens"], b["spent"]["money"]) == (6 * 12, None)
    assert c["problem"].startswith("the arms have no tasks in common")
    assert b["ledgers"][0].endswith("b.jsonl")
    assert data["notes"] == comparison_notes(three)


def test_one_arm_is_not_enough(storage: Storage) -> None:
    with pytest.raises(UserError, match="takes 2 to 26 arms, given 1"):
        compare_ledgers(["x"], storage)
