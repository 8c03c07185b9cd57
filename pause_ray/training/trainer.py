"""The training loop of one worker: optimizer steps, validation, training log, checkpoints.

Everything that a step does follows from (spec, seed, step), so a training that resumes from a checkpoint takes the same steps as
an uninterrupted one. Knows DeepSpeed's engine and torch's process group; knows no Ray and starts no process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed

from pause_ray.core.errors import StoppedError, TrainingError
from pause_ray.core.spec import JsonObject
from pause_ray.data.shards import PackedRow, ShardSet
from pause_ray.models.checkpoint import STOP, TRAINING_LOG
from pause_ray.training import deepspeed, metrics
from pause_ray.training.batching import IDLE, GlobalBatch, batch_layout, collate, learning_rate, num_loss_tokens
from pause_ray.training.distributed import WorkerGroup
from pause_ray.training.loss import tensors
from pause_ray.training.metrics import TrainingLogWriter
from pause_ray.training.spec import WorkerConfig

NODE_CHECK_SECONDS = 5.0
"""Time between two checks for a node that goes away, which all workers must make together; Ray itself checks as often."""


class Trainer:
    """The training loop. Every worker has one, and all workers call the same methods in the same order."""

    def __init__(self, engine: Any, config: WorkerConfig, *, loses_a_node: Callable[[], bool]) -> None:
        """Prepare the loop around DeepSpeed's engine of a ``LossModel``, just started.

        ``loses_a_node`` returns whether a node with workers on it is about to go away; all workers call it together.
        """
        self._engine = engine
        self._config = config
        self._train = config.job.train
        self._workers = workers = WorkerGroup(engine.device)
        self._loses_a_node, self._nodes_checked = loses_a_node, time.monotonic()
        self._layout = batch_layout(self._train, num_workers=workers.size, even=False)
        self._group, self._part = self._layout.place(workers.rank)
        self._shards = ShardSet.open(config.job.shards)
        self._shape = metrics.known_shape(config.job.model_dir)
        self._log = TrainingLogWriter(config.folder / TRAINING_LOG, writes=workers.rank == 0)

    def run(self) -> None:
        """Take the steps up to ``WorkerConfig.until`` that the last checkpoint lacks.

        Raises:
            TrainingError: loss, gradient or validation loss is not a number; the last checkpoint stays.
            StoppedError: asked to end; a checkpoint was written.
            CheckpointError: the last checkpoint is damaged or of another training.
            StorageError: the disk is full; the last checkpoint stays.
        """
        for step in range(self._resume(), self._config.until):
            record = self._step(step)
            done = step + 1
            if done == self._train.max_steps or (self._train.validate_every and done % self._train.validate_every == 0):
                record |= self._validate(step)
            self._log.append(record)
            stop, node_goes = self._requests()
            due = self._train.checkpoint_every is not None and done % self._train.checkpoint_every == 0
            if done < self._train.max_steps and (due or stop or node_goes or done == self._config.until):
                self._save(done)
                if stop:
                    raise StoppedError(
                        f"training was asked to end after step {done} of {self._train.max_steps}; the same command goes on there"
                    )

    def _requests(self) -> tuple[bool, bool]:
        """Return whether to end after a checkpoint, and whether one is due because a node goes away; the same on all workers."""
        stop, check_nodes = False, False
        if self._workers.rank == 0:
            stop = (self._config.folder / STOP).exists()
            check_nodes = time.monotonic() - self._nodes_checked >= NODE_CHECK_SECONDS
        code = int(self._workers.maximum(2 * stop + check_nodes))
        if not code % 2:
            return code >= 2, False
        self._nodes_checked = time.monotonic()
        return code >= 2, self._loses_a_node()

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one, and return the number of steps done."""
        saved = self._workers.from_first_worker(self._config.running.latest)
        if saved is not None:
            whole = deepspeed.read_tensors(saved.tensors, self._engine)
            deepspeed.restore(self._engine, whole, state=saved.facts)
        self._log.begin(saved.log_rows() if saved else [])
        return saved.step if saved else 0

    def _save(self, done: int) -> None:
        """Write a checkpoint and wait until it is complete."""
        whole = deepspeed.gather(self._engine) if deepspeed.applied_steps(self._engine) else {}
        if whole:
            self._config.running.save(
                done,
                write_tensors=lambda path: deepspeed.write_tensors(path, whole),
                log_rows=self._log.rows,
                facts=deepspeed.step_state(self._engine),
                keep_last=self._train.keep_checkpoints,
            )
        torch.distributed.barrier()

    def _step(self, step: int) -> JsonObject:
        """Take one optimizer step, all workers together; returns its row of the training log.

        DeepSpeed averages gradients over passes and workers. Scaling each pass's summed loss by their number and dividing
        by the step's loss tokens makes the gradient that of the mean over all of these, however the rows are divided.
        """
        started = time.perf_counter()
        batch = GlobalBatch.read(self._shards, step, layout=self._layout, seed=self._config.job.seed)
        rate = learning_rate(step, self._train)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        # Dropout follows from the step, so no random state is saved in checkpoints.
        dropout = np.random.SeedSequence([self._config.job.seed, step, self._workers.rank])
        torch.manual_seed(int(dropout.generate_state(1, np.uint64)[0]))
        passes, losses = batch.passes[self._group], list[torch.Tensor]()
        total = norm = math.nan
        for index, numbers in enumerate(passes):
            loss = self._loss([batch.rows[number] for number in numbers])
            losses.append(loss.detach())
            last = index == len(passes) - 1
            if last:
                total = self._total_loss(losses, passes, step=step)
            # DeepSpeed 0.19.8 divides by float16's loss scale at every stage, but multiplies with it under ZeRO only.
            scale = len(passes) * self._workers.size * deepspeed.unapplied_scale(self._engine)
            self._engine.backward(loss * (scale / batch.loss_tokens))
            norm = self._optimize(step, batch.numbers, last=last)
        seconds = time.perf_counter() - started
        return self._record(step, batch, loss=total / batch.loss_tokens, rate=rate, norm=norm, seconds=seconds)

    def _record(self, step: int, batch: GlobalBatch, *, loss: float, rate: float, norm: float, seconds: float) -> JsonObject:
        """Return the step's row of the training log."""
        device, workers, shape, mfu = self._engine.device, self._workers, self._shape, None
        if device.type == "cuda" and shape is not None:
            flops = metrics.step_flops(shape, document_tokens=batch.document_tokens, loss_tokens=batch.loss_tokens)
            name = torch.cuda.get_device_name(device)
            mfu = metrics.model_flops_utilization(flops, seconds=seconds, device_name=name, workers=workers.size)
        record = metrics.step_record(
            step=step + 1,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=batch.tokens,
            loss_tokens=batch.loss_tokens,
            computed_tokens=batch.computed_tokens(parts=self._layout.sequence_parallel),
            seconds=seconds,
            peak_memory_bytes=int(workers.maximum(metrics.peak_memory_bytes(str(device)))),
            mfu=mfu,
        )
        return record | ({"skipped_steps": self._engine.skipped_steps} if self._engine.skipped_steps else {})

    def _loss(self, rows: Sequence[PackedRow]) -> torch.Tensor:
        """Return the loss of this worker's part of ``rows``, summed over tokens."""
        part = collate(rows).part(self._part, of=self._layout.sequence_parallel)
        loss: torch.Tensor = self._engine(**tensors(part, device=self._engine.device))
        return loss

    def _total_loss(self, losses: list[torch.Tensor], passes: Sequence[Sequence[int]], *, step: int) -> float:
        """Return the step's loss summed over all workers, before the optimizer changes the weights.

        Raises:
            TrainingError: the sum is not a number; raised on every worker, with the rows of the passes that made it so.
        """
        total = torch.stack(losses).double().sum()
        torch.distributed.all_reduce(total)
        if not math.isfinite(total.item()):
            odd = {number for loss, numbers in zip(losses, passes, strict=True) for number in numbers if not math.isfinite(loss.item())}
            found: list[Any] = [None] * self._workers.size
            torch.distributed.all_gather_object(found, odd)
            rows = sorted(set().union(*found) - {IDLE})
            raise TrainingError(
                f"loss is {total.item()} at step {step + 1}, rows {rows}; lower train.learning_rate, or look for what is odd in these rows"
            )
        return total.item()

    def _optimize(self, step: int, numbers: Sequence[int], *, last: bool) -> float:
        """Call DeepSpeed's step, which changes the weights after the last pass only; returns the global gradient norm then.

        A float16 gradient that overflows is no error as long as the loss scale can be lowered: DeepSpeed skips and counts
        the step. Its norm is reported as 0.
        """
        engine, before = self._engine, self._engine.skipped_steps
        wrapped = engine.optimizer is not engine.basic_optimizer
        scale = deepspeed.unapplied_scale(engine)
        norm = math.nan
        if last and not wrapped:
            gradients = [part.grad for part in deepspeed.trained_parameters(engine).values() if part.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            self._check_gradient(norm, step, numbers)
        engine.step()
        if not last:
            return norm
        if wrapped:
            norm = float(engine.get_global_grad_norm()) / scale
        skipped = engine.skipped_steps > before
        if skipped and deepspeed.step_state(engine)["loss_scale"].get("cur_scale", 1.0) > 1.0:
            return 0.0
        self._check_gradient(math.inf if skipped else norm, step, numbers)
        return norm

    def _check_gradient(self, norm: float, step: int, numbers: Sequence[int]) -> None:
        if not math.isfinite(norm) or norm < 0:
            raise TrainingError(f"gradient is not a number at step {step + 1}, among rows {list(numbers)}; lower train.learning_rate")

    def _validate(self, step: int) -> JsonObject:
        """Return ``validation_loss`` of the held-out rows, in nats per token with a loss; empty where there are none.

        Raises:
            TrainingError: the loss is not a number; raised on every worker.
        """
        held_out, groups = self._shards.validation_rows, self._layout.groups
        sums = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        self._engine.eval()
        with torch.no_grad():
            for start in range(0, held_out, groups):
                chosen = range(start, min(start + groups, held_out))
                row = self._shards.row(self._shards.num_rows + chosen[self._group % len(chosen)])
                loss = self._loss([row])  # even without a row left: under ZeRO-3 all workers compute together
                if self._group < len(chosen):
                    sums += torch.tensor([loss.item(), num_loss_tokens(row) if self._part == 0 else 0], device=sums.device)
        self._engine.train()
        torch.distributed.all_reduce(sums)
        total, loss_tokens = sums.tolist()
        if not math.isfinite(total):
            raise TrainingError(f"validation loss is {total} after step {step + 1}; lower train.learning_rate")
        return {"validation_loss": total / loss_tokens} if loss_tokens else {}
