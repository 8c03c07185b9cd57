"""Running a sweep: its trials round by round, until all are finished or something ends it.

Knows the order of things; which trials there are is in ``rounds``, where they run in ``execution``. Storage decides what is left
to do, so the same command resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from pause_ray.core import ray_cluster
from pause_ray.core.errors import UserError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import Storage, exclusive
from pause_ray.data.pipeline import build_shards, shards_digest
from pause_ray.data.shards import ShardSet, corpus_words
from pause_ray.evaluation.scoring_pool import ScoringPool
from pause_ray.sweep.governed import run_governed
from pause_ray.sweep.heartbeat import StatusWriter
from pause_ray.sweep.progress import ProgressDisplay
from pause_ray.sweep.queue import Budget, BudgetMeter, TrialQueue, bill_of, left_over
from pause_ray.sweep.reporter import TrialMonitor, start_progress_actor
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.rungs import governed
from pause_ray.sweep.search import Rounds, Search, SweepTrial
from pause_ray.sweep.search_log import SearchLog
from pause_ray.sweep.spec import SweepSpec, TpeAlgorithm
from pause_ray.sweep.status import Failure, SweepOutcome
from pause_ray.sweep.trainable import NOT_YET, Shared, run_trials, why_lost
from pause_ray.trial.run import shares_on_storage

MOST_LOSSES = 3
"""A trial whose process was lost so often (with its node, or for want of memory) without having got further has failed."""


@dataclass(frozen=True)
class Loss:
    """Of a trial's process."""

    times: int
    """In a row without anything new done between them, this one included."""
    work: int
    """Steps and cells that were done."""


