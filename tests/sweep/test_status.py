"""The status of a sweep: its counts, and that it is written on where the cluster or storage does not answer for a moment."""

from __future__ import annotations

import dataclasses
import errno
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pause_ray.core.process import Stage
from pause_ray.core.storage import Storage
from pause_ray.evaluation.cell_scheduler import PoolState, ScoringStats
from pause_ray.sweep import status
from pause_ray.sweep.progress import TrialState
from pause_ray.sweep.status import (
    ClusterState,
    ExpectedTrial,
    LiveStatus,
    Metric,
    Speed,
    Speedometer,
    StatusWriter,
    StepCounter,
    TrainingProgress,
    count_trials,
    idle_share,
)

NUMBER, ANSWERED = 10, 4


def expected(*trials: str) -> dict[str, ExpectedTrial]:
    """The first trial has some answers already."""
    return {key: ExpectedTrial(key, "arm", NUMBER, 0 if number else ANSWERED) for number, key in enumerate(trials)}


@pytest.mark.parametrize(
    ("state", "left"),
    [
        (None, NUMBER - ANSWERED),
        (TrialState(Stage.TRAINING, 3, 60), NUMBER - ANSWERED),
        (TrialState(Stage.PROXY, 1, 16), NUMBER - ANSWERED),
        (TrialState(Stage.QUEUED, 5, NUMBER), NUMBER - 5),
        (TrialState(Stage.SCORING, 7, NUMBER), NUMBER - 7),
        (TrialState(Stage.NUMERICS_CHECK, 0, 12), 0),
        *((TrialState(stage, 0, 0), 0) for stage in Stage if stage.is_end),
    ],
)
def test_cells_that_are_left_of_a_trial(state: TrialState | None, left: int) -> None:
    states = {"a": state} if state else {}
    assert count_trials(expected("a"), states, failed=(), left_out=())[1] == left
    assert count_trials(expected("a"), states, failed=["a"], left_out=())[1] == 0


def test_every_trial_is_in_one_state_and_what_is_left_out_has_none_left() -> None:
    states = {"a": TrialState(Stage.TRAINING, 1, 2), "b": TrialState(Stage.SCORING, 9, NUMBER), "c": TrialState(Stage.STOPPED, 1, 1)}
    by_state, left = count_trials(expected("a", "b", "c", "d", "e"), states, failed=["b"], left_out=["c", "d"])
    assert by_state == {"stopped": 2, "training": 1, "failed": 1, "to_come": 1}
    assert left == (NUMBER - ANSWERED) + NUMBER


def test_what_is_left_out_is_counted_all_the_same_once_it_has_begun() -> None:
    states = {"b": TrialState(Stage.SCORING, 9, NUMBER)}
    by_state, left = count_trials(expected("a", "b", "c"), states, failed=[], left_out=["a", "b"])
    assert by_state == {"stopped": 1, "scoring": 1, "to_come": 1}
    assert left == 1 + NUMBER


def rows(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "tokens": 100} for step in steps]


def counted(before: Mapping[str, TrainingProgress], *reported: tuple[str, dict[str, Any]]) -> StepCounter:
    counts = StepCounter(before)
    for trial, row in reported:
        counts.note(trial, row)
    return counts


def test_a_step_that_is_reported_or_trained_again_counts_once() -> None:
    reported = [("a", row) for row in rows(1, 2, 3, 2, 3, 4)] + [("b", row) for row in rows(1)]
    counts = counted({}, *reported)
    assert counts.new == TrainingProgress(steps=5, tokens=500)
    assert counts.by_trial == {"a": TrainingProgress(steps=4, tokens=400), "b": TrainingProgress(steps=1, tokens=100)}


def test_steps_that_an_earlier_driver_counted_are_not_new() -> None:
    counts = counted({"a": TrainingProgress(steps=3, tokens=299)}, *(("a", row) for row in rows(1, 2, 3, 4)))
    assert counts.new == TrainingProgress(steps=1, tokens=100)
    assert counts.by_trial["a"] == TrainingProgress(steps=4, tokens=399)


def answered(cells: int) -> list[ScoringStats]:
    return [ScoringStats(cells=cells, prefilled_tokens=10 * cells), ScoringStats(cells=cells, decoded_tokens=10 * cells)]


def test_speeds_are_those_of_the_last_minute() -> None:
    meter = Speedometer()
    assert meter.speed(answered(0), trained_tokens=0, now=1000.0) == Speed()
    assert meter.speed(answered(10), trained_tokens=50, now=1010.0) == Speed(cells=2.0, scored_tokens=20.0, trained_tokens=5.0)
    for seconds in range(20, 200, 10):
        fast = meter.speed(answered(10 + 2 * (seconds - 10)), trained_tokens=50, now=1000.0 + seconds)
    assert fast == Speed(cells=4.0, scored_tokens=40.0, trained_tokens=0.0)


def test_totals_that_start_from_zero_again_give_no_negative_speed() -> None:
    meter = Speedometer()
    meter.speed(answered(100), trained_tokens=0, now=0.0)
    assert meter.speed(answered(1), trained_tokens=0, now=5.0) == Speed()
    assert meter.speed(answered(6), trained_tokens=0, now=10.0).cells == 2.0


