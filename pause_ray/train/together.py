"""Several adapters from one training: one copy of the base weights, the rows of all side by side in each forward pass.

What comes out is what ``launch.fit`` makes of each job, within rounding, in the same places; and what was begun together goes on alone,
or the other way round, from the last checkpoint. Without DeepSpeed: it has no job where every worker holds all trained weights.
Starts Ray Train's workers as ``launch`` does; runs no model itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from pause_ray import errors
from pause_ray.checkpoint import STOP, TRAINING_LOG, Checkpoint, RunningTraining, training_folder
from pause_ray.errors import PauseRayError, SpecError, StoppedError, UserError
from pause_ray.rows import ShardSet
from pause_ray.spec import JsonObject
from pause_ray.storage import Storage, exclusive, is_complete, lock_of, read_json
from pause_ray.text.tokens import MarkerToken
from pause_ray.train.assignment import FAILED, Assignment
from pause_ray.train.launch import (
    Stage,
    TrainJob,
    check_job,
    check_workers,
    making,
    run_workers,
    stoppable,
    train_digest,
    wait_for,
)
from pause_ray.train.loop import check_side_by_side
from pause_ray.train.spec import TrainSpec
from pause_ray.train.training_log import following

TogetherProgress = Callable[[int, int, int, JsonObject], None]
"""Called with (number of the job, steps done, steps in all, that step's row of the training log), from threads of its own."""


def fit_together(
    jobs: Sequence[TrainJob],
    *,
    storage: Storage,
    num_workers: int | tuple[int, int],
    cpus_per_worker: float,
    gpus_per_worker: float,
    progress: TogetherProgress,
    stage: Stage | None = None,
    stop: threading.Event | None = None,
) -> list[Checkpoint | PauseRayError]:
    """Train several adapters at once, or find those that are finished; one that fails leaves the others alone.

    A forward pass holds ``train.batch_size`` rows of each, so memory grows with their number. SIGTERM or Ctrl-C, or ``stop``, makes a
    checkpoint of each after the running step and ends.

    Args:
        jobs: What to train; equal in base model, marker, precision, quantisation and gradient checkpointing.
        storage: Where the checkpoints go, each under its digest.
        num_workers: As in ``fit``.
        cpus_per_worker: As in ``fit``.
        gpus_per_worker: As in ``fit``.
        progress: Called for every optimizer step of every job, those that a checkpoint already has included.
        stage: As in ``fit``, of any of the jobs.
        stop: Asks the training to end, from another thread.

    Returns:
        For each job its checkpoint, or why there is none.

    Raises:
        SpecError: jobs that cannot be trained together, or rows that the workers cannot share.
        SourceError: a missing or damaged shard set.
        ModelError: a model folder that cannot be loaded.
        StorageError: disk full or not writable.
        StoppedError: SIGTERM or Ctrl-C came, or ``stop`` was set; checkpoints were written.
        TrainingError: workers were lost again and again.
    """
    check_jobs(jobs)
    for job in jobs:
        check_workers(job.train, num_workers)
    folders = [storage.checkpoints / train_digest(job) for job in jobs]
    if len(set(folders)) < len(folders):
        raise SpecError("two of the trainings are the same; leave one out")
    untold: list[Exception] = []
    with ExitStack() as held:
        for folder in sorted(folders):  # in one order everywhere, so that no two trainings wait for each other
            held.enter_context(exclusive(lock_of(folder), waiting=functools.partial(wait_for, stage=stage)))
        missing = {folder: index for index, folder in enumerate(folders) if not is_complete(folder)}
        if missing and stage is not None:
            stage("training")
        if missing and stop is not None and stop.is_set():
            raise StoppedError("training was asked to end before it began; the same command begins it")
        failures: dict[Path, PauseRayError] = {}
        with ExitStack() as made:
            assignments: dict[Path, Assignment] = {}
            for folder, index in missing.items():
                its = _making(jobs[index], folder, on_gpu=gpus_per_worker > 0 if num_workers else None)
                try:
                    assignments[folder] = made.enter_context(_unless_failed(its, folder, failures))
                except UserError as error:
                    failures[folder] = error
            with ExitStack() as watched:
                for folder, assignment in assignments.items():
                    tell = functools.partial(progress, missing[folder])
                    growing = assignment.folder / TRAINING_LOG
                    watched.enter_context(following(growing, steps=assignment.train.steps, progress=tell, failures=untold))
                watched.enter_context(stoppable([assignment.folder / STOP for assignment in assignments.values()], asked=stop))
                if assignments:
                    _run(
                        list(assignments.values()),
                        num_workers=num_workers,
                        cpus_per_worker=cpus_per_worker,
                        gpus_per_worker=gpus_per_worker,
                    )
            failures.update(_failures(assignments))
        for folder in set(folders) - set(failures):
            RunningTraining(folder=training_folder(folder), belongs_to={}).finish(keep_rungs=False)
        if untold:
            raise untold[0]
        return [failures.get(folder) or Checkpoint.open(folder) for folder in folders]


def check_jobs(jobs: Sequence[TrainJob]) -> None:
    """Refuse jobs that cannot be trained together.

    Raises:
        SpecError: one needs DeepSpeed, or they do not agree on the base model.
    """
    for job in jobs:
        check_side_by_side(job.train)
    frames = [frame(job.train, base_digest=job.base_digest, marker=job.marker) for job in jobs]
    for name, value in frames[0].items():
        others = [other[name] for other in frames if other[name] != value]
        if others:
            raise SpecError(f"{name} {value} and {others[0]} cannot be trained together on one base model; train them one after another")


def frame(train: TrainSpec, *, base_digest: str, marker: MarkerToken | None) -> JsonObject:
    """What trainings on one base have in common: everything that concerns the base model and how it is gone through."""
    return {
        "base model": base_digest,
        "marker": dataclasses.asdict(marker) if marker else None,
        "train.precision": train.precision,
        "train.quantize": train.quantize,
        "train.gradient_checkpointing": train.gradient_checkpointing,
    }


@contextlib.contextmanager
def _making(job: TrainJob, folder: Path, *, on_gpu: bool | None) -> Iterator[Assignment]:
    shards = ShardSet.open(job.shards)
    check_job(job, shards)
    with making(job, shards, folder=folder, on_gpu=on_gpu) as assignment:
        yield assignment


@contextlib.contextmanager
def _unless_failed(
    making: AbstractContextManager[Assignment], folder: Path, failures: Mapping[Path, PauseRayError]
) -> Iterator[Assignment]:
    """Let ``making`` make no checkpoint if ``failures`` has its folder at the end, and the other ones theirs."""
    try:
        with making as assignment:
            yield assignment
            if folder in failures:
                raise failures[folder]
    except PauseRayError as error:
        if failures.get(folder) is not error:
            raise


class _All:
    """Trainings as ``Recovery`` sees them: further if one of them is."""

    def __init__(self, assignments: Sequence[Assignment]) -> None:
        self._running = [assignment.running for assignment in assignments]

    def last_step(self) -> int:
        return sum(running.last_step() for running in self._running)


def _run(assignments: Sequence[Assignment], *, num_workers: int | tuple[int, int], cpus_per_worker: float, gpus_per_worker: float) -> None:
    run_workers(
        _train_on_worker,
        {"assignments": list(assignments)},
        running=_All(assignments),
        notes=assignments[0].folder,
        num_workers=num_workers,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
    )


def _train_on_worker(config: dict[str, Any]) -> None:
    """Import the model libraries where they are needed: in a worker's process, which this module's need not be."""
    from pause_ray.train.worker import train_side_by_side

    train_side_by_side(config)


def _failures(assignments: Mapping[Path, Assignment]) -> dict[Path, PauseRayError]:
    """What ended some trainings and not the others."""
    left = {folder: assignment.folder / FAILED for folder, assignment in assignments.items()}
    found: dict[Path, PauseRayError] = {}
    for folder, path in left.items():
        if path.exists():
            told = read_json(path)
            found[folder] = getattr(errors, told["error"])(told["message"])
    return found
