"""What happens to machines, for real: two nodes, a killed worker, a killed machine, a node that is taken away, a killed driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.storage import is_complete, read_json_lines
from pause_ray.models.checkpoint import TRAINING_LOG, Checkpoint, training_folder
from pause_ray.training.launch import train_digest
from tests.training import faulty_cluster
from tests.training.test_launch import job_of, largest_difference, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3
"""Of the adapter after some hundred steps in float32, part of them on two workers and part on one."""


def after(scenario: str, llama: Path, shards: Path, folder: Path) -> tuple[list[dict[str, Any]], Checkpoint]:
    """What happened, and the checkpoint that the training left all the same."""
    events = folder / "events.json"
    command = [sys.executable, "-m", "tests.training.faulty_cluster", scenario, *map(str, (llama, shards, folder / "runs", events))]
    driver = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **faulty_cluster.QUICKLY}, capture_output=True, text=True, timeout=900, check=False
    )
    assert events.is_file(), driver.stdout + driver.stderr
    told = json.loads(events.read_text())
    assert "checkpoint" in told, told
    return told["happened"], Checkpoint.open(Path(told["checkpoint"]))


@pytest.mark.ray
@pytest.mark.parametrize(("scenario", "happenings"), [("killed", ["worker", "machine"]), ("drained", ["drain", "gone", "stop"])])
def test_a_training_survives(llama: Path, shards: Path, tmp_path: Path, scenario: str, happenings: list[str]) -> None:
    """Killed: a worker is replaced, then a node is lost in mid-step and one worker goes on.

    Drained: there is no regular checkpoint, so without one that is made in time the second attempt would begin anew; later
    the driver is asked to end, and goes on alone. A step that is taken again has other seconds.
    """
    happened, checkpoint = after(scenario, llama, shards, tmp_path)
    settings = faulty_cluster.SETTINGS[scenario]
    assert [event["name"] for event in happened] == happenings
    rows = checkpoint.losses()
    assert [row["step"] for row in rows] == list(range(1, settings["max_steps"] + 1)), "each step once"
    assert not training_folder(checkpoint.folder).exists()
    for event in happened:
        kept = next((step for step, row in enumerate(event["rows"]) if row != rows[step]), len(event["rows"]))
        repeated = len(event["rows"]) - kept
        if event["name"] in ("worker", "machine"):
            assert repeated <= settings["checkpoint_every"], event["name"]
        elif event["name"] in ("drain", "stop"):
            assert repeated == 0, event["name"]
    undisturbed = run(job_of(llama, shards, **settings), tmp_path / "undisturbed")
    assert largest_difference(checkpoint, undisturbed) < TOLERANCE


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.torch
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_same_command_goes_on_after_its_driver_was_killed(llama: Path, shards: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGKILL leaves the last regular checkpoint, the others make one; what comes out is the adapter of a training that ran through."""
    settings = {"max_steps": 300, "checkpoint_every": 20 if number == signal.SIGKILL else None}
    job = job_of(llama, shards, **settings)
    code = (
        "from pathlib import Path\n"
        "from tests.training.test_launch import job_of, run\n"
        f"run(job_of(Path({str(llama)!r}), Path({str(shards)!r}), **{settings!r}), Path({str(tmp_path)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    checkpoints = tmp_path / "checkpoints"

    def rows() -> list[dict[str, Any]]:
        return next((read_json_lines(path) for path in checkpoints.glob(f".*.partial/{TRAINING_LOG}")), [])

    try:
        wait_for(lambda: len(rows()) > 45, process)
    finally:
        process.send_signal(number)
        _, said = process.communicate(timeout=180)
    assert not is_complete(checkpoints / train_digest(job))
    assert number == signal.SIGKILL or b"StoppedError: training was asked to end after step" in said
    saved = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob(".*.training/step-*"))
    kept = read_json_lines(next(checkpoints.glob(f".*.training/step-{saved}")) / TRAINING_LOG)
    seen: list[int] = []
    again = run(job, tmp_path, lambda step, steps, row: seen.append(step))
    assert again.losses()[:saved] == kept, "rows of the first attempt, seconds and all"
    assert seen == list(range(1, 301))
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == [again.folder.name]
    undisturbed = run(job_of(llama, shards, **settings), tmp_path / "undisturbed")
    assert largest_difference(again, undisturbed) == 0
