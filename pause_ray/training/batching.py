"""Order of rows, their assignment to workers, packing of rows into batches, and the learning rate. Knows no model and no Ray.

Everything that a step does follows from (seed, step): the same rows with the same weight, however many workers share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pause_ray.core.errors import SpecError, TrainingError
from pause_ray.data.shards import NO_LOSS, PackedRow, ShardSet
from pause_ray.training.spec import TrainSpec

IDLE = -1
"""Row number of what a group computes when there are not enough rows for all: one token without a loss."""


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How the rows of one optimizer step are divided among groups of workers and forward passes."""

    rows_per_step: int
    """Rows of one optimizer step, all workers together."""
    micro_rows: int
    """Rows in one forward pass of one group."""
    passes: int
    """Forward passes of each group in one step."""
    sequence_parallel: int = 1
    """Workers of one group: they are neighbours in rank and share the tokens of the same rows."""
    groups: int = 1
    """Number of groups of workers; no two groups compute the same row."""

    def place(self, rank: int) -> tuple[int, int]:
        """Return the group of worker ``rank``, and the index of its part of the group's tokens."""
        return divmod(rank, self.sequence_parallel)


def batch_layout(train: TrainSpec, *, num_workers: int, even: bool = True) -> BatchLayout:
    """Divide the rows of a step equally; a forward pass never exceeds ``micro_batch_size`` rows.

    A number of rows that does not divide evenly is refused, or without ``even`` rounded up, so that some places stay idle.

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
    return BatchLayout(
        rows_per_step=total, micro_rows=micro_rows, passes=per_group // micro_rows, sequence_parallel=together, groups=groups
    )


def check_corpus(train: TrainSpec, *, num_rows: int, longest_row_tokens: int, limit_tokens: int) -> None:
    """Refuse fewer training rows than one optimizer step takes, and a training or validation row longer than the model's limit.

    Raises:
        SpecError: naming both numbers.
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
    """Return the row numbers of optimizer step ``step`` (from 0); epochs are permutations of all rows and follow without a gap."""
    wanted = range(step * rows_per_step, (step + 1) * rows_per_step)
    numbers = range(wanted[0] // num_rows, wanted[-1] // num_rows + 1)
    epochs = {epoch: np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in numbers}
    return [int(epochs[place // num_rows][place % num_rows]) for place in wanted]


def assign_rows(rows: Sequence[int], *, lengths: Sequence[int], micro_rows: int, groups: int) -> list[list[list[int]]]:
    """Return the forward passes of each group: ``result[group][pass]`` is ``micro_rows`` row numbers.

    Passes of similar length run at the same time in all groups, which keeps waiting short. Each row keeps its weight, so the
    assignment changes no result beyond rounding.
    """
    ordered = [row for _, row in sorted(zip(lengths, rows, strict=True), reverse=True)]
    passes = [ordered[start : start + micro_rows] for start in range(0, len(ordered), micro_rows)]
    return [passes[group::groups] for group in range(groups)]


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The rows of one optimizer step, and which group of workers computes which of them."""

    numbers: list[int]
    """Row numbers in the order of the epoch."""
    rows: dict[int, PackedRow]
    """Rows by number, with one for ``IDLE`` where a group computes it."""
    passes: list[list[list[int]]]
    """``passes[group][pass]``: row numbers of one forward pass."""
    loss_tokens: int
    """Tokens with a loss in all rows together; at least 1."""

    @classmethod
    def read(cls, shards: ShardSet, step: int, *, layout: BatchLayout, seed: int) -> Self:
        """Read the rows of optimizer step ``step`` (from 0); groups that would stay without a row compute one idle token.

        Raises:
            TrainingError: no row has a token with a loss.
        """
        numbers = rows_of_step(step, num_rows=shards.num_rows, rows_per_step=layout.rows_per_step, seed=seed)
        rows = dict(zip(numbers, shards.rows(numbers), strict=True))
        loss_tokens = sum(num_loss_tokens(rows[number]) for number in numbers)
        if not loss_tokens:
            raise TrainingError(f"rows {numbers} of step {step + 1} have no token with a loss; look at the corpus in {shards.folder}")
        computed = numbers + [IDLE] * (layout.micro_rows * layout.passes * layout.groups - len(numbers))
        if IDLE in computed:
            first_token = rows[numbers[0]].input_ids[:1]
            rows[IDLE] = PackedRow(input_ids=first_token, labels=np.array([NO_LOSS], np.int32), num_pauses=0, num_documents=1)
        lengths = [len(rows[number].input_ids) for number in computed]
        passes = assign_rows(computed, lengths=lengths, micro_rows=layout.micro_rows, groups=layout.groups)
        return cls(numbers=numbers, rows=rows, passes=passes, loss_tokens=loss_tokens)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding and idle ones."""
        return sum(len(self.rows[number].input_ids) for number in self.numbers)

    def computed_tokens(self, *, parts: int) -> int:
        """Return the tokens that go through the model: the rows of each pass end to end, padded to ``parts`` equal parts."""
        passes = (sum(len(self.rows[number].input_ids) for number in numbers) for group in self.passes for numbers in group)
        return sum(tokens + -tokens % parts for tokens in passes)

    @property
    def document_tokens(self) -> list[int]:
        """Tokens of each document of all rows."""
        rows = [self.rows[number] for number in self.numbers]
        return [int(tokens) for row in rows for tokens in np.diff(row.document_starts, append=len(row.input_ids))]


def learning_rate(step: int, train: TrainSpec) -> float:
    """Return the rate of optimizer step ``step`` (from 0): a linear warm-up to the peak, then the schedule down towards zero.

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
    """Rows laid end to end, so that nothing is computed for padding; each of their documents attends to itself alone."""

    input_ids: NDArray[np.int64]
    """(1, tokens)."""
    position_ids: NDArray[np.int64]
    """(1, tokens): counted from the first token of each document, as when the model is used."""
    targets: NDArray[np.int64]
    """(1, tokens): the next token of the same document where it has a loss, ``NO_LOSS`` elsewhere."""
    documents: tuple[tuple[int, int], ...]
    """(first token, token after the last) of each document; places in the whole batch, also where the arrays are a part of it. Tokens
    after the last document are padding that makes parts equal, and attend to nothing."""

    def part(self, index: int, *, of: int) -> Batch:
        """Return part ``index`` of ``of`` equal parts of the tokens, for one of the workers that share them."""
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


def num_loss_tokens(row: PackedRow) -> int:
    """Count the tokens of ``row`` that have a loss; the first of a document has nothing before it to be predicted from."""
    has_loss = row.labels != NO_LOSS
    has_loss[row.document_starts] = False
    return int(np.count_nonzero(has_loss))


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
