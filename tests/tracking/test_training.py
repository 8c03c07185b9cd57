"""Trainings in MLflow while they run: what is seen when, that nothing arrives twice, and how runs end."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage, write_json
from pause_ray.models.checkpoint import Checkpoint, seal
from pause_ray.report.results import read_results
from pause_ray.tracking.runs import LiveTrainings, Training, log_sweep, log_training
from pause_ray.tracking.store import tracking_uri
from pause_ray.training.metrics import step_record
from tests.stored_sweep import rows, store_sweep, store_trial

pytestmark = pytest.mark.mlflow
GRID = {(1024, 10.0): 1.0, (1024, 50.0): 0.5}
PLANNED = [("b0", "baseline", {}, 0), ("p0", "pause_tuned", {"pauses.every": 2}, 0), ("p1", "pause_tuned", {"pauses.every": 2}, 1)]


def step(number: int, *, loss: float | None = None, validation_loss: float | None = None) -> JsonObject:
    record = step_record(
        step=number,
        loss=3.0 / number if loss is None else loss,
        learning_rate=2e-4,
        gradient_norm=0.5,
        tokens=900,
        loss_tokens=90,
        computed_tokens=1000,
        seconds=2.0,
        peak_memory_bytes=5_000_000,
    )
    return record if validation_loss is None else {**record, "validation_loss": validation_loss}


def running_sweep(storage: Storage) -> Path:
    """Baseline done, two trials whose training has begun: only their specs are there."""
    store_trial(storage, "b0", rows(GRID, trial="b0"))
    for trial in ("p0", "p1"):
        write_json(
            storage.trials / trial / "spec.json", {"model": {"source": "some/model"}, "train": {"max_steps": 3, "lora": {"rank": 4}}}
        )
    return store_sweep(storage, PLANNED)


def send(live: LiveTrainings, folder: Path, storage: Storage, trial: str, numbers: range) -> None:
    live.send(Training.of_trial(folder, trial, storage), [step(number) for number in numbers])


def client_of(storage: Storage) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(storage))


def runs_of(storage: Storage, experiment: str = "demo") -> dict[str, Any]:
    """Digest → run; no digest has two."""
    client = client_of(storage)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    by_digest = {run.data.tags["pause_ray.digest"]: run for run in found}
    assert len(by_digest) == len(found)
    return by_digest


def steps_of(storage: Storage, run: Any, name: str = "training_loss") -> list[int]:
    return sorted(point.step for point in client_of(storage).get_metric_history(run.info.run_id, name))


def test_a_trial_is_seen_while_it_trains(storage: Storage) -> None:
    folder = running_sweep(storage)
    send(LiveTrainings(storage), folder, storage, "p0", range(1, 3))
    found = runs_of(storage)
    run = found["p0"]
    assert (run.info.status, run.info.run_name) == ("RUNNING", "pause_tuned every=2 #0")
    assert run.data.tags["mlflow.parentRunId"] == found["0011223344556677"].info.run_id
    assert run.data.params["train.lora.rank"] == "4"
    assert {name: run.data.metrics[f"training_{name}"] for name in ("loss", "learning_rate", "gradient_norm")} == {
        "loss": 1.5,
        "learning_rate": 2e-4,
        "gradient_norm": 0.5,
    }
    assert run.data.metrics["training_padding_share"] == 0.1
    assert run.data.metrics["training_tokens_per_second"] == 450.0
    assert run.data.metrics["training_peak_memory_bytes"] == 5_000_000
    assert not {"training_mfu", "training_validation_loss"} & run.data.metrics.keys(), "nothing is made up where nothing was measured"
    assert steps_of(storage, run) == [1, 2]


def test_the_finished_sweep_completes_the_same_run_without_doubles(storage: Storage) -> None:
    folder = running_sweep(storage)
    live = LiveTrainings(storage)
    send(live, folder, storage, "p0", range(1, 3))
    began = runs_of(storage)["p0"].info.run_id
    store_trial(storage, "p0", rows(GRID, trial="p0"), trained=True)
    log_sweep(read_results(folder, storage), storage)
    send(live, folder, storage, "p0", range(2, 4))  # comes in late
    live.end(status="FAILED")
    found = runs_of(storage)
    assert set(found) == {"0011223344556677", "b0", "p0"}
    assert (found["p0"].info.run_id, found["p0"].info.status) == (began, "FINISHED")
    assert found["p0"].data.metrics["score"] == 0.75
    for name in found["p0"].data.metrics:
        if name.startswith("training_"):
            steps = steps_of(storage, found["p0"], name)
            assert len(steps) == len(set(steps)), name
    assert steps_of(storage, found["p0"]) == [1, 2, 3]


def test_a_trial_that_is_trained_before_its_turn_is_seen_and_its_parameters_come_with_its_log(storage: Storage) -> None:
    store_trial(storage, "b0", rows(GRID, trial="b0"))
    folder = store_sweep(storage, PLANNED)
    send(LiveTrainings(storage), folder, storage, "p0", range(1, 3))
    began = runs_of(storage)["p0"]
    assert steps_of(storage, began) == [1, 2]
    store_trial(storage, "p0", rows(GRID, trial="p0"), trained=True)
    log_sweep(read_results(folder, storage), storage)
    found = runs_of(storage)["p0"]
    assert (found.info.run_id, steps_of(storage, found)) == (began.info.run_id, [1, 2, 3])
    assert (began.data.params, found.data.params["train.lora.rank"]) == ({}, "4")


def test_steps_that_a_resumed_training_repeats_are_not_sent_again(storage: Storage) -> None:
    folder = running_sweep(storage)
    send(LiveTrainings(storage), folder, storage, "p0", range(1, 6))
    send(LiveTrainings(storage), folder, storage, "p0", range(1, 4))  # another process, which begins at its last checkpoint
    send(LiveTrainings(storage), folder, storage, "p0", range(4, 8))
    assert Counter(steps_of(storage, runs_of(storage)["p0"])) == Counter(range(1, 8))


def test_trials_that_train_at_once_have_their_own_curves(storage: Storage) -> None:
    folder = running_sweep(storage)
    live = LiveTrainings(storage)
    send(live, folder, storage, "p0", range(1, 2))
    send(live, folder, storage, "p1", range(1, 4))
    send(live, folder, storage, "p0", range(2, 3))
    found = runs_of(storage)
    assert (steps_of(storage, found["p0"]), steps_of(storage, found["p1"])) == ([1, 2], [1, 2, 3])
    assert found["p0"].data.tags["mlflow.parentRunId"] == found["p1"].data.tags["mlflow.parentRunId"]


def test_a_training_that_was_given_up_says_so_and_goes_on_when_it_is_resumed(storage: Storage) -> None:
    folder = running_sweep(storage)
    live = LiveTrainings(storage)
    send(live, folder, storage, "p0", range(1, 2))
    live.end(status="KILLED")
    assert runs_of(storage)["p0"].info.status == "KILLED"
    send(LiveTrainings(storage), folder, storage, "p0", range(1, 3))
    run = runs_of(storage)["p0"]
    assert (run.info.status, steps_of(storage, run)) == ("RUNNING", [1, 2])


def checkpoint_in(folder: Path, log: list[JsonObject]) -> Checkpoint:
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    seal(folder, base_digest="b", tokenizer_digest="t", marker=None, spec={}, document_digests=frozenset())
    return Checkpoint.open(folder)


def test_a_training_of_its_own_has_a_run_from_its_first_step_to_its_end(storage: Storage, tmp_path: Path) -> None:
    log = [step(1), step(2), step(3, validation_loss=1.25)]
    training = Training.alone({"train": {"max_steps": 3}}, name="quickstart", checkpoint="abcdef0123456789")
    LiveTrainings(storage).send(training, log[:2])
    run = runs_of(storage, "training")["abcdef0123456789"]
    assert (run.info.status, run.info.run_name, run.data.params) == ("RUNNING", "quickstart abcdef01", {"train.max_steps": "3"})
    checkpoint = checkpoint_in(tmp_path / "checkpoint", log)
    for _ in range(2):
        log_training(training, checkpoint, storage)
    [(key, done)] = runs_of(storage, "training").items()
    assert (key, done.info.run_id, done.info.status) == ("abcdef0123456789", run.info.run_id, "FINISHED")
    assert steps_of(storage, done) == [1, 2, 3]
    assert steps_of(storage, done, "training_validation_loss") == [3]
    assert done.data.metrics["training_validation_loss"] == 1.25
    assert done.data.tags["pause_ray.checkpoint"] == str(checkpoint.folder)
    artifacts = {item.path for item in client_of(storage).list_artifacts(done.info.run_id)}
    assert artifacts == {"manifest.json", "training.jsonl", "adapter_config.json"}