class TrialRegistry(Mapping[str, SweepTrial]):
    """Trials by digest: the driver has them, other processes fetch those that they need from the board.

    A sweep's later trials do not exist yet when its processes start, and a thousand of them are more than each wants to load.
    """

    def __init__(self, board: Any) -> None:
        """None yet."""
        self._board = board
        self._here: dict[str, SweepTrial] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_board": self._board, "_here": {}}

    def __getitem__(self, key: str) -> SweepTrial:
        if key in self._here:
            return self._here[key]
        trial: SweepTrial = pickle.loads(ray.get(self._board.posted.remote(key)))  # noqa: S301 (written by ``post``)
        return trial

    def __iter__(self) -> Iterator[str]:
        return iter(self._here)

    def __len__(self) -> int:
        return len(self._here)

    def post(self, trials: Mapping[str, SweepTrial]) -> None:
        """Let all processes find these too."""
        ray.get(self._board.post.remote({key: pickle.dumps(trial) for key, trial in trials.items()}))
        self._here |= trials


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Everything that runs while trials of a sweep run."""

    sweep: SweepSpec
    rounds: Rounds
    storage: Storage
    placement: Placement
    fleet: ScoringPool
    board: Any
    watch: TrialMonitor
    progress: ProgressDisplay
    heartbeat: StatusWriter
    line: TrialQueue
    posted: TrialRegistry
    log: SearchLog
    after_trial: Callable[[], None]
    running: set[str] = field(default_factory=set)
    """Trials that have begun and not ended."""
    losses: dict[str, Loss] = field(default_factory=dict)
    """Trial → the last one."""
    set_aside: list[str] = field(default_factory=list)
    """Judged trials whose processes were lost; they begin again together, since a scheduler has heard of their ends."""
    errors: list[UserError] = field(default_factory=list)
    """What kept the next round from being prepared; Tune would wrap it in its own."""

    def run(self, trials: Mapping[str, SweepTrial]) -> None:
        """Run trials, and those of further rounds, until there are none or the sweep is to end.

        Raises:
            UserError: a further round could not be prepared.
        """
        judged = governed(self.sweep, self.rounds.trials)
        waiting = self._admit(trials)
        shared = Shared(
            folder=self.rounds.folder,
            trials=self.posted,
            storage=self.storage,
            fleet=self.fleet,
            board=self.board,
            train_gpus=self.placement.train_gpus,
        )
        with self.watch.interruptible():
            self.line.add(key for key in waiting if key in judged)
            goes_on = bool(judged)
            while goes_on:
                run_governed(
                    self.sweep,
                    shared,
                    trials={key: self.rounds.trials[key] for key in judged},
                    placement=self.placement,
                    log=self.log,
                    next_trial=self._next_trial,
                    ended=functools.partial(self._ended, begin_again=self._set_aside),
                    after_trial=self.after_trial,
                )
                goes_on = bool([key for key in self.set_aside if self.line.take_back(key)])
                self.set_aside.clear()
            left_out = self.rounds.left_out()
            self.heartbeat.leave_out(left_out)
            self.line.add(key for key in waiting if key not in judged and key not in left_out)
            if self.line.ended_by is None:
                run_trials(
                    self.sweep,
                    shared,
                    placement=self.placement,
                    next_trial=functools.partial(self._next_trial, may_return=True),
                    ended=functools.partial(self._ended, begin_again=self.line.take_back),
                    after_trial=self.after_trial,
                )
        if self.errors:
            raise self.errors[0]

    def failures(self) -> tuple[Failure, ...]:
        """Why trials did not finish."""
        return tuple(
            Failure(label=self.rounds.trials[key].planned.label, message=message, trace=trace)
            for key, (message, trace) in self.watch.failures.items()
        )

    def _next_trial(self, *, may_return: bool = False) -> str | None:
        """As for ``QueueSearcher``: who is next in line, when it is empty and all have ended of the next round.

        While trials run that ``may_return`` to the line when they are lost, it is not known whether there is another.
        """
        self.watch.look()
        key = self.line.next()
        while key is None and self.line.ended_by is None and not self.rounds.are_known:
            if self.running:
                return NOT_YET
            if self.sweep.arm in self.line.given_up:
                return None  # points that are chosen without a value would stay chosen
            try:
                more = self.rounds.advance()
            except UserError as error:
                self.errors.append(error)
                return None
            if not more:
                return None
            self.line.add(self._admit(more))
            key = self.line.next()
        if key is not None:
            self.running.add(key)
        elif may_return and self.running and self.line.may_take_back:
            return NOT_YET
        return key

    def _ended(self, key: str, account: str | None, *, begin_again: Callable[[str], bool]) -> None:
        """Note a trial's end. A lost trial may ``begin_again``, unless a mistake ended it that would be made again."""
        self.running.discard(key)
        self.watch.look()
        if account is None:
            return
        message, trace = why_lost(account)
        before, work = self.losses.get(key), self.watch.work_of(key)
        self.losses[key] = Loss(before.times + 1 if before is not None and before.work == work else 1, work)
        may = trace is not None and self.losses[key].times < MOST_LOSSES and self.watch.forgive(key)
        if may and begin_again(key):
            label = self.rounds.trials[key].planned.label
            self.progress.say(f"{label}: the trial's process was lost ({message}); it begins again where it was")
        else:
            self.watch.note_lost(key, message, trace)

    def _set_aside(self, key: str) -> bool:
        if self.line.may_take_back:
            self.set_aside.append(key)
        return self.line.may_take_back

    def _admit(self, trials: Mapping[str, SweepTrial]) -> list[str]:
        """Count trials as work; those whose training rows are on storage now, in their order. For the others the board says why."""
        self.progress.add({key: (trial.planned.label, trial.planned.spec) for key, trial in trials.items()})
        self.heartbeat.expect(trials)
        self._count_in_arms()
        rows, failed = self._make_rows(trials)
        runnable = {
            key: dataclasses.replace(trial, prepared=self.placement.placed(trial.prepared))
            for key, trial in trials.items()
            if key not in failed
        }
        self.progress.found(
            {key: shares_on_storage(trial.prepared, shards=rows.get(key), storage=self.storage) for key, trial in runnable.items()}
        )
        self.posted.post(runnable)
        for key, message in failed.items():
            ray.get(self.board.fail.remote(key, message, None))
        return list(runnable)

    def _count_in_arms(self) -> None:
        """Let the line know all trials, and which came to their end in earlier commands: an arm of which some did is not given up."""
        new = {key: trial.planned.arm for key, trial in self.rounds.trials.items() if not self.line.expects(key)}
        self.line.expect(new)
        self.line.note_finished(key for key in new if self.rounds.is_finished(key))

    def _make_rows(self, trials: Mapping[str, SweepTrial]) -> tuple[dict[str, ShardSet], dict[str, str]]:
        """Make the shard sets that trials train on; trial → its set, or why that could not be made."""
        jobs = {key: trial.prepared.shards for key, trial in trials.items() if trial.prepared.shards is not None}
        sharing: dict[str, list[str]] = {}
        for key, job in jobs.items():
            sharing.setdefault(shards_digest(job), []).append(key)
        made: dict[str, ShardSet] = {}
        failed: dict[str, str] = {}
        for keys in sharing.values():
            job, label = jobs[keys[0]], trials[keys[0]].planned.label
            try:
                rows = build_shards(job, storage=self.storage, progress=self.progress.showing(f"text for {label}"))
            except UserError as error:
                failed |= dict.fromkeys(keys, str(error))
                continue
            made |= dict.fromkeys(keys, rows)
            self.progress.say(f"training rows for {label}: {corpus_words(rows.manifest['stats'])}")
        return made, failed


