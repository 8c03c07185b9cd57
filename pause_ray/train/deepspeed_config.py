"""The DeepSpeed configuration of a train spec. Pure; knows no DeepSpeed."""

from __future__ import annotations

from pause_ray.spec import JsonObject
from pause_ray.train.loop import Share
from pause_ray.train.spec import TrainSpec

NEVER = 2**31 - 1
"""Steps between DeepSpeed's own progress lines; the training log has them all."""


def deepspeed_config(train: TrainSpec, *, share: Share) -> JsonObject:
    """Configuration for ``deepspeed.initialize``.

    Under bfloat16 every stage keeps a float32 master copy of the trained weights and float32 AdamW moments. The
    learning rate is set anew before every step. ``torch_adam`` is torch's AdamW: DeepSpeed's own ones need a compiler.
    """
    return {
        "train_micro_batch_size_per_gpu": share.micro_rows,
        "gradient_accumulation_steps": share.passes,
        "gradient_clipping": train.gradient_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": train.learning_rate, "weight_decay": train.weight_decay, "torch_adam": True},
        },
        "bf16": {"enabled": train.precision == "bfloat16"},
        "zero_optimization": {"stage": train.zero.stage},
        "steps_per_print": NEVER,
    }
