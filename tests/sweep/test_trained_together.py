"""A sweep whose trials train together on one base: each is finished as it would be otherwise."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
import yaml

from pause_ray.checkpoint import Checkpoint
from pause_ray.storage import MANIFEST, read_json
from tests.sweep.tiny_sweep import answers, run_sweep_to_its_end, write_model, write_sweep

pytestmark = pytest.mark.ray


def test_trials_of_one_base_train_in_the_turn_of_the_first(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, write_model(tmp_path / "model"))
    spec = yaml.safe_load(sweep.read_text())
    del spec["trial"]["train"]["zero"]
    spec["trial"]["train"]["precision"] = "float32"
    sweep.write_text(yaml.safe_dump(spec | {"train_together": 2}))
    storage = tmp_path / "runs"
    run_sweep_to_its_end(sweep, storage)
    assert [len({row.cell_id for row in rows}) for rows in answers(storage).values()] == [6, 6, 6]
    trials = [read_json(path) for path in (storage / "trials").glob(f"*/{MANIFEST}")]
    adapters = [Checkpoint.open(Path(trial["checkpoint"])) for trial in trials if trial["checkpoint"]]
    assert len({adapter.folder for adapter in adapters}) == 2
    for adapter in adapters:
        assert [(row["step"], row["side_by_side"]) for row in adapter.losses()] == [(1, 2), (2, 2), (3, 2)]
    with contextlib.closing(sqlite3.connect(storage / "mlflow.db")) as store:
        logged = store.execute("select run_uuid, step from metrics where key = 'training_loss' order by run_uuid, step").fetchall()
    assert [step for _, step in logged] == [1, 2, 3, 1, 2, 3]