@contextlib.contextmanager
def executing(
    sweep: SweepSpec,
    trials: Mapping[str, SweepTrial],
    *,
    rounds: Rounds,
    storage: Storage,
    console: Console,
    line: TrialQueue,
    log: SearchLog,
    after_step: Callable[[Path, str, JsonObject], None],
    after_trial: Callable[[Path], None],
) -> Iterator[Execution]:
    """Start what trials need, and end it.

    Args:
        sweep: What they belong to.
        trials: Those that decide what is needed: the first to be run.
        rounds: All that are known, and the way to more.
        storage: Where everything is kept.
        console: Where progress is shown.
        line: Where trials wait.
        log: Of the sweep's search.
        after_step: As for ``run_sweep``.
        after_trial: As for ``run_sweep``.

    Raises:
        SpecError: the cluster has no room for them.
    """

    def note_step(key: str, row: JsonObject) -> None:
        heartbeat.note_step(key, row)
        after_step(rounds.folder, key, row)

    with ray_cluster.connection():
        ray_cluster.hold_shared_actor_here()
        placement = Placement.of(sweep, [trial.planned.spec for trial in trials.values()])
        board = start_progress_actor()
        with _fleet(placement) as fleet:
            watch = TrialMonitor(
                board,
                line,
                timeout_minutes=sweep.trial_timeout_minutes,
                after_step=note_step,
                finish=fleet.finish,
                label=lambda key: rounds.trials[key].planned.label,
                say=lambda text: progress.say(text),
            )
            with (
                ProgressDisplay(console, watch.states) as progress,
                StatusWriter(
                    rounds,
                    storage=storage,
                    placement=placement,
                    fleet=fleet,
                    progress=progress,
                    failures=lambda: dict(watch.failures),
                    given_up=lambda: dict(line.given_up),
                    ended_by=lambda: line.ended_by,
                ) as heartbeat,
                watch,
            ):
                yield Execution(
                    sweep=sweep,
                    rounds=rounds,
                    storage=storage,
                    placement=placement,
                    fleet=fleet,
                    board=board,
                    watch=watch,
                    progress=progress,
                    heartbeat=heartbeat,
                    line=line,
                    posted=TrialRegistry(board),
                    log=log,
                    after_trial=lambda: after_trial(rounds.folder),
                )


@contextlib.contextmanager
def _fleet(placement: Placement) -> Iterator[ScoringPool]:
    fleet = ScoringPool.start(
        num_actors=placement.resources.scoring_bounds,
        cpus=placement.resources.scoring_cpus_per_actor,
        gpus=placement.scoring_gpus,
        threads=placement.resources.threads,
        idle_seconds=placement.resources.idle_seconds,
    )
    try:
        yield fleet
    finally:
        fleet.stop()


def run_sweep(
    sweep: SweepSpec,
    *,
    storage: Storage,
    console: Console,
    command: str,
    after_step: Callable[[Path, str, JsonObject], None],
    after_trial: Callable[[Path], None],
    budget: Budget | None = None,
) -> SweepOutcome:
    """Run what is missing of a sweep; what is on storage already is not run again.

    A first Ctrl-C (or SIGTERM) lets what is being answered or trained come to an end where it can go on; a second ends at once.

    Args:
        sweep: The trials.
        storage: Where everything is kept.
        console: Where progress is shown.
        command: How the user started this, for the report.
        after_step: Called with the sweep's folder, a trial's digest and a row of its training log, for every step that
            a trial trains; from a thread of its own.
        after_trial: Called with the sweep's folder whenever a trial has ended.
        budget: What the command may spend; None for no limit.

    Raises:
        StorageError: another process runs this sweep, or the storage root cannot be written.
        UserError: the sweep cannot be prepared (model, text, marker or lengths do not fit).
    """
    meter = BudgetMeter(budget or Budget(), bill=bill_of(storage))
    line = TrialQueue(start=meter.start)
    with console.status("checking models, texts and lengths (a model from a package is fetched and converted once)") as status:

        def show(done: int, total: int) -> None:
            status.update(f"checking models, texts and lengths: {done} of {total} trials")

        rounds = Rounds(sweep, storage=storage, command=command, showing=show)
    failures: tuple[Failure, ...] = ()
    interrupted = False
    with exclusive(rounds.folder / ".lock"):
        log = SearchLog(rounds.folder)
        missing = rounds.begin(_search(sweep, log=log))
        if missing:
            if there := rounds.num_finished():
                console.print(f"{there} of {len(rounds.trials)} trials are finished already; going on with the rest")
            with executing(
                sweep,
                missing,
                rounds=rounds,
                storage=storage,
                console=console,
                line=line,
                log=log,
                after_step=after_step,
                after_trial=after_trial,
            ) as execution:
                execution.run(missing)
                failures, interrupted = execution.failures(), execution.watch.interrupted
        finished, planned, left_out = rounds.num_finished(), len(rounds.trials), len(rounds.left_out())
    is_all = rounds.are_known and finished + left_out == planned
    ended_by = None if is_all else line.ended_by
    if ended_by is not None and line.is_out_of_budget:
        ended_by = left_over(ended_by, trials=planned - finished - left_out - len(failures))
    return SweepOutcome(
        folder=rounds.folder,
        finished=finished,
        planned=planned,
        left_out=left_out,
        failures=failures,
        ended_by=ended_by,
        given_up=tuple(line.given_up.values()),
        interrupted=interrupted and not is_all,
    )


def _search(sweep: SweepSpec, *, log: SearchLog) -> Search | None:
    """What chooses points as the sweep goes on; None where all are known."""
    if not isinstance(sweep.algorithm, TpeAlgorithm):
        return None
    from pause_ray.sweep.tpe import TpeSearch  # loads Optuna

    return TpeSearch(sweep, sweep.algorithm, log=log)
