"""Against real MLflow servers: one that dies in mid-sweep, and one on PostgreSQL behind basic auth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pause_ray.best import export_best
from pause_ray.cli import tracker as tracker_module
from pause_ray.cli.main import app
from pause_ray.cli.tracker import Tracker
from pause_ray.errors import TrackingError
from pause_ray.report import write_report
from pause_ray.storage import Storage, read_json, write_json
from pause_ray.tracking.sweeps import log_sweep
from tests.stored_sweep import rows, rung_event, stop_event, store_search, store_sweep, store_trial
from tests.tracking.mlflow_server import PASSWORD, USER, MlflowServer, postgres, what_auth_lacks, what_postgres_lacks
from tests.tracking.test_tracker import row, until
from tests.trained import store_checkpoint

pytestmark = pytest.mark.mlflow
GRID = {(1024, 10.0): 1.0, (1024, 50.0): 0.5, (2048, 10.0): 0.0, (2048, 50.0): None}


def planned(storage: Storage, *, num_trials: int) -> Path:
    """A baseline, pause-tuned trials that have not finished, and one that was stopped."""
    store_trial(storage, "base", rows(GRID, trial="base"))
    for number in range(num_trials):
        store_trial(storage, f"p{number}", rows(GRID, trial=f"p{number}"), trained=True, pauses=True, finished=False)
    trials = [("base", "baseline", {}, 0), *((f"p{number}", "paused", {"pauses.every": number}, 0) for number in range(num_trials + 1))]
    folder = store_sweep(storage, trials, spec={"arm": "paused"})
    stopped = f"p{num_trials}"
    store_search(folder, [rung_event(f"p{number}", 0, number / 10) for number in range(num_trials + 1)] + [stop_event(stopped, 0)])
    return folder


def finish(storage: Storage, trial: str) -> None:
    checkpoint = store_checkpoint(storage.checkpoints / f"adapter-{trial}")
    made = read_json(storage.trials / "base" / "manifest.json")
    training = [{"step": step, "loss": 3.0 / step, "seconds": 1.0} for step in (1, 2, 3)]
    write_json(storage.trials / trial / "manifest.json", {**made, "digest": trial, "checkpoint": str(checkpoint), "training": training})


def runs(uri: str) -> dict[str, Any]:
    """Digest → run; no digest has two, and no metric has a point twice."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("demo")
    found = client.search_runs([experiment.experiment_id], max_results=1000) if experiment else []
    by_digest = {run.data.tags["pause_ray.digest"]: run for run in found}
    assert len(by_digest) == len(found)
    return by_digest


def check_whole(uri: str, *, num_trials: int) -> None:
    from mlflow.tracking import MlflowClient

    client, found = MlflowClient(tracking_uri=uri), runs(uri)
    parent = found.pop("0011223344556677")
    assert set(found) == {"base", *(f"p{number}" for number in range(num_trials + 1))}
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert found.pop(f"p{num_trials}").info.status == "KILLED"
    for run in found.values():
        assert run.info.status == "FINISHED"
        assert {item.path for item in client.list_artifacts(run.info.run_id)} == {
            "spec.json",
            "manifest.json",
            "cells.parquet",
            "heatmap.png",
        }
    points = client.get_metric_history(found["p0"].info.run_id, "training_loss")
    assert [point.step for point in points] == [1, 2, 3]
    for name in ("score", "proxy_score", "cells"):
        assert len(client.get_metric_history(found["p0"].info.run_id, name)) == 1
    assert "figures/differences.png" in {item.path for item in client.list_artifacts(parent.info.run_id, "figures")}
    [version] = client.search_model_versions("name = 'pause_ray-demo'")
    assert version.run_id == found["p0"].info.run_id


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    import mlflow  # noqa: F401 (two threads that import it at once, the tracker's and this one, would wait for each other)

    folder = tmp_path / "server"
    folder.mkdir()
    server = MlflowServer(folder, backend=f"sqlite:///{folder / 'mlflow.db'}")
    server.start()
    yield server
    server.kill()


def test_a_server_that_dies_in_mid_sweep_stops_nothing_and_gets_what_it_lacks(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(tracker_module, "RETRY_SECONDS", 0.0)
    storage = Storage.open(tmp_path / "runs")
    folder = planned(storage, num_trials=4)
    with Tracker(storage, send_seconds=0.05) as tracker:
        for number in (1, 2):
            tracker.step_of_trial(folder, "p0", row(number))
        finish(storage, "p1")
        tracker.trial_ended(folder)
        until(lambda: runs(server.uri).get("p1") is not None and "training_loss" in runs(server.uri)["p0"].data.metrics)
        server.kill()
        tracker.step_of_trial(folder, "p0", row(3))
        for trial in ("p0", "p2", "p3"):
            finish(storage, trial)
            tracker.trial_ended(folder)
        export_best(folder, storage)
        write_report(folder, storage)
        tracker.log(folder)
        assert tracker.logged is None
    assert capsys.readouterr().err.count("MLflow at http://127.0.0.1") == 1
    server.start()
    for _ in range(2):
        done = CliRunner().invoke(app, ["report", "demo", "--log", "--json", "--storage", str(storage.root)])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["model"] == "models:/pause_ray-demo/1"
        check_whole(server.uri, num_trials=4)


@pytest.mark.skipif(what_auth_lacks() is not None, reason=str(what_auth_lacks()))
@pytest.mark.skipif(what_postgres_lacks() is not None, reason=str(what_postgres_lacks()))
def test_a_server_on_postgresql_with_basic_auth_takes_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.open(tmp_path / "runs")
    folder = planned(storage, num_trials=2)
    for number in range(2):
        finish(storage, f"p{number}")
    export_best(folder, storage)
    write_report(folder, storage)
    with postgres(tmp_path / "postgres") as backend:
        (tmp_path / "server").mkdir()
        server = MlflowServer(tmp_path / "server", backend=backend, auth=True)
        server.start()
        try:
            with pytest.raises(TrackingError, match=r"MLflow at http://127.0.0.1:\d+: .*401"):
                log_sweep(folder, storage, uri=server.uri)
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
            assert log_sweep(folder, storage, uri=server.uri) == log_sweep(folder, storage, uri=server.uri)
            check_whole(server.uri, num_trials=2)
        finally:
            server.kill()
