"""Properties of row order, sharing, padding and the learning rate."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.errors import SpecError
from pause_ray.data.shards import NO_LOSS, PackedRow
from pause_ray.training.batching import (
    assign_rows,
    batch_layout,
    check_corpus,
    check_heads,
    collate,
    learning_rate,
    num_loss_tokens,
    rows_of_step,
)
from pause_ray.training.spec import TrainSpec

counts = st.integers(1, 40)


@given(num_rows=counts, rows_per_step=counts, seed=st.integers(0, 9))
def test_every_epoch_is_a_permutation_of_all_rows(num_rows: int, rows_per_step: int, seed: int) -> None:
    steps = -(-3 * num_rows // rows_per_step)
    stream = [row for step in range(steps) for row in rows_of_step(step, num_rows=num_rows, rows_per_step=rows_per_step, seed=seed)]
    epochs = [stream[start : start + num_rows] for start in range(0, 3 * num_rows, num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = rows_of_step(0, num_rows=50, rows_per_step=50, seed=1)
    assert first == rows_of_step(0, num_rows=50, rows_per_step=50, seed=1)
    assert first != rows_of_step(1, num_rows=50, rows_per_step=50, seed=1)
    assert first != rows_of_step(0, num_rows=50, rows_per_step=50, seed=2)


@given(
    micro_batch_size=st.integers(1, 12),
    gradient_accumulation_steps=st.integers(1, 12),
    num_workers=st.integers(1, 24),
    together=st.sampled_from([1, 2, 3, 4]),
)
def test_rows_are_shared_evenly_or_refused(
    micro_batch_size: int, gradient_accumulation_steps: int, num_workers: int, together: int
) -> None:
    train = TrainSpec(
        micro_batch_size=micro_batch_size, gradient_accumulation_steps=gradient_accumulation_steps, sequence_parallel=together
    )
    if num_workers % together:
        with pytest.raises(SpecError, match=f"train.sequence_parallel {together} needs groups of {together}.* there are {num_workers}"):
            batch_layout(train, num_workers=num_workers)
        return
    if micro_batch_size * gradient_accumulation_steps % (num_workers // together):
        sharers = f"{num_workers} workers" if together == 1 else f"{num_workers // together} groups of {together} workers"
        with pytest.raises(SpecError, match=f"cannot be shared by {sharers}"):
            batch_layout(train, num_workers=num_workers)
        return
    cut = batch_layout(train, num_workers=num_workers)
    assert cut.rows_per_step == cut.micro_rows * cut.passes * cut.groups == micro_batch_size * gradient_accumulation_steps
    assert cut.micro_rows <= micro_batch_size
    places = [cut.place(rank) for rank in range(num_workers)]
    assert places == [(group, part) for group in range(cut.groups) for part in range(together)]


@given(data=st.data(), micro_rows=st.integers(1, 4), passes=st.integers(1, 4), groups=st.integers(1, 4))
def test_dealing_gives_each_row_to_one_pass_of_one_group(data: st.DataObject, micro_rows: int, passes: int, groups: int) -> None:
    total = micro_rows * passes * groups
    rows = data.draw(st.lists(st.integers(0, 30), min_size=total, max_size=total))
    lengths = [10 + row for row in rows]
    dealt = assign_rows(rows, lengths=lengths, micro_rows=micro_rows, groups=groups)
    assert [[len(one) for one in group] for group in dealt] == [[micro_rows] * passes] * groups
    assert Counter(row for group in dealt for one in group for row in one) == Counter(rows)
    longest_first = [max(one) for nth in zip(*dealt, strict=True) for one in nth]
    assert longest_first == sorted(longest_first, reverse=True)


@given(steps=st.integers(1, 60), warmup=st.integers(0, 20), schedule=st.sampled_from(["linear", "cosine", "constant"]))
def test_the_rate_climbs_to_its_peak_and_never_rises_again(steps: int, warmup: int, schedule: str) -> None:
    train = TrainSpec(max_steps=steps, warmup_steps=warmup, schedule=schedule, learning_rate=0.5)
    rates = [learning_rate(step, train) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    climb, descent = rates[:warmup], rates[warmup:]
    assert climb == sorted(climb)
    assert descent == sorted(descent, reverse=True)
    if descent:
        assert descent[0] == 0.5
    if schedule == "constant":
        assert set(descent) <= {0.5}


def test_schedules_end_near_zero() -> None:
    for schedule in ("linear", "cosine"):
        train = TrainSpec(max_steps=1000, warmup_steps=10, schedule=schedule, learning_rate=1.0)
        assert learning_rate(999, train) < 0.002
        assert learning_rate(505, train) == pytest.approx(0.5)


@st.composite
def packed_rows(draw: st.DrawFn) -> PackedRow:
    length = draw(st.integers(1, 30))
    ids = np.array(draw(st.lists(st.integers(1, 99), min_size=length, max_size=length)), dtype=np.int32)
    learned = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    starts = sorted({0, *draw(st.lists(st.integers(0, length - 1), max_size=4))})
    return PackedRow(
        input_ids=ids,
        labels=np.where(learned, ids, NO_LOSS).astype(np.int32),
        num_pauses=0,
        num_documents=len(starts),
        document_starts=np.array(starts, np.int32),
    )


@given(st.lists(packed_rows(), min_size=1, max_size=5))
def test_rows_lie_end_to_end_and_every_document_begins_anew(rows: list[PackedRow]) -> None:
    batch = collate(rows)
    assert batch.input_ids[0].tolist() == [token for row in rows for token in row.input_ids.tolist()]
    documents = [
        (row.input_ids[begin:end].tolist(), row.labels[begin:end].tolist())
        for row in rows
        for begin, end in itertools.pairwise([*row.document_starts.tolist(), len(row.input_ids)])
    ]
    assert len(batch.documents) == len(documents)
    for (begin, end), (tokens, labels) in zip(batch.documents, documents, strict=True):
        assert batch.input_ids[0, begin:end].tolist() == tokens
        assert batch.position_ids[0, begin:end].tolist() == list(range(len(tokens)))
        assert batch.targets[0, begin:end].tolist() == [*labels[1:], NO_LOSS], "the last token of a document predicts nothing"
    assert [begin for begin, _ in batch.documents] == [0, *(end for _, end in batch.documents[:-1])]
    assert np.count_nonzero(batch.targets != NO_LOSS) == sum(num_loss_tokens(row) for row in rows)


@given(st.lists(packed_rows(), min_size=1, max_size=3), st.integers(1, 5))
def test_equal_parts_are_the_batch_and_fewer_spare_tokens_than_parts(rows: list[PackedRow], of: int) -> None:
    batch = collate(rows)
    parts = [batch.part(index, of=of) for index in range(of)]
    tokens = batch.input_ids.shape[1]
    assert len({part.input_ids.shape for part in parts}) == 1
    for name, filling in (("input_ids", 0), ("position_ids", 0), ("targets", NO_LOSS)):
        together = np.concatenate([getattr(part, name) for part in parts], axis=1)
        assert np.array_equal(together[:, :tokens], getattr(batch, name))
        assert (together[:, tokens:] == filling).all()
        assert together.shape[1] - tokens < of
    assert all(part.documents == batch.documents for part in parts)


@pytest.mark.parametrize(("num_rows", "longest", "told"), [(7, 100, r"7 rows.* = 8 different"), (8, 101, "row of 101 tokens.* takes 100")])
def test_a_corpus_that_the_training_cannot_use_is_refused(num_rows: int, longest: int, told: str) -> None:
    train = TrainSpec(micro_batch_size=2, gradient_accumulation_steps=4)
    check_corpus(train, num_rows=8, longest_row_tokens=100, limit_tokens=100)
    with pytest.raises(SpecError, match=told):
        check_corpus(train, num_rows=num_rows, longest_row_tokens=longest, limit_tokens=100)


def test_more_workers_for_a_row_than_heads_are_refused() -> None:
    check_heads(TrainSpec(sequence_parallel=9), num_heads=9)
    with pytest.raises(SpecError, match=r"train.sequence_parallel 10 .* 9 attention heads"):
        check_heads(TrainSpec(sequence_parallel=10), num_heads=9)
