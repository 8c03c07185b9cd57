"""The steps of a training on one of its workers: rows, loss, gradient, optimizer, held-out rows, log, checkpoints.

Everything that a step does follows from (spec, seed, step), so a training that goes on from a checkpoint takes the steps that
an uninterrupted one takes. Knows DeepSpeed's engine and torch's process group; knows no Ray and starts no process.
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
from pause_ray.data.shards import NO_LOSS, PackedRow, ShardSet
from pause_ray.models.checkpoint import TRAINING_LOG
from pause_ray.training import deepspeed, metrics
from pause_ray.training.batching import check_loss, collate, deal, dropout_seed, learning_rate, num_labelled, read_step, share
from pause_ray.training.distributed import Crew, Requests
from pause_ray.training.loss import tensors
from pause_ray.training.metrics import WrittenLog
from pause_ray.training.spec import Assignment

IDLE = -1
"""Row number of what a worker computes when there are not enough rows for all: one token without a loss."""


class Steps:
    """A training between its first and its last step. Every worker has one, and all call the same methods in the same order."""

    def __init__(self, engine: Any, assignment: Assignment, *, loses_a_node: Callable[[], bool], write_rung: Callable[[int], None]) -> None:
        """Around an engine that was just started.

        Args:
            engine: DeepSpeed's, around a ``LossModel``.
            assignment: What is trained.
            loses_a_node: Whether a node with workers on it is about to go away; all workers call it together.
            write_rung: Writes the adapter as it is after so many steps; all workers call it together.
        """
        self._engine = engine
        self._assignment = assignment
        self._train = assignment.train
        crew = Crew(engine.device)
        self._crew, self._rank, self._world_size = crew, crew.rank, crew.size
        self._requests = Requests(crew, assignment.folder, loses_a_node=loses_a_node)
        self._write_rung = write_rung
        self._share = share(self._train, num_workers=self._world_size, even=False)
        self._group, self._part = self._share.place(self._rank)
        self._shards = ShardSet.open(assignment.shards)
        self._log = WrittenLog(assignment.folder / TRAINING_LOG, writes=crew.rank == 0)

    def run(self) -> None:
        """Take every step that no checkpoint has.

        Raises:
            TrainingError: loss, gradient or validation loss is not a number; names step and rows, and the last checkpoint is there.
            StoppedError: asked to end; a checkpoint was written.
            CheckpointError: the last checkpoint is damaged or of another training.
            StorageError: the disk is full; the last checkpoint is there.
        """
        for step in range(self._resume(), self._train.max_steps):
            record = self._step(step)
            done = step + 1
            if done == self._train.max_steps or (self._train.validate_every and done % self._train.validate_every == 0):
                record |= self._validate(step)
            self._log.append(record)
            if self._assignment.rungs is not None and done in self._assignment.rungs.steps:
                self._write_rung(done)
            stop, node_goes = self._requests.look()
            due = self._train.checkpoint_every is not None and done % self._train.checkpoint_every == 0
            if done < self._train.max_steps and (due or stop or node_goes):
                self._save(done)
                if stop:
                    raise StoppedError(
                        f"training was asked to end after step {done} of {self._train.max_steps}; the same command goes on there"
                    )

    def _resume(self) -> int:
        """Go back to the last checkpoint, if there is one; returns the steps done."""
        saved = self._crew.first_ones(self._assignment.running.latest)
        if saved is not None:
            whole = deepspeed.read_tensors(saved.tensors, trained=deepspeed.whole_shapes(self._engine))
            deepspeed.restore(self._engine, whole, applied=saved.facts["applied_steps"])
            deepspeed.restore_loss_scale(self._engine, saved.facts["loss_scale"])
            self._engine.skipped_steps = saved.facts["skipped_steps"]
        self._log.begin(saved.log_rows() if saved else [])
        return saved.step if saved else 0

    def _save(self, done: int) -> None:
        """Write a checkpoint; returns when it is complete."""
        whole = deepspeed.gather(self._engine) if deepspeed.applied_steps(self._engine) else {}
        if whole:
            self._assignment.running.save(
                done,
                write_tensors=lambda path: deepspeed.write_tensors(path, whole),
                log_rows=self._log.rows,
                facts={
                    "applied_steps": deepspeed.applied_steps(self._engine),
                    "skipped_steps": self._engine.skipped_steps,
                    "loss_scale": deepspeed.loss_scale(self._engine),
                },
                keep_last=self._train.keep_checkpoints,
            )
        torch.distributed.barrier()

    def _step(self, step: int) -> JsonObject:
        """One optimizer step, all workers together; returns its row of the training log.

        DeepSpeed averages gradients over passes and workers. Scaling each pass's summed loss by their number and dividing
        by the step's labelled tokens makes the gradient that of the mean over all labelled tokens, however they are cut up.
        """
        started = time.perf_counter()
        found = read_step(self._shards, step, rows_per_step=self._share.rows_per_step, seed=self._assignment.seed)
        numbers, rows, labelled = found.numbers, dict(found.rows), found.labelled
        dealt = self._deal(numbers, rows)
        rate = learning_rate(step, self._train)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(dropout_seed(self._assignment.seed, step, self._rank))
        losses: list[torch.Tensor] = []
        total, norm = math.nan, math.nan
        passes = dealt[self._group]
        for index, chosen in enumerate(passes):
            loss = self._loss([rows[number] for number in chosen])
            losses.append(loss.detach())
            last = index == len(passes) - 1
            if last:
                total = self._agreed_loss(losses, passes, step=step)
            # DeepSpeed 0.19.8 divides by float16's loss scale at every stage, but multiplies with it under ZeRO only.
            self._engine.backward(loss * (len(passes) * self._world_size * self._unapplied_scale() / labelled))
            norm = self._optimize(step, numbers, last=last)
        seconds = time.perf_counter() - started
        lengths = {number: len(rows[number].input_ids) for number in rows}
        record = metrics.step_record(
            step=step + 1,
            loss=total / labelled,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=sum(lengths[number] for number in numbers),
            labelled_tokens=labelled,
            computed_tokens=metrics.computed_tokens(lengths, passes=dealt, parts=self._share.sequence_parallel),
            seconds=seconds,
            peak_memory_bytes=int(self._crew.most(metrics.peak_memory_bytes(str(self._engine.device)))),
            mfu=metrics.measured_utilization(
                self._assignment.model_dir,
                [rows[number] for number in numbers],
                labelled_tokens=labelled,
                seconds=seconds,
                device=self._engine.device,
                workers=self._world_size,
            ),
        )
        return record | ({"skipped_steps": self._engine.skipped_steps} if self._engine.skipped_steps else {})

    def _deal(self, numbers: Sequence[int], rows: dict[int, PackedRow]) -> list[list[list[int]]]:
        """Row numbers of each pass of each group; where the rows do not go round, idle ones are added to ``rows``."""
        idle = self._share.micro_rows * self._share.passes * self._share.groups - len(numbers)
        if idle:
            rows[IDLE] = PackedRow(
                input_ids=rows[numbers[0]].input_ids[:1], labels=np.array([NO_LOSS], np.int32), num_pauses=0, num_documents=1
            )
        dealt = [*numbers, *[IDLE] * idle]
        lengths = [len(rows[number].input_ids) for number in dealt]
        return deal(dealt, lengths=lengths, micro_rows=self._share.micro_rows, groups=self._share.groups)

    def _loss(self, rows: Sequence[PackedRow]) -> torch.Tensor:
        """Summed over the learned tokens of this worker's part of ``rows``."""
        part = collate(rows).part(self._part, of=self._share.sequence_parallel)
        loss: torch.Tensor = self._engine(**tensors(part, device=self._engine.device))
        return loss

    def _agreed_loss(self, losses: list[torch.Tensor], passes: Sequence[Sequence[int]], *, step: int) -> float:
        """The step's summed loss over all workers, before the optimizer moves.

        Raises:
            TrainingError: it is not a number, on every worker, naming the rows of those passes whose loss is none.
        """
        total = torch.stack(losses).double().sum()
        torch.distributed.all_reduce(total)
        if not math.isfinite(total.item()):
            odd = {number for loss, chosen in zip(losses, passes, strict=True) for number in chosen if not math.isfinite(loss.item())}
            found: list[Any] = [None] * self._world_size
            torch.distributed.all_gather_object(found, odd)
            check_loss(total.item(), step=step, rows=sorted(set().union(*found) - {IDLE}))
        return total.item()

    def _optimize(self, step: int, numbers: Sequence[int], *, last: bool) -> float:
        """Take DeepSpeed's step, which moves the weights after the last pass only; returns the global norm of the gradient then.

        A float16 gradient that overflows is no error as long as the loss scale can be lowered: DeepSpeed skips and counts
        the step. Its norm is told as 0.
        """
        engine, before = self._engine, self._engine.skipped_steps
        wrapped = engine.optimizer is not engine.basic_optimizer
        scale = self._unapplied_scale()
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
        if skipped and deepspeed.loss_scale(engine).get("cur_scale", 1.0) > 1.0:
            return 0.0
        self._check_gradient(math.inf if skipped else norm, step, numbers)
        return norm

    def _unapplied_scale(self) -> float:
        """What the loss has to be multiplied with here, because DeepSpeed's plain float16 optimizer will divide by it."""
        return float(getattr(getattr(self._engine.optimizer, "loss_scale_config", None), "cur_scale", 1.0))

    def _check_gradient(self, norm: float, step: int, numbers: Sequence[int]) -> None:
        if not math.isfinite(norm) or norm < 0:
            raise TrainingError(f"gradient is not a number at step {step + 1}, among rows {list(numbers)}; lower train.learning_rate")

    def _validate(self, step: int) -> JsonObject:
        """``validation_loss`` of the held-out rows, in nats per learned token; nothing where there are none.

        Raises:
            TrainingError: it is not a number, on every worker.
        """
        held_out, groups = self._shards.validation_rows, self._share.groups
        sums = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        self._engine.eval()
        with torch.no_grad():
            for start in range(0, held_out, groups):
                chosen = range(start, min(start + groups, held_out))
                row = self._shards.row(self._shards.num_rows + chosen[self._group % len(chosen)])
                loss = self._loss([row])  # also where there is no row left: under ZeRO-3 all workers compute together
                if self._group < len(chosen):
                    sums += torch.tensor([loss.item(), num_labelled(row) if self._part == 0 else 0], device=sums.device)
        self._engine.train()
        torch.distributed.all_reduce(sums)
        total, labelled = sums.tolist()
        if not math.isfinite(total):
            raise TrainingError(f"validation loss is {total} after step {step + 1}; lower train.learning_rate")
        return {"validation_loss": total / labelled} if labelled else {}
