"""Runs a prepared trial: shards, checkpoint, cells, ledger, manifest.

Each step finds its result on storage or makes it, so a trial that was stopped anywhere goes on there. This module knows the order of
the steps; what a step does is in ``data``, ``training`` and ``evaluation``.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pause_ray import __version__
from pause_ray.core.errors import ModelError
from pause_ray.core.process import Stage, format_trial
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import MANIFEST, Storage, exclusive, is_complete, lock_of, write_json
from pause_ray.data.shards import ShardSet
from pause_ray.evaluation.answer import Provenance
from pause_ray.evaluation.ledger import CellResult, Ledger
from pause_ray.evaluation.scoring_actor import CellScorer, ScoringJob
from pause_ray.evaluation.suite import SuiteSpec, cells
from pause_ray.inference.engine import HfEngineSpec, LoadedAs, depends_on_shapes
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.spec import Resources

if TYPE_CHECKING:
    from pause_ray.training.spec import TrainJob

NUMERICS_CHECK_CELLS = 12
"""The default sample of a trial below float32; 12 equal answers say that less than 24 % change (Wilson, 95 %)."""


class TrialProgress(Protocol):
    """Receives the progress of a trial."""

    def __call__(self, stage: Stage, done: int, total: int, row: JsonObject | None = None) -> None:
        """Note that ``done`` of ``total`` units of a stage are done; while training, ``row`` is the step's row of the training log."""


def run_trial(
    trial: PreparedTrial,
    *,
    arm: str,
    storage: Storage,
    scorer: CellScorer,
    train_gpus: float,
    progress: TrialProgress,
) -> float | None:
    """Run what is missing of a trial; a ``StoppedError`` of ``progress`` ends it where the same call goes on.

    Returns:
        The mean score of its cells, 0 to 1, or None if no cell could be scored.

    Raises:
        StoppedError: the trial was asked to end; the same call goes on.
        PauseRayError: a step failed; finished steps stay on storage and are not repeated.
    """
    folder = storage.trials / trial.digest
    with exclusive(lock_of(folder), waiting=lambda holder: progress(Stage.WAITING, 0, 1)):
        ledger = Ledger(folder / "cells.jsonl")
        if not is_complete(folder):
            started = time.monotonic()
            write_json(folder / "spec.json", trial.spec.resolved())
            shards = make_shards(trial, storage=storage, progress=progress)
            checkpoint = make_checkpoint(trial, storage=storage, shards=shards, train_gpus=train_gpus, progress=progress)
            job = scoring_job(trial, arm=arm, checkpoint=checkpoint, storage=storage)
            score_cells(trial, job, ledger=ledger, scorer=scorer, progress=progress)
            noise = check_numerics(trial, job, ledger=ledger, scorer=scorer, progress=progress)
            write_json(folder / MANIFEST, _manifest(trial, shards, checkpoint, noise, seconds=time.monotonic() - started))
        scores = [row.score for row in ledger.rows() if row.score is not None]
    return sum(scores) / len(scores) if scores else None


def make_shards(trial: PreparedTrial, *, storage: Storage, progress: TrialProgress) -> ShardSet | None:
    """Return the trial's training data, or None when nothing is trained."""
    if trial.shards is None:
        return None
    from pause_ray.data.pipeline import build_shards  # imports Ray Data

    return build_shards(trial.shards, storage=storage, progress=lambda done, total: progress(Stage.DATA, done, total))


def make_checkpoint(
    trial: PreparedTrial,
    *,
    storage: Storage,
    shards: ShardSet | None,
    train_gpus: float,
    progress: TrialProgress,
) -> Checkpoint | None:
    """Return the trial's adapter: trained, named in the spec, or None for the base model."""
    if trial.spec.adapter is not None:
        return Checkpoint.open(Path(trial.spec.adapter))
    job = training_job(trial, shards)
    if job is None:
        return None
    return run_training(job, trial.spec.resources, storage=storage, train_gpus=train_gpus, progress=progress)


