"""MLflow as a view of storage: what arrives, that nothing arrives twice, and what is said when nothing can."""

from __future__ import annotations

import http.server
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import StorageError, TrackingError
from pause_ray.core.storage import Storage
from pause_ray.report.html import write_report
from pause_ray.report.results import read_results
from pause_ray.tracking.runs import MOST_CONTRASTS, MOST_DESCRIPTION_CHARS, flattened, log_finished, log_sweep, metric_label
from pause_ray.tracking.store import tracking_uri
from tests.stored_sweep import rows, rung_event, stop_event, store_search, store_sweep, store_trial

GRID = {(1024, 10.0): 1.0, (1024, 50.0): 0.5, (2048, 10.0): 0.0, (2048, 50.0): None}


def two_trials(storage: Storage, *, second_finished: bool = True) -> Path:
    store_trial(storage, "b0", rows(GRID, trial="b0"))
    noise = {"dtype": "bfloat16", "cells": 8, "answers_changed": 2, "scores_changed": 1}
    store_trial(storage, "p0", rows(GRID, trial="p0", prefilled_tokens=512), trained=True, finished=second_finished, noise=noise)
    return store_sweep(storage, [("b0", "baseline", {}, 0), ("p0", "pause_tuned", {"pauses.every": 2}, 0)])


