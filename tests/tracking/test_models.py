"""The best trial in MLflow: registered once, loaded by ``mlflow.pyfunc`` from the store alone, and it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import TrackingError
from pause_ray.core.storage import Storage, read_json, write_json
from pause_ray.report.ranking import export_best
from pause_ray.report.results import read_results
from pause_ray.tracking.runs import log_sweep
from pause_ray.tracking.store import tracking_uri
from pause_ray.trial.ask import Answerer
from tests.inference.tiny_model import make_model
from tests.stored_sweep import rows, store_sweep, store_trial
from tests.trial.test_ask import CONTEXT, QUESTION, spec_of
from tests.trial.test_ask import export as export_tiny

pytestmark = [pytest.mark.mlflow, pytest.mark.torch]
ASK = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
import pandas
asked = pandas.DataFrame({"context": [sys.argv[3]], "question": [sys.argv[4]]})
import pause_ray
print(json.dumps({"answers": list(model.predict(asked)), "package": pause_ray.__file__}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and an exported trial of it."""
    folder = tmp_path_factory.mktemp("trained")
    return export_tiny(folder / "export", make_model(folder / "model", limit_tokens=2048))


def finish(storage: Storage, trained: Path, key: str, score: float) -> None:
    """A trial whose adapter can be loaded."""
    adapter = storage.checkpoints / f"adapter{key}"
    adapter.parent.mkdir(exist_ok=True)
    adapter.symlink_to(trained / "adapter")
    spec = spec_of(trained.with_name("model"), adapter=str(adapter))
    folder = store_trial(storage, key, rows({(1024, 50.0): score}, trial=key), trained=True, spec=spec)
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "checkpoint": str(adapter)})


def sweep(storage: Storage, trained: Path) -> Path:
    store_trial(storage, "b0", rows({(1024, 50.0): 0.25}, trial="b0"))
    finish(storage, trained, "p0", 0.5)
    folder = store_sweep(storage, [("b0", "baseline", {}, 0), ("p0", "paused", {}, 0), ("q0", "other", {}, 0)])
    export_best(read_results(folder, storage), storage)
    return folder


def client_of(storage: Storage) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(storage))


def versions(storage: Storage) -> list[Any]:
    return sorted(client_of(storage).search_model_versions("name = 'pause_ray-demo'"), key=lambda its: int(its.version))


def logged_models(storage: Storage) -> list[Any]:
    client = client_of(storage)
    return list(client.search_logged_models([client.get_experiment_by_name("demo").experiment_id]))


def test_the_registered_model_answers_where_this_package_is_not_installed(storage: Storage, trained: Path, tmp_path: Path) -> None:
    logged = log_sweep(read_results(sweep(storage, trained), storage), storage)
    assert logged.model == "models:/pause_ray-demo/1"
    run = client_of(storage).get_run(versions(storage)[0].run_id)
    assert run.data.tags["pause_ray.digest"] == "p0"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ASK, tracking_uri(storage), "models:/pause_ray-demo@best", CONTEXT, QUESTION]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["answers"] == [Answerer.open(trained).answer(CONTEXT, QUESTION)]
    assert str(storage.root) in told["package"], "the source that was logged"


def test_the_same_best_is_registered_once_and_a_better_one_again(storage: Storage, trained: Path) -> None:
    folder = sweep(storage, trained)
    assert (
        log_sweep(read_results(folder, storage), storage).model
        == log_sweep(read_results(folder, storage), storage).model
        == "models:/pause_ray-demo/1"
    )
    assert (len(versions(storage)), len(logged_models(storage))) == (1, 1)
    finish(storage, trained, "q0", 0.75)
    export_best(read_results(folder, storage), storage)
    assert log_sweep(read_results(folder, storage), storage).model == "models:/pause_ray-demo/2"
    assert [its.tags["pause_ray.trial"] for its in versions(storage)] == ["p0", "q0"]
    client = client_of(storage)
    assert int(client.get_model_version_by_alias("pause_ray-demo", "best").version) == 2
    [parent] = client.search_runs([logged_models(storage)[0].experiment_id], "tags.`pause_ray.kind` = 'sweep'")
    assert parent.data.tags["pause_ray.model"] == "models:/pause_ray-demo/2"
    client.set_registered_model_alias("pause_ray-demo", "best", "1")  # as where the server went away before it was set
    assert log_sweep(read_results(folder, storage), storage).model == "models:/pause_ray-demo/2"
    assert int(client.get_model_version_by_alias("pause_ray-demo", "best").version) == 2


def test_a_server_that_goes_away_between_the_model_and_its_registration_leaves_no_second_one(
    storage: Storage, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    def gone(*arguments: Any, **options: Any) -> None:
        raise ConnectionResetError("connection reset")

    folder = sweep(storage, trained)
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "create_model_version", gone)
        with pytest.raises(TrackingError, match="ConnectionResetError"):
            log_sweep(read_results(folder, storage), storage)
    assert log_sweep(read_results(folder, storage), storage).model == "models:/pause_ray-demo/1"
    assert len(logged_models(storage)) == 1


def test_a_sweep_that_trains_nothing_registers_nothing(storage: Storage) -> None:
    store_trial(storage, "b0", rows({(1024, 50.0): 0.25}, trial="b0"))
    folder = store_sweep(storage, [("b0", "baseline", {}, 0)])
    export_best(read_results(folder, storage), storage)
    assert log_sweep(read_results(folder, storage), storage).model is None
    assert versions(storage) == []
