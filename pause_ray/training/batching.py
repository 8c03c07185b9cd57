"""The order of rows, how they are dealt to workers and laid end to end, and the learning rate. Pure; knows no model and no Ray.

Everything a step does follows from (seed, step): the same rows with the same weight, however many workers share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pause_ray.core.errors import SpecError, TrainingError
from pause_ray.data.shards import NO_LOSS, PackedRow, ShardSet
from pause_ray.training.spec import TrainSpec


@dataclass(frozen=True, kw_only=True)
class Share:
    """How the rows of one optimizer step are cut up."""

    rows_per_step: int
    """Rows of one optimizer step, all workers together."""
    micro_rows: int
    """Rows in one forward pass of one group."""
    passes: int
    """Forward passes of each group in one step."""
    sequence_parallel: int = 1
    """Workers of one group: neighbours in rank, which share the tokens of the same rows."""
    groups: int = 1
    """Groups of workers, each with rows of its own."""

    def place(self, rank: int) -> tuple[int, int]:
        """The group of worker ``rank``, and its part of the group's tokens."""
        return divmod(rank, self.sequence_parallel)


def share(train: TrainSpec, *, num_workers: int, even: bool = True) -> Share:
    """Cut the rows of a step into equal shares; a forward pass never exceeds ``micro_batch_size`` rows.

    Args:
        train: What is trained.
        num_workers: Workers in all.
        even: Refuse rows that do not go round; otherwise shares are rounded up, and some places stay idle.

    Raises:
        SpecError: the workers cannot form equal groups, or the rows cannot be shared evenly.
    """
    together, total = train.sequence_parallel, train.rows_per_step
    if num_workers % together:
        raise SpecError(
            f"train.sequence_parallel {together} needs groups of {together} workers, but there are {num_workers}; "
            f"choose a multiple of {together} workers"
        )
    groups = num_workers // together
    if even and total % groups:
        sharers = f"{num_workers} workers" if together == 1 else f"{groups} groups of {together} workers"
        raise SpecError(
            f"{train.step_formula} rows per step cannot be shared by {sharers}; "
            f"choose a number of {'workers' if together == 1 else 'groups'} that divides {total}"
        )
    per_group = math.ceil(total / groups)
    micro_rows = math.gcd(train.micro_batch_size, per_group)
    return Share(rows_per_step=total, micro_rows=micro_rows, passes=per_group // micro_rows, sequence_parallel=together, groups=groups)


def check_corpus(train: TrainSpec, *, num_rows: int, longest_row_tokens: int, limit_tokens: int) -> None:
    """Refuse a corpus that this training cannot use.

    Args:
        train: What is trained.
        num_rows: Training rows.
        longest_row_tokens: Of training and validation rows.
        limit_tokens: The longest sequence that the model was made for.

    Raises:
        SpecError: fewer rows than one optimizer step takes, or a row longer than the model.
    """
    if num_rows < train.rows_per_step:
        raise SpecError(
            f"the corpus has {num_rows} rows, but one optimizer step takes {train.step_formula} different ones; "
            "add text, raise corpus.num_sequences, or lower train.gradient_accumulation_steps"
        )
    if longest_row_tokens > limit_tokens:
        raise SpecError(
            f"the corpus has a row of {longest_row_tokens} tokens, but the model takes {limit_tokens}; lower corpus.sequence_len "
            "(under pauses.budget content, pauses come on top of it)"
        )


def check_heads(train: TrainSpec, *, num_heads: int) -> None:
    """Refuse more workers for a row than the model has attention heads (``num_heads``), since they share those.

    Raises:
        SpecError: naming both numbers.
    """
    if train.sequence_parallel > num_heads:
        raise SpecError(
            f"train.sequence_parallel {train.sequence_parallel} is more workers than the model's {num_heads} attention heads, which they "
            f"share; use at most {num_heads}"
        )


def rows_of_step(step: int, *, num_rows: int, rows_per_step: int, seed: int) -> list[int]:
    """Row numbers of optimizer step ``step`` (from 0): every epoch is a permutation of all rows, epochs follow without a gap."""
    wanted = range(step * rows_per_step, (step + 1) * rows_per_step)
    epochs = {epoch: _permutation(num_rows, seed, epoch) for epoch in range(wanted[0] // num_rows, wanted[-1] // num_rows + 1)}
    return [int(epochs[place // num_rows][place % num_rows]) for place in wanted]


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """What one optimizer step learns from, all workers together."""

    numbers: list[int]
    """In the order in which they are dealt."""
    rows: dict[int, PackedRow]
    """By number."""
    labelled: int
    """Learned tokens of all of them, at least 1."""


def read_step(shards: ShardSet, step: int, *, rows_per_step: int, seed: int) -> StepRows:
    """The rows of optimizer step ``step`` (from 0).

    Raises:
        TrainingError: none of them has a token with a loss.
    """
    numbers = rows_of_step(step, num_rows=shards.num_rows, rows_per_step=rows_per_step, seed=seed)
    rows = dict(zip(numbers, shards.rows(numbers), strict=True))
    labelled = sum(num_labelled(rows[number]) for number in numbers)
    if not labelled:
        raise TrainingError(f"rows {numbers} of step {step + 1} have no token with a loss; look at the corpus in {shards.folder}")
    return StepRows(numbers=numbers, rows=rows, labelled=labelled)


def _permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def deal(rows: Sequence[int], *, lengths: Sequence[int], micro_rows: int, groups: int) -> list[list[list[int]]]:
    """Forward passes of each group: ``result[group][pass]`` is ``micro_rows`` row numbers.

    Passes of like length run at the same time in all groups (little waiting). Each row keeps its weight, so this changes
    no result beyond rounding.
    """
    ordered = [row for _, row in sorted(zip(lengths, rows, strict=True), reverse=True)]
    passes = [ordered[start : start + micro_rows] for start in range(0, len(ordered), micro_rows)]
    return [passes[group::groups] for group in range(groups)]


def learning_rate(step: int, train: TrainSpec) -> float:
    """Of optimizer step ``step`` (from 0): linear warm-up that ends at the peak, then the schedule down towards zero.

    Neither the first nor the last step has rate zero, so every step of a short run counts.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    if train.schedule == "linear":
        return train.learning_rate * (1 - done)
    if train.schedule == "cosine":
        return train.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return train.learning_rate


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows end to end, so that nothing is computed for padding; each of their documents attends to itself alone."""

    input_ids: NDArray[np.int64]
    """(1, tokens)."""
    position_ids: NDArray[np.int64]
    """(1, tokens): counted from the first token of each document, as when the model is used."""
    targets: NDArray[np.int64]
    """(1, tokens): the token that follows in the same document where it is learned, ``NO_LOSS`` elsewhere."""
    documents: tuple[tuple[int, int], ...]
    """First token and the one after the last of each document, in the whole batch also where the arrays are a part of it. Tokens
    after the last document are there to make equal parts, and see nothing."""

    def part(self, index: int, *, of: int) -> Batch:
        """The ``index``-th of ``of`` equal parts of the tokens, for one of the workers that share them."""
        spare = -self.input_ids.shape[1] % of
        tokens = (self.input_ids.shape[1] + spare) // of

        def cut(array: NDArray[np.int64], filling: int) -> NDArray[np.int64]:
            return np.pad(array, ((0, 0), (0, spare)), constant_values=filling)[:, index * tokens : (index + 1) * tokens]

        return Batch(
            input_ids=cut(self.input_ids, 0),
            position_ids=cut(self.position_ids, 0),
            targets=cut(self.targets, NO_LOSS),
            documents=self.documents,
        )


def num_labelled(row: PackedRow) -> int:
    """Tokens of ``row`` that are learned; the first of a document has nothing before it to be predicted from."""
    learned = row.labels != NO_LOSS
    learned[row.document_starts] = False
    return int(np.count_nonzero(learned))


def collate(rows: Sequence[PackedRow]) -> Batch:
    """Lay rows end to end."""
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    labels = np.concatenate([row.labels for row in rows]).astype(np.int64)
    offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)])
    starts = np.concatenate([offset + row.document_starts for offset, row in zip(offsets, rows, strict=False)])
    ends = np.append(starts[1:], len(ids))
    labels[starts] = NO_LOSS
    return Batch(
        input_ids=ids[None],
        position_ids=(np.arange(len(ids)) - np.repeat(starts, ends - starts))[None],
        targets=np.append(labels[1:], NO_LOSS)[None],
        documents=tuple(zip(starts.tolist(), ends.tolist(), strict=True)),
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


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """So that no random state has to be kept: a step's dropout is the same whenever and after whatever it is taken."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
