"""The straight line from a prepared trial to its scored cells: shards, checkpoint, cells, ledger, manifest.

Each step finds its result on storage or makes it, so that a trial that was stopped anywhere goes on there. Knows the
order of steps; what a step does is in ``corpus``, ``train`` and ``needle``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pause_ray import __version__
from pause_ray.core.process import Stage, trial_words
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import MANIFEST, Storage, exclusive, is_complete, lock_of, write_json
from pause_ray.data.pipeline import build_shards
from pause_ray.data.shards import ShardSet
from pause_ray.evaluation.answer import Condition
from pause_ray.evaluation.ledger import CellResult, Ledger
from pause_ray.evaluation.scoring_actor import ScoringJob
from pause_ray.evaluation.scoring_pool import Fleet
from pause_ray.inference.engine import HfEngineSpec, LoadedAs, depends_on_shapes
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.training.launch import TrainJob, fit, steps_on_storage
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.spec import Resources

RECHECKED_CELLS = 12
"""Of a trial below float32; 12 equal answers say that less than 24 % change (Wilson, 95 %)."""


class TrialProgress(Protocol):
    """Is told how far a trial is."""

    def __call__(self, stage: Stage, done: int, total: int, row: JsonObject | None = None) -> None:
        """Of ``stage``, ``done`` of ``total`` is behind it; while training, ``row`` is that step's row of the training log."""


def run_trial(
    trial: PreparedTrial,
    *,
    arm: str,
    storage: Storage,
    fleet: Fleet,
    train_gpus: float,
    progress: TrialProgress,
    stop: threading.Event | None = None,
) -> float | None:
    """Run what is missing of a trial; ``stop`` asks its training to end where it can go on.

    Returns:
        The mean score of its cells, 0 to 1, or None if no cell could be scored.

    Raises:
        StoppedError: it was asked to end; the same call goes on.
        PauseRayError: a step failed; what was finished before stays and is not repeated.
    """
    folder = storage.trials / trial.digest
    with exclusive(lock_of(folder), waiting=lambda holder: progress(Stage.WAITING, 0, 1)):
        ledger = Ledger(folder / "cells.jsonl")
        if not is_complete(folder):
            started = time.monotonic()
            write_json(folder / "spec.json", trial.spec.resolved())
            shards = make_shards(trial, storage=storage, progress=progress)
            checkpoint = make_checkpoint(trial, storage=storage, shards=shards, train_gpus=train_gpus, progress=progress, stop=stop)
            job = scoring_job(trial, arm=arm, checkpoint=checkpoint, storage=storage)
            score_cells(trial, job, ledger=ledger, fleet=fleet, progress=progress)
            noise = recheck_cells(trial, job, ledger=ledger, fleet=fleet, progress=progress)
            write_json(folder / MANIFEST, _summary(trial, shards, checkpoint, noise, seconds=time.monotonic() - started))
        scores = [row.score for row in ledger.rows() if row.score is not None]
    return sum(scores) / len(scores) if scores else None


def make_shards(trial: PreparedTrial, *, storage: Storage, progress: TrialProgress) -> ShardSet | None:
    """The trial's training rows, or None when nothing is trained."""
    if trial.shards is None:
        return None
    return build_shards(trial.shards, storage=storage, progress=lambda done, total: progress(Stage.DATA, done, total))


def make_checkpoint(
    trial: PreparedTrial,
    *,
    storage: Storage,
    shards: ShardSet | None,
    train_gpus: float,
    progress: TrialProgress,
    stop: threading.Event | None = None,
) -> Checkpoint | None:
    """The trial's adapter: trained, given by the spec, or None for the base model."""
    spec = trial.spec
    if spec.adapter is not None:
        return Checkpoint.open(Path(spec.adapter))
    job = training_job(trial, shards)
    if job is None:
        return None
    return run_training(job, spec.resources, storage=storage, train_gpus=train_gpus, progress=progress, stop=stop)


