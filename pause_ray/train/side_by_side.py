"""The steps of several trainings side by side on one of their workers: one forward pass for all, everything else each its own.

A training here takes the steps that it would take alone: its rows, gradient norm, learning rate, optimizer, log and checkpoints are
its own, and its checkpoints are those of ``train.steps``, so that it can go on alone what it began here and the other way round. One
that fails leaves the others alone. Trained weights have float32 masters; all of them lie on every worker (ZeRO's stage 0), so torch's
AdamW and one reduction do what DeepSpeed would be for. Knows no Ray and starts no process.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pause_ray.checkpoint import TRAINING_LOG
from pause_ray.errors import PauseRayError, StoppedError, TrainingError
from pause_ray.rows import ShardSet
from pause_ray.spec import JsonObject
from pause_ray.storage import space_errors, write_json
from pause_ray.train import state, telemetry
from pause_ray.train.adapters import AdaptersLoss, name_alone, name_of
from pause_ray.train.assignment import FAILED, Assignment
from pause_ray.train.crew import Crew, Requests
from pause_ray.train.loop import StepRows, check_loss, deal, dropout_seed, learning_rate, num_labelled, read_step, share
from pause_ray.train.model import write_adapter
from pause_ray.train.training_log import WrittenLog

IDLE = -1
"""Stands for a row where rows do not go round."""


@dataclass
class _Step:
    """One optimizer step of one training, while it is taken."""

    read: StepRows
    passes: list[list[int]]
    """Row numbers of this worker's forward passes."""
    losses: list[torch.Tensor]
    """Summed, of each pass so far."""


class Side:
    """One training among others: all that it does not share with them."""

    def __init__(self, assignment: Assignment, *, adapter: str, parameters: dict[str, nn.Parameter], crew: Crew) -> None:
        """At its start.

        Args:
            assignment: What is trained.
            adapter: Its name in the model.
            parameters: Its trained parameters by their names in the model.
            crew: Who trains.
        """
        self.assignment, self.adapter, self.train = assignment, adapter, assignment.train
        self.shards = ShardSet.open(assignment.shards)
        self.done = 0
        self.running = True
        self._crew = crew
        self._parameters = parameters
        self._masters = {name: part if part.dtype == torch.float32 else part.detach().float() for name, part in parameters.items()}
        self._optimizer = torch.optim.AdamW(self._masters.values(), lr=self.train.learning_rate, weight_decay=self.train.weight_decay)
        self._share = share(self.train, num_workers=crew.size, even=False)
        self.log = WrittenLog(assignment.folder / TRAINING_LOG, writes=crew.rank == 0)

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one.

        Raises:
            CheckpointError: it is damaged or of another training.
        """
        saved = self._crew.first_ones(self.assignment.running.latest)
        if saved is not None:
            alone = {name_alone(name, self.adapter): name for name in self._parameters}
            whole = state.read_tensors(saved.tensors, trained={name: self._parameters[its].shape for name, its in alone.items()})
            for name, its in alone.items():
                self._restore(its, {kind: whole[f"{kind}/{name}"] for kind in (state.MASTER, *state.MOMENTS)}, saved.facts)
            self.done = saved.step
        self.log.begin(saved.log_rows() if saved else [])

    @torch.no_grad()
    def _restore(self, name: str, tensors: Mapping[str, torch.Tensor], facts: JsonObject) -> None:
        master = self._masters[name]
        master.copy_(tensors[state.MASTER])
        self._parameters[name].copy_(master)
        moments = {kind: tensors[kind].to(master.device) for kind in state.MOMENTS}
        self._optimizer.state[master] = {"step": torch.tensor(float(facts["applied_steps"])), **moments}

    def save(self) -> None:
        """Write a checkpoint of the training, as one that goes on alone would."""
        if self._crew.rank != 0:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self._masters.items():
            kept = {state.MASTER: master.detach(), **{kind: self._optimizer.state[master][kind] for kind in state.MOMENTS}}
            tensors |= {f"{kind}/{name_alone(name, self.adapter)}": part.cpu() for kind, part in kept.items()}
        applied = max(int(its["step"]) for its in self._optimizer.state.values())
        self.assignment.running.save(
            self.done,
            write_tensors=lambda path: state.write_tensors(path, tensors),
            log_rows=self.log.rows,
            facts={"applied_steps": applied, "skipped_steps": 0, "loss_scale": {}},
            keep_last=self.train.keep_checkpoints,
        )

    def plan(self) -> _Step:
        """Rows of the next step.

        Raises:
            TrainingError: none of them has a token with a loss.
        """
        found = read_step(self.shards, self.done, rows_per_step=self._share.rows_per_step, seed=self.assignment.seed)
        dealt = [*found.numbers, *[IDLE] * (self._share.micro_rows * self._share.passes * self._share.groups - len(found.numbers))]
        lengths = [len(found.rows[number].input_ids) if number != IDLE else 0 for number in dealt]
        passes = deal(dealt, lengths=lengths, micro_rows=self._share.micro_rows, groups=self._share.groups)[self._crew.rank]
        taken = [[number for number in chosen if number != IDLE] for chosen in passes]
        return _Step(read=found, passes=taken, losses=[])

    def collect(self) -> None:
        """Add the gradient of a pass to the masters', in float32."""
        for name, master in self._masters.items():
            own = self._parameters[name]
            if own is not master and own.grad is not None:
                gradient = own.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                own.grad = None

    def learn(self, step: _Step, total: float) -> JsonObject:
        """Take the optimizer's step; returns what the log says of it.

        Args:
            step: Whose gradients have been collected.
            total: Its summed loss over all workers.

        Raises:
            TrainingError: loss or gradient is not a number, on every worker.
        """
        if not math.isfinite(total):
            odd = [chosen for chosen, loss in zip(step.passes, step.losses, strict=True) if not math.isfinite(float(loss))]
            check_loss(total, step=self.done, rows=self._crew.union({number for chosen in odd for number in chosen}))
        masters = list(self._masters.values())
        self._reduce(masters)
        norm = float(torch.nn.utils.clip_grad_norm_(masters, self.train.gradient_clip))
        if not math.isfinite(norm):
            raise TrainingError(
                f"gradient is not a number at step {self.done + 1}, among rows {step.read.numbers}; lower train.learning_rate"
            )
        rate = learning_rate(self.done, self.train)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for name, master in self._masters.items():
                self._parameters[name].copy_(master)
        self.done += 1
        return {"step": self.done, "loss": total / step.read.labelled, "learning_rate": rate, "gradient_norm": norm}

    def _reduce(self, masters: Sequence[torch.Tensor]) -> None:
        for master in masters:
            if master.grad is None:  # no row of this step came to this worker
                master.grad = torch.zeros_like(master)
        if self._crew.size > 1:
            whole = self._crew.add_up(torch.cat([master.grad.flatten() for master in masters if master.grad is not None]))
            for master, part in zip(masters, torch.split(whole, [master.numel() for master in masters]), strict=True):
                master.grad = part.view_as(master)

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps happens now."""
        return every is not None and self.done % every == 0

    @contextlib.contextmanager
    def ending_alone(self) -> Iterator[None]:
        """Let a training's own failure end it and no other: it is left where the launcher finds it."""
        try:
            yield
        except TrainingError as error:
            self._end()
            if self._crew.rank == 0:
                leave_failure(error, self.assignment.folder)

    def finish(self, model: nn.Module) -> None:
        """Leave the adapter, as the model computes with it."""
        trained = {name: part.detach().cpu() for name, part in self._parameters.items()}
        if self._crew.rank == 0:
            with space_errors(self.assignment.folder):
                write_adapter(model, trained=trained, folder=self.assignment.folder, adapter=self.adapter)
        self._end()

    def _end(self) -> None:
        self.running = False
        self._optimizer.state.clear()
        for part in (*self._masters.values(), *self._parameters.values()):
            part.grad = None


