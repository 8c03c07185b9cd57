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

from pause_ray.core.process import Stage  # noqa: E402
from pause_ray.core.storage import Storage  # noqa: E402
from pause_ray.evaluation.cell_scheduler import PoolState, ScoringStats  # noqa: E402
from pause_ray.sweep import heartbeat  # noqa: E402
from pause_ray.sweep.heartbeat import PENDING_SECONDS, PendingNotice, StatusWriter  # noqa: E402
from pause_ray.sweep.progress import ProgressDisplay, TrialState  # noqa: E402
from pause_ray.sweep.status import LiveStatus  # noqa: E402

CELLS = 12
ROW = {"step": 1, "tokens": 100}


class Broker:
    """A fleet whose broker has answered many cells long ago, and misses the beats that it is told to miss."""

    misses = False

    def state(self, *, timeout_seconds: float) -> PoolState:
        if self.misses:
            raise GetTimeoutError(f"no answer within {timeout_seconds} s")
        return PoolState(pids=(1,), busy=1, starting=0, requests=1, waiting_cells=0, stats={"grid": ScoringStats(cells=100_000)})


class Told(dict[tuple[str, str], float]):
    """What went to Prometheus: (name, state) → the last value."""

    def show(self, metric: heartbeat.Metric, value: float, **labels: str) -> None:
        self[metric.name, labels.get("state", "")] = value

    def count(self, metric: heartbeat.Metric, total: float, **labels: str) -> None:
        self[metric.name, ""] = total


def beating(
    folder: Path, *, broker: Broker | None = None, states: Mapping[str, TrialState] | None = None, given_up: Mapping[str, str] | None = None
) -> StatusWriter:
    """Of a sweep with two trials of each of two arms."""
    suite = SimpleNamespace(num_positions={1024: CELLS})
    trials = {
        f"{arm}{number}": SimpleNamespace(planned=SimpleNamespace(arm=arm, label=f"{arm} #{number}", spec=SimpleNamespace(eval=suite)))
        for arm in ("good", "bad")
        for number in (0, 1)
    }
    rounds = SimpleNamespace(folder=folder, trials=trials, left_out=set, num_finished=lambda: 0)
    progress = SimpleNamespace(look=lambda: dict(states or {}), seconds_left=None)
    found = StatusWriter(
        cast(Any, rounds),
        storage=Storage(folder),
        placement=cast(Any, SimpleNamespace(scoring_gpus=0.0, train_gpus=0.0, resources=SimpleNamespace(train_workers=0))),
        fleet=cast(Any, broker or Broker()),
        progress=cast(ProgressDisplay, progress),
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
    assert not {heartbeat.GPUS.name, heartbeat.GPU_IDLE_SHARE.name, heartbeat.CELLS.name} & {name for name, _ in shown}
    assert shown[heartbeat.CELLS_LEFT.name, ""] == 4 * CELLS


def test_trials_of_an_arm_that_was_given_up_are_not_to_come(tmp_path: Path) -> None:
    beat = beating(tmp_path, given_up={"bad": "3 of them have failed"}, states={"bad0": TrialState(Stage.SCORING, 2, CELLS)})
    shown = cast(Any, beat._exported)
    beat._beat()
    assert said(tmp_path).given_up == {"bad": "3 of them have failed"}
    assert [shown[heartbeat.TRIALS.name, state] for state in ("to_come", "scoring", "stopped")] == [2, 1, 1]
    assert shown[heartbeat.CELLS_LEFT.name, ""] == 2 * CELLS + CELLS - 2, "the one that runs goes on"


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


def shown(line: str | None, states: Mapping[str, TrialState], notice: PendingNotice, *, start: float) -> list[float]:
    """The times, in steps of a second for two minutes, at which the line is shown."""
    return [now for now in range(int(start), int(start) + 120) if notice.due(line, states, now=now) is not None]


def test_pending_requests_are_shown_once_after_a_minute_without_progress() -> None:
    notice, waits = PendingNotice(), {"a": TrialState(Stage.WAITING, 0, 1), "b": TrialState(Stage.QUEUED, 0, 1)}
    line = "{'GPU': 1.0}: 1+ pending tasks/actors"
    assert shown(line, waits, notice, start=0) == [PENDING_SECONDS]
    assert shown(line, waits, notice, start=120) == []
    assert shown(line.replace("1+", "2+"), waits, notice, start=240) == [240 + PENDING_SECONDS]
    assert shown(None, waits, notice, start=360) == []
    assert shown(line, waits, notice, start=480) == [480 + PENDING_SECONDS], "a new shortage"


def test_while_a_trial_makes_progress_no_pending_request_is_shown() -> None:
    notice = PendingNotice()
    steps = [{"a": TrialState(Stage.TRAINING, step, 999)} for step in range(300)]
    assert not any(notice.due("{'GPU': 1.0}: 1+", states, now=now) for now, states in enumerate(steps))


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_that_waits_for_a_resource_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    lines: list[str] = []
    monkeypatch.setattr(heartbeat, "PENDING_SECONDS", 0.0)
    beat = beating(tmp_path)
    beat._progress = cast(Any, SimpleNamespace(look=dict, seconds_left=None, say=lines.append))

    @ray.remote(num_cpus=0, resources={"quantum_chip": 2})
    def work() -> None: ...

    waiting = work.remote()

    def beat_until_shown() -> bool:
        beat._beat()
        return bool(lines)

    try:
        wait_until(beat_until_shown)
        beat._beat()
    finally:
        ray.cancel(waiting)
    [line] = [line for line in lines if "quantum_chip" in line]
    assert "Ray has not placed {'quantum_chip': 2.0}: 1+ pending tasks/actors; `ray status` on the head" in line
