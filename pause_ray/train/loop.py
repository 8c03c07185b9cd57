"""The order of rows, how they are dealt to workers and padded, and the learning rate. Pure; knows no model and no Ray.

Everything a step does follows from (seed, step): the same rows with the same weight, however many workers share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pause_ray.errors import SpecError, TrainingError
from pause_ray.rows import NO_LOSS, PackedRow
from pause_ray.train.spec import TrainSpec


@dataclass(frozen=True, kw_only=True)
class Share:
    """How the rows of one optimizer step are cut up."""

    rows_per_step: int
    """Rows of one optimizer step, all workers together."""
    micro_rows: int
    """Rows in one forward pass of one worker."""
    passes: int
    """Forward passes of each worker in one step."""


def share(train: TrainSpec, *, num_workers: int) -> Share:
    """Cut ``batch_size × accumulation`` rows into equal shares; a worker's forward pass never exceeds ``batch_size``.

    Raises:
        SpecError: the rows cannot be shared evenly.
    """
    total = train.batch_size * train.accumulation
    if total % num_workers:
        raise SpecError(
            f"train.batch_size {train.batch_size} × train.accumulation {train.accumulation} = {total} rows per step cannot be shared by "
            f"{num_workers} workers; choose a number of workers that divides {total}"
        )
    per_worker = total // num_workers
    micro_rows = math.gcd(train.batch_size, per_worker)
    return Share(rows_per_step=total, micro_rows=micro_rows, passes=per_worker // micro_rows)


def rows_of_step(step: int, *, num_rows: int, rows_per_step: int, seed: int) -> list[int]:
    """Row numbers of optimizer step ``step`` (from 0): every epoch is a permutation of all rows, epochs follow without a gap."""
    wanted = range(step * rows_per_step, (step + 1) * rows_per_step)
    epochs = {epoch: _permutation(num_rows, seed, epoch) for epoch in range(wanted[0] // num_rows, wanted[-1] // num_rows + 1)}
    return [int(epochs[place // num_rows][place % num_rows]) for place in wanted]


def _permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def deal(rows: Sequence[int], *, lengths: Sequence[int], micro_rows: int, num_workers: int) -> list[list[list[int]]]:
    """Forward passes of each worker: ``result[worker][pass]`` is ``micro_rows`` row numbers.

    Rows of like length share a pass (little padding), and passes of like length run at the same time on all workers
    (little waiting). Each row keeps its weight, so this changes no result beyond rounding.
    """
    ordered = [row for _, row in sorted(zip(lengths, rows, strict=True), reverse=True)]
    passes = [ordered[start : start + micro_rows] for start in range(0, len(ordered), micro_rows)]
    return [passes[worker::num_workers] for worker in range(num_workers)]


def learning_rate(step: int, train: TrainSpec) -> float:
    """Of optimizer step ``step`` (from 0): linear warm-up that ends at the peak, then the schedule down towards zero.

    Neither the first nor the last step has rate zero, so every step of a short run counts.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    if train.schedule == "linear":
        return train.learning_rate * (1 - done)
    if train.schedule == "cosine":
        return train.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return train.learning_rate


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the left, so that answers, which stand at the end, share their columns."""

    input_ids: NDArray[np.int64]
    """(rows, tokens)."""
    attention_mask: NDArray[np.int64]
    """(rows, tokens): 0 where padded."""
    position_ids: NDArray[np.int64]
    """(rows, tokens): counted from each row's own first token, as when the model is used."""
    targets: NDArray[np.int64]
    """(rows, kept - 1): the next token at each kept position but the last, or ``NO_LOSS``."""

    @property
    def logits_to_keep(self) -> int:
        """Positions, from the end, whose logits are needed; the last one predicts nothing."""
        return int(self.targets.shape[1]) + 1


def num_labelled(row: PackedRow) -> int:
    """Tokens of ``row`` that are learned; its first token has nothing before it to be predicted from."""
    return int(np.count_nonzero(row.labels[1:] != NO_LOSS))


def collate(rows: Sequence[PackedRow]) -> Batch:
    """Pad rows to the longest."""
    width = max(len(row.input_ids) for row in rows)
    shape = (len(rows), width)
    input_ids, attention_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, NO_LOSS, np.int64)
    for index, row in enumerate(rows):
        start = width - len(row.input_ids)
        input_ids[index, start:] = row.input_ids
        attention_mask[index, start:] = 1
        labels[index, start + 1 :] = row.labels[1:]
    learned = np.flatnonzero((labels != NO_LOSS).any(axis=0))
    first = int(learned[0]) if len(learned) else width - 1
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=np.maximum(attention_mask.cumsum(axis=1) - 1, 0),
        targets=labels[:, max(first, 1) :],
    )


def check_loss(loss: float, *, step: int, rows: Sequence[int]) -> None:
    """Stop before a loss that is not a number spoils the adapter.

    Raises:
        TrainingError: naming the step (from 1) and the rows.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"loss is {loss} at step {step + 1}, rows {list(rows)}; lower train.learning_rate, or look for what is odd in these rows"
        )
