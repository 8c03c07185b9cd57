"""Early stopping with Ray Tune's ASHA: a trial trains up to a rung, its adapter is scored with the proxy, and ASHA decides.

ASHA compares the trials of the unchanged arm at replicate 0. Rung scores and stops are in ``search.jsonl`` before anything follows from
them. A restarted driver tells a fresh ASHA the recorded scores in their order, which makes it stop the same trials.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from pause_ray.core.storage import is_complete
from pause_ray.evaluation.suite import proxy_suite
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.sweep.search import RungScore, SearchLog, SearchRecord, Stop, SweepTrial
from pause_ray.sweep.spec import PlannedTrial, SchedulerSpec, SweepSpec
from pause_ray.sweep.trainable import IDLE_SECONDS, SCORE, ReapIdleActors, Shared, TuneTrial
from pause_ray.trial.run import make_shards, run_training, score_proxy, training_job

log = logging.getLogger("pause_ray")

PROXY_SCORE, STEP, RUNG = "proxy_score", "train_step", "rung"
"""Keys of a trial's result: what ASHA compares, its clock, and the ``RungScore`` for the log."""


def is_compared(trial: PlannedTrial, sweep: SweepSpec) -> bool:
    """Return whether ASHA compares a trial with others; without a scheduler it compares none."""
    return sweep.scheduler is not None and trial.arm == sweep.arm and trial.spec.replicate == 0 and trial.spec.train is not None


class EarlyStopping(ReapIdleActors, ASHAScheduler):  # type: ignore[misc]
    """Tune's ASHA with a log: it writes each rung score before the decision and each stop before Tune acts on it."""

    def __init__(
        self,
        spec: SchedulerSpec,
        *,
        mode: str,
        trials: Mapping[str, PlannedTrial],
        finished: Collection[str],
        search_log: SearchLog,
        on_stop: Callable[[str], None],
    ) -> None:
        """Begin where the log ends: tell ASHA the recorded scores in their order and write the stops that the log lacks.

        A driver that was killed between a score and its stop leaves such a log. A finished trial is never stopped.

        Args:
            spec: The sweep's scheduler.
            mode: The better direction of a score, ``max`` or ``min``.
            trials: The trials that are compared, by digest.
            finished: The digests of those whose cells are all scored.
            search_log: The sweep's log.
            on_stop: Called with the digest of every trial that is stopped.
        """
        steps = [trial.spec.train.max_steps for trial in trials.values() if trial.spec.train is not None]
        super().__init__(
            IDLE_SECONDS,
            time_attr=STEP,
            metric=PROXY_SCORE,
            mode=mode,
            grace_period=spec.grace_period,
            reduction_factor=spec.reduction_factor,
            max_t=max(steps),
            stop_last_trials=False,  # a training that reaches its last step is scored on its whole grid
        )
        self._points = {key: trial.point for key, trial in trials.items()}
        self._search_log, self._on_stop, self._kind = search_log, on_stop, spec.kind
        record = SearchRecord.read(search_log.path.parent)
        self.stopped = set(record.stops) & set(trials)
        """The digests of the trials that were stopped."""
        scores = [score for score in record.rungs if score.trial in trials]
        replayed = {score.trial: SimpleNamespace(trial_id=score.trial) for score in scores}
        for trial in replayed.values():
            self.on_trial_add(None, trial)
        for score in scores:
            decision = super().on_trial_result(None, replayed[score.trial], _compared_values(score))
            if decision == TrialScheduler.STOP and score.trial not in {*self.stopped, *finished}:
                self._note_stop(score)

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its scheduler to restore an experiment, which the search log makes unnecessary."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Write the score, let ASHA decide, and write its stop."""
        score: RungScore = result[RUNG]
        self._search_log.append(score.as_event(point=self._points[score.trial]))
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._note_stop(score)
        return decision

    def _note_stop(self, score: RungScore) -> None:
        self.stopped.add(score.trial)
        self._search_log.append(Stop(trial=score.trial, rung=score.rung, by=self._kind).as_event(point=self._points[score.trial]))
        self._on_stop(score.trial)


