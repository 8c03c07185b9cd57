"""One trial's process under a scheduler: its training goes on in a thread while an adapter of it is asked the proxy.

A scheduler's stop is not Tune's: Tune would end the process wherever it is, and workers and placement groups of its training would
outlive it. The trial hears of it at its next step, lets its training end, and is done. A pause is a checkpoint of the training, made in
the same way. What was scored before is repeated to the scheduler and not scored again. Knows Tune's trainables; decides nothing.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import ray
from ray import tune

from pause_ray.core.process import Stage
from pause_ray.evaluation.proxy import proxy_suite
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.sweep.reporter import TrialReporter
from pause_ray.sweep.rungs import Schedule
from pause_ray.sweep.search_log import Rung
from pause_ray.sweep.trainable import SCORE, Shared, TuneTrial, check_storage, guarded
from pause_ray.training.launch import train_digest
from pause_ray.trial.early_stopping import TrainingInBackground, score_proxy
from pause_ray.trial.run import make_shards, run_training, training_job

PROXY_SCORE, TIME, RUNG, IS_NEW, ENDED = "proxy_score", "rung_time", "rung", "rung_is_new", "trial_ended"
"""Of a result: what schedulers compare, when on their clock, at which rung, whether the log lacks it, whether it is the trial's last."""
STEP, CELLS, SECONDS, TOKENS = "rung_step", "rung_cells", "rung_seconds", "rung_prefilled_tokens"
"""Of a result: facts for the log."""