def run_training(
    job: TrainJob,
    resources: Resources,
    *,
    storage: Storage,
    train_gpus: float,
    progress: TrialProgress,
    until: int | None = None,
) -> Checkpoint:
    """Train with a trial's resources; ``until`` is that of ``training.launch.fit``."""
    from pause_ray.training.launch import fit  # imports Ray Train

    fewest, most = resources.worker_bounds
    return fit(
        job,
        storage=storage,
        num_workers=most if fewest == most else (fewest, most),
        cpus_per_worker=resources.train_cpus_per_worker,
        gpus_per_worker=train_gpus,
        progress=lambda done, total, row: progress(Stage.TRAINING, done, total, row),
        stage=lambda stage: progress(stage, 0, job.train.max_steps),
        until=until,
    )


def training_job(trial: PreparedTrial, shards: ShardSet | None) -> TrainJob | None:
    """Return what decides the trial's adapter, or None when nothing is trained."""
    spec = trial.spec
    if spec.train is None or shards is None:
        return None
    from pause_ray.training.spec import TrainJob

    return TrainJob(
        train=spec.train,
        model_dir=trial.model_dir,
        base_digest=trial.base_digest,
        shards=shards.folder,
        marker=trial.marker.token,
        policy=spec.pauses.resolved() if spec.pauses else None,
        seed=spec.data_seed,
        threads=spec.resources.threads,
    )


def shares_on_storage(trial: PreparedTrial, *, shards: ShardSet | None, storage: Storage) -> tuple[float, float]:
    """Return the shares, 0 to 1, of the trial's optimizer steps and of its cells that are on storage.

    Raises:
        StorageError: the trial's ledger is damaged.
    """
    answered = Ledger(storage.trials / trial.digest / "cells.jsonl").done_ids()
    scored = len(answered) / sum(trial.spec.eval.num_positions.values())
    job = training_job(trial, shards)
    if job is None:
        return 0.0, scored
    from pause_ray.training.launch import steps_on_storage

    return steps_on_storage(job, storage=storage) / job.train.max_steps, scored


def scoring_job(trial: PreparedTrial, *, arm: str, checkpoint: Checkpoint | None, storage: Storage) -> ScoringJob:
    """Return what is needed to answer the trial's cells."""
    spec = trial.spec
    return ScoringJob(
        suite=spec.eval,
        policy=spec.pauses,
        replicate=spec.replicate,
        seed=spec.seed,
        data_seed=spec.data_seed,
        engine=spec.engine,
        provenance=Provenance(
            arm=arm,
            model=spec.model.source,
            adapter=checkpoint.folder.name if checkpoint else None,
            pauses=json.dumps(spec.pauses.model_dump(mode="json", exclude_defaults=True)) if spec.pauses else "none",
        ),
        loaded=LoadedAs(
            model_dir=trial.model_dir,
            dtype=spec.model.dtype,
            quantize=spec.model.quantize,
            marker=trial.marker.token,
            adapter_dir=checkpoint.folder if checkpoint else None,
        ),
        cache=storage.cache,
        trial=format_trial(arm, trial.digest),
    )


def score_cells(trial: PreparedTrial, job: ScoringJob, *, ledger: Ledger, scorer: CellScorer, progress: TrialProgress) -> None:
    """Answer the cells that the ledger lacks; each answer is in the ledger before the next is waited for."""
    done = ledger.done_ids()
    missing = [cell for cell in trial.cells if cell.id not in done]
    num_answered = len(trial.cells) - len(missing)

    def on_result(result: CellResult) -> None:
        nonlocal num_answered
        ledger.append(result)
        num_answered += 1
        progress(Stage.SCORING, num_answered, len(trial.cells))

    def on_wait(waits: bool) -> None:  # noqa: FBT001 (the signature of CellScorer)
        progress(Stage.QUEUED if waits else Stage.SCORING, num_answered, len(trial.cells))

    if missing:
        scorer.score(job, missing, on_result=on_result, on_wait=on_wait)


@dataclass(frozen=True, kw_only=True)
class ProxyScore:
    """The result of the proxy for one adapter."""

    score: float
    """The mean of the scored cells, 0 to 1."""
    num_cells: int
    """The number of scored cells; others could not be scored."""
    seconds: float
    """The time from the question to the last answer, including the wait for a scoring actor."""
    prefilled_tokens: int
    """The number of prompt tokens that were computed."""