class SideBySide:
    """Trainings between the first and the last step of all. Every worker has one, and all call ``run`` together."""

    def __init__(self, model: AdaptersLoss, assignments: Sequence[Assignment], *, crew: Crew, loses_a_node: Callable[[], bool]) -> None:
        """Around a model that was just loaded.

        Args:
            model: Of these ``assignments``.
            assignments: What is trained.
            crew: Who trains.
            loses_a_node: Whether a node with workers on it is about to go away; all workers call it together.
        """
        self._model, self._crew = model, crew
        self._requests = Requests(crew, [assignment.folder for assignment in assignments], loses_a_node=loses_a_node)
        names = [name_of(index) for index in range(len(assignments))]
        self._sides = [
            Side(assignment, adapter=name, parameters=model.trained(name), crew=crew)
            for name, assignment in zip(names, assignments, strict=True)
        ]

    def run(self) -> None:
        """Take every step that no checkpoint has, and leave each adapter and log, or its failure, in its assignment's folder.

        Raises:
            StoppedError: asked to end; checkpoints were written.
            CheckpointError: a last checkpoint is damaged or of another training.
            StorageError: the disk is full; the last checkpoints are there.
        """
        for side in self._sides:
            side.resume()
        self._finish()
        while running := self._running():
            records = self._step(running)
            due = [side for side in self._running() if side.done == side.train.steps or side.is_due(side.train.validate_every)]
            measured = self._validate(due) if due else {}
            for side in self._running():
                side.log.append(records[side.adapter] | measured.get(side.adapter, {}))
            self._save()
            self._finish()

    def _running(self) -> list[Side]:
        return [side for side in self._sides if side.running]

    def _finish(self) -> None:
        for side in self._running():
            if side.done == side.train.steps:
                side.finish(self._model.model)

    def _save(self) -> None:
        """Write the checkpoints that are due, and all where the training is to end or a node goes away."""
        running = self._running()
        unfinished = [side for side in running if side.done < side.train.steps]
        stop, node_goes = self._requests.look()
        if not unfinished:
            return
        everyone = stop or node_goes
        # One that is done waits for the others before it is sealed, so it keeps what it has.
        due = [side for side in running if everyone or side.done == side.train.steps or side.is_due(side.train.checkpoint_every)]
        for side in due:
            side.save()
        self._crew.wait()
        if stop:
            steps = ", ".join(f"{side.done} of {side.train.steps}" for side in unfinished)
            raise StoppedError(f"trainings side by side were asked to end after steps {steps}; the same command goes on there")

    def _step(self, sides: Sequence[Side]) -> dict[str, JsonObject]:
        """One optimizer step of each side; returns their rows of the training log without the held-out loss."""
        started = time.perf_counter()
        steps: dict[str, _Step] = {}
        for side in sides:
            with side.ending_alone():
                steps[side.adapter] = side.plan()
                seed = dropout_seed(side.assignment.seed, side.done, self._crew.rank)
                self._model.begin_step(side.adapter, seed=seed)
        sides = [side for side in sides if side.running]
        self._go_through(sides, steps)
        sums = [torch.stack(steps[side.adapter].losses).double().sum() for side in sides]
        totals = self._crew.add_up(torch.stack(sums)).tolist() if sides else []
        records = {}
        for side, total in zip(sides, totals, strict=True):
            with side.ending_alone():
                records[side.adapter] = side.learn(steps[side.adapter], total)
        return self._measured(records, steps, seconds=time.perf_counter() - started)

    def _go_through(self, sides: Sequence[Side], steps: Mapping[str, _Step]) -> None:
        """Every forward and backward pass of the step: the first ones of all sides together, then the second ones, and so on."""
        for index in range(max((len(steps[side.adapter].passes) for side in sides), default=0)):
            rows = {}
            for side in sides:
                step = steps[side.adapter]
                chosen = step.passes[index] if index < len(step.passes) else []
                if chosen:
                    rows[side.adapter] = [step.read.rows[number] for number in chosen]
                elif index < len(step.passes):
                    step.losses.append(torch.zeros((), device=self._crew.device))
            if not rows:
                continue
            losses = self._model.each(rows)
            shares = torch.tensor([1 / steps[name].read.labelled for name in rows], device=losses.device)
            torch.autograd.backward((losses * shares).sum())
            for name, loss in zip(rows, losses.detach(), strict=True):
                steps[name].losses.append(loss)
            for side in sides:
                side.collect()

    def _measured(self, records: Mapping[str, JsonObject], steps: Mapping[str, _Step], *, seconds: float) -> dict[str, JsonObject]:
        """Rows of the training log. The time of a step that all take at once is divided by their tokens."""
        together = sum(step.read.tokens for step in steps.values())
        peak = int(self._crew.most(telemetry.peak_memory_bytes(str(self._crew.device))))
        mfu = telemetry.measured_utilization(
            self._sides[0].assignment.model_dir,
            [row for step in steps.values() for row in step.read.rows.values()],
            labelled_tokens=sum(step.read.labelled for step in steps.values()),
            seconds=seconds,
            device=self._crew.device,
            workers=self._crew.size,
        )
        return {
            name: telemetry.step_record(
                **record,
                tokens=steps[name].read.tokens,
                labelled_tokens=steps[name].read.labelled,
                computed_tokens=steps[name].read.tokens,
                seconds=seconds * steps[name].read.tokens / together,
                peak_memory_bytes=peak,
                mfu=mfu,
            )
            | {"side_by_side": len(steps)}
            for name, record in records.items()
        }

    def _validate(self, sides: Sequence[Side]) -> dict[str, JsonObject]:
        """``validation_loss`` of each side's held-out rows, in nats per learned token; nothing where there are none."""
        groups, rank = self._crew.size, self._crew.rank
        sums = {side.adapter: torch.zeros(2, dtype=torch.float64) for side in sides}
        self._model.eval()
        with torch.no_grad():
            for number in range(rank, max(side.shards.validation_rows for side in sides), groups):
                rows = {
                    side.adapter: [side.shards.row(side.shards.num_rows + number)] for side in sides if number < side.shards.validation_rows
                }
                for (name, own), loss in zip(rows.items(), self._model.each(rows), strict=True):
                    sums[name] += torch.tensor([loss.item(), num_labelled(own[0])])
        self._model.train()
        found = self._crew.add_up(torch.stack(list(sums.values())).to(self._crew.device)).tolist()
        measured = {}
        for side, (total, labelled) in zip(sides, found, strict=True):
            with side.ending_alone():
                if not math.isfinite(total):
                    raise TrainingError(f"validation loss is {total} after step {side.done}; lower train.learning_rate")
                measured[side.adapter] = {"validation_loss": total / labelled} if labelled else {}
        return measured


def leave_failure(error: PauseRayError, folder: Path) -> None:
    """Tell the launcher why a training ended, in the folder that it was given."""
    write_json(folder / FAILED, {"error": type(error).__name__, "message": str(error)})
