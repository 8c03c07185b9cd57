"""Runs a sweep whose trials train nothing in this process, one trial after another, without Ray."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from pause_ray.core.errors import StoppedError
from pause_ray.core.process import Stage, stop_on_signal
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage, exclusive
from pause_ray.evaluation.cell_scheduler import PoolState
from pause_ray.evaluation.scoring_actor import STOPPED, LocalScorer
from pause_ray.inference.engine import Engine
from pause_ray.sweep.progress import ProgressDisplay, TrialState
from pause_ray.sweep.queue import TrialQueue, left_over
from pause_ray.sweep.search import SweepTrial, SweepTrials
from pause_ray.sweep.spec import SweepSpec
from pause_ray.sweep.status import STATUS_SECONDS, ClusterState, Failure, StatusWriter, SweepOutcome
from pause_ray.trial.run import run_trial, shares_on_storage


class _Run:
    """The trials of one command, and how far each is."""

    def __init__(self, trials: SweepTrials, *, storage: Storage, console: Console, scorer: LocalScorer) -> None:
        self._trials, self._storage, self._scorer = trials, storage, scorer
        self._display = ProgressDisplay(console)
        self._status = StatusWriter(trials.folder, storage=storage)
        self._written = 0.0
        """The monotonic time of the last status."""
        self.queue = TrialQueue(start=lambda key: None)
        self.failures: dict[str, Failure] = {}
        self.interrupted = False

    def run(self, missing: dict[str, SweepTrial], *, after_trial: Callable[[], None]) -> None:
        """Run the missing trials until all have ended, or an interrupt or failures end the sweep."""
        trials = self._trials.by_digest
        self.queue.expect({key: trial.planned.arm for key, trial in trials.items()})
        self.queue.note_finished(key for key in trials if self._trials.is_finished(key))
        self.queue.add(missing)
        self._status.expect(missing)
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: self._write_status(ended=time.time()))
            stack.enter_context(self._display)
            stack.enter_context(stop_on_signal(self._interrupt))
            self._display.add({key: (trial.planned.label, trial.planned.spec) for key, trial in missing.items()})
            found = {key: shares_on_storage(trial.prepared, shards=None, storage=self._storage) for key, trial in missing.items()}
            self._display.subtract_stored(found)
            while (key := self.queue.next()) is not None:
                self._run_trial(key, trials[key])
                after_trial()

    def _run_trial(self, key: str, trial: SweepTrial) -> None:
        def progress(stage: Stage, done: int, total: int, row: JsonObject | None = None) -> None:
            self._display.show({key: TrialState(stage, done, total)})
            if time.monotonic() - self._written >= STATUS_SECONDS:
                self._write_status(ended=None)

        progress(Stage.STARTING, 0, 1)
        try:
            run_trial(trial.prepared, arm=trial.planned.arm, storage=self._storage, scorer=self._scorer, train_gpus=0.0, progress=progress)
            self.queue.note_finished([key])
            progress(Stage.DONE, 1, 1)
        except StoppedError:
            progress(Stage.STOPPED, 0, 1)
        except Exception as error:  # noqa: BLE001 (a trial's border: the error is kept and the sweep goes on, as on Ray)
            self.failures[key] = Failure.of(error)
            self.queue.note_failed(key, self.failures[key].message)
            progress(Stage.FAILED, 0, 1)

    def _interrupt(self) -> None:
        self.interrupted = True
        self.queue.end("it was interrupted")
        self._scorer.finish()
        self._display.print("finishing the current cell, then stopping; Ctrl-C once more stops at once")
        if any(state.stage == Stage.WAITING for state in self._display.states.values()):
            raise StoppedError(STOPPED)  # this process waits for another, which may take hours

    def _write_status(self, *, ended: float | None) -> None:
        self._written = time.monotonic()
        busy = int(ended is None)
        pool = PoolState(pids=(os.getpid(),) * busy, busy=busy, starting=0, requests=busy, stats={"grid": self._scorer.stats})
        cluster, ended_by = ClusterState(scoring=pool), self.queue.ended_by
        self._status.write(self._display, self.queue, cluster, failures=self.failures, ended=ended, ended_by=ended_by)


def prepared_trials(sweep: SweepSpec, *, storage: Storage, console: Console, command: str) -> SweepTrials:
    """Prepare the trials of a sweep; arguments and errors as for ``run_in_process``."""
    with console.status("checking models, texts and lengths (a model from a package is fetched and converted once)") as status:
        return SweepTrials(
            sweep,
            storage=storage,
            command=command,
            progress=lambda done, total: status.update(f"checking models, texts and lengths: {done} of {total} trials"),
        )


def print_finished(trials: SweepTrials, console: Console) -> None:
    """Tell the user how many trials need not be run."""
    if finished := trials.num_finished():
        console.print(f"{finished} of {len(trials.by_digest)} trials are finished already; going on with the rest")


def outcome_of(trials: SweepTrials, queue: TrialQueue, *, failures: Mapping[str, Failure], interrupted: bool) -> SweepOutcome:
    """Return the result of a run with these ``failures``, given by trial label."""
    finished, planned, left_out = trials.num_finished(), len(trials.by_digest), len(trials.left_out())
    is_all = trials.all_known and finished + left_out == planned
    ended_by = None if is_all else queue.ended_by
    if ended_by is not None and queue.is_out_of_budget:
        ended_by = left_over(ended_by, trials=planned - finished - left_out - len(failures))
    return SweepOutcome(
        folder=trials.folder,
        finished=finished,
        planned=planned,
        left_out=left_out,
        failures=failures,
        ended_by=ended_by,
        given_up=tuple(queue.given_up.values()),
        interrupted=interrupted and not is_all,
    )


def run_in_process(
    sweep: SweepSpec,
    *,
    storage: Storage,
    console: Console,
    command: str,
    after_trial: Callable[[Path], None],
    engine: Engine | None = None,
) -> SweepOutcome:
    """Run what is missing of a sweep that trains nothing, as ``runner.run_sweep`` does, but without Ray.

    A first Ctrl-C (or SIGTERM) lets the current cell be answered; a second ends at once. ``after_trial`` is called with the sweep's
    folder whenever a trial has ended. An ``engine`` is used instead of each trial's own.

    Raises:
        StorageError: another process runs this sweep, or the storage root cannot be written.
        UserError: the sweep cannot be prepared (model, text, marker or lengths do not fit).
    """
    trials = prepared_trials(sweep, storage=storage, console=console, command=command)
    with exclusive(trials.folder / ".lock"):
        trials.write()
        missing = trials.missing(trials.by_digest)
        threads = next((trial.planned.spec.resources.threads for trial in missing.values()), None)
        run = _Run(trials, storage=storage, console=console, scorer=LocalScorer(engine, threads=threads))
        if missing:
            print_finished(trials, console)
            run.run(missing, after_trial=lambda: after_trial(trials.folder))
        failures = {trials.by_digest[key].planned.label: failure for key, failure in run.failures.items()}
        return outcome_of(trials, run.queue, failures=failures, interrupted=run.interrupted)
