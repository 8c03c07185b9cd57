"""The driver's view of trials by their reports: silence of a trial that hangs, silence of one that waits for others, and interrupts."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from pause_ray.core.process import Stage
from pause_ray.evaluation.cell_scheduler import PoolState
from pause_ray.sweep import progress
from pause_ray.sweep.progress import ProgressDisplay, TrialState
from pause_ray.sweep.queue import TrialQueue

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

LIMIT_SECONDS = 0.5


@pytest.fixture
def progress_actor() -> Iterator[Any]:
    import ray

    from pause_ray.sweep.reporter import start_progress_actor

    started = start_progress_actor()
    yield started
    ray.kill(started)


def monitor(progress_actor: Any, queue: TrialQueue, *, timeout_minutes: float | None) -> Any:
    from pause_ray.sweep.reporter import TrialMonitor

    display = ProgressDisplay(Console(file=io.StringIO()))
    pool: Any = SimpleNamespace(finish=lambda: None)
    return TrialMonitor(progress_actor, queue=queue, pool=pool, display=display, timeout_minutes=timeout_minutes)


def failures_after(progress_actor: Any, states: dict[str, TrialState], until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the failures that a monitor with a limit notes when trials report ``states`` and then nothing more."""
    import ray

    queue = TrialQueue(start=lambda key: None)
    queue.expect(dict.fromkeys(states, "arm"))
    watched = monitor(progress_actor, queue, timeout_minutes=LIMIT_SECONDS / 60)
    for key, state in states.items():
        ray.get(progress_actor.begin.remote(key, None))
        ray.get(progress_actor.report.remote(key, state))
    watched.read()
    deadline = time.monotonic() + 120
    while not until(watched.failures):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        watched.read()
    return watched.failures


def test_a_second_signal_kills_trials_that_do_not_end(progress_actor: Any) -> None:
    import ray
    from ray.exceptions import RayActorError

    queue = TrialQueue(start=lambda key: None)
    queue.expect({"trained": "arm"})
    watched = monitor(progress_actor, queue, timeout_minutes=None)

    class Trial:
        def answers(self) -> bool:
            return True

        def never_ends(self) -> None:
            threading.Event().wait()

    process = ray.remote(num_cpus=0, max_concurrency=2)(Trial).remote()
    at_work = process.never_ends.remote()
    ray.get(progress_actor.begin.remote("trained", process))
    ray.get(progress_actor.report.remote("trained", TrialState(Stage.TRAINING, 1, 4)))
    watched.interrupted.set()
    watched.read()
    assert ray.get(process.answers.remote()), "a first signal lets it come to an end of its own"
    watched.insisted.set()
    watched.read()
    with pytest.raises(RayActorError):
        ray.get(at_work, timeout=120)
    assert not watched.failures, "it did nothing wrong"


def test_only_a_silent_trial_that_waits_for_no_other_counts_as_hanging(progress_actor: Any) -> None:
    at_work = {
        stage: TrialState(stage, 1, 4) for stage in (Stage.STARTING, Stage.DATA, Stage.TRAINING, Stage.SCORING, Stage.NUMERICS_CHECK)
    }
    for_others = {stage: TrialState(stage, 1, 4) for stage in Stage if stage.waits_for_others}
    failed = failures_after(progress_actor, for_others | at_work, lambda failures: len(failures) >= len(at_work))
    assert failed.keys() == at_work.keys()
    assert all(
        "reported nothing for" in failure.message and f"({stage}, 1 of 4 done)" in failure.message for stage, failure in failed.items()
    )


class SilentPool:
    """A scoring pool that answers after a longer time than the driver waits."""

    def state(self, *, timeout_seconds: float) -> PoolState:
        from ray.exceptions import GetTimeoutError

        raise GetTimeoutError(f"no answer within {timeout_seconds} s")


class Pool:
    def state(self, *, timeout_seconds: float) -> PoolState:
        return PoolState(pids=(1,), busy=1, starting=0, requests=1, stats={})


def test_a_cluster_that_does_not_answer_is_left_out_of_the_status() -> None:
    from pause_ray.sweep.runner import cluster_state
    from pause_ray.sweep.status import ClusterState

    assert cluster_state(cast(Any, SilentPool())) == ClusterState()
    assert cluster_state(cast(Any, Pool())).gpus == 0


def test_a_sweep_that_waits_for_a_resource_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from pause_ray.sweep.runner import cluster_state

    monkeypatch.setattr(progress, "PENDING_SECONDS", 0.0)
    screen = io.StringIO()
    display = ProgressDisplay(Console(file=screen, width=300))

    @ray.remote(num_cpus=0, resources={"quantum_chip": 2})
    def work() -> None: ...

    waiting = work.remote()
    deadline = time.monotonic() + 120
    try:
        while "quantum_chip" not in screen.getvalue():
            assert time.monotonic() < deadline, "never shown"
            display.note_pending(cluster_state(cast(Any, Pool())).pending, now=time.monotonic())
        display.note_pending(cluster_state(cast(Any, Pool())).pending, now=time.monotonic())
    finally:
        ray.cancel(waiting)
    [line] = [line for line in screen.getvalue().splitlines() if "quantum_chip" in line]
    assert "Ray has not placed {'quantum_chip': 2.0}: 1+ pending tasks/actors; `ray status` on the head" in line
