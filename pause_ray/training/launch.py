"""Shards → checkpoint: starts Ray Train's workers, follows the training log, seals what they leave. Runs no model itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.train

from pause_ray.core.errors import PauseRayError, SpecError, StoppedError, TrainingError
from pause_ray.core.process import Stage, stop_on_signal
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import Storage, building, exclusive, is_complete, lock_of
from pause_ray.data.shards import ShardSet
from pause_ray.models.checkpoint import (
    STOP,
    TRAINING_LOG,
    Checkpoint,
    RunningTraining,
    copy_tokenizer,
    partial_folder,
    remove_training,
    seal,
    training_folder,
)
from pause_ray.models.shape import ModelShape
from pause_ray.models.sources import row_limit_tokens
from pause_ray.text.tokenizer import ModelTokenizer
from pause_ray.training.batching import batch_layout, check_corpus, check_heads
from pause_ray.training.metrics import Progress, following
from pause_ray.training.spec import FORMAT, TrainJob, TrainSpec, WorkerConfig

FRUITLESS_ATTEMPTS = 3
"""Attempts in a row that were lost without a new checkpoint, after which training gives up."""


class Recovery(ray.train.UserCallback):  # type: ignore[misc]
    """Lives in Ray Train's controller; an exception that it raises ends the training, otherwise the workers are started again."""

    def __init__(self, running: RunningTraining) -> None:
        """Watch the training whose checkpoints ``running`` holds."""
        self._running = running
        self._last_step: int | None = None
        self._fruitless = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Decide after workers have failed.

        Raises:
            Exception: what a worker raised, where trying again would raise it again.
            TrainingError: workers were lost too often without getting further.
        """
        for failure in worker_exceptions.values():
            if isinstance(failure, PauseRayError) or not _may_be_the_machine(failure):
                raise failure
        lost = [getattr(failure, "health_check_failure", failure) for failure in worker_exceptions.values()]
        if any(getattr(failure, "preempted", False) for failure in lost):
            return  # announced, and reported again until the node is gone
        step = self._running.last_step()
        self._fruitless = 1 if step != self._last_step else self._fruitless + 1
        self._last_step = step
        if self._fruitless >= FRUITLESS_ATTEMPTS:
            reasons = {rank: (str(failure).strip() or repr(failure)).splitlines()[-1] for rank, failure in worker_exceptions.items()}
            listed = "; ".join(f"worker {rank}: {reason}" for rank, reason in reasons.items())
            raise TrainingError(
                f"workers were lost {self._fruitless} times in a row after step {step} ({listed}); look at their nodes, "
                "give them more memory, or set train.checkpoint_every to fewer steps; the same command goes on"
            )


def cause_of(error: Exception) -> Exception:
    """Return the error of a worker or of ``Recovery`` if it is this package's or the disk's; else a ``TrainingError``."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in failures:
        raised = getattr(failure, "_base_exc", failure)
        if isinstance(raised, ray.train.TrainingFailedError):
            return cause_of(raised)
        if isinstance(raised, PauseRayError | OSError):
            return raised
    return TrainingError(f"Ray Train gave up: {error}")


def _may_be_the_machine(failure: Exception) -> bool:
    """Return whether a failure is a lost worker (an exception of Ray), or an unreachable peer or broken GPU (torch's RuntimeError)."""
    return isinstance(failure, RuntimeError) or type(failure).__module__.startswith("ray.")


RAY_FOLDER = "ray"
"""Ray Train's own notes inside the scratch folder, removed with it: the checkpoint is what must survive."""
StageCallback = Callable[[Stage], None]
"""Called with ``WAITING`` before the call waits for another process that trains the same adapter, and with ``TRAINING`` when it trains."""
log = logging.getLogger("pause_ray")


def train_digest(job: TrainJob) -> str:
    """Return the adapter's identity: a digest of the job without places and threads.

    Raises:
        SourceError: the shard set is missing or damaged.
    """
    return _digest(_identity(job, ShardSet.open(job.shards)))


def steps_on_storage(job: TrainJob, *, storage: Storage) -> int:
    """Return the optimizer steps that ``fit`` finds on storage: all of a finished adapter's, else those of its last checkpoint.

    Raises:
        SourceError: as for ``train_digest``.
    """
    folder = storage.checkpoints / train_digest(job)
    if is_complete(folder):
        return job.train.max_steps
    return RunningTraining(folder=training_folder(folder), belongs_to={}).last_step()


def _digest(identity: JsonObject) -> str:
    return digest([FORMAT, *identity.values()])


