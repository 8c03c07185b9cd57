"""What every training worker runs: DeepSpeed around the trainable model, step by step, and the adapter at the end.

The function is Ray Train's; it knows its rank and reads rows by itself, so it needs no dataset shard. It writes the
adapter and the training log into the folder it is given; sealing that folder is the launcher's business.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed

from pause_ray.checkpoint import TRAINING_LOG
from pause_ray.errors import TrainingError
from pause_ray.rows import PackedRow, ShardSet
from pause_ray.storage import space_errors
from pause_ray.text.tokens import MarkerToken
from pause_ray.train.deepspeed_config import deepspeed_config
from pause_ray.train.loop import check_loss, collate, deal, learning_rate, num_labelled, rows_of_step, share
from pause_ray.train.model import load_trainable, summed_loss, write_adapter
from pause_ray.train.spec import TrainSpec


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """All that a worker needs; picklable, with paths that every node sees."""

    train: TrainSpec
    model_dir: Path
    shards: Path
    marker: MarkerToken | None
    seed: int
    threads: int | None
    on_gpu: bool | None
    """None: on the process's GPU if it has one."""
    folder: Path
    """Where rank 0 writes."""


def train_on_worker(config: dict[str, Any]) -> None:
    """Train and leave adapter and training log in the assignment's folder.

    Args:
        config: ``{"assignment": Assignment}``; Ray Train passes it to every worker.

    Raises:
        TrainingError: the loss is not a number.
        StorageError: the disk is full.
        SpecError, ModelError, SourceError: model, layers or rows that do not fit the assignment.
    """
    assignment: Assignment = config["assignment"]
    device = "cuda" if (torch.cuda.is_available() if assignment.on_gpu is None else assignment.on_gpu) else "cpu"
    _prepare_deepspeed(device)
    with warnings.catch_warnings(), _threads(assignment.threads), _process_group(device):
        # Torch's collectives and transformers announce renamings to DeepSpeed, and to no reader of our output.
        warnings.simplefilter("ignore", FutureWarning)
        engine = _start_engine(assignment, device=device)
        try:
            _run_steps(engine, assignment)
            trained = _gather_trained(engine)
            if ray.train.get_context().get_world_rank() == 0:
                with space_errors(assignment.folder):
                    write_adapter(engine.module, trained=trained, folder=assignment.folder)
        finally:
            _release(engine)
            del engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


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
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _process_group(device: str) -> Iterator[None]:
    """The process group that Ray Train made, or for training in this very process one of its own, gone afterwards.

    DeepSpeed caches groups per process, so its own teardown has to run or the next training here would use dead ones.
    ZeRO-3 also replaces ``torch.nn.functional.linear`` for good, which an engine in this process must not inherit.
    """
    if torch.distributed.is_initialized():
        yield
        return
    import deepspeed.comm

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


def _start_engine(assignment: Assignment, *, device: str) -> Any:
    import deepspeed

    context = ray.train.get_context()
    model = load_trainable(
        assignment.train,
        model_dir=assignment.model_dir,
        marker=assignment.marker,
        seed=assignment.seed,
        device="cpu" if device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}",
    )
    cut = share(assignment.train, num_workers=context.get_world_size())
    torch.manual_seed(assignment.seed + context.get_world_rank())  # dropout differs between workers
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=deepspeed_config(assignment.train, share=cut),
    )
    if assignment.train.zero.stage == 0:
        # Its bfloat16 wrapper allocates AdamW's state by a step with zero gradients, which counts as one in the bias
        # correction: the first real step would be 0.74 of its size. The state comes back by itself.
        engine.basic_optimizer.state.clear()
    return engine


def _run_steps(engine: Any, assignment: Assignment) -> None:
    """All optimizer steps; rank 0 appends one row per step to the training log, and every rank reports it to Ray Train."""
    train, context = assignment.train, ray.train.get_context()
    cut = share(train, num_workers=context.get_world_size())
    shards = ShardSet.open(assignment.shards)
    for step in range(train.steps):
        started = time.perf_counter()
        numbers = rows_of_step(step, num_rows=shards.num_rows, rows_per_step=cut.rows_per_step, seed=assignment.seed)
        rows = dict(zip(numbers, shards.rows(numbers), strict=True))
        passes = deal(
            numbers,
            lengths=[len(rows[number].input_ids) for number in numbers],
            micro_rows=cut.micro_rows,
            num_workers=context.get_world_size(),
        )[context.get_world_rank()]
        labelled = sum(num_labelled(rows[number]) for number in numbers)
        if not labelled:
            raise TrainingError(f"rows {numbers} of step {step + 1} have no token with a loss; look at the corpus in {assignment.shards}")
        rate = learning_rate(step, train)
        loss = _step(
            engine, [[(number, rows[number]) for number in numbers] for numbers in passes], step=step, labelled=labelled, rate=rate
        )
        record = {
            "step": step + 1,
            "loss": loss,
            "learning_rate": rate,
            "tokens": sum(len(rows[number].input_ids) for number in numbers),
            "labelled_tokens": labelled,
            "seconds": round(time.perf_counter() - started, 3),
        }
        if context.get_world_rank() == 0:
            path = assignment.folder / TRAINING_LOG
            with space_errors(path), path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        ray.train.report({"step": step + 1, "loss": loss})


def _step(engine: Any, passes: list[list[tuple[int, PackedRow]]], *, step: int, labelled: int, rate: float) -> float:
    """One optimizer step on this worker's share; returns the mean loss per labelled token of the whole step.

    DeepSpeed averages gradients over passes and workers. Scaling each pass's summed loss by their number and dividing
    by the step's labelled tokens makes the gradient that of the mean over all labelled tokens, however they are cut up.
    """
    world_size = torch.distributed.get_world_size()
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for rows in passes:
        loss = summed_loss(engine, collate([row for _, row in rows]), device=str(engine.device))
        check_loss(loss.item(), step=step, rows=[number for number, _ in rows])
        engine.backward(loss * (len(passes) * world_size / labelled))
        engine.step()
        total += loss.detach()
    if engine.skipped_steps:
        numbers = [number for rows in passes for number, _ in rows]
        raise TrainingError(f"gradient is not a number at step {step + 1}, among rows {numbers}; lower train.learning_rate")
    torch.distributed.all_reduce(total)
    return total.item() / labelled


def _gather_trained(engine: Any) -> dict[str, torch.Tensor]:
    """Every trained parameter, whole and on the CPU. All ranks must call it: under ZeRO-3 each holds a part only."""
    import deepspeed

    trained = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
