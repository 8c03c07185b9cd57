"""Sweeps of stubs in processes of their own that are killed, interrupted, hang, fail or share a storage root.

``PAUSE_RAY_KILLS`` says how often the driver is killed at a random moment (3 unless told; 20 with ``make test-kills``).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.storage import Storage
from pause_ray.evaluation.ledger import Ledger
from pause_ray.report.results import read_results
from tests.sweep.stubs import FAILING_RANK, HANGING_RANK, ROOT, write_stub_sweep
from tests.sweep.tiny_sweep import answers

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KILLS = int(os.environ.get("PAUSE_RAY_KILLS", "3"))
INTERRUPTED = 130


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stubbed")


@contextlib.contextmanager
def started(
    sweep: Path, storage: Path, *more: str, cell_seconds: float = 0.0, step_seconds: float = 0.0
) -> Iterator[subprocess.Popen[str]]:
    """``pause-ray sweep`` with stubs; nothing of it is left behind."""
    stubs = [f"--cell-seconds={cell_seconds}", f"--step-seconds={step_seconds}", "--"]
    command = [sys.executable, "-m", "tests.sweep.stubs", *stubs, "sweep", str(sweep), "--storage", str(storage), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{storage}/mlflow.db", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=sweep.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run_to_its_end(sweep: Path, storage: Path, *more: str) -> tuple[int, str]:
    """Return code and output."""
    with started(sweep, storage, *more) as process:
        output, _ = process.communicate(timeout=600)
        return process.returncode, output


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, f"ended before that: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.02)


def ledgers(storage: Path) -> list[Path]:
    return sorted((storage / "trials").glob("*/cells.jsonl"))


def whole_lines(storage: Path) -> set[bytes]:
    """Every row of every ledger as it is on disk."""
    return {line for path in ledgers(storage) for line in path.read_bytes().split(b"\n")[:-1]}


def ranking(storage: Path) -> list[tuple[str, float | None]]:
    """Conditions and their scores, best first."""
    [folder] = (path.parent for path in storage.glob("sweeps/*/sweep.json"))
    scored = [(c.label, c.summary.grand_mean if c.summary else None) for c in read_results(folder, Storage.open(storage)).conditions]
    return sorted(scored, key=lambda entry: (-(entry[1] or 0.0), entry[0]))


@pytest.fixture(scope="module")
def undisturbed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Storage of a sweep that nothing disturbed, and the seconds that it took."""
    storage = tmp_path_factory.mktemp("undisturbed")
    before = time.monotonic()
    code, output = run_to_its_end(write_stub_sweep(texts), storage)
    assert code == 0, output
    assert {len(Ledger(path).rows()) for path in ledgers(storage)} == {12}
    return storage, time.monotonic() - before


def test_a_driver_that_is_killed_again_and_again_leaves_the_same_ledgers_and_ranking(
    texts: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = undisturbed
    draw, sweep = random.Random(KILLS), texts / "stubbed.yaml"
    storage, round_number = tmp_path / "0", 0
    for _ in range(KILLS):
        before = whole_lines(storage)
        with started(sweep, storage, cell_seconds=0.05, step_seconds=0.1) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0.2, 1.2) * seconds)
            ended = process.poll() is not None
            if ended:
                assert process.returncode == 0, process.communicate()[0]
            else:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        assert before <= whole_lines(storage), "a row that was there before the kill is gone or was asked again"
        if ended:
            assert answers(storage) == answers(expected)
            round_number += 1
            storage = tmp_path / str(round_number)
    code, output = run_to_its_end(sweep, storage)
    assert code == 0, output
    assert answers(storage) == answers(expected)
    assert ranking(storage) == ranking(expected)
    assert len({score for _, score in ranking(storage)}) > 1, "a ranking of equal scores shows nothing"