def _identity(job: TrainJob, shards: ShardSet) -> JsonObject:
    """Return everything that decides the adapter as plain JSON data."""
    rows = [entry["sha256"] for entry in shards.manifest["shards"]]
    marker = dataclasses.asdict(job.marker) if job.marker else None
    identity = {"train": job.train.identity(), "model": job.base_digest, "shards": rows, "marker": marker, "seed": job.seed}
    plain: JsonObject = json.loads(json.dumps(identity))
    return plain


def fit(
    job: TrainJob,
    *,
    storage: Storage,
    num_workers: int | tuple[int, int],
    cpus_per_worker: float,
    gpus_per_worker: float,
    progress: Progress,
    stage: StageCallback | None = None,
    until: int | None = None,
) -> Checkpoint:
    """Train, continue a training that was stopped, or find the finished checkpoint of the same job.

    SIGTERM, Ctrl-C or a ``StoppedError`` of ``progress`` makes it write a checkpoint after the running step and end. A finished
    training's own checkpoints are removed.

    Args:
        job: What to train.
        storage: Where the checkpoint goes, under its digest.
        num_workers: Ray Train workers, or their smallest and largest number; 0 trains in this process without Ray.
        cpus_per_worker: Logical CPUs of each worker.
        gpus_per_worker: GPUs of each worker; 0 trains on the CPU.
        progress: Called for every optimizer step, those that a checkpoint already has included.
        stage: Called when the training begins or waits for another process that makes the same adapter.
        until: Optimizer steps after which the adapter of that step is returned (see ``_goal``); None trains to the end.

    Raises:
        SpecError: the workers cannot share the rows of a step, the model lacks layers, or the rows are too few or too long.
        SourceError, ModelError, StorageError: the shards, the model folder or the disk cannot be used.
        CheckpointError: a checkpoint's files were changed, or it is of another training.
        StoppedError: the training was interrupted, and a checkpoint was written; or ``stage`` raised it.
        TrainingError: loss, gradient or validation loss is not a number, or workers were lost again and again.
    """
    _check_workers(job.train, num_workers)
    shards = ShardSet.open(job.shards)
    whole = storage.checkpoints / _digest(_identity(job, shards))
    with exclusive(lock_of(whole), waiting=functools.partial(_wait_for, stage=stage)):
        reports = None
        steps, folder = _goal(job, whole, until=until)
        if not is_complete(folder):
            if stage is not None:
                stage(Stage.TRAINING)
            scaling = _scaling(num_workers, cpus=cpus_per_worker, gpus=gpus_per_worker)
            reports = _train(job, shards, whole=whole, folder=folder, until=steps, progress=progress, scaling=scaling)
        if folder == whole:
            remove_training(whole)  # also the remains of a training that was killed before this line
        if reports is not None:
            reports.result()
        return Checkpoint.open(folder)


def _train(
    job: TrainJob,
    shards: ShardSet,
    *,
    whole: Path,
    folder: Path,
    until: int,
    progress: Progress,
    scaling: ray.train.ScalingConfig,
) -> Future[None]:
    """Make and seal the checkpoint ``folder``: ``whole``, or that of the adapter after ``until`` steps.

    The result raises what ``progress`` raised meanwhile, unless that was a ``StoppedError``.
    """
    _check_job(job, shards)
    tokenizer_digest = ModelTokenizer.load(job.model_dir).digest
    belongs_to = _identity(job, shards) | {"tokenizer": tokenizer_digest}
    running = RunningTraining(folder=training_folder(whole).absolute(), belongs_to=belongs_to)
    saved = running.latest()
    if saved:
        log.info("resuming after step %d of %d, from %s", saved.step, job.train.max_steps, saved.folder)
    with building(folder) as scratch:
        copy_tokenizer(job.model_dir, scratch, marker=job.marker)
        config = WorkerConfig(
            job=dataclasses.replace(job, model_dir=job.model_dir.absolute(), shards=job.shards.absolute()),
            on_gpu=scaling.use_gpu if scaling.num_workers else None,
            folder=scratch.absolute(),
            running=running,
            until=until,
        )
        with (
            _stoppable(config.folder / STOP, progress) as report,
            following(config.folder / TRAINING_LOG, steps=job.train.max_steps, progress=report) as reports,
        ):
            run_workers(config, scaling=scaling)
        shutil.rmtree(scratch / RAY_FOLDER, ignore_errors=True)
        (scratch / STOP).unlink(missing_ok=True)
        seal(
            scratch,
            base_digest=job.base_digest,
            tokenizer_digest=tokenizer_digest,
            marker=job.marker,
            spec={"train": job.train.resolved(), "pauses": job.policy, "shards": job.shards.name, "seed": job.seed},
            document_digests=shards.document_digests(),
        )
    return reports


