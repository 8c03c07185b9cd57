"""A sweep that loses machine after machine, and the head, ends with the ledgers of one that nothing happened to.

Training and answers are stubs; the cluster, its processes, shard writing and everything that is lost are real.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pause_ray.core.spec import JsonObject
from pause_ray.data.shards import ShardSet
from tests.real_cluster import RAY, RealCluster, raylet, running_cluster, wait_for_nodes
from tests.sweep.stubs import KILLING_RANK, ROOT, write_stub_sweep
from tests.sweep.tiny_sweep import answers

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS, UNIT_TOKENS = 256, 32 * 256
"""Of training text: some seconds of work in eight pieces, so that a machine is lost in the middle of it."""
STEPS, STEP_SECONDS, CELL_SECONDS = 5, 0.4, 0.5
CPUS = 3
SOON_LOST = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "6",
}
"""Six seconds until a node counts as lost; with two, a busy machine loses nodes that are there."""
BEGINS_AGAIN = re.compile(r"(\S+ #\d): the trial's process was lost \(.*?\); it begins again where it was")
MAKING_ROWS, TRIAL, ANSWERING = "ray::MapBatches", "ray::ResourceTrainable.train", "ray::ScoringActor"
"""What Ray calls processes that are at work: on training rows, at a trial, at cells. Once a scoring actor has been asked to stop, in
another of its threads, Ray no longer says that it answers."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A sweep that was submitted, as whoever follows it sees it."""

    follower: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return " ".join(self.log.read_text().split())

    def code(self) -> int:
        """As soon as it has ended."""
        return self.follower.wait(timeout=480)


@dataclasses.dataclass
class Machines:
    """A head and two raylets beside it, each of which can be lost and replaced."""

    cluster: RealCluster
    head: psutil.Process
    folder: Path
    stack: contextlib.ExitStack
    raylets: list[psutil.Process] = dataclasses.field(default_factory=list)

    def add(self) -> None:
        place = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        arguments = [f"--address={self.cluster.gcs}", f"--num-cpus={CPUS}", "--num-gpus=0", f"--temp-dir={place}"]
        started = self.stack.enter_context(raylet(self.cluster, arguments, log=self.folder / f"{len(os.listdir(self.folder))}.log"))
        self.raylets.append(psutil.Process(started.pid))

    def lose_one(self, at_work: str, job: Job) -> None:
        """A machine on which such a process runs, as soon as there is one, as if its power went: the raylet and all that it has started."""
        machine = wait_until(lambda: next((its for its in self.raylets if holds_still(its, at_work)), None), job)
        self.raylets.remove(machine)
        end_at_once(machine)


def holds_still(machine: psutil.Process, at_work: str) -> bool:
    """Whether such a process runs on the machine; it stays at what it is at."""

    def is_at_work(process: psutil.Process) -> bool:
        return " ".join(process.cmdline()).startswith(at_work)

    for process in machine.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if is_at_work(process):
                process.suspend()
                if is_at_work(process):
                    return True
                process.resume()
    return False


def end_at_once(machine: psutil.Process) -> None:
    for process in [*machine.children(recursive=True), machine]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    folder.mkdir()
    with running_cluster(folder, workers=0, settings=SOON_LOST) as cluster, contextlib.ExitStack() as stack:
        # Not the raylet of a Ray that other tests keep in this process, which has the same flag.
        started = (its for its in psutil.Process().children() if its.status() != psutil.STATUS_ZOMBIE)
        head = next(its for its in started if {"start", "--head"} <= set(its.cmdline()))
        found = Machines(cluster, head, folder, stack)
        found.add()
        found.add()
        wait_for_nodes(cluster, 3)
        yield found


def submitted(cluster: RealCluster, sweep: Path, storage: Path, *, log: Path) -> Job:
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{storage}/mlflow.db"}
    stubs = [f"--step-seconds={STEP_SECONDS}", f"--cell-seconds={CELL_SECONDS}", f"--unit-tokens={UNIT_TOKENS}"]
    job = ["python", "-m", "tests.sweep.stubs", *stubs, "--"]
    command = [*RAY, "job", "submit", f"--address={cluster.address}", "--runtime-env-json", json.dumps({"env_vars": variables}), "--"]
    command += [*job, "sweep", str(sweep), "--storage", str(storage)]
    with log.open("wb") as file:
        return Job(subprocess.Popen(command, env=cluster.environment, stdout=file, stderr=file), log)


def wait_until(happened: Callable[[], Any], job: Job, *, seconds: float = 240) -> Any:
    """What it returns, as soon as that is anything."""
    until = time.monotonic() + seconds
    while not (found := happened()):
        assert job.follower.poll() is None, job.said()
        assert time.monotonic() < until, job.said()
        time.sleep(0.02)
    return found