def run_training(
    job: TrainJob,
    resources: Resources,
    *,
    storage: Storage,
    train_gpus: float,
    progress: TrialProgress,
    rungs: Sequence[int] = (),
    stop: threading.Event | None = None,
) -> Checkpoint:
    """Train with a trial's resources; ``rungs`` and ``stop`` are ``train.launch.fit``'s."""
    fewest, most = resources.worker_bounds
    return fit(
        job,
        storage=storage,
        num_workers=most if fewest == most else (fewest, most),
        cpus_per_worker=resources.train_cpus_per_worker,
        gpus_per_worker=train_gpus,
        progress=lambda done, total, row: progress(Stage.TRAINING, done, total, row),
        stage=lambda stage: progress(stage, 0, job.train.max_steps),
        rungs=rungs,
        stop=stop,
    )


def training_job(trial: PreparedTrial, shards: ShardSet | None) -> TrainJob | None:
    """What decides the trial's adapter, or None when nothing is trained."""
    spec = trial.spec
    if spec.train is None or shards is None:
        return None
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
    """Of the trial's optimizer steps and of its cells, 0 to 1: what ``run_trial`` finds, and has not to do.

    Raises:
        StorageError: its ledger is damaged.
    """
    answered = Ledger(storage.trials / trial.digest / "cells.jsonl").done_ids()
    scored = len(answered) / sum(trial.spec.eval.num_positions.values())
    job = training_job(trial, shards)
    return steps_on_storage(job, storage=storage) / job.train.max_steps if job is not None else 0.0, scored


def scoring_job(trial: PreparedTrial, *, arm: str, checkpoint: Checkpoint | None, storage: Storage) -> ScoringJob:
    """What the fleet needs to answer the trial's cells."""
    spec = trial.spec
    return ScoringJob(
        suite=spec.eval,
        policy=spec.pauses,
        replicate=spec.replicate,
        seed=spec.seed,
        data_seed=spec.data_seed,
        engine=spec.engine,
        condition=Condition(
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
        trial=trial_words(arm, trial.digest),
    )


def score_cells(trial: PreparedTrial, job: ScoringJob, *, ledger: Ledger, fleet: Fleet, progress: TrialProgress) -> None:
    """Ask the cells that the ledger does not have yet; each answer is in the ledger before the next is waited for."""
    done = ledger.done_ids()
    missing = [cell for cell in trial.cells if cell.id not in done]
    answered = len(trial.cells) - len(missing)

    def keep(result: CellResult) -> None:
        nonlocal answered
        ledger.append(result)
        answered += 1
        progress(Stage.SCORING, answered, len(trial.cells))

    def show(waits: bool) -> None:  # noqa: FBT001 (the fleet's)
        progress(Stage.QUEUED if waits else Stage.SCORING, answered, len(trial.cells))

    if missing:
        fleet.score(job, missing, on_result=keep, on_wait=show)


def recheck_cells(trial: PreparedTrial, job: ScoringJob, *, ledger: Ledger, fleet: Fleet, progress: TrialProgress) -> JsonObject | None:
    """Answer some scored cells again in other shapes: how often the precision alone changes an answer, or its score.

    None where nothing is rechecked.
    """
    engine, model = trial.spec.engine, trial.spec.model
    if not isinstance(engine, HfEngineSpec):
        return None
    wanted = engine.recheck_cells
    if wanted is None:
        wanted = RECHECKED_CELLS if depends_on_shapes(dtype=model.dtype, quantize=model.quantize) else 0
    rows = {row.cell_id: row for row in ledger.rows() if row.score is not None}
    sample = sorted((cell for cell in trial.cells if cell.id in rows), key=lambda cell: cell.id)[:wanted]
    if not sample:
        return None

    def show(waits: bool) -> None:  # noqa: FBT001 (the fleet's)
        if waits:
            progress(Stage.QUEUED, len(rows), len(trial.cells))
        else:
            progress(Stage.RECHECKING, 0, len(sample))

    again = [result for result in fleet.answer_otherwise(job, sample, on_wait=show) if result.score is not None]
    if not again:
        return None
    return {
        "cells": len(again),
        "answers_changed": sum(result.response != rows[result.cell_id].response for result in again),
        "scores_changed": sum(result.score != rows[result.cell_id].score for result in again),
        "dtype": model.quantize or model.dtype,
    }


def _summary(
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
