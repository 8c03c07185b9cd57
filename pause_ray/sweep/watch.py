"""The driver's side of the board: what trials say goes to the display, the tracker and the waiting line; who hangs is ended.

Knows Ray and no trial. A thread looks at the board twice a second, and whoever starts the next trial looks too, so that a failure
is known before the next trial begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pause_ray.interruption import first_signal_asks
from pause_ray.spec import JsonObject
from pause_ray.sweep.board import ProgressBoard, Reason
from pause_ray.sweep.line import WaitingLine
from pause_ray.sweep.progress import ENDED, PAUSED, QUEUED, WAITING, TrialState

LOOK_SECONDS = 0.5
COUNTED = ("training", "scoring")
"""Stages whose steps and cells are kept when a trial begins again."""
SILENT_MINUTES = 30
"""After which people are told, where no limit is set: loading a large model or waiting for machines may take as long."""


def start_board() -> Any:
    """A board on this node, where the driver is: nodes that only work may be taken away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(ProgressBoard).options(num_cpus=0, scheduling_strategy=here).remote()


class Watch:
    """Reads the board for all who want to know, from when it is entered until it is left."""

    def __init__(
        self,
        board: Any,
        line: WaitingLine,
        *,
        timeout_minutes: float | None,
        after_step: Callable[[str, JsonObject], None],
        finish: Callable[[], None],
        label: Callable[[str], str],
        say: Callable[[str], None],
    ) -> None:
        """Begin to listen.

        Args:
            board: Handle of a ``ProgressBoard``.
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
        self._furthest: dict[tuple[str, str], int] = {}
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
            if state.stage in (*ENDED, PAUSED):
                self._running.pop(key, None)
            else:
                self._running[key] = (state, now)
            if state.stage in COUNTED:
                self._furthest[key, state.stage] = max(state.done, self._furthest.get((key, state.stage), 0))
        self._line.note_finished(key for key, state in states.items() if state.stage == "done")

    def _note_failure(self, key: str, message: str, trace: str | None) -> None:
        self.failures[key] = (message, trace)
        self._line.note_failed(key, message)

    def _mind_the_silent(self) -> None:
        """End trials that have said nothing for too long; where there is no limit, say once that they are silent."""
        now = time.monotonic()
        for key, (state, heard) in list(self._running.items()):
            minutes = (now - heard) / 60
            if state.stage in (WAITING, QUEUED):
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
        for key in [key for key, (state, _) in self._running.items() if state.stage == WAITING]:
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