class GovernedTrial(TuneTrial):
    """One trial as Tune runs it under a scheduler: a step up to each rung, and one for the rest."""

    def setup(self, config: dict[str, Any], *, shared: Shared, schedule: Schedule, verdicts: Any) -> None:  # type: ignore[override]
        """As ``TuneTrial``, with what the scheduler has seen before and the handle of ``Verdicts``."""
        super().setup(config, shared=shared)
        self._schedule = schedule
        self._verdicts = verdicts
        self._training: TrainingInBackground | None = None
        self._last: dict[str, Any] = {}
        self._subject = contextlib.ExitStack()
        """Names the trial in all lines from its first step until its training has ended, which goes on between steps."""
        self._is_named = False
        self._forget()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process."""
        self._end_training()
        self._forget()
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Before a pause: the training writes its own checkpoint and ends; only how far the trial is remains for Tune to keep."""
        self._end_training()
        if self._key not in self._schedule.settled:
            self._reports().finish(Stage.PAUSED)
        return {"rungs": self._rungs, "last": self._last}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """After a pause: the training goes on from its own checkpoint as soon as it is needed."""
        if checkpoint is not None:
            self._rungs, self._last = checkpoint["rungs"], checkpoint["last"]

    def cleanup(self) -> None:
        """Before the process ends."""
        self._end_training()

    def step(self) -> dict[str, Any]:
        """Come to the next rung and say what the proxy says there, or come to the end."""
        is_settled = self._key in self._schedule.settled
        if ray.get(self._verdicts.is_stopped.remote(self._key)):
            self._end_training()
            if not is_settled:
                self._reports().finish(Stage.STOPPED)
            return self._end({})
        if (known := self._repeated()) is not None:
            return known
        if is_settled:
            return self._end({})
        reports = self._reports()
        if not self._is_named:
            self._subject.enter_context(self._named())
            self._is_named = True
        result = guarded(reports, lambda: self._next_rung(reports) or self._finish_training(reports))
        if not result.get(tune.result.DONE):
            return result
        self._end_training()
        return self._end(result)

    @property
    def _key(self) -> str:
        return str(self.config["trial"])

    def _forget(self) -> None:
        self._rungs = 0
        self._last = {PROXY_SCORE: math.nan, TIME: 0, RUNG: -1}
        self._told: TrialReporter | None = None
        self._looked_at: tuple[int, ...] = ()

    def _reports(self) -> TrialReporter:
        self._told = self._told or TrialReporter(self._shared.progress_actor, self._key)
        return self._told

    def _end_training(self) -> None:
        if self._training is not None:
            self._training.end()
            self._training.forget(self._looked_at[: self._rungs])
        self._training = None
        self._subject.close()
        self._is_named = False

    def _repeated(self) -> dict[str, Any] | None:
        """The next rung, if it was scored before."""
        known = self._schedule.known(self._key, self._rungs)
        return self._result(known, is_new=False) if known is not None else None

    def _next_rung(self, reports: TrialReporter) -> dict[str, Any] | None:
        """Wait for the next rung and score it; None if no rung is left, or the training was further when it began here."""
        train = self._shared.trials[self._key].prepared.spec.train
        steps = self._looked_at = self._schedule.scheduler.steps(train.max_steps) if train else ()
        while self._rungs < len(steps):
            if (known := self._repeated()) is not None:
                return known
            self._training = self._training or self._begin_training(reports, rungs=steps)
            adapter = self._training.adapter_after(steps[self._rungs])
            if adapter is not None:
                return self._result(self._scored(adapter, reports), is_new=True)
            self._rungs += 1
        return None

    def _scored(self, adapter: Checkpoint, reports: TrialReporter) -> Rung:
        trial, proxy = self._shared.trials[self._key], self._schedule.scheduler.proxy
        found = score_proxy(
            trial.prepared,
            adapter,
            proxy_suite(trial.prepared.spec.eval, facts=proxy.facts, context_tokens=self._schedule.context_tokens),
            arm=trial.planned.arm,
            storage=self._shared.storage,
            fleet=self._shared.pool,
            progress=lambda stage, done, total: self._tell(reports, stage, done, total),
        )
        return Rung(
            trial=self._key,
            rung=self._rungs,
            step=adapter.num_steps,
            proxy_score=found.score,
            num_cells=found.num_cells,
            seconds=found.seconds,
            prefilled_tokens=found.prefilled_tokens,
        )

    def _tell(self, reports: TrialReporter, stage: Stage, done: int, total: int) -> None:
        """As long as the training goes on it has the word."""
        if self._training is None or not self._training.goes_on:
            reports(stage, done, total)

    def _begin_training(self, reports: TrialReporter, *, rungs: tuple[int, ...]) -> TrainingInBackground:
        shared, trial = self._shared, self._shared.trials[self._key].prepared
        check_storage(shared.folder)
        job = training_job(trial, make_shards(trial, storage=shared.storage, progress=reports))
        if job is None:
            raise AssertionError(f"trial {self._key} is judged by a scheduler and not trained")
        return TrainingInBackground(
            lambda: run_training(
                job,
                trial.spec.resources,
                storage=shared.storage,
                train_gpus=shared.train_gpus,
                progress=reports,
                rungs=rungs,
                stop=reports.ending,
            ),
            checkpoint=shared.storage.checkpoints / train_digest(job),
            stop=reports.ending,
        )

    def _finish_training(self, reports: TrialReporter) -> dict[str, Any]:
        if self._training is not None:
            self._training.wait()
        self._last = {**self._last, TIME: self._schedule.whole_time}
        return self._finish(reports)

    def _result(self, rung: Rung, *, is_new: bool) -> dict[str, Any]:
        self._rungs = rung.rung + 1
        score = math.nan if rung.proxy_score is None else rung.proxy_score
        self._last = {PROXY_SCORE: score, TIME: self._schedule.time_of(rung.rung), RUNG: rung.rung}
        facts = {STEP: rung.step, CELLS: rung.num_cells, SECONDS: rung.seconds, TOKENS: rung.prefilled_tokens}
        return {**self._last, **facts, IS_NEW: is_new, SCORE: None, tune.result.DONE: False}

    def _end(self, result: dict[str, Any]) -> dict[str, Any]:
        return {**self._last, SCORE: None, **result, ENDED: True, tune.result.DONE: True}