def _compared_values(score: RungScore) -> dict[str, Any]:
    return {PROXY_SCORE: math.nan if score.proxy_score is None else score.proxy_score, STEP: score.step}


class EarlyStoppedTrial(TuneTrial):
    """A trial in one step per rung and one for the rest. Tune stops it between two steps, when it neither trains nor scores."""

    _adapter: Checkpoint | None = None

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], *, shared: Shared, scheduler: SchedulerSpec, context_tokens: tuple[int, ...]
    ) -> None:
        """Set the process up as ``TuneTrial`` does; ``context_tokens`` are the lengths of the proxy, the same for all trials."""
        self._scheduler, self._context_tokens = scheduler, context_tokens
        super().setup(config, shared=shared)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process."""
        self._remove_adapter()
        self._last: dict[str, Any] = {PROXY_SCORE: math.nan, STEP: 0}
        return super().reset_config(new_config)

    def cleanup(self) -> None:
        """Remove what the trial no longer needs before the process ends."""
        self._remove_adapter()

    def step(self) -> dict[str, Any]:
        """Come to the next rung and return its score, or come to the end of the trial."""
        self._remove_adapter()
        result = super().step()
        return self._last | result  # Tune refuses a result without the scheduler's metric, also that of a trial which ends

    def _advance(self, trial: SweepTrial) -> dict[str, Any]:
        return self._next_rung(trial) or super()._advance(trial)

    def _next_rung(self, trial: SweepTrial) -> dict[str, Any] | None:
        """Train to the next rung that has no score and score the adapter there; return None if no rung is left."""
        shared, prepared = self._shared, trial.prepared
        if prepared.spec.train is None or is_complete(shared.storage.trials / prepared.digest):
            return None
        recorded = [score.step for score in SearchRecord.read(shared.folder).rungs if score.trial == prepared.digest]
        done = max(recorded, default=self._last[STEP])
        open_rungs = [(rung, step) for rung, step in enumerate(self._scheduler.steps(prepared.spec.train.max_steps)) if step > done]
        job = training_job(prepared, make_shards(prepared, storage=shared.storage, progress=self._reporter)) if open_rungs else None
        if job is None:
            return None
        for rung, step in open_rungs:
            self._adapter = run_training(
                job,
                prepared.spec.resources,
                storage=shared.storage,
                train_gpus=shared.train_gpus,
                progress=self._reporter,
                until=step,
            )
            if self._adapter.num_steps == step:
                return self._score(trial, rung, self._adapter)
        return None  # an earlier training of the same adapter went past all rungs, so stopping would save nothing

    def _score(self, trial: SweepTrial, rung: int, adapter: Checkpoint) -> dict[str, Any]:
        shared = self._shared
        suite = proxy_suite(trial.prepared.spec.eval, facts=self._scheduler.proxy.facts, context_tokens=self._context_tokens)
        result = score_proxy(
            trial.prepared, adapter, suite, arm=trial.planned.arm, storage=shared.storage, scorer=shared.pool, progress=self._reporter
        )
        score = RungScore(
            trial=trial.prepared.digest,
            rung=rung,
            step=adapter.num_steps,
            proxy_score=result.score,
            num_cells=result.num_cells,
            seconds=result.seconds,
            prefilled_tokens=result.prefilled_tokens,
        )
        self._last = _compared_values(score)
        return {RUNG: score, SCORE: None, tune.result.DONE: False}

    def _remove_adapter(self) -> None:
        """Remove the adapter of the last rung, which nobody needs once its score is reported; the training has its own checkpoint."""
        if self._adapter is not None and self._adapter.folder.name.startswith("."):
            shutil.rmtree(self._adapter.folder, ignore_errors=True)
        self._adapter = None
