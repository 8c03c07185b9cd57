"""Trials under one of Tune's schedulers: who is behind at a rung is trained no further. The driver's side.

Rungs and stops are in the search's log before anything follows from them. Started anew, all trials take part again in the same order,
and those that are settled only repeat what they said, so that the scheduler goes on with what it knew.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pause_ray.core.process import Stage
from pause_ray.core.storage import is_complete
from pause_ray.sweep.governed_trial import CELLS, ENDED, IS_NEW, PROXY_SCORE, RUNG, SECONDS, STEP, TIME, TOKENS, GovernedTrial
from pause_ray.sweep.progress import TrialState
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.rungs import Schedule
from pause_ray.sweep.search import SweepTrial
from pause_ray.sweep.search_log import Rung, SearchLog, SearchRecord, Stop
from pause_ray.sweep.spec import SchedulerSpec, SweepSpec
from pause_ray.sweep.trainable import INTERRUPTED, QueueSearcher, Shared, TrialCallbacks, run_tuner, trial_bundles
from pause_ray.trial.early_stopping import proxy_lengths

HEAD = "node:__internal_head__"
"""A resource of which every cluster has exactly one."""
FEWEST_FOR_A_MEDIAN = 3
"""As Tune has it."""


class Verdicts:
    """Whom a scheduler has given up; an actor's class, asked by trials."""

    def __init__(self) -> None:
        self._stopped: set[str] = set()

    def stop(self, trial: str) -> None:
        """Give a trial up."""
        self._stopped.add(trial)

    def is_stopped(self, trial: str) -> bool:
        """Whether a trial was given up."""
        return trial in self._stopped


@dataclass(kw_only=True)
class _Minutes:
    """Writes down what a scheduler sees and decides, and lets trials know."""

    trials: Mapping[str, SweepTrial]
    by: str
    log: SearchLog
    verdicts: Any
    board: Any
    settled: frozenset[str]
    interrupted: bool = False
    """Trials were asked to end: what a scheduler thinks of those that are left, it thinks without the others."""

    def note_rung(self, key: str, result: Mapping[str, Any]) -> None:
        """A trial has told of a rung."""
        if result[IS_NEW]:
            rung = Rung(
                trial=key,
                rung=result[RUNG],
                step=result[STEP],
                proxy_score=result[PROXY_SCORE],
                num_cells=result[CELLS],
                seconds=result[SECONDS],
                prefilled_tokens=result[TOKENS],
            )
            self.log.append(rung.as_event(point=self.trials[key].planned.point))

    def note_stop(self, key: str, *, rung: int, is_running: bool) -> None:
        """A trial is given up after a rung."""
        if self.interrupted:
            return
        if key not in self.settled:
            self.log.append(Stop(trial=key, rung=rung, by=self.by).as_event(point=self.trials[key].planned.point))
        if is_running:
            ray.get(self.verdicts.stop.remote(key))
        elif key not in self.settled:
            ray.get(self.board.report.remote(key, TrialState(Stage.STOPPED, 1, 1)))


class _Heeding(TrialScheduler):  # type: ignore[misc]
    """Over one of Tune's schedulers: its decisions are written down, and its stops are left to the trials themselves."""

    minutes: _Minutes

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its scheduler to restore an experiment, which storage makes unnecessary here."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """What becomes of a trial after a rung."""
        key = trial.config["trial"]
        self.minutes.note_rung(key, result)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP:
            return decision
        self.minutes.note_stop(key, rung=result[RUNG], is_running=True)
        goes_on: str = TrialScheduler.CONTINUE
        return goes_on


class _Asha(_Heeding, ASHAScheduler):  # type: ignore[misc]
    pass


class _HyperBand(_Heeding, HyperBandScheduler):  # type: ignore[misc]
    pass


class _Median(_Heeding, MedianStoppingRule):  # type: ignore[misc]
    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: an end repeats the last rung, which Tune's rule would add to the trial's mean once more."""


class _Ends(TrialCallbacks):
    """Hears of trials that end. One that a scheduler gives up while it is paused has no process that could say so."""

    def __init__(self, minutes: _Minutes, after_trial: Callable[[], None], *, ended: Callable[[str, Exception | None], None]) -> None:
        super().__init__(after_trial, ended=ended)
        self._minutes = minutes

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Notice that trials end because they were asked to; Tune tells this before it tells its scheduler that the trial has ended."""
        self._minutes.interrupted |= bool(result.get(INTERRUPTED))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write it down, and pass it on if there is anything new."""
        key = trial.config["trial"]
        if RUNG in trial.last_result and not trial.last_result.get(ENDED):
            self._minutes.note_stop(key, rung=trial.last_result[RUNG], is_running=False)
        if key not in self._minutes.settled:
            super().on_trial_complete(iteration, trials, trial, **info)


