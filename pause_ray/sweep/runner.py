"""The driver of a sweep: prepares its trials, runs them until all are finished or something ends the sweep, and watches them.

``run_sweep`` is the order of things. While trials run, Tune has the main thread and asks ``SweepDriver`` for one trial after another; one
thread beside it, the driver loop, reads reports, draws, writes the status and feeds the tracker. Storage decides what is left to do, so
the same command resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pickle
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import ray
from ray import tune
from ray.exceptions import RayError
from rich.console import Console

from pause_ray.core import ray_cluster
from pause_ray.core.errors import UserError
from pause_ray.core.process import Stage
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage, exclusive
from pause_ray.data.pipeline import build_shards
from pause_ray.data.shards import ShardSet, format_corpus
from pause_ray.data.spec import shards_digest
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.sweep.early_stopping import EarlyStoppedTrial, EarlyStopping, is_compared
from pause_ray.sweep.progress import ProgressDisplay, TrialState
from pause_ray.sweep.queue import Budget, BudgetMeter, TrialQueue, bill_of, left_over
from pause_ray.sweep.reporter import TrialMonitor, start_progress_actor
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.search import SearchLoop, SweepTrial, SweepTrials
from pause_ray.sweep.spec import SweepSpec
from pause_ray.sweep.status import STATUS_SECONDS, ClusterState, Failure, StatusWriter, SweepOutcome
from pause_ray.sweep.trainable import NOT_YET, Shared, failure_of_lost_process, run_trials
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

    A first Ctrl-C (or SIGTERM) lets running cells and training steps finish and keeps what they made; a second ends at once.

    Args:
        sweep: The trials.
        storage: Where everything is kept.
        console: Where progress is shown.
        command: How the user started this, for the report.
        tracker: Receives training steps and ends of trials while they happen.
        budget: What the command may spend; None for no limit.

    Raises:
        StorageError: another process runs this sweep, or the storage root cannot be written.
        UserError: the sweep cannot be prepared (model, text, pause token or lengths do not fit).
    """
    queue = TrialQueue(start=BudgetMeter(budget or Budget(), bill=bill_of(storage)).start)
    trials = _prepared_trials(sweep, storage=storage, console=console, command=command)
    failures: dict[str, Failure] = {}
    interrupted = False
    with exclusive(trials.folder / ".lock"):
        trials.write()
        search = SearchLoop(trials)
        missing = trials.missing(trials.by_digest) | search.next_round()
        if missing:
            if finished := trials.num_finished():
                console.print(f"{finished} of {len(trials.by_digest)} trials are finished already; going on with the rest")
            with _driver(trials, missing, search=search, storage=storage, queue=queue, console=console, tracker=tracker) as driver:
                driver.run(missing)
                failures, interrupted = driver.failures(), driver.monitor.interrupted
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


@contextlib.contextmanager
def _driver(
    trials: SweepTrials,
    missing: Mapping[str, SweepTrial],
    *,
    search: SearchLoop,
    storage: Storage,
    queue: TrialQueue,
    console: Console,
    tracker: SweepTracker | None,
) -> Iterator[SweepDriver]:
    """Connect to the cluster and start what the missing trials need.

    Raises:
        SpecError: the cluster has no room for them.
    """
    with ray_cluster.connection():
        ray_cluster.create_shared_actor_here()
        placement = Placement.of(trials.sweep, [trial.planned.spec for trial in missing.values()])
        with (
            _scoring_pool(placement) as pool,
            ProgressDisplay(console) as display,
            SweepDriver(
                trials,
                search=search,
                storage=storage,
                queue=queue,
                placement=placement,
                pool=pool,
                display=display,
                tracker=tracker,
            ) as driver,
        ):
            yield driver


def _prepared_trials(sweep: SweepSpec, *, storage: Storage, console: Console, command: str) -> SweepTrials:
    with console.status("checking models, texts and lengths (a model from a package is fetched and converted once)") as status:

        def show(done: int, total: int) -> None:
            status.update(f"checking models, texts and lengths: {done} of {total} trials")

        return SweepTrials(sweep, storage=storage, command=command, progress=show)


@contextlib.contextmanager
def _scoring_pool(placement: Placement) -> Iterator[ScoringPool]:
    pool = ScoringPool.start(
        num_actors=placement.resources.scoring_bounds,
        cpus=placement.resources.scoring_cpus_per_actor,
        gpus=placement.scoring_gpus,
        threads=placement.resources.threads,
        idle_seconds=placement.resources.idle_seconds,
    )
    try:
        yield pool
    finally:
        pool.stop()


@dataclass(frozen=True)
class Loss:
    """The last loss of a trial's process, with its node or for want of memory."""

    times: int
    """Losses in a row without progress between them, this one included."""
    work: int
    """Steps and cells that were done."""