def test_a_pool_that_does_not_answer_keeps_the_last_speed_for_a_minute() -> None:
    meter = Speedometer()
    assert meter.speed(None, trained_tokens=0, now=0.0) == Speed()
    meter.speed(answered(50_000), trained_tokens=0, now=0.0)
    before = meter.speed(answered(50_006), trained_tokens=0, now=6.0)
    assert before.cells == 2.0
    assert meter.speed(None, trained_tokens=0, now=9.0) == before
    assert meter.speed(answered(50_012), trained_tokens=0, now=12.0).cells == 2.0
    assert meter.speed(None, trained_tokens=0, now=200.0) == Speed(), "of the last minute nothing is known"


def test_a_gpu_that_is_free_or_whose_holder_waits_is_idle() -> None:
    running = [TrialState(Stage.TRAINING, 1, 2), TrialState(Stage.SCORING, 1, 2)]
    cluster = ClusterState(scoring=scoring(pids=(1, 2, 3), busy=1), gpus=8.0, free_gpus=1.0)
    assert idle_share(running, cluster, per_actor=0.5, per_trial=1.0) == pytest.approx((1.0 + 2 * 0.5 + 1.0) / 8)
    unknown = ClusterState(gpus=8.0, free_gpus=1.0)
    assert idle_share(running, unknown, per_actor=0.5, per_trial=0.0) == pytest.approx(1 / 8)
    assert idle_share(running, dataclasses.replace(cluster, gpus=1.0), per_actor=0.5, per_trial=1.0) == 1.0
    assert idle_share(running, dataclasses.replace(cluster, gpus=0.0), per_actor=0.0, per_trial=0.0) is None
    assert idle_share(running, ClusterState(), per_actor=0.0, per_trial=0.0) is None


def scoring(*, pids: tuple[int, ...], busy: int) -> PoolState:
    return PoolState(pids=pids, busy=busy, starting=1, requests=1, stats={"grid": ScoringStats(cells=100_000)})


class Series(dict[tuple[str, str], float]):
    """Stands for ``RayMetrics``: (name, state) → the last value."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self[metric.name, labels.get("state", "")] = value


@pytest.fixture
def writer(tmp_path: Path) -> StatusWriter:
    """A writer of a sweep with two trials of each of two arms."""
    suite = SimpleNamespace(num_positions={1024: NUMBER})
    trials = {
        f"{arm}{number}": SimpleNamespace(planned=SimpleNamespace(arm=arm, label=f"{arm} #{number}", spec=SimpleNamespace(eval=suite)))
        for arm in ("good", "bad")
        for number in (0, 1)
    }
    found = StatusWriter(tmp_path, storage=Storage(tmp_path), metrics=cast(Any, Series()), settled={Stage.STOPPED: 2})
    found.expect(cast(Any, trials))
    return found


def write(writer: StatusWriter, cluster: ClusterState, *, states: Any = None, given_up: Mapping[str, str] | None = None) -> None:
    display, queue = SimpleNamespace(states=states or {}, seconds_left=None), SimpleNamespace(given_up=given_up or {})
    writer.write(cast(Any, display), cast(Any, queue), cluster, failures={})


def written(writer: StatusWriter, folder: Path, cluster: ClusterState, **more: Any) -> LiveStatus:
    write(writer, cluster, **more)
    found = LiveStatus.read(folder)
    assert found is not None
    return found


def test_a_missed_answer_makes_no_speed_and_no_number_of_gpus(writer: StatusWriter, tmp_path: Path) -> None:
    answer = ClusterState(scoring=scoring(pids=(1,), busy=1), gpus=0.0)
    for cluster in (answer, ClusterState(), answer):
        assert written(writer, tmp_path, cluster).speed.cells == 0, "nothing was answered meanwhile"
    writer._metrics = shown = cast(Any, Series())
    found = written(writer, tmp_path, ClusterState())
    assert (found.actors, found.gpus, found.gpu_idle_share) == (None, None, None)
    assert not {status.GPUS.name, status.GPU_IDLE_SHARE.name, status.CELLS.name} & {name for name, _ in shown}
    assert shown[status.CELLS_LEFT.name, ""] == 4 * NUMBER


def test_trials_of_an_arm_that_was_given_up_are_not_to_come(writer: StatusWriter, tmp_path: Path) -> None:
    reason = {"bad": "3 of them have failed"}
    found = written(writer, tmp_path, ClusterState(), states={"bad0": TrialState(Stage.SCORING, 2, NUMBER)}, given_up=reason)
    assert found.given_up == reason
    shown = cast(Any, writer._metrics)
    assert [shown[status.TRIALS.name, state] for state in (Stage.TO_COME, Stage.SCORING, Stage.STOPPED)] == [2, 1, 1 + 2]
    assert shown[status.CELLS_LEFT.name, ""] == 2 * NUMBER + NUMBER - 2, "the one that runs goes on"


def test_storage_that_refuses_is_logged_once_each_time_and_raises_nothing(
    writer: StatusWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuses = True

    def look(folder: Path) -> bool:
        if refuses:
            raise OSError(errno.ESTALE, "Stale file handle")
        return False

    monkeypatch.setattr(status, "is_complete", look)
    writer.steps.note("good0", {"step": 1, "tokens": 100})
    with caplog.at_level(logging.WARNING, logger="pause_ray"):
        for refuses in (True, True, False, True, True):
            write(writer, ClusterState())
            assert refuses or (tmp_path / "status.json").is_file()
    assert len([message for message in caplog.messages if "Stale file handle" in message]) == 2
