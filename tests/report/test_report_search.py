"""What the report says of a search: its best trial, what is worth its price, and what was stopped on which evidence."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pause_ray.core.storage import Storage
from pause_ray.report.findings import notes
from pause_ray.report.html import arms_csv, page, table, write_report
from pause_ray.report.ranking import export_best
from pause_ray.report.results import read_results
from tests.report.test_html import shown_of
from tests.stored_sweep import rows, rung_event, stop_event, store_search, store_sweep, store_trial, sweep_of

GRID = {(1024, 10.0): 1.0, (1024, 50.0): 0.5}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path)


def searched(storage: Storage, **spec: Any) -> Path:
    """Four pause-tuned points, one of them stopped, and a baseline."""
    store_trial(storage, "base", rows(dict.fromkeys(GRID, 0.25), trial="base"))
    for number, score in ((1, 0.5), (2, 1.0), (3, 0.75)):
        log = [{"step": 1, "loss": 1.0, "seconds": 1.0, "tokens": 1000 * number}]
        its = rows(dict.fromkeys(GRID, score), trial=f"p{number}", prompt_tokens=1024 + 64 * number)
        store_trial(storage, f"p{number}", its, trained=True, pauses=True, training=log)
    planned = [("base", "baseline", {}, 0), *((f"p{number}", "paused", {"pauses.every": number}, 0) for number in range(4))]
    folder = store_sweep(storage, planned, spec={"arm": "paused", **spec})
    scores = [rung_event(f"p{number}", 0, number / 4) for number in range(4)]
    store_search(folder, [*scores, stop_event("p0", 0), *(rung_event(f"p{number}", 1, number / 3) for number in (1, 2, 3))])
    return folder


def test_the_best_trial_is_named_and_where_it_is(storage: Storage) -> None:
    folder = searched(storage)
    best = "Best trial by the sweep’s objective, highest score: paused every=2, 1.00 (95 % interval 0.34 to 1.00)"
    assert best in shown_of(folder, storage)
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    console.print(table(read_results(folder, storage)))
    assert "Best by highest score: paused every=2, 1.00 [0.34, 1.00] (chosen as the best of" in console.export_text()
    assert "is in best/" not in shown_of(folder, storage)


def test_an_export_is_pointed_to_when_it_is_there(storage: Storage) -> None:
    folder = sweep_of(storage, {"baseline": 0.5, "other": 0.75})
    export_best(read_results(folder, storage), storage)
    assert "Nothing was trained, so best/ holds the best trial’s spec alone." in shown_of(folder, storage)


def test_the_front_is_in_the_report_with_what_beats_the_others(storage: Storage) -> None:
    shown = shown_of(searched(storage), storage)
    assert "Score against token overhead" in shown
    assert "Score against training cost" in shown
    overhead = shown[shown.index("Score against token overhead") : shown.index("Score against training cost")]
    # Pauses cost 6, 12 and 19 %; every=3 costs most and scores less than every=2, on two questions, which is not sure.
    assert overhead.count(" yes") == 3
    assert "no, not significant: dominated by paused every=2 +0.25" in overhead
    assert overhead.count("yes, not significant") == 2  # two questions do not show that the dearer ones are worth it
    lines = {row["pauses.every"]: row for row in csv.DictReader(io.StringIO(arms_csv(read_results(searched_folder(storage), storage))))}
    assert {key: row["overhead_front"] for key, row in lines.items()} == {"": "yes", "0": "", "1": "yes", "2": "yes", "3": "no"}
    assert lines["2"]["trained_tokens"] == "2000.0"


def searched_folder(storage: Storage) -> Path:
    [folder] = storage.sweeps.iterdir()
    return folder


def test_what_was_stopped_is_shown_as_stopped_and_not_as_missing(storage: Storage) -> None:
    folder = searched(storage)
    results, shown = read_results(folder, storage), shown_of(folder, storage)
    assert "4 of 5 trials finished, 1 stopped early" in shown
    assert "not finished" not in shown
    assert "paused every=0 stopped early" in shown
    assert not any(note.startswith("Unfinished") for note in notes(results))
    assert any("they have no score on the full grid" in note for note in notes(results))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(read_results(folder, storage)))
    assert "stopped early" in console.export_text()


def test_rungs_are_labelled_as_a_proxy_and_compared_with_the_full_grid(storage: Storage) -> None:
    shown = shown_of(searched(storage), storage)
    rungs = shown[shown.index("Early stopping") :]
    assert "scored on a proxy" in rungs
    assert "Rung 0 proxy, step 10 Rung 1 proxy, step 30 Full grid score" in rungs
    assert "paused every=0 0.00 – – stopped at rung 0 by asha" in rungs
    assert "paused every=2 0.50 0.67 1.00 full grid" in rungs
    assert "The proxy took 7 cells" not in rungs
    assert "The proxy took 112 cells, 28,000 prefilled tokens" in rungs
    agreement = rungs[rungs.index("Does the proxy rank") :]
    assert "0 10 3 1 +0.33" in agreement  # of 0.5, 1.0 and 0.75 the proxy swaps the last two
    assert "1 30 3 0 +0.33" in agreement


def test_a_sweep_without_a_scheduler_says_nothing_of_rungs(storage: Storage) -> None:
    shown = shown_of(sweep_of(storage, {"baseline": 0.5, "other": 0.75}), storage)
    assert "Rung" not in shown
    assert "proxy" not in shown


@pytest.mark.seconds
def test_the_report_stands_alone_with_its_figure_of_costs(storage: Storage) -> None:
    folder = searched(storage)
    path = write_report(read_results(folder, storage))
    assert (folder / "figures" / "fronts.svg").is_file()
    assert path.read_text().count("data:image/svg+xml;base64,") >= 4
    assert "stopped early" in page(read_results(folder, storage), {})
