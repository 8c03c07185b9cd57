"""Shards → checkpoint: starts Ray Train's workers, follows the training log, seals what they leave. Runs no model itself."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pause_ray.checkpoint import TRAINING_LOG, Checkpoint, copy_tokenizer, read_training_log, seal
from pause_ray.errors import PauseRayError, TrainingError
from pause_ray.rows import ShardSet
from pause_ray.spec import JsonObject, digest
from pause_ray.storage import Storage, building, exclusive, is_complete, lock_of
from pause_ray.text.tokens import MarkerToken, ModelTokenizer
from pause_ray.train.loop import share
from pause_ray.train.spec import TrainSpec

FORMAT = 2
"""Part of the digest; raised when the same job begins to give another adapter."""
POLL_SECONDS = 0.5
"""Between two looks at the training log; a step takes seconds."""
RAY_FOLDER = "ray"
"""Ray Train's own notes inside the scratch folder, removed with it: the checkpoint is what must survive."""
Progress = Callable[[int, int, JsonObject], None]
"""Called with (steps done, steps in all, that step's row of the training log), from a thread of its own."""
log = logging.getLogger("pause_ray")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that decides an adapter, and how many threads may compute it."""

    train: TrainSpec
    model_dir: Path
    """Base model: config.json, tokenizer.json, *.safetensors."""
    base_digest: str
    """``model_digest`` of that folder."""
    shards: Path
    """Folder of a complete shard set."""
    marker: MarkerToken | None
    """Whose embedding row is trained, or None."""
    policy: JsonObject | None
    """The resolved pause policy of the shards, for the record; None without pauses."""
    seed: int
    """Of row order and of the adapter's first values."""
    threads: int | None
    """Threads of one worker on a CPU; None leaves torch's default."""


def train_digest(job: TrainJob) -> str:
    """Identity of the adapter: what is trained on what, with which seed; not where.

    Raises:
        SourceError: the shard set is missing or damaged.
    """
    shards = [entry["sha256"] for entry in ShardSet.open(job.shards).manifest["shards"]]
    marker = dataclasses.asdict(job.marker) if job.marker else None
    return digest([FORMAT, job.train.identity(), job.base_digest, shards, marker, job.seed])


def fit(
    job: TrainJob,
    *,
    storage: Storage,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    progress: Progress,
) -> Checkpoint:
    """Train, or find the finished checkpoint of the same job; a killed training leaves nothing and starts anew.

    Args:
        job: What to train.
        storage: Where the checkpoint goes, under its digest.
        num_workers: Ray Train workers; 0 trains in this process, on its GPU if it has one, without starting Ray.
        cpus_per_worker: Logical CPUs of each worker.
        gpus_per_worker: GPUs of each worker; 0 trains on the CPU.
        progress: Called for every optimizer step.

    Raises:
        SpecError: rows per step that the workers cannot share, or layers that the model lacks.
        SourceError: a missing or damaged shard set.
        ModelError: a model folder that cannot be loaded.
        CheckpointError: a finished checkpoint whose files were changed.
        StorageError: disk full or not writable.
        TrainingError: the loss is not a number, or a worker was lost.
    """
    share(job.train, num_workers=max(1, num_workers))
    folder = storage.checkpoints / train_digest(job)
    with exclusive(lock_of(folder), waiting=lambda holder: log.info("waiting for %s, which trains the same adapter", holder)):
        if not is_complete(folder):
            tokenizer_digest = ModelTokenizer.load(job.model_dir).digest
            with building(folder) as scratch:
                copy_tokenizer(job.model_dir, scratch, marker=job.marker)
                with _following(scratch / TRAINING_LOG, steps=job.train.steps, progress=progress):
                    _run(job, scratch, num_workers=num_workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker)
                shutil.rmtree(scratch / RAY_FOLDER, ignore_errors=True)
                seal(
                    scratch,
                    base_digest=job.base_digest,
                    tokenizer_digest=tokenizer_digest,
                    marker=job.marker,
                    spec={"train": job.train.resolved(), "pauses": job.policy, "shards": job.shards.name, "seed": job.seed},
                    document_digests=ShardSet.open(job.shards).document_digests(),
                )
        return Checkpoint.open(folder)


def _run(job: TrainJob, folder: Path, *, num_workers: int, cpus_per_worker: float, gpus_per_worker: float) -> None:
    """Let Ray Train run the worker function until adapter and log lie in ``folder``."""
    for noisy in ("ray.train", "bitsandbytes"):  # a line per report; a note on a kernel that only 4-bit models use
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import ray.train
    from ray.train.torch import TorchTrainer

    from pause_ray.train.worker import Assignment, train_on_worker

    assignment = Assignment(
        train=job.train,
        model_dir=job.model_dir.absolute(),
        shards=job.shards.absolute(),
        marker=job.marker,
        seed=job.seed,
        threads=job.threads,
        on_gpu=gpus_per_worker > 0 if num_workers else None,
        folder=folder.absolute(),
    )
    resources: dict[str, float] = {"CPU": cpus_per_worker} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"assignment": assignment},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources if num_workers else None
        ),
        run_config=ray.train.RunConfig(name=RAY_FOLDER, storage_path=str(folder.absolute())),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error


def _cause(error: Exception) -> Exception:
    """What a worker raised, where it is an error of ours or of the disk; otherwise a ``TrainingError`` with Ray Train's account."""
    for failure in getattr(error, "worker_failures", {}).values():
        raised = getattr(failure, "_base_exc", failure)
        if isinstance(raised, PauseRayError | OSError):
            return raised
    return TrainingError(f"Ray Train gave up: {error}")


@contextlib.contextmanager
def _following(path: Path, *, steps: int, progress: Progress) -> Iterator[None]:
    """Pass each row of a growing training log to ``progress``: the same way for one process and for workers elsewhere."""
    ended = threading.Event()
    failures: list[Exception] = []

    def follow() -> None:
        told = 0
        while True:
            last_look = ended.wait(POLL_SECONDS)
            for row in read_training_log(path)[told:]:
                progress(row["step"], steps, row)
                told += 1
            if last_look:
                return

    def guarded() -> None:
        try:
            follow()
        except Exception as error:  # noqa: BLE001 (a thread's border: raised again below)
            failures.append(error)

    thread = threading.Thread(target=guarded, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]
