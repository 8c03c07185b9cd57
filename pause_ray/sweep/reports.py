"""A trial's side of the board: says how far it is, and hears that it shall end. Lives in the trial's process; knows no trial."""

from __future__ import annotations

import threading
from typing import Any

import ray

from pause_ray.errors import StoppedError
from pause_ray.spec import JsonObject
from pause_ray.sweep.progress import TrialState
from pause_ray.sweep.watch import WAITING
from pause_ray.trial.run import TrialProgress

ANSWERED = ("waiting", "text", "training")
"""Stages in which a trial asks whether it may go on."""


class Reports:
    """A ``trial.run.TrialProgress`` that tells the board of one sweep about one trial."""

    def __init__(self, board: Any, key: str) -> None:
        """``key`` names the trial on the board."""
        self._board = board
        self._key = key
        self.ending = threading.Event()
        """Set as soon as the board has said that trials shall come to an end: what trains writes a checkpoint and stops."""

    def begin(self) -> bool:
        """Say that this process runs the trial now; False if it shall not."""
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

    def beside(self, key: str) -> TrialProgress:
        """Says under its own name how a trial gets on that is trained with this one; it still waits for its turn."""

        def tell(stage: str, done: int, total: int, row: JsonObject | None = None) -> None:
            self._board.show.remote(key, TrialState(WAITING, done, total, row))

        return tell

    def finish(self, stage: str) -> None:
        """Say that the trial has come to an end: ``done``, or ``stopped`` where it can be taken up again."""
        ray.get(self._board.show.remote(self._key, TrialState(stage, 1, 1)))

    def fail(self, message: str, trace: str | None) -> None:
        """Say why the trial failed."""
        ray.get(self._board.fail.remote(self._key, message, trace))