def runs_of(storage: Storage) -> tuple[Any, dict[str, Any], Any]:
    """Parent, children by trial digest, and the client."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(storage))
    found = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) + 1 == len(found)
    by_digest = {run.data.tags["pause_ray.digest"]: run for run in children}
    assert len(by_digest) == len(children)
    return parents[0], by_digest, client


def artifacts(client: Any, run: Any, folder: str | None = None) -> set[str]:
    return {item.path for item in client.list_artifacts(run.info.run_id, folder)}


@pytest.mark.mlflow
def test_a_sweep_arrives_as_parent_and_children(storage: Storage) -> None:
    folder = two_trials(storage)
    write_report(read_results(folder, storage))
    parent_id = log_sweep(read_results(folder, storage), storage).run_id
    parent, children, client = runs_of(storage)
    assert parent.info.run_id == parent_id
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "demo")
    assert {"report.html", "arms.csv", "sweep.json"} <= artifacts(client, parent)
    assert "figures/heatmaps.png" in artifacts(client, parent, "figures")
    assert "| pause_tuned every=2 | 0.50 [" in parent.data.tags["mlflow.note.content"]
    trained = children["p0"]
    assert (trained.info.status, trained.info.run_name) == ("FINISHED", "pause_tuned every=2 #0")
    assert trained.info.end_time - trained.info.start_time == 60_000  # the manifest's 60 s
    assert trained.data.params["train.lora.rank"] == "4"
    assert trained.data.tags["pause_ray.arm"] == "pause_tuned"
    assert parent.data.metrics["difference/pause_tuned every-2"] == 0.0
    assert trained.data.metrics["score"] == 0.5  # (1 + 0.5 + 0) / 3
    assert trained.data.metrics["score_at_1024_tokens"] == 0.75
    assert trained.data.metrics["score_middle"] == 0.5
    assert trained.data.metrics["score_edges"] == 0.5  # (1 + 0) / 2
    assert trained.data.metrics["exact_recall"] == pytest.approx(1 / 3)
    assert trained.data.metrics["prompt_overhead_percent"] == 0.0
    assert trained.data.metrics["unscored_share"] == 0.25
    assert trained.data.metrics["reused_share"] == 1 - 3 * 512 / 4096  # of the three that were answered
    assert trained.data.metrics["noise_answers_changed_share"] == 0.25
    assert not {"cost", "noise_answers_changed_share"} & set(children["b0"].data.metrics)
    assert "In bfloat16, 8 answered questions" in parent.data.tags["mlflow.note.content"]
    history = client.get_metric_history(trained.info.run_id, "training_loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.5), (2, 1.5), (3, 0.75)]
    assert artifacts(client, trained) == {"spec.json", "manifest.json", "cells.parquet", "heatmap.png"}
    assert "training_loss" not in children["b0"].data.metrics
    assert not (Path.cwd() / "mlruns").exists()


@pytest.mark.mlflow
def test_logging_again_sends_nothing(storage: Storage) -> None:
    folder = two_trials(storage)
    log_sweep(read_results(folder, storage), storage)
    before = everything(storage)
    log_sweep(read_results(folder, storage), storage)
    assert everything(storage) == before


@pytest.mark.mlflow
def test_a_renamed_arm_is_brought_up_to_date(storage: Storage) -> None:
    log_sweep(read_results(two_trials(storage), storage), storage)
    folder = store_sweep(storage, [("b0", "plain", {}, 0), ("p0", "paused", {"pauses.every": 2}, 0)], compare_to="plain")
    log_sweep(read_results(folder, storage), storage)
    parent, children, _ = runs_of(storage)
    assert {run.info.run_name for run in children.values()} == {"plain #0", "paused every=2 #0"}
    assert children["p0"].data.tags["pause_ray.arm"] == "paused"
    assert parent.data.tags["pause_ray.compare_to"] == "plain"
    assert "pause_tuned" not in str([children["p0"].data.params, parent.data.params])


@pytest.mark.mlflow
def test_the_difference_to_the_control_arrives(storage: Storage) -> None:
    for trial, trained, pauses in (("b0", False, False), ("t0", True, False), ("p0", True, True)):
        store_trial(storage, trial, rows(GRID, trial=trial), trained=trained, pauses=pauses)
    planned = [("b0", "baseline", {}, 0), ("t0", "tuned", {}, 0), ("p0", "paused", {}, 0)]
    log_sweep(read_results(store_sweep(storage, planned, control="tuned"), storage), storage)
    parent, _, _ = runs_of(storage)
    assert parent.data.metrics["against_control/paused"] == 0.0
    assert "against_control/tuned" not in parent.data.metrics
    description = parent.data.tags["mlflow.note.content"]
    assert "| paused vs tuned |  | 0.00" in description
    assert "Against tuned, which was tuned the same way" in description


@pytest.mark.mlflow
def test_a_running_sweep_is_brought_up_to_date(storage: Storage) -> None:
    folder = two_trials(storage, second_finished=False)
    log_sweep(read_results(folder, storage), storage)
    parent, children, _ = runs_of(storage)
    assert (parent.info.status, parent.data.metrics["trials_finished"], set(children)) == ("RUNNING", 1, {"b0"})
    assert parent.data.metrics["trials_planned"] == 2
    (storage.trials / "p0" / "cells.jsonl").unlink()
    store_trial(storage, "p0", rows(GRID, trial="p0"), trained=True)
    write_report(read_results(folder, storage))
    log_sweep(read_results(folder, storage), storage)
    parent, children, client = runs_of(storage)
    assert (parent.info.status, parent.data.metrics["trials_finished"], set(children)) == ("FINISHED", 2, {"b0", "p0"})
    assert "report.html" in artifacts(client, parent)


@pytest.mark.mlflow
def test_a_half_logged_trial_is_completed_without_doubles(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    folder = two_trials(storage)
    sent = MlflowClient.log_artifact
    calls = []

    def dies_at_the_fourth(self: Any, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        calls.append(local_path)
        if len(calls) == 4:
            raise ConnectionResetError("connection reset")
        sent(self, run_id, local_path, artifact_path)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifact", dies_at_the_fourth)
        with pytest.raises(TrackingError, match="ConnectionResetError"):
            log_sweep(read_results(folder, storage), storage)
    log_sweep(read_results(folder, storage), storage)
    _, children, client = runs_of(storage)
    assert set(children) == {"b0", "p0"}
    for run in children.values():
        assert artifacts(client, run) == {"spec.json", "manifest.json", "cells.parquet", "heatmap.png"}
        assert run.info.status == "FINISHED"
        assert all(
            len(client.get_metric_history(run.info.run_id, name)) == (3 if name.startswith("training_") else 1) for name in run.data.metrics
        )


@pytest.mark.mlflow
def test_a_trial_shared_by_two_sweeps_is_in_both(storage: Storage) -> None:
    store_trial(storage, "b0", rows(GRID, trial="b0"))
    first = store_sweep(storage, [("b0", "baseline", {}, 0)], name="first")
    second = store_sweep(storage, [("b0", "baseline", {}, 0)], name="second")
    assert log_sweep(read_results(first, storage), storage) != log_sweep(read_results(second, storage), storage)


@pytest.mark.mlflow
def test_mlflow_tracking_uri_is_honoured(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    log_sweep(read_results(two_trials(storage), storage), storage)
    assert (tmp_path / "other.db").is_file()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert MlflowClient(tracking_uri=tracking_uri(storage)).get_experiment_by_name("demo") is None


@pytest.mark.mlflow
def test_an_unreachable_server_is_said_quickly_in_one_line(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        port = taken.getsockname()[1]
        for scheme in ("http", "postgresql"):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://anna:secret@127.0.0.1:{port}/db?token=hidden")
            started = time.monotonic()
            with pytest.raises(TrackingError) as caught:
                log_sweep(read_results(two_trials_once(storage), storage), storage)
            assert time.monotonic() - started < 60
            message = str(caught.value)
            assert f"{scheme}://127.0.0.1:{port}/db" in message
            assert "Connection refused" in message
            assert not any(word in message for word in ("anna", "secret", "hidden", "\n"))
            assert caught.value.__cause__ is None
            assert caught.value.__suppress_context__


@pytest.mark.mlflow
def test_a_server_that_never_answers_is_given_up_in_time(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(TrackingError):
            log_sweep(read_results(two_trials(storage), storage), storage)
        assert time.monotonic() - started < 60


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """A server that wants credentials."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.mlflow
def test_a_refusing_server_is_told_from_an_absent_one(storage: Storage, refusing_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing_server)
    with pytest.raises(TrackingError, match="error code 401"):
        log_sweep(read_results(two_trials(storage), storage), storage)