def test_one_interrupt_finishes_the_running_cell_and_says_how_to_go_on(
    texts: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    sweep = texts / "stubbed.yaml"
    with started(sweep, tmp_path, cell_seconds=5.0) as process:
        wait_until(lambda: len(whole_lines(tmp_path)) >= 2, process)
        time.sleep(0.3)  # into the next cell
        answered = len(whole_lines(tmp_path))
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=180)
    assert process.returncode == INTERRUPTED, output
    assert "the same command" in output
    assert "Traceback" not in output
    assert answered + 1 <= len(whole_lines(tmp_path)) <= answered + 2, "the running cell was lost, or others were asked"
    kept = whole_lines(tmp_path)
    code, output = run_to_its_end(sweep, tmp_path)
    assert code == 0, output
    assert kept <= whole_lines(tmp_path)
    assert answers(tmp_path) == answers(undisturbed[0])


def test_a_second_interrupt_ends_at_once_what_never_would(texts: Path, tmp_path: Path) -> None:
    sweep = write_stub_sweep(texts, name="hanging", **{"search": {"train.lora.rank": {"grid": [HANGING_RANK]}}, "arms": {}})
    with started(sweep, tmp_path) as process:
        wait_until(lambda: bool(list(tmp_path.glob("checkpoints/.*.partial"))), process)
        os.kill(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(4)
        assert process.poll() is None, "a training that was asked to end was not waited for"
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == INTERRUPTED, output
    assert "run the same command again" in output
    assert "Traceback" not in output


def test_a_trial_that_hangs_and_one_that_cannot_be_trained_cost_only_themselves(texts: Path, tmp_path: Path) -> None:
    ranks = {"train.lora.rank": {"grid": [HANGING_RANK, FAILING_RANK, 2]}}
    sweep = write_stub_sweep(texts, name="mixed", **{"search": ranks, "trial_timeout_minutes": 0.3})
    code, output = run_to_its_end(sweep, tmp_path)
    output = " ".join(output.split())
    assert code == 2, output
    assert f"rank={HANGING_RANK} #0 failed: reported nothing for 0.3 minutes (" in output
    assert f"rank={FAILING_RANK} #0 failed: train.lora.rank {FAILING_RANK}" in output
    assert "3 of 5 trials are finished" in output
    assert len(ledgers(tmp_path)) == 3
    assert "Traceback" not in output


def test_trials_that_all_fail_end_the_sweep_after_a_share_with_their_common_reason(texts: Path, tmp_path: Path) -> None:
    points = {"train.lora.rank": {"grid": [FAILING_RANK]}, "train.learning_rate": {"grid": [n / 1e5 for n in range(1, 41)]}}
    sweep = write_stub_sweep(texts, name="failing", **{"search": points, "arms": {}})
    code, output = run_to_its_end(sweep, tmp_path)
    output = " ".join(output.split())
    assert code == 2, output
    assert "4 of 40 trials of the arm pause_tuned have failed and none has finished" in output
    assert f"4 of them: train.lora.rank {FAILING_RANK}" in output
    assert len(list((tmp_path / "trials").glob("*/spec.json"))) == 4


def test_an_arm_that_has_finished_trials_is_not_given_up_when_the_sweep_goes_on(texts: Path, tmp_path: Path) -> None:
    ranks = {"train.lora.rank": {"grid": [2, FAILING_RANK, 4]}}
    sweep = write_stub_sweep(texts, name="half", **{"search": ranks, "arms": {}, "replicates": 3})
    code, output = run_to_its_end(sweep, tmp_path, "--max-trials", "3")
    assert code == 0, output
    code, output = run_to_its_end(sweep, tmp_path)
    assert code == 2, output
    assert "6 of 9 trials are finished" in " ".join(output.split())
    assert "were not begun" not in " ".join(output.split())


def modification_times(storage: Path) -> dict[Path, int]:
    made = (path for name in ("trials", "checkpoints", "shards") for path in (storage / name).rglob("[!.]*"))
    return {path: path.stat().st_mtime_ns for path in made}


def test_two_sweeps_at_once_share_their_trials_and_a_third_makes_only_what_is_new(
    texts: Path, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    one, other = write_stub_sweep(texts, name="one"), write_stub_sweep(texts, name="other")
    with started(one, tmp_path, cell_seconds=0.05) as first, started(other, tmp_path, cell_seconds=0.05) as second:
        outputs = [process.communicate(timeout=400)[0] for process in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0], outputs
    assert answers(tmp_path) == answers(undisturbed[0])
    assert sum(path.read_bytes().count(b"\n") for path in ledgers(tmp_path)) == 4 * 12, "a cell was answered twice"
    assert len(list((tmp_path / "shards").glob("*/manifest.json"))) == 1
    kept = modification_times(tmp_path)
    third = write_stub_sweep(texts, name="third", **{"search": {"train.lora.rank": {"grid": [2, 8]}}})
    code, output = run_to_its_end(third, tmp_path)
    assert code == 0, output
    now = modification_times(tmp_path)
    new = {path.relative_to(tmp_path).parts[:2] for path in now.keys() - kept.keys()}
    assert sorted(kind for kind, _ in new) == ["checkpoints", "trials"], "more than the trial of rank 8 and its adapter was made"
    # A folder's own time changes with its neighbours; its files' do not.
    assert {path: time for path, time in now.items() if path in kept and path.is_file()} == {
        path: time for path, time in kept.items() if path.is_file()
    }


def test_a_second_run_of_the_same_sweep_is_told_who_runs_it(texts: Path, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    sweep = texts / "stubbed.yaml"
    with started(sweep, tmp_path, cell_seconds=0.5) as first:
        wait_until(lambda: bool(list(tmp_path.glob("sweeps/*/sweep.json"))), first)
        with started(sweep, tmp_path) as second:
            output, _ = second.communicate(timeout=400)
        assert second.returncode == 2, output
        assert f"in use by process {first.pid}" in " ".join(output.split())
        output, _ = first.communicate(timeout=400)
    assert first.returncode == 0, output
    assert answers(tmp_path) == answers(undisturbed[0])


def test_a_search_that_learns_goes_on_after_a_kill_with_the_points_that_it_would_have_chosen(texts: Path, tmp_path: Path) -> None:
    tpe: dict[str, Any] = {
        "search": {"train.lora.rank": {"int": [1, 12]}, "train.learning_rate": {"loguniform": [1e-5, 1e-3]}},
        "algorithm": {"kind": "tpe", "points": 5, "random_points": 2, "at_a_time": 2},
        "arms": {"baseline": {"pauses": None, "train": None}},
    }
    sweep = write_stub_sweep(texts, name="learning", **tpe)
    code, output = run_to_its_end(sweep, tmp_path / "straight")
    assert code == 0, output
    with started(sweep, tmp_path / "killed", cell_seconds=0.1) as process:
        finished = tmp_path / "killed" / "trials"
        wait_until(lambda: len(list(finished.glob("*/manifest.json"))) >= 3, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    code, output = run_to_its_end(sweep, tmp_path / "killed")
    assert code == 0, output
    assert ranking(tmp_path / "killed") == ranking(tmp_path / "straight")
    assert len(ranking(tmp_path / "killed")) == 6


def test_a_search_whose_trials_all_fail_chooses_no_more_points_without_a_value(texts: Path, tmp_path: Path) -> None:
    """Points stay asked: a cause that is put right later would leave a search that has learned nothing."""
    tpe: dict[str, Any] = {
        "search": {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}},
        "algorithm": {"kind": "tpe", "points": 8, "random_points": 2},
        "trial.train.lora.rank": FAILING_RANK,
        "arms": {"baseline": {"pauses": None, "train": None}},
    }
    code, output = run_to_its_end(write_stub_sweep(texts, name="unlucky", **tpe), tmp_path)
    assert code == 2, output
    assert "3 of 3 trials of the arm pause_tuned have failed" in " ".join(output.split())
    [log] = tmp_path.glob("sweeps/*/search.jsonl")
    assert [event["event"] for event in map(json.loads, log.read_text().splitlines())] == ["asked", "told", "asked", "told", "asked"]
