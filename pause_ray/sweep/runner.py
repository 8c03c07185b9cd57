"""The driver of a sweep: prepares its trials, runs them until all are finished or something ends the sweep, and watches them.

``run_sweep`` is the order of things. While trials run, Tune has the main thread and asks ``SweepDriver`` for one trial after another; one
thread beside it, the driver loop, reads reports, draws, writes the status and feeds the tracker. Storage decides what is left to do, so
the same command resumes.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import ray
from ray import tune
from ray.exceptions import RayError
from rich.console import Console

from pause_ray.core import ray_cluster
from pause_ray.core.errors import UserError
from pause_ray.core.process import Stage, stop_on_signal
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import Storage, exclusive
from pause_ray.data.pipeline import build_shards
from pause_ray.data.shards import ShardSet, format_corpus
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.sweep.early_stopping import EarlyStoppedTrial, EarlyStopping, is_compared
from pause_ray.sweep.in_process import outcome_of, prepared_trials, print_finished
from pause_ray.sweep.progress import ProgressDisplay, TrialState
from pause_ray.sweep.queue import Budget, BudgetMeter, TrialQueue, bill_of
from pause_ray.sweep.reporter import TrialMonitor, start_progress_actor
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.search import SweepTrial, SweepTrials
from pause_ray.sweep.spec import SweepSpec
from pause_ray.sweep.status import STATUS_SECONDS, ClusterState, Failure, RayMetrics, StatusWriter, SweepOutcome
from pause_ray.sweep.trainable import (
    IDLE_SECONDS,
    NOT_YET,
    ReapIdleActors,
    Shared,
    TuneTrial,
    failure_of_lost_process,
    run_tuner,
    trial_bundles,
)
from pause_ray.trial.prepare import proxy_lengths
from pause_ray.trial.run import shares_on_storage

log = logging.getLogger("pause_ray")

LOOP_SECONDS = 1.0
"""Time between two rounds of the driver loop."""
ASK_SECONDS = 10.0
"""Time to wait for the scoring pool's state. Its actor is on the driver's node; if it does not answer for so long, it is lost."""
MAX_LOSSES = 3
"""Losses of a trial's process in a row, without progress between them, after which the trial has failed."""


class SweepTracker(Protocol):
    """Receives what a sweep makes while it runs (``tracking.live.Tracker``); no method may block for long."""

    def step_of_trial(self, sweep_folder: Path, trial: str, row: JsonObject) -> None:
        """Take a row of the training log of the trial with this digest."""

    def trial_ended(self, sweep_folder: Path) -> None:
        """Note that a trial of the sweep has ended."""

    def send(self) -> None:
        """Begin to send what waits; the driver loop calls this every second."""


def run_sweep(
    sweep: SweepSpec,
    *,
    storage: Storage,
    console: Console,
    command: str,
    tracker: SweepTracker | None = None,
    budget: Budget | None = None,
) -> SweepOutcome:
    """Run what is missing of a sweep; what is on storage already is not run again.

    A first Ctrl-C (or SIGTERM) lets running cells and training steps finish and keeps what they made; a second ends at once. The
    report shows ``command``, with which the user started this. ``tracker`` receives training steps and ends of trials.

    Raises:
        StorageError: another process runs this sweep, or the storage root cannot be written.
        UserError: the sweep cannot be prepared (model, text, pause token or lengths do not fit).
    """
    queue = TrialQueue(start=BudgetMeter(budget or Budget(), bill=bill_of(storage)).start)
    trials = prepared_trials(sweep, storage=storage, console=console, command=command)
    failures: dict[str, Failure] = {}
    interrupted = False
    with exclusive(trials.folder / ".lock"):
        trials.write()
        missing = trials.missing(trials.by_digest) | trials.next_round()
        if missing:
            print_finished(trials, console)
            with ray_cluster.connection():
                ray_cluster.create_shared_actor_here()
                placement = Placement.of(sweep, [trial.planned.spec for trial in missing.values()])
                with (
                    ProgressDisplay(console) as display,
                    SweepDriver(trials, storage=storage, queue=queue, placement=placement, display=display, tracker=tracker) as driver,
                ):
                    driver.run(missing)
                    failures = {display.label(key): failure for key, failure in driver.monitor.failures.items()}
                    interrupted = driver.monitor.interrupted.is_set()
        return outcome_of(trials, queue, failures=failures, interrupted=interrupted)


