"""Steps go to MLflow while the command runs, and a server that is away stops nothing."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pause_ray.cli.terminal import warn
from pause_ray.core.errors import StoppedError
from pause_ray.core.storage import Storage, read_json, write_json
from pause_ray.report.results import read_results
from pause_ray.tracking import live as tracker_module
from pause_ray.tracking.live import Tracker
from pause_ray.tracking.runs import Training
from pause_ray.tracking.store import tracking_uri
from tests.stored_sweep import rows, store_sweep, store_trial

pytestmark = pytest.mark.mlflow
TRAINING = Training.alone({"train": {"max_steps": 2}}, name="quickstart", checkpoint="abcdef0123456789")


@pytest.fixture
def absent_server() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def row(number: int) -> dict[str, Any]:
    return {"step": number, "loss": 1.0 / number, "seconds": 1.0, "tokens_per_second": 100.0}


def runs(storage: Storage, name: str = "training") -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(storage))
    experiment = client.get_experiment_by_name(name)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def until(happened: Callable[[], bool], tracker: Tracker) -> None:
    """Call ``send`` as a driver loop does, until something has happened."""
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        tracker.send()


def last_step(storage: Storage) -> float | None:
    return next((run.data.metrics.get("training_loss") for run in runs(storage)), None)


def test_steps_arrive_while_the_command_runs(storage: Storage) -> None:
    with Tracker(storage, warn=warn, send_seconds=0.01) as tracker:
        tracker.step(TRAINING, row(1))
        until(lambda: last_step(storage) == 1.0, tracker)
        tracker.step(TRAINING, row(2))
        until(lambda: last_step(storage) == 0.5, tracker)
        assert [run.info.status for run in runs(storage)] == ["RUNNING"]


@pytest.mark.parametrize(("raised", "status"), [(ValueError, "FAILED"), (StoppedError, "KILLED")])
def test_a_command_that_fails_sends_its_last_steps_and_says_how_it_ended(
    storage: Storage, raised: type[BaseException], status: str
) -> None:
    with pytest.raises(raised):
        with Tracker(storage, warn=warn) as tracker:
            tracker.step(TRAINING, row(1))
            tracker.step(TRAINING, row(2))
            raise raised
    [run] = runs(storage)
    assert (run.info.status, run.data.metrics["training_loss"]) == (status, 0.5)


def test_a_command_that_is_to_end_at_once_sends_nothing_unless_it_has_begun_to(storage: Storage) -> None:
    with pytest.raises(KeyboardInterrupt):
        with Tracker(storage, warn=warn) as tracker:
            tracker.step(TRAINING, row(1))
            raise KeyboardInterrupt
    assert not runs(storage), "MLflow, which takes long to load, was not asked"
    with pytest.raises(KeyboardInterrupt):
        with Tracker(storage, warn=warn, send_seconds=0.01) as tracker:
            tracker.step(TRAINING, row(1))
            until(lambda: last_step(storage) == 1.0, tracker)
            raise KeyboardInterrupt
    assert [run.info.status for run in runs(storage)] == ["KILLED"]


@pytest.mark.parametrize(("interrupted", "status"), [(True, "KILLED"), (False, "FAILED")])
def test_a_training_that_a_command_leaves_unfinished_failed_unless_the_user_stopped_it(
    storage: Storage, interrupted: bool, status: str
) -> None:
    with Tracker(storage, warn=warn) as tracker:
        tracker.step(TRAINING, row(1))
        tracker.interrupted = interrupted
    assert [run.info.status for run in runs(storage)] == [status]


def test_a_server_that_is_away_is_said_once_and_holds_nothing_up(
    storage: Storage, absent_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", absent_server)
    monkeypatch.setattr(tracker_module, "RETRY_SECONDS", 0.0)
    said: list[str] = []
    with Tracker(storage, warn=warn, send_seconds=0.01) as tracker:
        started = time.monotonic()
        for number in range(1, 1001):
            tracker.step(TRAINING, row(number))
            tracker.send()
        assert time.monotonic() - started < 10
        until(lambda: bool(said.append(capsys.readouterr().err) or "".join(said)), tracker)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage.root / 'mlflow.db'}")  # the server is back
        until(lambda: last_step(storage) == 1 / 1000, tracker)
    said.append(capsys.readouterr().err)
    assert "".join(said).count("MLflow at http://127.0.0.1") == 1


def test_trials_arrive_while_the_sweep_runs_and_their_ends_hold_nothing_up(storage: Storage) -> None:
    for trial in ("a", "b"):
        store_trial(storage, trial, rows({(1024, 50.0): 0.5}, trial=trial), finished=trial == "a")
    folder = store_sweep(storage, [("a", "baseline", {}, 0), ("b", "paused", {}, 0)])

    def finished() -> set[str]:
        found = runs(storage, "demo")
        return {run.data.tags["pause_ray.digest"] for run in found if run.info.status == "FINISHED"}

    with Tracker(storage, warn=warn, send_seconds=0.01) as tracker:
        started = time.monotonic()
        for _ in range(1000):
            tracker.trial_ended(folder)
            tracker.send()
        assert time.monotonic() - started < 10
        until(lambda: finished() == {"a"}, tracker)
        write_json(storage.trials / "b" / "manifest.json", {**read_json(storage.trials / "a" / "manifest.json"), "digest": "b"})
        tracker.trial_ended(folder)
        until(lambda: finished() == {"a", "b"}, tracker)
        tracker.log(read_results(folder, storage))
    assert finished() == {"a", "b", "0011223344556677"}
    assert len(runs(storage, "demo")) == 3


def test_trials_that_could_not_be_sent_are_sent_when_the_server_is_back(
    storage: Storage, absent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_trial(storage, "a", rows({(1024, 50.0): 0.5}, trial="a"))
    folder = store_sweep(storage, [("a", "baseline", {}, 0)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", absent_server)
    monkeypatch.setattr(tracker_module, "RETRY_SECONDS", 0.0)
    with Tracker(storage, warn=warn, send_seconds=0.01) as tracker:
        tracker.trial_ended(folder)
        until(lambda: tracker._warned, tracker)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage.root / 'mlflow.db'}")
        until(lambda: len(runs(storage, "demo")) == 2, tracker)
    assert {run.data.tags["pause_ray.digest"] for run in runs(storage, "demo")} == {"a", "0011223344556677"}
