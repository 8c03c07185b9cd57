"""Progress of trials, from their processes to the driver: an actor that keeps reports, a trial's side of it, and the driver's side.

A trial reports through ``TrialReporter`` to the ``ProgressActor``; the driver's ``TrialMonitor`` drains the actor, counts what was
reported, and ends trials that hang. An interrupt takes the same way back: the actor's answer to a report says whether to continue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pause_ray.core.errors import PauseRayError, StoppedError
from pause_ray.core.process import Stage
from pause_ray.core.spec import JsonObject
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.sweep.progress import ProgressDisplay, TrialState
from pause_ray.sweep.queue import TrialQueue
from pause_ray.sweep.status import Failure

log = logging.getLogger("pause_ray")

STAGES_THAT_ASK = (Stage.WAITING, Stage.DATA, Stage.TRAINING)
"""Stages in which a report waits for the answer whether the trial may continue. The scoring pool answers in the stages of scoring."""


@dataclass(kw_only=True)
class Update:
    """Reports of trials since the last call of ``ProgressActor.drain``."""

    states: dict[str, TrialState] = field(default_factory=dict)
    """The last state of each trial that reported, by trial digest."""
    steps: list[tuple[str, JsonObject]] = field(default_factory=list)
    """Trial digests and rows of their training logs in the order of their arrival."""
    failures: dict[str, Failure] = field(default_factory=dict)
    """The first reason of each trial that failed, by trial digest."""


@dataclass
class ProgressActor:
    """A Ray actor's class: keeps what trials report until the driver drains it, so that a drain costs as much as there is to see."""

    _new: Update = field(default_factory=Update)
    _processes: dict[str, Any] = field(default_factory=dict)
    _published: dict[str, bytes] = field(default_factory=dict)
    _ending: bool = False

    def publish(self, trials: Mapping[str, bytes]) -> None:
        """Keep pickled trials for the processes that will run them, each until it has ended."""
        self._published |= trials

    def published(self, key: str) -> bytes:
        """Return a published trial."""
        return self._published[key]

    def begin(self, key: str, process: Any) -> bool:
        """Note the actor handle of a trial's process. Return False if the sweep ends and the trial must not begin."""
        self._processes[key] = process
        self._new.states[key] = TrialState(Stage.STARTING, 0, 1)
        return not self._ending

    def process(self, key: str) -> Any:
        """Return the actor handle of a trial's process, or None if the trial has not begun."""
        return self._processes.get(key)

    def report(self, key: str, state: TrialState) -> bool:
        """Replace a trial's state and keep the row of its training log, if there is one.

        Returns:
            Whether the trial may continue. If not, it must stop where a later run can resume it.
        """
        self._new.states[key] = state
        if state.row is not None:
            self._new.steps.append((key, state.row))
        if state.stage.is_end:
            self._forget(key)
        return not self._ending

    def fail(self, key: str, failure: Failure) -> None:
        """Keep why a trial failed."""
        self._new.failures.setdefault(key, failure)
        self._new.states[key] = TrialState(Stage.FAILED, 0, 0)
        self._forget(key)

    def end(self) -> None:
        """Ask running trials to stop, and let none begin."""
        self._ending = True

    def drain(self) -> Update:
        """Return what was reported since the last call."""
        update, self._new = self._new, Update()
        return update

    def _forget(self, key: str) -> None:
        self._published.pop(key, None)
        self._processes.pop(key, None)


def start_progress_actor() -> Any:
    """Start a ``ProgressActor`` on the driver's node, since other nodes may be taken away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(ProgressActor).options(num_cpus=0, scheduling_strategy=here).remote()


class TrialReporter:
    """A ``trial.run.TrialProgress`` that reports one trial to the sweep's ``ProgressActor``."""

    def __init__(self, progress_actor: Any, key: str) -> None:
        """Create a reporter for the trial with this digest."""
        self._actor = progress_actor
        self._key = key
        self._has_begun = False

    def begin(self) -> None:
        """Announce, once, that this process runs the trial.

        Raises:
            StoppedError: the sweep ends, so the trial must not begin.
        """
        if self._has_begun:
            return
        self._has_begun = True
        log.info("begins")
        process = ray.get_runtime_context().current_actor
        if not ray.get(self._actor.begin.remote(self._key, process)):
            raise StoppedError("the sweep ended before the trial began; run the same command again to begin it")

    def __call__(self, stage: Stage, done: int, total: int, row: JsonObject | None = None) -> None:
        """Report the trial's state, and in ``STAGES_THAT_ASK`` wait for the answer.

        Raises:
            StoppedError: the trial must stop. A training then writes a checkpoint after its running step.
        """
        answer = self._actor.report.remote(self._key, TrialState(stage, done, total, row))
        if stage in STAGES_THAT_ASK and not ray.get(answer):
            raise StoppedError(f"stopped while {stage}; run the same command again to go on")

    def finish(self, stage: Stage) -> None:
        """Report that the trial has ended: ``DONE``, or ``STOPPED`` where it can be resumed."""
        ray.get(self._actor.report.remote(self._key, TrialState(stage, 1, 1)))

    def fail(self, failure: Failure) -> None:
        """Report why the trial failed."""
        ray.get(self._actor.fail.remote(self._key, failure))