def _scaling(num_workers: int | tuple[int, int], *, cpus: float, gpus: float) -> ray.train.ScalingConfig:
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return ray.train.ScalingConfig(num_workers=num_workers, use_gpu=gpus > 0, resources_per_worker=resources if num_workers else None)


def _goal(job: TrainJob, whole: Path, *, until: int | None) -> tuple[int, Path]:
    """Return the steps that ``fit`` trains up to and the folder of the adapter after them; ``whole`` is that of the finished training.

    With ``until`` the training's checkpoint is written, too, and the adapter exists until the training is finished. A training that has
    gone further already gives the adapter of its last checkpoint.
    """
    done = RunningTraining(folder=training_folder(whole), belongs_to={}).last_step()
    steps = job.train.max_steps if until is None else min(max(until, done), job.train.max_steps)
    is_partial = steps < job.train.max_steps and not is_complete(whole)
    return steps, partial_folder(whole, step=steps) if is_partial else whole


def _wait_for(holder: str, *, stage: StageCallback | None) -> None:
    """Say that ``holder`` trains the same adapter, before it is waited for."""
    log.info("waiting for %s, which trains the same adapter", holder)
    if stage is not None:
        stage(Stage.WAITING)


def _check_job(job: TrainJob, shards: ShardSet) -> None:
    """Refuse a corpus or a number of sharers that does not fit the model, before anything starts."""
    check_corpus(
        job.train,
        num_rows=shards.num_rows,
        longest_row_tokens=shards.longest_row_tokens(),
        limit_tokens=row_limit_tokens(job.model_dir),
    )
    if job.train.sequence_parallel > 1:
        check_heads(job.train, num_heads=ModelShape.load(job.model_dir).num_heads)


def _check_workers(train: TrainSpec, num_workers: int | tuple[int, int]) -> None:
    """Refuse what only shows when workers have started.

    Raises:
        SpecError: rows that do not go round, or elastic workers that would start over or could not form groups.
    """
    if isinstance(num_workers, int):
        batch_layout(train, num_workers=max(1, num_workers))
        return
    fewest, most = num_workers
    if train.checkpoint_every is None:
        raise SpecError(
            f"{fewest} to {most} workers start again whenever their number changes; set train.checkpoint_every, or they begin at step 1"
        )
    if train.sequence_parallel > 1:
        raise SpecError(f"train.sequence_parallel {train.sequence_parallel} needs full groups; give a fixed number of workers")
    if most > train.rows_per_step:
        raise SpecError(f"{most} workers, but only {train.rows_per_step} rows per step; allow fewer workers")


def run_workers(config: WorkerConfig, *, scaling: ray.train.ScalingConfig) -> None:
    """Let Ray Train run ``train_on_worker`` on every worker, again and again as long as ``Recovery`` permits it."""
    for noisy in ("ray.train", "bitsandbytes"):  # a line per report; a note on a kernel that only 4-bit models use
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"worker": config},
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=RAY_FOLDER,
            storage_path=str(config.folder),
            failure_config=ray.train.FailureConfig(max_failures=-1),  # Recovery decides
            callbacks=[Recovery(config.running)],
        ),
    )
    # Ray Train 2.60 would answer Ctrl-C by sys.exit, now and for as long as the process lives; it is ours to answer (_stoppable).
    trainer._register_sigint_handler = lambda controller: None
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise cause_of(error) from error


def _train_on_worker(config: dict[str, Any]) -> None:
    """Import the model libraries where they are needed: in a worker's process, which this module's need not be."""
    from pause_ray.training.worker import train_on_worker

    train_on_worker(config)


@contextlib.contextmanager
def _stoppable(stop: Path, progress: Progress) -> Iterator[Progress]:
    """Yield ``progress`` so that its ``StoppedError`` creates the file ``stop``, as a first SIGTERM or Ctrl-C within the block does."""

    def ask() -> None:
        if not stop.exists():
            stop.touch()
            log.info("writing a checkpoint after the running step, then stopping; once more stops at once")

    def report(done: int, total: int, row: JsonObject) -> None:
        try:
            progress(done, total, row)
        except StoppedError:
            ask()

    with stop_on_signal(ask):
        yield report
