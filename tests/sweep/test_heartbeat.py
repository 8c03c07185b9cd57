"""A heartbeat goes on where the cluster or storage does not answer for a moment, and says nothing that it does not know."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytestmark = pytest.mark.ray
pytest.importorskip("ray")

from ray.exceptions import GetTimeoutError  # noqa: E402

from pause_ray.live_status import LiveStatus  # noqa: E402
from pause_ray.needle.tally import Answered, FleetState  # noqa: E402
from pause_ray.storage import Storage  # noqa: E402
from pause_ray.sweep import heartbeat, metrics, shortage  # noqa: E402
from pause_ray.sweep.heartbeat import Heartbeat  # noqa: E402
from pause_ray.sweep.progress import SweepProgress, TrialState  # noqa: E402
from pause_ray.sweep.shortage import ShortageWatch  # noqa: E402

CELLS = 12
ROW = {"step": 1, "tokens": 100}


class Broker:
    """A fleet whose broker has answered many cells long ago, and misses the beats that it is told to miss."""

    misses = False

    def state(self, *, timeout_seconds: float) -> FleetState:
        if self.misses:
            raise GetTimeoutError(f"no answer within {timeout_seconds} s")
        return FleetState(pids=(1,), busy=1, coming=0, orders=1, waiting_cells=0, answered={"grid": Answered(cells=100_000)})


class Told(dict[tuple[str, str], float]):
    """What went to Prometheus: (name, state) → the last value."""

    def show(self, metric: metrics.Metric, value: float, **labels: str) -> None:
        self[metric.name, labels.get("state", "")] = value

    def count(self, metric: metrics.Metric, total: float, **labels: str) -> None:
        self[metric.name, ""] = total


def beating(
    folder: Path, *, broker: Broker | None = None, states: Mapping[str, TrialState] | None = None, given_up: Mapping[str, str] | None = None
) -> Heartbeat:
    """Of a sweep with two trials of each of two arms."""
    suite = SimpleNamespace(num_positions={1024: CELLS})
    trials = {
        f"{arm}{number}": SimpleNamespace(planned=SimpleNamespace(arm=arm, label=f"{arm} #{number}", spec=SimpleNamespace(eval=suite)))
        for arm in ("good", "bad")
        for number in (0, 1)
    }
    rounds = SimpleNamespace(folder=folder, trials=trials, left_out=set, num_finished=lambda: 0)
    progress = SimpleNamespace(look=lambda: dict(states or {}), seconds_left=None)
    found = Heartbeat(
        cast(Any, rounds),
        storage=Storage(folder),
        places=cast(Any, SimpleNamespace(scoring_gpus=0.0, train_gpus=0.0, resources=SimpleNamespace(train_workers=0))),
        fleet=cast(Any, broker or Broker()),
        progress=cast(SweepProgress, progress),
        failures=dict,
        given_up=lambda: given_up or {},
        ended_by=lambda: None,
    )
    found._exported = cast(Any, Told())
    found.expect(cast(Any, trials))
    return found


def said(folder: Path) -> LiveStatus:
    status = LiveStatus.read(folder)
    assert status is not None
    return status


def test_a_missed_answer_of_the_broker_makes_no_speed_and_no_number_of_gpus(tmp_path: Path) -> None:
    broker = Broker()
    beat = beating(tmp_path, broker=broker)
    for broker.misses in (False, True, False):
        beat._beat()
        assert said(tmp_path).speed.cells == 0, "nothing was answered meanwhile"
    broker.misses = True
    beat._exported = shown = cast(Any, Told())
    beat._beat()
    assert (said(tmp_path).fleet, said(tmp_path).gpus, said(tmp_path).gpu_idle_share) == (None, None, None)
    assert not {metrics.GPUS.name, metrics.GPU_IDLE_SHARE.name, metrics.CELLS.name} & {name for name, _ in shown}
    assert shown[metrics.CELLS_LEFT.name, ""] == 4 * CELLS


def test_trials_of_an_arm_that_was_given_up_are_not_to_come(tmp_path: Path) -> None:
    beat = beating(tmp_path, given_up={"bad": "3 of them have failed"}, states={"bad0": TrialState("scoring", 2, CELLS)})
    shown = cast(Any, beat._exported)
    beat._beat()
    assert said(tmp_path).given_up == {"bad": "3 of them have failed"}
    assert [shown[metrics.TRIALS.name, state] for state in ("to_come", "scoring", "stopped")] == [2, 1, 1]
    assert shown[metrics.CELLS_LEFT.name, ""] == 2 * CELLS + CELLS - 2, "the one that runs goes on"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.005)


def test_storage_that_refuses_a_look_ends_neither_the_thread_nor_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[Path] = []
    refuses = True

    def look(folder: Path) -> bool:
        looks.append(folder)
        if refuses:
            raise OSError(errno.ESTALE, "Stale file handle")
        return False

    monkeypatch.setattr(heartbeat, "is_complete", look)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    beat = beating(tmp_path)
    beat.note_step("good0", ROW)
    with caplog.at_level(logging.WARNING, logger="pause_ray"), beat:
        wait_until(lambda: len(looks) > 3)
        refuses = False
        wait_until((tmp_path / "status.json").is_file)
        refuses = True
        told = said(tmp_path)
        before = len(looks)
        wait_until(lambda: len(looks) > before + 3)
    assert told.ended is None
    refusals = [message for message in caplog.messages if "Stale file handle" in message]
    assert len(refusals) == 2, "once for each time that it began"


def test_a_cluster_that_cannot_be_looked_at_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def demand() -> Any:
        nonlocal looks
        looks += 1
        raise GetTimeoutError("the head is busy")

    monkeypatch.setattr(shortage, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(shortage, "demand", demand)
    with ShortageWatch(lambda text: None):
        wait_until(lambda: looks > 2)
