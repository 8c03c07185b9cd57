"""A whole sweep of a real model in processes of its own: run, run again, killed in training, killed in scoring.

One undisturbed run is made for all tests; what a disturbed one leaves is compared with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sweep.tiny_sweep import answers, run_sweep_to_its_end, start, start_sweep, write_model, write_sweep

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    return write_sweep(folder, write_model(folder / "model"))


@pytest.fixture(scope="module")
def undisturbed(sweep_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("undisturbed")
    run_sweep_to_its_end(sweep_file, storage)
    return storage


def kill_when(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """SIGKILL the driver, and nothing else, as soon as ``happened``; its cluster must end by itself."""
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, f"the sweep ended before it could be killed: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "the sweep never came to the place where it was to be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def complete_lines(storage: Path) -> set[bytes]:
    """Every whole row of every ledger as it is on disk, its seconds included."""
    return {line for path in (storage / "trials").glob("*/cells.jsonl") for line in path.read_bytes().split(b"\n")[:-1]}


def test_every_trial_has_every_cell_once_and_the_report_is_there(undisturbed: Path) -> None:
    ledgers = answers(undisturbed)
    assert [len({row.cell_id for row in rows}) for rows in ledgers.values()] == [6, 6, 6]
    [report] = (undisturbed / "sweeps").glob("tiny-*/report.html")
    assert "baseline" in report.read_text()


def logged_steps(storage: Path) -> dict[tuple[str, str], list[int]]:
    """MLflow's (experiment, run) → steps of its loss curve; only runs that have one."""
    with contextlib.closing(sqlite3.connect(storage / "mlflow.db")) as store:
        found = store.execute(
            "select experiments.name, runs.name, runs.status, metrics.step from metrics join runs using (run_uuid) "
            "join experiments using (experiment_id) where metrics.key = 'training_loss' order by metrics.step"
        ).fetchall()
    assert {status for _, _, status, _ in found} <= {"FINISHED"}
    steps: dict[tuple[str, str], list[int]] = {}
    for experiment, run, _, step in found:
        steps.setdefault((experiment, run), []).append(step)
    return steps


LOSS_CURVES = {("tiny", f"pause_tuned every={every} #0"): [1, 2, 3] for every in (1, 2)}


def test_every_step_is_in_mlflow_once(undisturbed: Path) -> None:
    assert logged_steps(undisturbed) == LOSS_CURVES


def modification_times(storage: Path) -> dict[Path, int]:
    results = (path for name in ("trials", "checkpoints", "shards") for path in (storage / name).rglob("[!.]*"))
    return {path: path.stat().st_mtime_ns for path in results}


def test_the_same_command_again_computes_nothing(sweep_file: Path, undisturbed: Path) -> None:
    kept = modification_times(undisturbed)
    run_sweep_to_its_end(sweep_file, undisturbed)
    assert modification_times(undisturbed) == kept


def test_a_sweep_killed_in_training_and_again_in_scoring_ends_with_the_same_ledgers(
    sweep_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    process = start_sweep(sweep_file, tmp_path)
    kill_when(process, lambda: any(lines(log) for log in (tmp_path / "checkpoints").glob(".*.partial/training.jsonl")))
    assert not list((tmp_path / "checkpoints").glob("*/manifest.json"))
    process = start_sweep(sweep_file, tmp_path)
    kill_when(process, lambda: any(0 < lines(ledger) < 6 for ledger in (tmp_path / "trials").glob("*/cells.jsonl")))
    before = complete_lines(tmp_path)
    assert before
    run_sweep_to_its_end(sweep_file, tmp_path)
    assert before <= complete_lines(tmp_path), "a cell that was answered before the kill was asked again"
    assert answers(tmp_path) == answers(undisturbed)
    assert logged_steps(tmp_path) == LOSS_CURVES


@pytest.mark.slow
def test_an_interrupted_sweep_says_how_to_go_on_and_goes_on(sweep_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    process = start_sweep(sweep_file, tmp_path)
    deadline = time.monotonic() + 300
    while not any(lines(ledger) for ledger in (tmp_path / "trials").glob("*/cells.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode not in (0, 1)
    assert "run the same command again" in output
    assert "Traceback" not in output
    before = complete_lines(tmp_path)
    run_sweep_to_its_end(sweep_file, tmp_path)
    assert before <= complete_lines(tmp_path)
    assert answers(tmp_path) == answers(undisturbed)


@pytest.mark.slow
def test_a_mistake_in_one_arm_costs_only_that_arm(sweep_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    broken = ["--set", "arms.broken={train.lora.targets: [no_such_layer]}", "--set", "search.pauses.every.grid=[1]"]
    process = start_sweep(sweep_file, tmp_path, *broken)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "broken" in output
    assert "no_such_layer" in output
    assert "2 of 3 trials are finished" in output


@pytest.mark.slow
def test_a_corpus_a_training_and_a_scoring_find_what_a_sweep_made(sweep_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    first_point = ["--set", "pauses.every=1"]
    folder = sweep_file.parent

    def json_of(*arguments: str) -> dict[str, Any]:
        process = start([*arguments, "--json"], folder=folder, storage=tmp_path)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found

    kept = modification_times(tmp_path)
    assert json_of("corpus", "tiny.yaml", *first_point)["stats"]["rows"] == 12
    trained = json_of("train", "tiny.yaml", *first_point)
    assert [step["step"] for step in trained["steps"]] == [1, 2, 3]
    assert logged_steps(tmp_path) == LOSS_CURVES | {("training", f"tiny {Path(trained['folder']).name[:8]}"): [1, 2, 3]}
    assert modification_times(tmp_path) == kept
    suite = folder / "suite.yaml"
    suite.write_text(yaml.safe_dump(yaml.safe_load(sweep_file.read_text())["trial"]["eval"]))
    scored = json_of("eval", "suite.yaml", "--model", "model", "--adapter", trained["folder"])
    assert scored["finished"] == 1
    assert (Path(scored["folder"]) / "report.html").exists()
