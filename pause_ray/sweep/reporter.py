"""The driver's side of the board: what trials say goes to the display, the tracker and the waiting line; who hangs is ended.

Knows Ray and no trial. A thread looks at the board twice a second, and whoever starts the next trial looks too, so that a failure
is known before the next trial begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pause_ray.core.errors import StoppedError
from pause_ray.core.process import Stage, first_signal_asks
from pause_ray.core.spec import JsonObject
from pause_ray.sweep.progress import TrialState
from pause_ray.sweep.queue import TrialQueue

TrainedStep = tuple[str, JsonObject]
"""A trial's digest and a row of its training log."""
Reason = tuple[str, str | None]
"""A failure's message and traceback."""
ANSWERED = (Stage.WAITING, Stage.DATA, Stage.TRAINING)
"""Stages in which a trial asks whether it may go on."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What trials have said since the board was last asked."""

    states: Mapping[str, TrialState]
    """Of the trials that said something, the last one."""
    steps: tuple[TrainedStep, ...]
    """Rows reported since the last call."""
    failures: Mapping[str, Reason]
    """Since."""


@dataclass
class ProgressActor:
    """Where trial processes say how far they are and the driver reads it.

    What was read is dropped, so that a look costs as much as there is to see, however many trials the sweep has.
    """

    _states: dict[str, TrialState] = field(default_factory=dict)
    _rows: list[TrainedStep] = field(default_factory=list)
    _new_failures: dict[str, Reason] = field(default_factory=dict)
    _failures: dict[str, Reason] = field(default_factory=dict)
    _processes: dict[str, Any] = field(default_factory=dict)
    _posted: dict[str, bytes] = field(default_factory=dict)
    _ending: bool = False

    def post(self, trials: Mapping[str, bytes]) -> None:
        """Keep what a trial's process needs to know of it until the trial has ended."""
        self._posted |= trials

    def posted(self, key: str) -> bytes:
        """What was posted of a trial."""
        return self._posted[key]

    def begin(self, key: str, process: Any) -> bool:
        """A process has begun a trial and can be ended through its handle; False if the sweep ends and it shall not."""
        self._processes[key] = process
        self._states[key] = TrialState(Stage.STARTING, 0, 1)
        return not self._ending

    def goes_on(self) -> bool:
        """Whether trials may go on."""
        return not self._ending

    def process(self, key: str) -> Any:
        """Handle of the process that a trial runs in, or None if it has said no such thing."""
        return self._processes.get(key)

    def show(self, key: str, state: TrialState) -> bool:
        """Replace a trial's state; a row of its training log is kept until it is taken.

        Returns:
            Whether the trial may go on; if not it shall come to an end where it can be taken up again.
        """
        self._states[key] = state
        if state.row is not None:
            self._rows.append((key, state.row))
        if state.stage.is_end:
            self._forget(key)
        return not self._ending

    def fail(self, key: str, message: str, trace: str | None) -> None:
        """Keep why a trial failed; of several reasons the first one counts."""
        if key not in self._failures:
            self._failures[key] = self._new_failures[key] = (message, trace)
        self._states[key] = TrialState(Stage.FAILED, 0, 0)
        self._forget(key)

    def end(self) -> None:
        """Let the running trials come to an end, and none begin."""
        self._ending = True

    def news(self) -> Update:
        """What has been said since this was last asked."""
        told = Update(states=self._states, steps=tuple(self._rows), failures=self._new_failures)
        self._states, self._rows, self._new_failures = {}, [], {}
        return told

    def failures(self) -> dict[str, Reason]:
        """Trial → message and traceback, of all trials that failed."""
        return self._failures

    def _forget(self, key: str) -> None:
        self._posted.pop(key, None)
        self._processes.pop(key, None)