def run_governed(
    sweep: SweepSpec,
    shared: Shared,
    *,
    trials: Mapping[str, SweepTrial],
    placement: Placement,
    log: SearchLog,
    next_trial: Callable[[], str | None],
    ended: Callable[[str, Exception | None], None],
    after_trial: Callable[[], None],
) -> None:
    """Run the trials that the sweep's scheduler judges; who was given up is in the log (``SearchRecord.stops``).

    Args:
        sweep: What they belong to.
        shared: What their processes know.
        trials: All that are judged (``rungs.governed``), the finished ones too: the scheduler compares with them.
        placement: What of the cluster they get.
        log: Of the sweep's search.
        next_trial: As for ``QueueSearcher``; gives those of them that are not settled, in their order.
        ended: As for ``QueueSearcher``.
        after_trial: Called when a trial has ended that was not settled.

    Raises:
        SpecError, ModelError, TextError: the proxy cannot be asked of one of them.
    """
    scheduler = sweep.scheduler
    if scheduler is None or not trials:
        return
    record = SearchRecord.read(shared.folder)
    finished = [key for key in trials if is_complete(shared.storage.trials / key)]
    if all(key in finished or key in record.stops for key in trials):
        return
    lengths = proxy_lengths(
        [trial.prepared for trial in trials.values()],
        facts=scheduler.proxy.facts,
        context_tokens=scheduler.proxy.context_tokens,
        cache=shared.storage.cache,
    )
    schedule = Schedule.resume(scheduler, record, trials=trials, finished=finished, context_tokens=lengths)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    verdicts = ray.remote(Verdicts).options(num_cpus=0, scheduling_strategy=here).remote()
    minutes = _Minutes(trials=trials, by=scheduler.kind, log=log, verdicts=verdicts, board=shared.progress_actor, settled=schedule.settled)
    judge = _judge(scheduler, mode=sweep.objective.mode)
    judge.minutes = minutes
    keys = _in_order(trials, schedule.settled, next_trial)
    waits = isinstance(judge, HyperBandScheduler)
    trainable = tune.with_parameters(GovernedTrial, shared=shared, schedule=schedule, verdicts=verdicts)
    try:
        with _all_pending(len(trials)) if waits else contextlib.nullcontext():
            run_tuner(
                tune.with_resources(trainable, _side_by_side(placement) if waits else trial_bundles(placement)),
                tune.TuneConfig(
                    scheduler=judge,
                    search_alg=QueueSearcher(lambda: next(keys, None), ended=ended),
                    num_samples=-1,
                    reuse_actors=True,
                    max_concurrent_trials=None if waits else placement.concurrent_trials,
                ),
                name=sweep.name,
                storage=shared.storage,
                callbacks=[_Ends(minutes, after_trial, ended=ended)],
            )
    finally:
        ray.kill(verdicts)


def _in_order(trials: Mapping[str, SweepTrial], settled: frozenset[str], next_trial: Callable[[], str | None]) -> Iterator[str | None]:
    """Settled trials where they were before, so that schedulers see all in the same order again; for each of the others, who is next."""
    for key in trials:
        if key in settled:
            yield key
            continue
        while not (found := next_trial()):
            if found is None:
                return
            yield found
        yield found


def _judge(scheduler: SchedulerSpec, *, mode: str) -> Any:
    """Tune's scheduler. None of them ends a trial that has come to its end anyway, which would be no end in good order."""
    schedule = Schedule(scheduler=scheduler, context_tokens=())
    its: dict[str, Any] = {"time_attr": TIME, "metric": PROXY_SCORE, "mode": mode}
    if scheduler.kind == "median":
        # Without pauses: they would cost a start of the training each, for samples that come anyway.
        return _Median(**its, grace_period=1, min_samples_required=FEWEST_FOR_A_MEDIAN, min_time_slice=math.inf)
    its |= {"reduction_factor": scheduler.reduction, "stop_last_trials": False}
    if scheduler.kind == "asha":
        return _Asha(**its, grace_period=1, max_t=schedule.whole_time)
    # Rungs are at the floor of max_t times a float power, which may be just below the whole number.
    return _HyperBand(**its, max_t=schedule.whole_time + 0.5)


def _side_by_side(placement: Placement) -> tune.PlacementGroupFactory:
    """A trial's resources and a share of the one head, for schedulers that must know all trials from the beginning.

    Tune's own limit counts paused trials too, and keeps back those that a paused one waits for.
    """
    # Rounded to what Ray counts in; the rest of the head is for Ray Train, which takes a thousandth for each training.
    return trial_bundles(placement, beside={HEAD: math.floor(10_000 / (placement.concurrent_trials + 0.5)) / 10_000})


@contextlib.contextmanager
def _all_pending(num_trials: int) -> Iterator[None]:
    """Tune holds so many trials ready at a time: a bracket is complete before its first rung is judged."""
    name = "TUNE_MAX_PENDING_TRIALS_PG"
    before = os.environ.get(name)
    os.environ[name] = str(num_trials)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
