"""What the driver makes of what trials say: who is silent because it hangs, and who because it waits for others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pause_ray.core.process import Stage
from pause_ray.sweep.progress import TrialState
from pause_ray.sweep.queue import TrialQueue

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

LIMIT_SECONDS = 0.5


@pytest.fixture
def board() -> Iterator[Any]:
    import ray

    from pause_ray.sweep.reporter import start_progress_actor

    started = start_progress_actor()
    yield started
    ray.kill(started)


def failures_after(board: Any, states: dict[str, TrialState], until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What a watch with a limit takes to have failed, when trials say ``states`` and then nothing more."""
    import ray

    from pause_ray.sweep.reporter import TrialMonitor

    line = TrialQueue(start=lambda key: None)
    line.expect(dict.fromkeys(states, "arm"))
    watch = TrialMonitor(
        board,
        line,
        timeout_minutes=LIMIT_SECONDS / 60,
        after_step=lambda key, row: None,
        finish=lambda: None,
        label=lambda key: key,
        say=lambda text: None,
    )
    for key, state in states.items():
        ray.get(board.begin.remote(key, None))
        ray.get(board.show.remote(key, state))
    watch.look()
    deadline = time.monotonic() + 120
    while not until(watch.failures):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        watch.look()
    return watch.failures


def test_who_insists_on_an_end_is_not_kept_waiting_by_trials(board: Any) -> None:
    import ray
    from ray.exceptions import RayActorError

    from pause_ray.sweep.reporter import TrialMonitor

    line = TrialQueue(start=lambda key: None)
    line.expect({"trained": "arm"})
    watch = TrialMonitor(
        board,
        line,
        timeout_minutes=None,
        after_step=lambda key, row: None,
        finish=lambda: None,
        label=lambda key: key,
        say=lambda text: None,
    )

    class Trial:
        def answers(self) -> bool:
            return True

        def never_ends(self) -> None:
            threading.Event().wait()

    process = ray.remote(num_cpus=0, max_concurrency=2)(Trial).remote()
    at_work = process.never_ends.remote()
    ray.get(board.begin.remote("trained", process))
    ray.get(board.show.remote("trained", TrialState(Stage.TRAINING, 1, 4)))
    watch.interrupted = True
    watch.look()
    assert ray.get(process.answers.remote()), "a first signal lets it come to an end of its own"
    watch.insisted = True
    watch.look()
    with pytest.raises(RayActorError):
        ray.get(at_work, timeout=120)
    assert not watch.failures, "it did nothing wrong"


def test_only_who_is_at_work_and_says_nothing_is_taken_to_hang(board: Any) -> None:
    at_work = {stage: TrialState(stage, 1, 4) for stage in (Stage.STARTING, Stage.DATA, Stage.TRAINING, Stage.SCORING, Stage.RECHECKING)}
    for_others = {stage: TrialState(stage, 1, 4) for stage in Stage if stage.waits_for_others}
    failed = failures_after(board, for_others | at_work, lambda failures: len(failures) >= len(at_work))
    assert failed.keys() == at_work.keys()
    assert all("said nothing for" in message and f"({stage}, 1 of 4 done)" in message for stage, (message, _) in failed.items())