class TrialReporter:
    """A ``trial.run.TrialProgress`` that tells the board of one sweep about one trial."""

    def __init__(self, board: Any, key: str) -> None:
        """``key`` names the trial on the board."""
        self._board = board
        self._key = key
        self._has_begun = False
        self.ending = threading.Event()
        """Set as soon as the board has said that trials shall come to an end: what trains writes a checkpoint and stops."""

    def begin(self) -> bool:
        """Say, the first time, that this process runs the trial now; False if it shall not, or not go on."""
        if self._has_begun:
            return bool(ray.get(self._board.goes_on.remote()))
        self._has_begun = True
        process = ray.get_runtime_context().current_actor
        may_begin: bool = ray.get(self._board.begin.remote(self._key, process))
        return may_begin

    def __call__(self, stage: Stage, done: int, total: int, row: JsonObject | None = None) -> None:
        """Tell; where the stage can end here, wait for the answer. Who scores hears from the fleet that it shall end.

        Raises:
            StoppedError: trials shall end, and this one does nothing yet. A training is left to look at ``ending``.
        """
        answer = self._board.show.remote(self._key, TrialState(stage, done, total, row))
        if stage not in ANSWERED or ray.get(answer):
            return
        self.ending.set()
        if stage != Stage.TRAINING:
            raise StoppedError(f"stopped while {stage}; run the same command again to go on")

    def finish(self, stage: Stage) -> None:
        """Say that the trial has come to an end: ``done``, or ``stopped`` where it can be taken up again."""
        ray.get(self._board.show.remote(self._key, TrialState(stage, 1, 1)))

    def fail(self, message: str, trace: str | None) -> None:
        """Say why the trial failed."""
        ray.get(self._board.fail.remote(self._key, message, trace))


LOOK_SECONDS = 0.5
COUNTED = (Stage.TRAINING, Stage.SCORING)
"""Stages whose steps and cells are kept when a trial begins again."""
SILENT_MINUTES = 30
"""After which people are told, where no limit is set: loading a large model or waiting for machines may take as long."""