@pytest.mark.mlflow
def test_the_environment_is_as_before_and_nothing_secret_is_logged(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://anna:secret@127.0.0.1:1/db")
    before = dict(os.environ)
    with caplog.at_level(logging.DEBUG, logger="pause_ray"), pytest.raises(TrackingError):
        log_sweep(read_results(two_trials(storage), storage), storage)
    assert dict(os.environ) == before
    assert "secret" not in caplog.text


@pytest.mark.mlflow
def test_trials_are_sent_as_they_finish_and_the_sweep_completes_the_same_runs(storage: Storage) -> None:
    folder = two_trials(storage, second_finished=False)
    sent: set[str] = set()
    log_finished(folder, storage, sent=sent)
    parent, children, _ = runs_of(storage)
    assert (sent, set(children), parent.info.status) == ({"b0"}, {"b0"}, "RUNNING")
    assert (children["b0"].info.status, children["b0"].data.metrics["cells"]) == ("FINISHED", 4)
    before = everything(storage)
    log_finished(folder, storage, sent=sent)
    log_finished(folder, storage, sent=set())  # of another process
    assert everything(storage) == before
    (storage.trials / "p0" / "cells.jsonl").unlink()
    store_trial(storage, "p0", rows(GRID, trial="p0"), trained=True)
    log_finished(folder, storage, sent=sent)
    log_sweep(read_results(folder, storage), storage)
    parent, children, client = runs_of(storage)
    assert (set(children), parent.info.status) == ({"b0", "p0"}, "FINISHED")
    for run in children.values():
        assert all(
            len(client.get_metric_history(run.info.run_id, name)) == (3 if name.startswith("training_") else 1) for name in run.data.metrics
        )


@pytest.mark.mlflow
def test_a_damaged_ledger_does_not_keep_the_other_trials_back(storage: Storage) -> None:
    folder = two_trials(storage)
    (storage.trials / "b0" / "cells.jsonl").write_text("nothing\n")
    with pytest.raises(StorageError, match=r"b0.*line 1 is no cell result"):
        log_finished(folder, storage, sent=set())
    _, children, _ = runs_of(storage)
    assert set(children) == {"p0"}


@pytest.mark.mlflow
def test_what_a_scheduler_stopped_is_a_killed_run_with_the_proxys_scores(storage: Storage) -> None:
    store_trial(storage, "p1", rows(GRID, trial="p1"), trained=True)
    planned = [(f"p{number}", "paused", {"pauses.every": number}, 0) for number in (0, 1)]
    folder = store_sweep(storage, planned, compare_to="paused", spec={"arm": "paused"})
    events = [rung_event("p0", 0, 0.25), rung_event("p1", 0, 0.5), stop_event("p0", 0), rung_event("p1", 1, 0.75)]
    store_search(folder, events)
    log_sweep(read_results(folder, storage), storage)
    log_sweep(read_results(folder, storage), storage)
    parent, children, client = runs_of(storage)
    stopped, kept = children["p0"], children["p1"]
    assert (parent.info.status, parent.data.metrics["trials_stopped"]) == ("FINISHED", 1)
    assert (stopped.info.status, stopped.info.run_name) == ("KILLED", "paused every=0 #0")
    assert stopped.data.tags["pause_ray.stopped"] == "at rung 0 by asha, on the proxy"
    assert "score" not in stopped.data.metrics
    scores = [client.get_metric_history(run.info.run_id, "proxy_score") for run in (stopped, kept)]
    assert [[(point.step, point.value) for point in its] for its in scores] == [[(10, 0.25)], [(10, 0.5), (30, 0.75)]]
    assert "| paused every=0 | stopped early |" in parent.data.tags["mlflow.note.content"]
    assert "search.jsonl" in artifacts(client, parent)


@pytest.mark.mlflow
def test_the_parent_of_many_arms_has_few_metrics_and_a_whole_description(storage: Storage) -> None:
    store_trial(storage, "b0", rows(GRID, trial="b0"))
    planned = [("b0", "baseline", {}, 0)]
    for number in range(150):
        store_trial(storage, f"p{number}", rows(GRID, trial=f"p{number}"))
        planned.append((f"p{number}", "paused", {"pauses.every": number, "train.lora.rank": 16}, 0))
    folder = store_sweep(storage, planned)
    from pause_ray.tracking.runs import _sweep_run

    run = _sweep_run(read_results(folder, storage))
    assert len(run.metrics) <= 2 * MOST_CONTRASTS + 10
    description = run.tags["mlflow.note.content"]
    assert len(description) <= MOST_DESCRIPTION_CHARS
    assert re.search(r"\| baseline \| 0\.50 \[\S+ \S+\] \| reference", description)
    assert "more, in `arms.csv`" in description
    assert description.endswith("The whole report is the artifact `report.html`.")


def test_labels_that_differ_in_punctuation_are_metrics_of_their_own() -> None:
    markers = ("<PAUSE>", "[PAUSE]", "-PAUSE-", "/PAUSE/", ".", "..", "1=2")
    labels = [f"paused marker={marker}" for marker in markers]
    names = [metric_label(label) for label in labels]
    assert len(set(names)) == len(names)
    assert metric_label("paused every=2 rank=16") == "paused every-2 rank-16"
    assert metric_label("paused every=2") != metric_label("paused every-2")
    assert len(metric_label("paused marker=" + "x" * 500)) < 230


@pytest.mark.mlflow
def test_mlflow_takes_every_label_as_a_metric(storage: Storage) -> None:
    labels = ["paused marker=<|p|>", "paused marker=..", "paused marker=/a//b/", "paused marker=é ", "paused every=2", "paused x=\n"]
    store_trial(storage, "b0", rows(GRID, trial="b0"))
    planned = [("b0", "baseline", {}, 0)]
    for number, label in enumerate(labels):
        store_trial(storage, f"p{number}", rows(GRID, trial=f"p{number}"))
        arm, _, point = label.partition(" ")
        path, _, value = point.partition("=")
        planned.append((f"p{number}", arm, {f"pauses.{path}": value}, 0))
    log_sweep(read_results(store_sweep(storage, planned), storage), storage)
    parent, _, _ = runs_of(storage)
    assert sum(name.startswith("difference/") for name in parent.data.metrics) == len(labels)


def test_a_spec_becomes_dotted_parameters() -> None:
    spec = {
        "pauses": None,
        "train": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}, "learning_rate": 2e-4},
        "corpus": {"sources": [{"path": "a.txt"}], "facts": {"facts": [{"needle": "x" * 900}]}},
        "eval": {"task": {"kind": "single", "needles": {"needles": []}}, "prompt": {"system": "s" * 900}},
        "resources": {"threads": 2},
    }
    params = flattened(spec)
    assert params["pauses"] == "null"
    assert params["train.lora.rank"] == "4"
    assert params["train.lora.targets"] == '["q_proj", "v_proj"]'
    assert params["train.learning_rate"] == "0.0002"
    assert params["corpus.sources.0.path"] == "a.txt"
    assert params["corpus.facts"].startswith("digest ")
    assert params["eval.task.needles"].startswith("digest ")
    assert params["eval.task.kind"] == "single"
    assert len(params["eval.prompt.system"]) == 500
    assert not any(name.startswith("resources") for name in params)


def two_trials_once(storage: Storage) -> Path:
    """The sweep of ``two_trials``, made on the first call."""
    existing = storage.sweeps / "demo-0011223344556677"
    return existing if existing.exists() else two_trials(storage)


def everything(storage: Storage) -> list[tuple[Any, ...]]:
    """All rows of the store, and the artifacts' times of writing."""
    import sqlite3

    connection = sqlite3.connect(storage.root / "mlflow.db")
    try:
        tables = [
            connection.execute(f"select * from {table} order by 1, 2, 3").fetchall() for table in ("runs", "params", "metrics", "tags")
        ]
    finally:
        connection.close()
    files = sorted((path, path.stat().st_mtime_ns) for path in (storage.root / "mlartifacts").rglob("*") if path.is_file())
    return [*map(tuple, tables), tuple(files)]
