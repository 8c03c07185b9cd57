"""Which sweeps are the same one, and so go on in the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.spec import JsonObject
from pause_ray.storage import Storage
from pause_ray.sweep.rounds import Rounds
from pause_ray.sweep.spec import read_sweep
from tests.sweep.stubs import write_stub_sweep

ASHA = {"kind": "asha", "rungs": 2, "reduction": 2}


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stub_sweep(tmp_path_factory.mktemp("texts"))


def folder_of(sweep: Path, overrides: JsonObject) -> str:
    """Name of the folder in which it would run."""
    storage = Storage(sweep.parent / "runs")
    return Rounds(read_sweep(sweep, overrides), storage=storage, command="", showing=lambda done, total: None).folder.name


def test_stops_and_rungs_of_one_scheduler_are_nothing_to_another_or_to_none(stubbed: Path) -> None:
    """What it stopped stays out of a folder's sweep for ever, and the number of a rung says nothing of its step."""
    others: list[JsonObject] = [
        {},
        {"scheduler": ASHA},
        {"scheduler": {**ASHA, "kind": "median"}},
        {"scheduler": {**ASHA, "rungs": 1}},
        {"scheduler": {**ASHA, "proxy": {"facts": 8}}},
        {"scheduler": ASHA, "objective.mode": "min"},
    ]
    assert len({folder_of(stubbed, overrides) for overrides in others}) == len(others)


@pytest.mark.parametrize("overrides", [{"max_concurrent_trials": 2}, {"trial_timeout_minutes": 5}, {"objective.metric": "score_middle"}])
def test_where_and_how_long_it_runs_and_what_is_made_of_it_changes_no_sweep(stubbed: Path, overrides: JsonObject) -> None:
    assert folder_of(stubbed, overrides) == folder_of(stubbed, {})
