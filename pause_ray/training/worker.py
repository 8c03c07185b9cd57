"""What every training worker runs: a process set up for DeepSpeed, the engine, its steps, and the adapter at the end.

The function is Ray Train's; the worker reads rows by itself, so it needs no dataset shard. The first worker writes the
adapter and the training log into the folder it is given; sealing that folder is the launcher's business.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import ray.train
import torch
import torch.distributed
from joblib import cpu_count

from pause_ray.core.errors import SpecError
from pause_ray.core.storage import building, is_complete, space_errors
from pause_ray.data.shards import ShardSet
from pause_ray.models.checkpoint import TRAINING_LOG, copy_tokenizer, rung_folder, seal
from pause_ray.training import deepspeed
from pause_ray.training.attention import sequence_group
from pause_ray.training.batching import batch_layout
from pause_ray.training.loss import LossModel
from pause_ray.training.memory import resolve_stage
from pause_ray.training.metrics import known_shape
from pause_ray.training.model import load_trainable, write_adapter
from pause_ray.training.spec import TrainSpec, WorkerConfig
from pause_ray.training.trainer import Trainer
from pause_ray.training.zero_config import deepspeed_config


def train_on_worker(config: dict[str, Any]) -> None:
    """Train from the last checkpoint on and leave adapter and training log in the folder of ``WorkerConfig``.

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
    _prepare_deepspeed(device)
    with warnings.catch_warnings(), _threads(settings.threads), _process_group(device):
        # Torch's collectives and transformers announce renamings to DeepSpeed, and to no reader of our output.
        warnings.simplefilter("ignore", FutureWarning)
        engine = _start_engine(settings, device=device)
        try:
            write_rung = functools.partial(_write_rung, engine, settings)
            Trainer(engine, settings, loses_a_node=_loses_a_node, write_rung=write_rung).run()
            del write_rung
            trained = deepspeed.gather_weights(engine)
            if torch.distributed.get_rank() == 0:
                with space_errors(settings.folder):
                    write_adapter(engine.module.model, trained=trained, folder=settings.folder)
        finally:
            _release(engine)
            del engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _write_rung(engine: Any, settings: WorkerConfig, step: int) -> None:
    """Leave the adapter as it is now beside the training's own checkpoints, unless an earlier attempt has left it; on all workers."""
    trained = deepspeed.gather_weights(engine)
    folder = rung_folder(settings.running.folder, step=step)
    if torch.distributed.get_rank() != 0 or settings.rungs is None or is_complete(folder):
        return
    with building(folder) as scratch:
        copy_tokenizer(settings.model_dir, scratch, marker=settings.marker)
        write_adapter(engine.module.model, trained=trained, folder=scratch)
        shutil.copyfile(settings.folder / TRAINING_LOG, scratch / TRAINING_LOG)
        seal(
            scratch,
            base_digest=settings.rungs.base_digest,
            tokenizer_digest=settings.rungs.tokenizer_digest,
            marker=settings.marker,
            spec=settings.rungs.spec,
            document_digests=ShardSet.open(settings.shards).document_digests(),
        )


def _loses_a_node() -> bool:
    return ray.train.get_preemption_info() is not None


def _release(engine: Any) -> None:
    """Give the weights' memory back: ZeRO-3's backward hooks keep the model alive for as long as the process lives."""
    masters = [master for group in engine.basic_optimizer.param_groups for master in group["params"]]
    parameters = [*engine.module.parameters(), *masters]
    engine.basic_optimizer.state.clear()
    engine.destroy()
    for parameter in parameters:
        parameter.grad = None
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = torch.empty(0, dtype=parameter.dtype)


def _prepare_deepspeed(device: str) -> None:
    """Settings that DeepSpeed reads when it is first used in a process: the accelerator, its log level, no compiling.

    On a CPU it would spend half a minute of g++ and ninja on a shared-memory op that only its inference uses; an empty
    table of compatible ops skips that.
    """
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or _share_of_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _share_of_cores() -> int:
    """Cores that may be used here, divided among the workers here; Ray would have them compute with as many as they hold logical CPUs."""
    cores: int = cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def _process_group(device: str) -> Iterator[None]:
    """The process group that Ray Train made, or for training in this very process one of its own, gone afterwards.

    DeepSpeed caches groups per process, so its own teardown has to run or the next training here would use dead ones.
    ZeRO-3 also replaces ``torch.nn.functional.linear`` for good, which an engine in this process must not inherit.
    """
    import deepspeed.comm

    if torch.distributed.is_initialized():
        deepspeed.comm.init_distributed(verbose=False)
        yield
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = "0"
    linear = torch.nn.functional.linear
    try:
        deepspeed.comm.init_distributed(verbose=False)
        yield
    finally:
        torch.nn.functional.linear = linear
        deepspeed.comm.destroy_process_group()
        del os.environ["LOCAL_RANK"]


def _free_memory_bytes(device: str) -> int | None:
    """Of the worker whose GPU has least, so that all come to the same plan; None on a CPU."""
    if device == "cpu":
        return None
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MIN)
    return int(free)


def _check_nvme(train: TrainSpec) -> None:
    """Refuse an offload to NVMe before a model is loaded for it.

    Raises:
        SpecError: DeepSpeed's asynchronous input and output cannot be built or used here.
    """
    if "nvme" not in (train.zero.offload_optimizer, train.zero.offload_parameters):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise SpecError(
            "train.zero: offload to nvme needs DeepSpeed's async_io, which does not work on this machine; "
            "install libaio with its headers and a C++ compiler on every node, or offload to cpu"
        )


def _start_engine(settings: WorkerConfig, *, device: str) -> Any:
    import deepspeed

    if settings.train.precision == "float16" and not deepspeed.get_accelerator().is_fp16_supported():
        raise SpecError(f"train.precision float16: this {device} does not compute in it; use bfloat16 or float32")
    _check_nvme(settings.train)
    train, num_workers = settings.train, torch.distributed.get_world_size()
    where = "cpu" if device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
    stage = resolve_stage(
        train,
        shape=known_shape(settings.model_dir),
        workers=num_workers,
        memory_bytes=_free_memory_bytes(where),
        longest_row_tokens=ShardSet.open(settings.shards).longest_row_tokens() if device == "cuda" else 0,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats(where)  # of a training before this one in the same process
    layout = batch_layout(train, num_workers=num_workers, even=False)
    adapted = load_trainable(
        train,
        model_dir=settings.model_dir,
        marker=settings.marker,
        seed=settings.seed,
        device=where,
        stage=stage,
    )
    model = LossModel(adapted, sequence_group=sequence_group(train.sequence_parallel))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=deepspeed_config(train, layout=layout, stage=stage, world_size=num_workers),
    )
    if stage == 0:
        # Its bfloat16 wrapper allocates AdamW's state by a step with zero gradients, which counts as one in the bias
        # correction: the first real step would be 0.74 of its size. The state comes back by itself.
        engine.basic_optimizer.state.clear()
    return engine
