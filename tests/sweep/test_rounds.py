"""Which sweeps are the same one, and so go on in the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage, write_json
from pause_ray.evaluation.ledger import Ledger
from pause_ray.sweep.search import SweepTrials
from pause_ray.sweep.spec import read_sweep
from tests.evaluation.answered_rows import row
from tests.evaluation.tiny import STOCK
from tests.sweep.stubs import write_stub_sweep

ASHA = {"kind": "asha", "grace_period": 1, "reduction_factor": 3}


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stub_sweep(tmp_path_factory.mktemp("texts"))


def folder_of(sweep: Path, overrides: JsonObject) -> str:
    """Name of the folder in which it would run."""
    storage = Storage(sweep.parent / "runs")
    return SweepTrials(read_sweep(sweep, overrides), storage=storage, command="", progress=lambda done, total: None).folder.name


def test_stops_and_rungs_of_one_scheduler_are_nothing_to_another_or_to_none(stubbed: Path) -> None:
    """What it stopped stays out of a folder's sweep for ever, and the number of a rung says nothing of its step."""
    others: list[JsonObject] = [
        {},
        {"scheduler": ASHA},
        {"scheduler": {**ASHA, "reduction_factor": 2}},
        {"scheduler": {**ASHA, "proxy": {"facts": 8}}},
        {"scheduler": ASHA, "objective.mode": "min"},
    ]
    assert len({folder_of(stubbed, overrides) for overrides in others}) == len(others)


@pytest.mark.parametrize("overrides", [{"max_concurrent_trials": 2}, {"trial_timeout_minutes": 5}, {"objective.metric": "score_middle"}])
def test_where_and_how_long_it_runs_and_what_is_made_of_it_changes_no_sweep(stubbed: Path, overrides: JsonObject) -> None:
    assert folder_of(stubbed, overrides) == folder_of(stubbed, {})


def test_points_that_are_the_same_trial_have_its_value_in_one_round_and_in_two(stubbed: Path, tmp_path: Path) -> None:
    """Of rows per step and steps that are added up only the product counts."""
    same: list[JsonObject] = [{"train.micro_batch_size": size, "train.gradient_accumulation_steps": 4 // size} for size in (1, 2, 4)]
    space: JsonObject = {"train.micro_batch_size": {"int": [1, 4]}, "train.gradient_accumulation_steps": {"int": [1, 4]}}
    changes: JsonObject = {
        "search": space,
        "algorithm": {"kind": "tpe", "points": 3, "random_points": 2, "at_a_time": 2},
        "arms": {},
        "trial.corpus.num_sequences": 16,
    }
    storage = Storage(tmp_path)
    trials = SweepTrials(read_sweep(stubbed, changes), storage=storage, command="", progress=lambda done, total: None)
    for number, points in enumerate([same[:2], same[2:]]):
        trials.log.append({"event": "asked", "round": number, "points": points})
    [(key, trial)] = trials.next_round().items()
    ledger = Ledger(storage.trials / key / "cells.jsonl")
    for number, cell in enumerate(trial.prepared.cells):
        ledger.append(row(number, STOCK.needle, cell_id=cell.id))
    write_json(storage.trials / key / "manifest.json", {})
    assert trials.next_round() == {}
    told = [event for event in trials.log.events() if event["event"] == "told"]
    assert [event["point"] for event in told] == same
    [value] = {event["value"] for event in told}
    assert value is not None
