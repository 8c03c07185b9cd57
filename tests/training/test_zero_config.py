"""What DeepSpeed is told."""

from __future__ import annotations

from typing import Any

import pytest

from pause_ray.training.batching import BatchLayout
from pause_ray.training.spec import TrainSpec, ZeroSpec
from pause_ray.training.zero_config import deepspeed_config

LAYOUT = BatchLayout(rows_per_step=8, micro_rows=2, passes=4)
ALL_STAGES: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "weight_decay": 0.0, "torch_adam": True}},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "initial_scale_power": 12, "hysteresis": 1},
    "steps_per_print": 2**31 - 1,
}
BUCKETS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
GATHERING = {
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/local"}


def configured(train: TrainSpec, *, stage: int, world_size: int = 1) -> dict[str, Any]:
    return deepspeed_config(train, layout=LAYOUT, stage=stage, world_size=world_size)


@pytest.mark.parametrize(
    ("zero", "stage", "expected"),
    [
        ({}, 0, {"stage": 0}),
        ({"stage": 1}, 1, {"stage": 1} | BUCKETS),
        ({"stage": 2}, 2, {"stage": 2} | BUCKETS),
        ({"stage": 3}, 3, {"stage": 3} | BUCKETS | GATHERING),
        ({"stage": "auto"}, 2, {"stage": 2} | BUCKETS),
        ({"stage": 2, "offload_optimizer": "cpu"}, 2, {"stage": 2, "offload_optimizer": CPU} | BUCKETS),
        (
            {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
            3,
            {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU} | BUCKETS | GATHERING,
        ),
        (
            {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": "/local"},
            3,
            {"stage": 3, "offload_optimizer": NVME, "offload_param": NVME} | BUCKETS | GATHERING,
        ),
    ],
)
def test_the_whole_configuration_of_every_stage(zero: dict[str, Any], stage: int, expected: dict[str, Any]) -> None:
    train = TrainSpec(zero=ZeroSpec.parse(zero, origin="test"))
    assert configured(train, stage=stage) == ALL_STAGES | {"zero_optimization": expected}


@pytest.mark.parametrize(("precision", "bf16", "fp16"), [("bfloat16", True, False), ("float16", False, True), ("float32", False, False)])
def test_one_precision_is_switched_on(precision: Any, bf16: bool, fp16: bool) -> None:
    config = configured(TrainSpec(precision=precision), stage=1)
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (bf16, fp16)


def test_clipping_rate_and_decay_are_the_specs() -> None:
    config = configured(TrainSpec(gradient_clip=0.3, learning_rate=1e-5, weight_decay=0.1), stage=0)
    assert config["gradient_clipping"] == 0.3
    assert config["optimizer"]["params"] == {"lr": 1e-5, "weight_decay": 0.1, "torch_adam": True}


def test_rows_of_all_workers_are_the_batch_that_deepspeed_checks() -> None:
    assert configured(TrainSpec(), stage=1, world_size=3)["train_batch_size"] == 2 * 4 * 3


def test_a_bucket_is_even_and_sizes_everything_that_is_sent() -> None:
    config = configured(TrainSpec(zero=ZeroSpec(stage=3, bucket_elements=1_001)), stage=3)["zero_optimization"]
    sent = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    assert [config[name] for name in sent] == [1_000] * 3
    assert config["stage3_max_live_parameters"] == 20_000


@pytest.mark.torch
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_knows_every_setting(stage: int) -> None:
    """An unknown key of ``zero_optimization`` is an error of DeepSpeed's own schema."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    train = TrainSpec(zero=ZeroSpec.parse({"stage": "auto", "offload_optimizer": "cpu", "offload_parameters": "cpu"}, origin="test"))
    zero = configured(train, stage=stage)["zero_optimization"]
    assert config.DeepSpeedZeroConfig(**zero).stage == stage


@pytest.mark.parametrize("stage", [3, "auto"])
def test_weights_in_8_bits_go_with_stages_up_to_2(stage: int | str) -> None:
    assert TrainSpec.model_validate({"quantize": "int8", "zero": {"stage": 2}}).quantize == "int8"
    with pytest.raises(ValueError, match=r"int8 gives wrong losses under ZeRO stage 3 .* or a stage up to 2"):
        TrainSpec.model_validate({"quantize": "int8", "zero": {"stage": stage}})