def whole_lines(storage: Path) -> set[bytes]:
    return {line for path in (storage / "trials").glob("*/cells.jsonl") for line in path.read_bytes().split(b"\n")[:-1]}


def trials(storage: Path, *, finished: bool) -> list[Path]:
    """Folders of those that have begun to be answered."""
    begun = [path.parent for path in (storage / "trials").glob("*/cells.jsonl")]
    return [folder for folder in begun if (folder / "manifest.json").exists() is finished]


def finished(storage: Path) -> dict[Path, int]:
    """Files of everything that has been sealed, and when they were written."""
    folders = [path.parent for name in ("shards", "checkpoints", "trials") for path in (storage / name).glob("*/manifest.json")]
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {
        "trial.corpus.num_sequences": ROWS,
        "trial.train.max_steps": STEPS,
        "trial.resources.scoring_actors": 2,
        "max_concurrent_trials": 2,
    }
    return write_stub_sweep(tmp_path_factory.mktemp("sweep"), name="lossy", **changes)


@pytest.fixture(scope="module")
def undisturbed(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of the sweep on this machine alone."""
    storage = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "tests.sweep.stubs", "--", "sweep", str(sweep), "--storage", str(storage)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return storage


def rows_of(storage: Path) -> list[str]:
    [folder] = (path.parent for path in (storage / "shards").glob("*/manifest.json"))
    return [entry["sha256"] for entry in ShardSet.open(folder).manifest["shards"]]


def test_what_is_lost_costs_what_it_was_at_and_nothing_else(sweep: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A machine on which training rows are made, one on which a trial trains, one on which cells are answered; then all of them and the
    head, while answers are written: the same job is submitted to another cluster."""
    storage = tmp_path / "runs"
    with machines(tmp_path / "first") as there:
        job = submitted(there.cluster, sweep, storage, log=tmp_path / "first.log")
        wait_until(lambda: list(storage.glob("shards/.*/packed/*")), job)
        there.lose_one(MAKING_ROWS, job)
        assert not list(storage.glob("shards/*/manifest.json")), "the rows were there before the machine was lost"
        there.add()

        wait_until(lambda: list(storage.glob("checkpoints/.*/training.jsonl")), job)
        there.lose_one(TRIAL, job)
        there.add()
        wait_until(lambda: BEGINS_AGAIN.search(job.said()), job)

        wait_until(lambda: len(whole_lines(storage)) >= 3, job)
        there.lose_one(ANSWERING, job)
        answered, through = whole_lines(storage), trials(storage, finished=True)
        there.add()
        wait_until(lambda: len(trials(storage, finished=True)) > len(through), job)

        wait_until(lambda: whole_lines(storage) > answered and trials(storage, finished=False), job)
        before, sealed = whole_lines(storage), finished(storage)
        for machine in [there.head, *there.raylets]:
            end_at_once(machine)
        assert job.code() != 0, "whoever follows the job hears of its end"
    with machines(tmp_path / "second") as there:
        job = submitted(there.cluster, sweep, storage, log=tmp_path / "second.log")
        assert job.code() == 0, job.said()
    assert answers(storage) == answers(undisturbed)
    assert rows_of(storage) == rows_of(undisturbed)
    assert before <= whole_lines(storage), "a cell that was answered was asked again"
    assert sealed, "nothing was finished before the head was lost, so nothing could have been made again"
    assert sealed.items() <= finished(storage).items(), "what was finished was made again"


ASHA = {"kind": "asha", "grace_period": 2, "reduction_factor": 2, "proxy": {"facts": 2}}


@pytest.mark.parametrize("scheduler", [None, ASHA], ids=["alone", "early stopping"])
def test_a_trial_that_takes_its_process_with_it_again_and_again_has_failed(tmp_path: Path, scheduler: JsonObject | None) -> None:
    ranks = {"train.lora.rank": {"grid": [KILLING_RANK, 2]}}
    sweep = write_stub_sweep(tmp_path, name="deadly", **{"search": ranks, "arms": {}, "scheduler": scheduler})
    command = [sys.executable, "-m", "tests.sweep.stubs", "--", "sweep", str(sweep), "--storage", str(tmp_path / "runs")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=400)
    told = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1, told
    assert [label for label in BEGINS_AGAIN.findall(told) if label.startswith(f"rank={KILLING_RANK}")] == [f"rank={KILLING_RANK} #0"] * 2
    assert f"rank={KILLING_RANK} #0 failed: " in told
    assert f"rank={KILLING_RANK} #0 failed: the trial's process was lost" not in told, "Ray knows more of it"
    assert "1 of 2 trials are finished" in told