def score_proxy(
    trial: PreparedTrial, adapter: Checkpoint, suite: SuiteSpec, *, arm: str, storage: Storage, scorer: CellScorer, progress: TrialProgress
) -> ProxyScore:
    """Score an adapter of the trial's unfinished training with the proxy ``suite``; nothing of it enters the ledger.

    The stage ``proxy`` shows how far the training is.

    Raises:
        ModelError: no cell could be scored.
        UserError: as for ``CellScorer.score``.
    """
    started = time.monotonic()
    job = dataclasses.replace(scoring_job(trial, arm=arm, checkpoint=adapter, storage=storage), suite=suite, purpose="proxy")
    trained, max_steps = adapter.num_steps, trial.spec.train.max_steps if trial.spec.train else adapter.num_steps
    asked = cells(suite, identity=f"{trial.digest} {trained}", replicate=trial.spec.replicate, seed=trial.spec.data_seed)
    rows: list[CellResult] = []

    def on_result(result: CellResult) -> None:
        rows.append(result)
        progress(Stage.PROXY, trained, max_steps)

    def on_wait(waits: bool) -> None:  # noqa: FBT001 (the signature of CellScorer)
        if waits:
            progress(Stage.QUEUED, 0, len(trial.cells))
        else:
            progress(Stage.PROXY, trained, max_steps)

    scorer.score(job, asked, on_result=on_result, on_wait=on_wait)
    scores = [row.score for row in rows if row.score is not None]
    if not scores:
        raise ModelError(
            f"none of the {len(rows)} proxy cells after step {trained} could be scored ({rows[0].unscored_reason}); "
            "put that right, or leave scheduler out"
        )
    return ProxyScore(
        score=sum(scores) / len(scores),
        num_cells=len(scores),
        seconds=round(time.monotonic() - started, 3),
        prefilled_tokens=sum(row.prefilled_tokens for row in rows),
    )


def check_numerics(
    trial: PreparedTrial, job: ScoringJob, *, ledger: Ledger, scorer: CellScorer, progress: TrialProgress
) -> JsonObject | None:
    """Answer a sample of scored cells again with other batch shapes, and count the answers and scores that the precision alone changes.

    Returns:
        The counts, or None where no cell is checked.
    """
    engine, model = trial.spec.engine, trial.spec.model
    if not isinstance(engine, HfEngineSpec):
        return None
    sample_size = engine.numerics_check_cells
    if sample_size is None:
        sample_size = NUMERICS_CHECK_CELLS if depends_on_shapes(dtype=model.dtype, quantize=model.quantize) else 0
    rows = {row.cell_id: row for row in ledger.rows() if row.score is not None}
    sample = sorted((cell for cell in trial.cells if cell.id in rows), key=lambda cell: cell.id)[:sample_size]
    if not sample:
        return None

    def on_wait(waits: bool) -> None:  # noqa: FBT001 (the signature of CellScorer)
        if waits:
            progress(Stage.QUEUED, len(rows), len(trial.cells))
        else:
            progress(Stage.NUMERICS_CHECK, 0, len(sample))

    results: list[CellResult] = []
    scorer.score(dataclasses.replace(job, purpose="numerics_check"), sample, on_result=results.append, on_wait=on_wait)
    again = [result for result in results if result.score is not None]
    if not again:
        return None
    return {
        "cells": len(again),
        "answers_changed": sum(result.response != rows[result.cell_id].response for result in again),
        "scores_changed": sum(result.score != rows[result.cell_id].score for result in again),
        "dtype": model.quantize or model.dtype,
    }


def _manifest(
    trial: PreparedTrial, shards: ShardSet | None, checkpoint: Checkpoint | None, noise: JsonObject | None, *, seconds: float
) -> JsonObject:
    return {
        "digest": trial.digest,
        "version": __version__,
        "num_cells": len(trial.cells),
        "model_digest": trial.base_digest,
        "shards": shards.folder.name if shards else None,
        "checkpoint": str(checkpoint.folder) if checkpoint else None,
        "corpus_stats": shards.manifest["stats"] if shards else None,
        "evaluation_overlap": shards.manifest["evaluation_overlap"] if shards and shards.manifest["overlap"] else None,
        "training": checkpoint.losses() if checkpoint else [],
        "noise": noise,
        "seconds": {"total": round(seconds, 3)},
    }
