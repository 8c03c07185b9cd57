"""Properties of row order, sharing, padding and the learning rate."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.errors import SpecError, TrainingError
from pause_ray.rows import NO_LOSS, PackedRow
from pause_ray.train.loop import check_loss, collate, deal, learning_rate, num_labelled, rows_of_step, share
from pause_ray.train.spec import TrainSpec

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


@given(batch_size=st.integers(1, 12), accumulation=st.integers(1, 12), num_workers=st.integers(1, 24))
def test_rows_are_shared_evenly_or_refused(batch_size: int, accumulation: int, num_workers: int) -> None:
    train = TrainSpec(batch_size=batch_size, accumulation=accumulation)
    if batch_size * accumulation % num_workers:
        with pytest.raises(SpecError, match=f"{num_workers} workers"):
            share(train, num_workers=num_workers)
        return
    cut = share(train, num_workers=num_workers)
    assert cut.rows_per_step == cut.micro_rows * cut.passes * num_workers == batch_size * accumulation
    assert cut.micro_rows <= batch_size


@given(data=st.data(), micro_rows=st.integers(1, 4), passes=st.integers(1, 4), num_workers=st.integers(1, 4))
def test_dealing_gives_each_row_to_one_pass_of_one_worker(data: st.DataObject, micro_rows: int, passes: int, num_workers: int) -> None:
    total = micro_rows * passes * num_workers
    rows = data.draw(st.lists(st.integers(0, 30), min_size=total, max_size=total))
    lengths = [10 + row for row in rows]
    dealt = deal(rows, lengths=lengths, micro_rows=micro_rows, num_workers=num_workers)
    assert [[len(one) for one in worker] for worker in dealt] == [[micro_rows] * passes] * num_workers
    assert Counter(row for worker in dealt for one in worker for row in one) == Counter(rows)
    longest_first = [max(one) for nth in zip(*dealt, strict=True) for one in nth]
    assert longest_first == sorted(longest_first, reverse=True)


@given(steps=st.integers(1, 60), warmup=st.integers(0, 20), schedule=st.sampled_from(["linear", "cosine", "constant"]))
def test_the_rate_climbs_to_its_peak_and_never_rises_again(steps: int, warmup: int, schedule: str) -> None:
    train = TrainSpec(steps=steps, warmup_steps=warmup, schedule=schedule, learning_rate=0.5)
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
        train = TrainSpec(steps=1000, warmup_steps=10, schedule=schedule, learning_rate=1.0)
        assert learning_rate(999, train) < 0.002
        assert learning_rate(505, train) == pytest.approx(0.5)


@st.composite
def packed_rows(draw: st.DrawFn) -> PackedRow:
    length = draw(st.integers(1, 30))
    ids = np.array(draw(st.lists(st.integers(1, 99), min_size=length, max_size=length)), dtype=np.int32)
    learned = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    return PackedRow(input_ids=ids, labels=np.where(learned, ids, NO_LOSS).astype(np.int32), num_pauses=0, num_documents=1)


@given(st.lists(packed_rows(), min_size=1, max_size=5))
def test_padding_keeps_tokens_positions_and_targets(rows: list[PackedRow]) -> None:
    batch = collate(rows)
    width = batch.input_ids.shape[1]
    assert width == max(len(row.input_ids) for row in rows)
    assert 1 <= batch.logits_to_keep <= width
    for index, row in enumerate(rows):
        here = batch.attention_mask[index] == 1
        assert batch.input_ids[index][here].tolist() == row.input_ids.tolist()
        assert batch.position_ids[index][here].tolist() == list(range(len(row.input_ids)))
        targets = batch.targets[index]
        assert targets[targets != NO_LOSS].tolist() == [label for label in row.labels[1:].tolist() if label != NO_LOSS]
        assert np.count_nonzero(targets != NO_LOSS) == num_labelled(row)
        padded = np.zeros(width, dtype=np.int64)
        padded[here] = row.input_ids
        learned = targets != NO_LOSS
        assert padded[width - len(targets) :][learned].tolist() == targets[learned].tolist()


def test_logits_are_kept_from_the_first_learned_token_on() -> None:
    ids = np.arange(1, 101, dtype=np.int32)
    labels = np.where(ids > 95, ids, NO_LOSS).astype(np.int32)
    row = PackedRow(input_ids=ids, labels=labels, num_pauses=0, num_documents=1)
    assert collate([row]).logits_to_keep == 6


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_names_step_and_rows(loss: float) -> None:
    with pytest.raises(TrainingError, match=r"step 8, rows \[3, 14\]"):
        check_loss(loss, step=7, rows=[3, 14])


def test_an_ordinary_loss_passes() -> None:
    check_loss(0.0, step=0, rows=[1])
