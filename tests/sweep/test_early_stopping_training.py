"""A whole sweep with early stopping and real training, from the command line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pause_ray.models.checkpoint import Checkpoint
from pause_ray.sweep.search import SearchRecord
from tests.sweep.tiny_sweep import answers, run_sweep_to_its_end, write_model, write_sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 8
SCHEDULER = {"kind": "asha", "grace_period": 2, "reduction_factor": 2, "proxy": {"facts": 3}}


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    path = write_sweep(folder, write_model(folder / "model"), steps=STEPS)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"scheduler": SCHEDULER}))
    return path


def test_real_adapters_are_scored_at_every_rung(sweep_file: Path, tmp_path: Path) -> None:
    output = run_sweep_to_its_end(sweep_file, tmp_path)
    [folder] = (tmp_path / "sweeps").glob("tiny-*")
    record = SearchRecord.read(folder)
    entries: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["trials"]
    compared = [entry["digest"] for entry in entries if entry["arm"] == "pause_tuned"]
    assert [(rung.trial, rung.rung, rung.step) for rung in record.rungs] == [
        (key, rung, step) for key, (rung, step) in itertools.product(compared, enumerate((2, 4)))
    ], output
    assert {rung.num_cells for rung in record.rungs} == {3}
    assert not record.stops, "a random model finds no fact, so no trial is worse than another"
    assert {key: len(rows) for key, rows in answers(tmp_path).items()} == {entry["digest"]: 6 for entry in entries}
    adapters = [Checkpoint.open(path) for path in (tmp_path / "checkpoints").glob("[!.]*")]
    assert [adapter.num_steps for adapter in adapters] == [STEPS, STEPS]
    assert not [*(tmp_path / "checkpoints").glob(".*.training"), *(tmp_path / "checkpoints").glob(".*.after-*")], "unfinished ones stayed"
