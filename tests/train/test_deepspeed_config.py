"""What DeepSpeed is told."""

from __future__ import annotations

import pytest

from pause_ray.train.deepspeed_config import deepspeed_config
from pause_ray.train.loop import share
from pause_ray.train.spec import TrainSpec, ZeroSpec


def test_the_papers_setting_on_one_worker() -> None:
    train = TrainSpec()
    config = deepspeed_config(train, share=share(train, num_workers=1))
    assert config == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "weight_decay": 0.0, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0},
        "steps_per_print": 2**31 - 1,
    }


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_workers_share_the_rows_of_a_step(num_workers: int, stage: int) -> None:
    train = TrainSpec(zero=ZeroSpec(stage=stage), precision="float32")
    config = deepspeed_config(train, share=share(train, num_workers=num_workers))
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * num_workers == 8
    assert config["zero_optimization"]["stage"] == stage
    assert config["bf16"]["enabled"] is False
