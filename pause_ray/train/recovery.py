"""Which failures of Ray Train's workers are worth another attempt. Knows Ray Train; starts nothing.

A worker that was lost (killed, out of memory, its node gone, its peers unreachable) is replaced and the group goes on from
the last checkpoint, as long as it gets further each time. What the training itself raises ends it at once.
"""

from __future__ import annotations

from typing import Any

import ray.train

from pause_ray.checkpoint import RunningTraining
from pause_ray.errors import PauseRayError, TrainingError

FRUITLESS_ATTEMPTS = 3
"""Attempts in a row that were lost without a new checkpoint, after which training gives up."""


class Recovery(ray.train.UserCallback):  # type: ignore[misc]
    """Lives in Ray Train's controller; an exception that it raises ends the training, otherwise the workers are started again."""

    def __init__(self, running: RunningTraining) -> None:
        """Of the training whose checkpoints lie there."""
        self._running = running
        self._last_step: int | None = None
        self._fruitless = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Decide after workers have failed.

        Raises:
            Exception: what a worker raised, where trying again would raise it again.
            TrainingError: workers were lost too often without getting further.
        """
        for failure in worker_exceptions.values():
            if isinstance(failure, PauseRayError) or not _may_be_the_machine(failure):
                raise failure
        lost = [getattr(failure, "health_check_failure", failure) for failure in worker_exceptions.values()]
        if any(getattr(failure, "preempted", False) for failure in lost):
            return  # announced, and told again until the node is gone
        step = self._running.last_step()
        self._fruitless = 1 if step != self._last_step else self._fruitless + 1
        self._last_step = step
        if self._fruitless >= FRUITLESS_ATTEMPTS:
            told = "; ".join(f"worker {rank}: {_last_line(failure)}" for rank, failure in worker_exceptions.items())
            raise TrainingError(
                f"workers were lost {self._fruitless} times in a row after step {step} ({told}); look at their nodes, "
                "give them more memory, or set train.checkpoint_every to fewer steps; the same command goes on"
            )


def run_config(running: RunningTraining, *, name: str, storage: str) -> ray.train.RunConfig:
    """Ray Train's settings for a training that survives its workers; ``storage`` is where it keeps its own notes."""
    return ray.train.RunConfig(
        name=name,
        storage_path=storage,
        failure_config=ray.train.FailureConfig(max_failures=-1),  # Recovery decides
        callbacks=[Recovery(running)],
    )


def cause_of(error: Exception) -> Exception:
    """What a worker or ``Recovery`` raised, where it is an error of ours or of the disk; otherwise a ``TrainingError``."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in failures:
        raised = getattr(failure, "_base_exc", failure)
        if isinstance(raised, ray.train.TrainingFailedError):
            return cause_of(raised)
        if isinstance(raised, PauseRayError | OSError):
            return raised
    return TrainingError(f"Ray Train gave up: {error}")


def _last_line(failure: Exception) -> str:
    return (str(failure).strip() or repr(failure)).splitlines()[-1]


def _may_be_the_machine(failure: Exception) -> bool:
    """Lost workers, which Ray tells in exceptions of its own, and unreachable peers and broken GPUs, of which torch's are RuntimeErrors."""
    return isinstance(failure, RuntimeError) or type(failure).__module__.startswith("ray.")
