"""How many adapters fit beside each other: the base once, everything else as often as there are adapters."""

from __future__ import annotations

import pytest

from pause_ray.engines.cost import ModelShape
from pause_ray.engines.published import PUBLISHED
from pause_ray.errors import SpecError
from pause_ray.train.memory import MemoryPlan, Workers, plan_memory
from pause_ray.train.room import check_room, side_by_side_bytes
from pause_ray.train.spec import LoraSpec, TrainSpec

_, MIDDLE, _ = (ModelShape.from_config(config) for config in PUBLISHED.values())
GPU = 80_000_000_000


def planned(train: TrainSpec, *, tokens: int = 4096) -> MemoryPlan:
    return plan_memory(train, shape=MIDDLE, workers=Workers(number=1, per_node=1), stage=0, longest_row_tokens=tokens)


def test_the_base_is_there_once_and_activations_grow_with_the_adapters() -> None:
    one = planned(TrainSpec())
    four = side_by_side_bytes([one] * 4)
    assert side_by_side_bytes([one]) == one.worker_bytes
    own = one.worker["adapter"] + one.worker["gradients"] + one.worker["optimizer"] + one.worker["activations"]
    assert four == one.worker_bytes + 3 * own
    assert four < 4 * one.worker_bytes - 3 * one.worker["weights"]


def test_a_large_and_a_small_adapter_need_what_they_need_in_any_order() -> None:
    small, large = planned(TrainSpec(lora=LoraSpec(rank=4))), planned(TrainSpec(lora=LoraSpec(rank=256)), tokens=1024)
    assert side_by_side_bytes([small, large]) == side_by_side_bytes([large, small])
    assert side_by_side_bytes([small, large]) > max(small.worker_bytes, large.worker_bytes)


def checked(number: int, *, memory_bytes: int = GPU, **train: object) -> None:
    trains = [TrainSpec.parse(train, origin="test")] * number
    check_room(trains, shape=MIDDLE, workers=1, memory_bytes=memory_bytes, longest_row_tokens=[4096] * number)


def test_too_many_are_refused_and_told_how_many_fit() -> None:
    checked(1)
    with pytest.raises(
        SpecError, match=r"64 adapters side by side need .* 80\.0 GB .*train_together to (\d+), or train\.gradient_ch"
    ) as caught:
        checked(64)
    number = int(str(caught.value).split("train_together to ")[1].split(",")[0])
    checked(number)
    with pytest.raises(SpecError):
        checked(number + 1)


def test_a_base_that_does_not_fit_at_all_is_told_so() -> None:
    with pytest.raises(SpecError, match=r"one after another, at another train\.zero\.stage$"):
        checked(2, memory_bytes=GPU // 10, gradient_checkpointing=True)


def test_a_model_of_unknown_sizes_is_left_unchecked() -> None:
    check_room([TrainSpec()] * 9, shape=None, workers=1, memory_bytes=1, longest_row_tokens=[4096] * 9)