def start_progress_actor() -> Any:
    """A board on this node, where the driver is: nodes that only work may be taken away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(ProgressActor).options(num_cpus=0, scheduling_strategy=here).remote()


class TrialMonitor:
    """Reads the board for all who want to know, from when it is entered until it is left."""

    def __init__(
        self,
        board: Any,
        line: TrialQueue,
        *,
        timeout_minutes: float | None,
        after_step: Callable[[str, JsonObject], None],
        finish: Callable[[], None],
        label: Callable[[str], str],
        say: Callable[[str], None],
    ) -> None:
        """Begin to listen.

        Args:
            board: Handle of a ``ProgressActor``.
            line: Is told which trials finished and failed.
            timeout_minutes: A trial that says nothing for so long is ended; None waits for ever.
            after_step: Is given a trial's key and each row of its training log.
            finish: Called once when the sweep is to end: lets running cells be answered and no others.
            label: What people call a trial.
            say: Shows a line to people.
        """
        self._board = board
        self._line = line
        self._timeout_minutes = timeout_minutes
        self._after_step = after_step
        self._finish = finish
        self._label = label
        self._say = say
        self._looking = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look_regularly, name="sweep-watch", daemon=True)
        self._running: dict[str, tuple[TrialState, float]] = {}
        """Trial → what it said last, and when this was heard."""
        self._unseen: dict[str, TrialState] = {}
        """What the display has not seen yet."""
        self._told_silent: dict[str, float] = {}
        self._let_go: set[str] = set()
        """Trials whose processes were ended although they did nothing wrong."""
        self._ended = False
        self.interrupted = False
        """A signal asked for an end; set by its handler, which must not talk to Ray itself."""
        self.insisted = False
        """A second signal did."""
        self._furthest: dict[tuple[str, Stage], int] = {}
        self.failures: dict[str, Reason] = {}
        """Trial → message and traceback."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()

    def _look_regularly(self) -> None:
        while not self._left.wait(LOOK_SECONDS):
            self.look()

    def states(self) -> Mapping[str, TrialState]:
        """What trials have said since this was last asked: for the display."""
        with self._looking:
            unseen, self._unseen = self._unseen, {}
        return unseen

    def look(self) -> None:
        """Read the board and act on it."""
        with self._looking:
            news = ray.get(self._board.news.remote())
            for key, row in news.steps:
                self._after_step(key, row)
            self._hear(news.states)
            for key, (message, trace) in news.failures.items():
                self._note_failure(key, message, trace)
            self._mind_the_silent()
            self._end_if_told_to()

    def forgive(self, key: str) -> bool:
        """Whether a trial whose process was lost may begin again: it has not failed and was not ended. Its silence is no more minded."""
        with self._looking:
            self._running.pop(key, None)
            return key not in self.failures and key not in self._let_go

    def note_lost(self, key: str, message: str, trace: str | None) -> None:
        """A trial's process was lost, and why; what it said itself before counts more."""
        with self._looking:
            if key not in self.failures and key not in self._let_go:
                self._note_failure(key, message, trace)

    def work_of(self, key: str) -> int:
        """Steps and cells that a trial has told of so far, each once however often it began."""
        with self._looking:
            return sum(self._furthest.get((key, stage), 0) for stage in COUNTED)

    def _hear(self, states: Mapping[str, TrialState]) -> None:
        now = time.monotonic()
        self._unseen |= states
        for key, state in states.items():
            if state.stage.is_end or state.stage == Stage.PAUSED:
                self._running.pop(key, None)
            else:
                self._running[key] = (state, now)
            if state.stage in COUNTED:
                self._furthest[key, state.stage] = max(state.done, self._furthest.get((key, state.stage), 0))
        self._line.note_finished(key for key, state in states.items() if state.stage == Stage.DONE)

    def _note_failure(self, key: str, message: str, trace: str | None) -> None:
        self.failures[key] = (message, trace)
        self._line.note_failed(key, message)

    def _mind_the_silent(self) -> None:
        """End trials that have said nothing for too long; where there is no limit, say once that they are silent."""
        now = time.monotonic()
        for key, (state, heard) in list(self._running.items()):
            minutes = (now - heard) / 60
            if state.stage.waits_for_others:
                continue
            place = f"{state.stage}, {state.done} of {state.total} done"
            if self._timeout_minutes is not None and minutes >= self._timeout_minutes:
                message = (
                    f"said nothing for {self._timeout_minutes:g} minutes ({place}), so it was ended; run the same command again to try it "
                    "once more, with a larger trial_timeout_minutes if it was only slow"
                )
                self._end_process(key, message)
            elif self._timeout_minutes is None and minutes >= SILENT_MINUTES and self._told_silent.get(key) != heard:
                self._told_silent[key] = heard
                hint = "trial_timeout_minutes would end such trials"
                self._say(f"{self._label(key)}: has said nothing for {SILENT_MINUTES} minutes ({place}); {hint}")

    def _end_process(self, key: str, message: str | None) -> None:
        """Kill the process of a trial; without a message it did not fail."""
        del self._running[key]
        process = ray.get(self._board.process.remote(key))  # which the board forgets with a trial that has failed
        if message is None:
            self._let_go.add(key)
        else:
            ray.get(self._board.fail.remote(key, message, None))
        if process is not None:
            ray.kill(process)

    def _end_if_told_to(self) -> None:
        if self.interrupted:
            self._line.end("it was interrupted")
        if self.insisted:
            for key in list(self._running):
                self._end_process(key, None)  # Tune would give each of them ten seconds
        if not self.interrupted or self._ended:
            return
        self._ended = True
        ray.get(self._board.end.remote())
        self._finish()
        for key in [key for key, (state, _) in self._running.items() if state.stage == Stage.WAITING]:
            self._end_process(key, None)
        self._say("finishing what is being answered or trained just now, then stopping; Ctrl-C once more stops at once")

    def interruptible(self) -> AbstractContextManager[None]:
        """Let a first SIGINT or SIGTERM bring the sweep to an end; a second ends its trials too, and does what it did before.

        Only a main thread can.
        """

        def ask() -> None:
            self.interrupted = True

        def insist() -> None:
            self.insisted = True

        return first_signal_asks(ask, insist=insist)
