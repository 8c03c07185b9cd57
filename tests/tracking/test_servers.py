"""Against real MLflow servers: one that dies in mid-sweep, and one on PostgreSQL behind basic auth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pause_ray.cli.main import app
from pause_ray.core.errors import TrackingError
from pause_ray.core.storage import Storage, is_complete, read_json, write_json
from pause_ray.report.html import write_report
from pause_ray.report.ranking import export_best
from pause_ray.report.results import read_results
from pause_ray.tracking.runs import log_sweep
from tests.stored_sweep import rows, rung_event, stop_event, store_search, store_sweep, store_trial
from tests.sweep.stubs import ROOT, write_stub_sweep
from tests.tracking.mlflow_server import PASSWORD, USER, MlflowServer, postgres, what_auth_lacks, what_postgres_lacks
from tests.trained import store_checkpoint

pytestmark = [pytest.mark.mlflow, pytest.mark.slow]
FEW_STEPS, MANY_STEPS, STEP_SECONDS = 2, 40, 0.4
"""The longer training takes three times as long as the driver waits between two batches that it sends."""
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
        check_finished(client, run)
    assert steps(client, found["p0"]) == [1, 2, 3]
    assert len(client.get_metric_history(found["p0"].info.run_id, "proxy_score")) == 1
    assert "figures/differences.png" in {item.path for item in client.list_artifacts(parent.info.run_id, "figures")}
    [version] = client.search_model_versions("name = 'pause_ray-demo'")
    assert version.run_id == found["p0"].info.run_id


def check_finished(client: Any, run: Any) -> None:
    """A trial's run that has all, once."""
    assert run.info.status == "FINISHED"
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files == {"spec.json", "manifest.json", "cells.parquet", "heatmap.png"}
    for name in ("score", "cells"):
        assert len(client.get_metric_history(run.info.run_id, name)) == 1


def steps(client: Any, run: Any) -> list[int]:
    """Points of its curve."""
    return [point.step for point in client.get_metric_history(run.info.run_id, "training_loss")]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a server that is slow because everything here is."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = MlflowServer(folder, backend=f"sqlite:///{folder / 'mlflow.db'}")
    server.start()
    yield server
    server.kill()


def start_sweep(folder: Path, storage: Storage, *, mlflow: str) -> subprocess.Popen[str]:
    """Of stubs: a short training, one that takes its time, a baseline."""
    changes = {"search": {"train.max_steps": {"grid": [FEW_STEPS, MANY_STEPS]}}, "arms": {"baseline": {"pauses": None, "train": None}}}
    sweep = write_stub_sweep(folder, name="demo", **changes)
    command = [sys.executable, "-m", "tests.sweep.stubs", f"--step-seconds={STEP_SECONDS}", "--"]
    command += ["sweep", str(sweep), "--storage", str(storage.root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": mlflow}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def one_whole_and_one_growing(uri: str, sweep: subprocess.Popen[str]) -> Any:
    """The run of the second training, as soon as it has some steps and the first one's is whole."""
    until = time.monotonic() + 240
    while True:
        assert sweep.poll() is None, sweep.communicate()[0]
        assert time.monotonic() < until, "it never happened"
        found = {run.data.params.get("train.max_steps"): run for run in runs(uri).values()}
        first, second = found.get(str(FEW_STEPS)), found.get(str(MANY_STEPS))
        if first and first.info.status == "FINISHED" and second and "training_loss" in second.data.metrics:
            return second
        time.sleep(0.2)


@pytest.mark.ray
def test_a_server_that_dies_in_mid_sweep_stops_nothing_and_gets_what_it_lacks(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    storage = Storage.open(tmp_path / "runs")
    sweep = start_sweep(tmp_path, storage, mlflow=server.uri)
    try:
        growing = one_whole_and_one_growing(server.uri, sweep)
        server.kill()
        assert not is_complete(storage.trials / growing.data.tags["pause_ray.digest"]), "the sweep was through before the server was gone"
        output, _ = sweep.communicate(timeout=480)
    finally:
        sweep.kill()
    told = " ".join(output.split())
    assert sweep.returncode == 0, output
    assert told.count("MLflow at http://127.0.0.1") == 1
    [name] = re.findall(r"to MLflow .*? report (\S+) --log", told)
    [its] = (read_json(path) for path in storage.root.glob("sweeps/*/sweep.json"))
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    for _ in range(2):
        done = CliRunner().invoke(app, ["report", name, "--log", "--json", "--storage", str(storage.root)])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["model"] == "models:/pause_ray-demo/1"
        client, found = MlflowClient(tracking_uri=server.uri), runs(server.uri)
        parent = found.pop(its["digest"])
        assert parent.info.status == "FINISHED"
        assert set(found) == {trial["digest"] for trial in its["trials"]}
        curves = []
        for run in found.values():
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            check_finished(client, run)
            curves.append(steps(client, run))
        assert sorted(curves) == [[], list(range(1, FEW_STEPS + 1)), list(range(1, MANY_STEPS + 1))]


@pytest.mark.skipif(what_auth_lacks() is not None, reason=str(what_auth_lacks()))
@pytest.mark.skipif(what_postgres_lacks() is not None, reason=str(what_postgres_lacks()))
def test_a_server_on_postgresql_with_basic_auth_takes_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.open(tmp_path / "runs")
    folder = planned(storage, num_trials=2)
    for number in range(2):
        finish(storage, f"p{number}")
    export_best(read_results(folder, storage), storage)
    write_report(read_results(folder, storage))
    with postgres(tmp_path / "postgres") as backend:
        (tmp_path / "server").mkdir()
        server = MlflowServer(tmp_path / "server", backend=backend, auth=True)
        server.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        try:
            with pytest.raises(TrackingError, match=r"MLflow at http://127.0.0.1:\d+: .*401"):
                log_sweep(read_results(folder, storage), storage)
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
            assert log_sweep(read_results(folder, storage), storage) == log_sweep(read_results(folder, storage), storage)
            check_whole(server.uri, num_trials=2)
        finally:
            server.kill()
