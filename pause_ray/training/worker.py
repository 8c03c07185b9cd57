"""Training function of every Ray Train worker: set up the process, start the engine, train, write the adapter.

A worker reads rows by itself, so it needs no dataset shard. The first worker writes adapter and training log into the given
folder; the launcher seals that folder.
"""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator
from typing import Any

import ray.train
import torch
import torch.distributed
from joblib import cpu_count

from pause_ray.core.storage import space_errors
from pause_ray.data.shards import ShardSet
from pause_ray.training import deepspeed
from pause_ray.training.attention import sequence_group
from pause_ray.training.batching import batch_layout
from pause_ray.training.loss import LossModel
from pause_ray.training.memory import resolve_stage
from pause_ray.training.metrics import known_shape
from pause_ray.training.model import load_trainable, write_adapter
from pause_ray.training.spec import WorkerConfig
from pause_ray.training.trainer import Trainer
from pause_ray.training.zero_config import deepspeed_config


def train_on_worker(config: dict[str, Any]) -> None:
    """Train from the last checkpoint on and write adapter and training log into the folder of ``WorkerConfig``.

    Args:
        config: ``{"worker": WorkerConfig}``; Ray Train passes it to every worker.

    Raises:
        TrainingError: loss, gradient or validation loss is not a number.
        StoppedError: asked to end; a checkpoint was written.
        StorageError: the disk is full.
        CheckpointError: the last checkpoint is damaged or of another training.
        SpecError, ModelError, SourceError: model, layers or rows that do not fit together.
    """
    settings: WorkerConfig = config["worker"]
    device = "cuda" if (torch.cuda.is_available() if settings.on_gpu is None else settings.on_gpu) else "cpu"
    deepspeed.prepare_process(device)
    with warnings.catch_warnings(), _threads(settings.job.threads), deepspeed.process_group(device):
        # Torch's collectives and transformers warn DeepSpeed of renamings, which concerns no reader of our output.
        warnings.simplefilter("ignore", FutureWarning)
        engine = _start_engine(settings, device=device)
        try:
            Trainer(engine, settings, loses_a_node=lambda: ray.train.get_preemption_info() is not None).run()
            trained = deepspeed.gather_weights(engine)
            if torch.distributed.get_rank() == 0:
                with space_errors(settings.folder):
                    write_adapter(engine.module.model, trained=trained, folder=settings.folder)
        finally:
            deepspeed.release(engine)
            del engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Compute with ``threads``, or with this machine's usable cores divided by its workers; Ray's default would be their reserved CPUs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _free_memory_bytes(device: str) -> int | None:
    """Return the free memory of the GPU that has least, so that all workers come to the same plan; None on a CPU."""
    if device == "cpu":
        return None
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)
    return int(free)


def _start_engine(settings: WorkerConfig, *, device: str) -> Any:
    job, train, num_workers = settings.job, settings.job.train, torch.distributed.get_world_size()
    deepspeed.check_machine(train, device=device)
    where = "cpu" if device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
    stage = resolve_stage(
        train,
        shape=known_shape(job.model_dir),
        workers=num_workers,
        memory_bytes=_free_memory_bytes(where),
        longest_row_tokens=ShardSet.open(job.shards).longest_row_tokens() if device == "cuda" else 0,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats(where)  # of a training before this one in the same process
    layout = batch_layout(train, num_workers=num_workers, even=False)
    adapted = load_trainable(train, model_dir=job.model_dir, marker=job.marker, seed=job.seed, device=where, stage=stage)
    model = LossModel(adapted, sequence_group=sequence_group(train.sequence_parallel))
    return deepspeed.start(model, deepspeed_config(train, layout=layout, stage=stage, world_size=num_workers))