COUNTED = (Stage.TRAINING, Stage.SCORING)
"""Stages whose steps and cells are kept when a trial begins again."""
SILENT_MINUTES = 30
"""Silence after which the user is told where no limit is set: loading a large model or waiting for machines may take as long."""


class TrialMonitor:
    """The driver's view of running trials. Not safe for threads: the driver calls it under its own lock."""

    def __init__(
        self, progress_actor: Any, *, queue: TrialQueue, pool: ScoringPool, display: ProgressDisplay, timeout_minutes: float | None
    ) -> None:
        """Watch the trials of ``progress_actor``; one that reports nothing for ``timeout_minutes`` is killed, None sets no limit."""
        self._actor, self._queue, self._pool, self._display = progress_actor, queue, pool, display
        self._timeout_minutes = timeout_minutes
        self._running: dict[str, tuple[TrialState, float]] = {}
        """The last state of each running trial, and when it arrived by the monotonic clock."""
        self._warned_silent: dict[str, float] = {}
        """When the last report of a trial arrived about whose silence the user was warned."""
        self._killed: set[str] = set()
        """Trials whose processes were killed by an interrupt, which is no failure."""
        self._ended = False
        self.interrupted = threading.Event()
        """Set when a signal asked for an end; ``read`` carries it out, since a signal's handler must not talk to Ray."""
        self.insisted = threading.Event()
        """Set when a second signal came: the trials are killed."""
        self._furthest: dict[tuple[str, Stage], int] = {}
        self.failures: dict[str, Failure] = {}
        """Failures of this run, by trial digest."""

    def read(self) -> Update:
        """Drain the actor, note ends and failures, end trials that hang, and carry out an interrupt."""
        update: Update = ray.get(self._actor.drain.remote())
        self._note_states(update.states)
        for key, failure in update.failures.items():
            self._note_failure(key, failure)
        self._end_silent_trials()
        self._carry_out_interrupt()
        return update

    def may_restart(self, key: str) -> bool:
        """Return whether a trial whose process was lost may begin again: it has not failed and was not killed. Its silence is forgotten."""
        self._running.pop(key, None)
        return key not in self.failures and key not in self._killed

    def note_lost(self, key: str, failure: Failure) -> None:
        """Note why a trial's process was lost, unless the trial has reported a failure itself."""
        if key not in self._killed:
            self._note_failure(key, failure)

    def work_done(self, key: str) -> int:
        """Return the steps and cells that a trial has reported, each once however often it began."""
        return sum(self._furthest.get((key, stage), 0) for stage in COUNTED)

    def _note_states(self, states: Mapping[str, TrialState]) -> None:
        now = time.monotonic()
        for key, state in states.items():
            if state.stage.is_end:
                self._running.pop(key, None)
            else:
                self._running[key] = (state, now)
            if state.stage in COUNTED:
                self._furthest[key, state.stage] = max(state.done, self._furthest.get((key, state.stage), 0))
        self._queue.note_finished(key for key, state in states.items() if state.stage == Stage.DONE)

    def _note_failure(self, key: str, failure: Failure) -> None:
        if key not in self.failures:
            self.failures[key] = failure
            self._queue.note_failed(key, failure.message)

    def _end_silent_trials(self) -> None:
        """Kill trials that have been silent for too long; where no limit is set, warn once about each silence."""
        now = time.monotonic()
        for key, (state, arrived) in list(self._running.items()):
            minutes = (now - arrived) / 60
            if state.stage.waits_for_others:
                continue
            progress = f"{state.stage}, {state.done} of {state.total} done"
            if self._timeout_minutes is not None and minutes >= self._timeout_minutes:
                message = (
                    f"reported nothing for {self._timeout_minutes:g} minutes ({progress}), so its process was ended; run the same command "
                    "again to retry it, with a larger trial_timeout_minutes if it was only slow"
                )
                self._kill(key, Failure(error=PauseRayError(message)))
            elif self._timeout_minutes is None and minutes >= SILENT_MINUTES and self._warned_silent.get(key) != arrived:
                self._warned_silent[key] = arrived
                hint = "set trial_timeout_minutes to end such trials"
                self._display.print(f"{self._display.label(key)}: no report for {SILENT_MINUTES} minutes ({progress}); {hint}")

    def _kill(self, key: str, failure: Failure | None) -> None:
        """Kill a trial's process; without a failure the trial did nothing wrong."""
        del self._running[key]
        process = ray.get(self._actor.process.remote(key))  # before the failure, with which the actor forgets the process
        if failure is None:
            self._killed.add(key)
        else:
            ray.get(self._actor.fail.remote(key, failure))
        if process is not None:
            ray.kill(process)

    def _carry_out_interrupt(self) -> None:
        if self.insisted.is_set():
            for key in list(self._running):
                self._kill(key, None)  # Tune would give each of them ten seconds
        if not self.interrupted.is_set() or self._ended:
            return
        self._ended = True
        self._queue.end("it was interrupted")
        ray.get(self._actor.end.remote())
        self._pool.finish()
        for key in [key for key, (state, _) in self._running.items() if state.stage == Stage.WAITING]:
            self._kill(key, None)
        self._display.print("finishing the running cells and training steps, then stopping; press Ctrl-C again to stop at once")
