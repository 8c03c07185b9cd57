"""Where trial processes say how far they are and why they failed, and hear that the sweep ends: the board, and a trial's side of it.

The board is an actor's class, started by ``sweep.watch``, which is the driver's side. Knows no trial.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from pause_ray.errors import StoppedError
from pause_ray.spec import JsonObject
from pause_ray.sweep.progress import ENDED, TrialState


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a trial did not finish."""

    label: str
    message: str
    trace: str | None
    """None for a mistake of the user."""


TrainedStep = tuple[str, JsonObject]
"""A trial's digest and a row of its training log."""
Reason = tuple[str, str | None]
"""A failure's message and traceback."""
ANSWERED = ("waiting", "text", "training")
"""Stages in which a trial asks whether it may go on."""


@dataclass(frozen=True, kw_only=True)
class News:
    """What trials have said since the board was last asked."""

    states: Mapping[str, TrialState]
    """Of the trials that said something, the last one."""
    steps: tuple[TrainedStep, ...]
    """Trained since."""
    failures: Mapping[str, Reason]
    """Since."""


@dataclass
class ProgressBoard:
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
        self._states[key] = TrialState("starting", 0, 1)
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
        if state.stage in ENDED:
            self._forget(key)
        return not self._ending

    def fail(self, key: str, message: str, trace: str | None) -> None:
        """Keep why a trial failed; of several reasons the first one counts."""
        if key not in self._failures:
            self._failures[key] = self._new_failures[key] = (message, trace)
        self._states[key] = TrialState("failed", 0, 0)
        self._forget(key)

    def end(self) -> None:
        """Let the running trials come to an end, and none begin."""
        self._ending = True

    def news(self) -> News:
        """What has been said since this was last asked."""
        told = News(states=self._states, steps=tuple(self._rows), failures=self._new_failures)
        self._states, self._rows, self._new_failures = {}, [], {}
        return told

    def failures(self) -> dict[str, Reason]:
        """Trial → message and traceback, of all trials that failed."""
        return self._failures

    def _forget(self, key: str) -> None:
        self._posted.pop(key, None)
        self._processes.pop(key, None)


class Reports:
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

    def __call__(self, stage: str, done: int, total: int, row: JsonObject | None = None) -> None:
        """Tell; where the stage can end here, wait for the answer. Who scores hears from the fleet that it shall end.

        Raises:
            StoppedError: trials shall end, and this one does nothing yet. A training is left to look at ``ending``.
        """
        answer = self._board.show.remote(self._key, TrialState(stage, done, total, row))
        if stage not in ANSWERED or ray.get(answer):
            return
        self.ending.set()
        if stage != "training":
            raise StoppedError(f"stopped while {stage}; run the same command again to go on")

    def finish(self, stage: str) -> None:
        """Say that the trial has come to an end: ``done``, or ``stopped`` where it can be taken up again."""
        ray.get(self._board.show.remote(self._key, TrialState(stage, 1, 1)))

    def fail(self, message: str, trace: str | None) -> None:
        """Say why the trial failed."""
        ray.get(self._board.fail.remote(self._key, message, trace))