class SweepDriver:
    """Runs trials while its ``with`` block lasts: gives them to Tune, and watches them from the driver loop's thread."""

    def __init__(
        self,
        trials: SweepTrials,
        *,
        storage: Storage,
        queue: TrialQueue,
        placement: Placement,
        display: ProgressDisplay,
        tracker: SweepTracker | None,
    ) -> None:
        """Start the scoring pool; Ray must be initialised, and the display entered."""
        self._trials, self._storage, self._queue = trials, storage, queue
        self._placement, self._display, self._tracker = placement, display, tracker
        self._pool = ScoringPool.start(
            num_actors=placement.resources.scoring_bounds,
            cpus=placement.resources.scoring_cpus_per_actor,
            gpus=placement.scoring_gpus,
            threads=placement.resources.threads,
            idle_seconds=placement.resources.idle_seconds,
        )
        self._progress_actor = start_progress_actor()
        self.monitor = TrialMonitor(
            self._progress_actor, queue=queue, pool=self._pool, display=display, timeout_minutes=trials.sweep.trial_timeout_minutes
        )
        self._status = StatusWriter(
            trials.folder,
            storage=storage,
            metrics=RayMetrics(trials.folder.name),
            per_actor_gpus=placement.scoring_gpus,
            per_trial_gpus=0.0 if placement.resources.train_workers else placement.train_gpus,
            settled={Stage.STOPPED: len(trials.left_out()), Stage.DONE: trials.num_finished()},
        )
        self._running: set[str] = set()
        """Trials that have begun and not ended."""
        self._losses: dict[str, tuple[int, int]] = {}
        """Losses of a trial's process in a row without progress between them, and the steps and cells done at the last; by digest."""
        self._next_round_error: UserError | None = None
        """Why the search's next round could not be prepared; raised when Tune has returned, which would wrap it in an error of its own."""
        self._lock = threading.RLock()
        """Guards the monitor, the display, the status and the queue: the main thread and the driver loop use them."""
        self._left = threading.Event()
        self._loop = threading.Thread(target=self._run_loop, name="sweep-driver", daemon=True)

    def __enter__(self) -> Self:
        self._loop.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._loop.join()
        reason = self._queue.ended_by
        if error is not None:
            reason = str(error) if isinstance(error, UserError) else type(error).__name__
        try:
            self._write_status(ended=time.time(), ended_by=reason)
        finally:
            self._pool.stop()

    def run(self, trials: Mapping[str, SweepTrial]) -> None:
        """Run trials, and those of further rounds, until there are none or the sweep is to end.

        Raises:
            UserError: a further round could not be prepared.
        """
        compared = [key for key, trial in self._trials.by_digest.items() if is_compared(trial.planned, self._trials.sweep)]
        waiting = self._admit(trials)
        shared = Shared(
            folder=self._trials.folder,
            storage=self._storage,
            pool=self._pool,
            progress_actor=self._progress_actor,
            train_gpus=self._placement.train_gpus,
        )
        with stop_on_signal(self.monitor.interrupted.set, insist=self.monitor.insisted.set):
            if any(key in compared for key in waiting):
                self._run_with_early_stopping(compared, waiting, shared)
            left_out = self._trials.left_out()
            with self._lock:
                self._status.left_out |= left_out
            self._queue.add(key for key in waiting if key not in compared and key not in left_out)
            if self._queue.ended_by is None:
                self._run_trials(tune.with_parameters(TuneTrial, shared=shared), ReapIdleActors(IDLE_SECONDS))
        self._read_reports()
        if self._next_round_error is not None:
            raise self._next_round_error

    def _run_with_early_stopping(self, compared: Sequence[str], waiting: Sequence[str], shared: Shared) -> None:
        """Run those of the ``compared`` trials that wait and that no early stop has ended."""
        spec, trials = self._trials.sweep.scheduler, {key: self._trials.by_digest[key] for key in compared}
        if spec is None:
            return
        lengths = proxy_lengths(
            [trial.prepared for trial in trials.values()],
            facts=spec.proxy.facts,
            context_tokens=spec.proxy.context_tokens,
            cache=self._storage.cache,
        )
        scheduler = EarlyStopping(
            spec,
            mode=self._trials.sweep.objective.mode,
            trials={key: trial.planned for key, trial in trials.items()},
            finished=[key for key in compared if self._trials.is_finished(key)],
            search_log=self._trials.log,
            on_stop=lambda key: ray.get(self._progress_actor.report.remote(key, TrialState(Stage.STOPPED, 1, 1))),
        )
        self._queue.add(key for key in waiting if key in trials and key not in scheduler.stopped)
        trainable = tune.with_parameters(EarlyStoppedTrial, shared=shared, scheduler=spec, context_tokens=lengths)
        self._run_trials(trainable, scheduler)

    def _run_trials(self, trainable: Any, scheduler: ReapIdleActors) -> None:
        run_tuner(
            tune.with_resources(trainable, trial_bundles(self._placement)),
            next_trial=self._next_trial,
            ended=self._note_end,
            scheduler=scheduler,
            concurrent_trials=self._placement.concurrent_trials,
            name=self._trials.sweep.name,
            storage=self._storage,
        )

    def _run_loop(self) -> None:
        """Each second read reports, draw, and let the tracker send; every few seconds write the status."""
        status_due = time.monotonic()
        while True:
            self._read_reports()
            if time.monotonic() >= status_due:
                self._write_status()
                status_due = time.monotonic() + STATUS_SECONDS
            if self._tracker is not None:
                self._tracker.send()
            if self._left.wait(LOOP_SECONDS):
                return

    def _read_reports(self) -> None:
        """Act on new reports. The main thread does so too before it begins a trial, so that failures are known by then."""
        with self._lock:
            update = self.monitor.read()
            for key, row in update.steps:
                self._status.steps.note(key, row)
                if self._tracker is not None:
                    self._tracker.step_of_trial(self._trials.folder, key, row)
            self._display.show(update.states)

    def _write_status(self, *, ended: float | None = None, ended_by: str | None = None) -> None:
        cluster = cluster_state(self._pool)  # outside of the lock: the cluster may take seconds to answer
        with self._lock:
            self._display.note_pending(cluster.pending, now=time.monotonic())
            self._status.write(self._display, self._queue, cluster, failures=self.monitor.failures, ended=ended, ended_by=ended_by)

    def _next_trial(self) -> str | None:
        """Return the key of the next trial, advancing the search when the queue is empty, or ``NOT_YET``, or None at the end.

        While trials run, which return to the queue when they are lost, it is not known whether there is another.
        """
        self._read_reports()
        key = self._queue.next()
        while key is None and self._queue.ended_by is None and not self._trials.all_known:
            if self._running:
                return NOT_YET
            if self._trials.sweep.arm in self._queue.given_up:
                return None  # points that are chosen without a value would stay chosen
            try:
                more = self._trials.next_round()
            except UserError as error:
                self._next_round_error = error
                return None
            if not more:
                return None
            self._queue.add(self._admit(more))
            key = self._queue.next()
        if key is not None:
            self._running.add(key)
        elif self._running and self._queue.may_take_back:
            return NOT_YET
        return key

    def _note_end(self, key: str, error: Exception | None) -> None:
        """Note that a trial has ended; one whose process was lost begins again, unless a mistake ended it that would be made again."""
        self._running.discard(key)
        self._read_reports()
        if error is None:
            if self._tracker is not None:
                self._tracker.trial_ended(self._trials.folder)
            return
        failure = failure_of_lost_process(error)
        with self._lock:
            work = self.monitor.work_done(key)
            losses, work_before = self._losses.get(key, (0, work))
            losses = losses + 1 if work == work_before else 1
            self._losses[key] = (losses, work)
            may_restart = failure.trace is not None and losses < MAX_LOSSES and self.monitor.may_restart(key)
            if may_restart and self._queue.take_back(key):
                label = self._display.label(key)
                self._display.print(f"{label}: the trial's process was lost ({failure.message}); it begins again where it was")
            else:
                self.monitor.note_lost(key, failure)

    def _admit(self, trials: Mapping[str, SweepTrial]) -> list[str]:
        """Count trials as work and make their training sequences; return those that can run. The others have failed."""
        with self._lock:
            self._display.add({key: (trial.planned.label, trial.planned.spec) for key, trial in trials.items()})
            self._status.expect(trials)
            # An arm of which earlier commands finished a trial is not given up.
            new = self._queue.expect({key: trial.planned.arm for key, trial in self._trials.by_digest.items()})
            self._queue.note_finished(key for key in new if self._trials.is_finished(key))
        shards, failed = self._make_shards(trials)
        runnable = {
            key: dataclasses.replace(trial, prepared=self._placement.placed(trial.prepared))
            for key, trial in trials.items()
            if key not in failed
        }
        stored = {key: shares_on_storage(trial.prepared, shards=shards.get(key), storage=self._storage) for key, trial in runnable.items()}
        with self._lock:
            self._display.subtract_stored(stored)
        ray.get(self._progress_actor.publish.remote({key: pickle.dumps(trial) for key, trial in runnable.items()}))
        for key, error in failed.items():
            ray.get(self._progress_actor.fail.remote(key, Failure(error=error)))
        return list(runnable)

    def _make_shards(self, trials: Mapping[str, SweepTrial]) -> tuple[dict[str, ShardSet], dict[str, UserError]]:
        """Make the shard sets that trials train on; return them by trial digest, and why others could not be made."""
        jobs = {key: trial.prepared.shards for key, trial in trials.items() if trial.prepared.shards is not None}
        sharing: dict[str, list[str]] = {}
        for key, job in jobs.items():
            sharing.setdefault(digest(job.identity()), []).append(key)
        made: dict[str, ShardSet] = {}
        failed: dict[str, UserError] = {}
        for keys in sharing.values():
            job, label = jobs[keys[0]], trials[keys[0]].planned.label
            try:
                shards = build_shards(job, storage=self._storage, progress=self._display.bar(f"data for {label}"))
            except UserError as error:
                failed |= dict.fromkeys(keys, error)
                continue
            made |= dict.fromkeys(keys, shards)
            self._display.print(f"training data for {label}: {format_corpus(shards.manifest['stats'])}")
        return made, failed


def cluster_state(pool: ScoringPool) -> ClusterState:
    """Ask the scoring pool and Ray for their state; a part that does not answer is left out."""
    state = ClusterState()
    try:
        state = dataclasses.replace(state, scoring=pool.state(timeout_seconds=ASK_SECONDS))
        state = dataclasses.replace(state, free_gpus=ray_cluster.free_gpus(), gpus=ray_cluster.total_gpus())
        state = dataclasses.replace(state, pending=ray_cluster.pending_requests())
    except RayError as error:
        log.debug("a part of the cluster does not answer: %s", error)
    return state