class SweepDriver:
    """Runs trials while its ``with`` block lasts: gives them to Tune, and watches them from the driver loop's thread."""

    def __init__(
        self,
        trials: SweepTrials,
        *,
        search: SearchLoop,
        storage: Storage,
        queue: TrialQueue,
        placement: Placement,
        pool: ScoringPool,
        display: ProgressDisplay,
        tracker: SweepTracker | None,
    ) -> None:
        """Prepare to run; Ray must be initialised, and the display entered."""
        self._trials, self._search = trials, search
        self._storage, self._queue, self._placement, self._pool = storage, queue, placement, pool
        self._display, self._tracker = display, tracker
        self._progress_actor = start_progress_actor()
        self._registry = TrialRegistry(self._progress_actor)
        self.monitor = TrialMonitor(
            self._progress_actor, queue=queue, pool=pool, display=display, timeout_minutes=trials.sweep.trial_timeout_minutes
        )
        self._status = StatusWriter(
            trials.folder,
            storage=storage,
            per_actor_gpus=placement.scoring_gpus,
            per_trial_gpus=0.0 if placement.resources.train_workers else placement.train_gpus,
            settled={Stage.STOPPED: len(trials.left_out()), Stage.DONE: trials.num_finished()},
        )
        self._running: set[str] = set()
        """Trials that have begun and not ended."""
        self._losses: dict[str, Loss] = {}
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
        self._write_status(ended=time.time(), ended_by=reason)

    def run(self, trials: Mapping[str, SweepTrial]) -> None:
        """Run trials, and those of further rounds, until there are none or the sweep is to end.

        Raises:
            UserError: a further round could not be prepared.
        """
        compared = [key for key, trial in self._trials.by_digest.items() if is_compared(trial.planned, self._trials.sweep)]
        waiting = self._admit(trials)
        shared = Shared(
            folder=self._trials.folder,
            trials=self._registry,
            storage=self._storage,
            pool=self._pool,
            progress_actor=self._progress_actor,
            train_gpus=self._placement.train_gpus,
        )
        with self.monitor.interruptible():
            if any(key in compared for key in waiting):
                self._run_with_early_stopping(compared, waiting, shared)
            left_out = self._trials.left_out()
            with self._lock:
                self._status.leave_out(left_out)
            self._queue.add(key for key in waiting if key not in compared and key not in left_out)
            if self._queue.ended_by is None:
                self._run_trials(shared)
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
        self._run_trials(shared, trainable=trainable, scheduler=scheduler)

    def _run_trials(self, shared: Shared, *, trainable: Any = None, scheduler: EarlyStopping | None = None) -> None:
        run_trials(
            self._trials.sweep,
            shared,
            placement=self._placement,
            next_trial=self._next_trial,
            ended=self._note_end,
            after_trial=self._tell_tracker,
            trainable=trainable,
            scheduler=scheduler,
        )

    def failures(self) -> dict[str, Failure]:
        """Return why trials did not finish, by their labels."""
        return {self._display.label(key): failure for key, failure in self.monitor.failures.items()}

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
                self._status.count_step(key, row)
                if self._tracker is not None:
                    self._tracker.step_of_trial(self._trials.folder, key, row)
            self._display.show(update.states)

    def _write_status(self, *, ended: float | None = None, ended_by: str | None = None) -> None:
        cluster = cluster_state(self._pool)  # outside of the lock: the cluster may take seconds to answer
        with self._lock:
            self._display.note_pending(cluster.pending)
            self._status.write(
                self._display.states,
                cluster,
                failures={key: failure.message for key, failure in self.monitor.failures.items()},
                given_up=self._queue.given_up,
                seconds_left=self._display.seconds_left,
                ended=ended,
                ended_by=ended_by,
            )

    def _tell_tracker(self) -> None:
        if self._tracker is not None:
            self._tracker.trial_ended(self._trials.folder)

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
                more = self._search.next_round()
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
            return
        failure = failure_of_lost_process(error)
        with self._lock:
            before, work = self._losses.get(key), self.monitor.work_done(key)
            self._losses[key] = Loss(before.times + 1 if before is not None and before.work == work else 1, work)
            may_restart = failure.trace is not None and self._losses[key].times < MAX_LOSSES and self.monitor.may_restart(key)
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
            new = {key: trial.planned.arm for key, trial in self._trials.by_digest.items() if not self._queue.expects(key)}
            self._queue.expect(new)
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
        self._registry.publish(runnable)
        for key, error in failed.items():
            ray.get(self._progress_actor.fail.remote(key, Failure(error=error)))
        return list(runnable)

    def _make_shards(self, trials: Mapping[str, SweepTrial]) -> tuple[dict[str, ShardSet], dict[str, UserError]]:
        """Make the shard sets that trials train on; return them by trial digest, and why others could not be made."""
        jobs = {key: trial.prepared.shards for key, trial in trials.items() if trial.prepared.shards is not None}
        sharing: dict[str, list[str]] = {}
        for key, job in jobs.items():
            sharing.setdefault(shards_digest(job), []).append(key)
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


class TrialRegistry(Mapping[str, SweepTrial]):
    """Trials by digest: the driver has them, and other processes fetch those that they need from the ``ProgressActor``.

    A sweep's later trials do not exist yet when its processes start, and a thousand of them are more than each wants to load.
    """

    def __init__(self, progress_actor: Any) -> None:
        """Create an empty registry."""
        self._actor = progress_actor
        self._local: dict[str, SweepTrial] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_actor": self._actor, "_local": {}}

    def __getitem__(self, key: str) -> SweepTrial:
        if key in self._local:
            return self._local[key]
        trial: SweepTrial = pickle.loads(ray.get(self._actor.published.remote(key)))  # noqa: S301 (pickled by ``publish``)
        return trial

    def __iter__(self) -> Iterator[str]:
        return iter(self._local)

    def __len__(self) -> int:
        return len(self._local)

    def publish(self, trials: Mapping[str, SweepTrial]) -> None:
        """Let all processes find these trials."""
        ray.get(self._actor.publish.remote({key: pickle.dumps(trial) for key, trial in trials.items()}))
        self._local |= trials
