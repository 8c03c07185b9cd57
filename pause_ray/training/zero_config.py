"""The configuration that DeepSpeed is given for a training. Pure: planning reads it without loading torch or DeepSpeed."""

from __future__ import annotations

from pause_ray.core.spec import JsonObject
from pause_ray.training.batching import BatchLayout
from pause_ray.training.spec import TrainSpec, ZeroSpec

NEVER = 2**31 - 1
"""Steps between DeepSpeed's progress lines, which the training log makes superfluous."""
LIVE_BUCKETS = 20
"""Gathered parameters that stage 3 keeps at a time, in buckets: a billion with the default bucket, as DeepSpeed's default."""
WHOLE_ELEMENTS = 100_000
"""Elements up to which a parameter stays whole on every worker under stage 3, as for norms and most adapter matrices."""
FIRST_LOSS_SCALE_POWER = 12
"""Exponent of two of float16's first loss scale. DeepSpeed's 16 would lose the first steps of a short run to overflows."""


def deepspeed_config(train: TrainSpec, *, layout: BatchLayout, stage: int, world_size: int) -> JsonObject:
    """Return the configuration for ``deepspeed.initialize``.

    In 16 bits every stage keeps a float32 master copy of the trained weights and float32 AdamW moments. The trainer
    sets the learning rate before every step. ``torch_adam`` is torch's AdamW; DeepSpeed's need a compiler. Workers that share
    the tokens of a row count as data parallel, as their gradients are summed in the same way. DeepSpeed refuses to start with
    another number of workers than ``world_size``.
    """
    return {
        "train_batch_size": layout.micro_rows * layout.passes * world_size,
        "train_micro_batch_size_per_gpu": layout.micro_rows,
        "gradient_accumulation_steps": layout.passes,
        "gradient_clipping": train.gradient_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": train.learning_rate, "weight_decay": train.weight_decay, "torch_adam": True},
        },
        "bf16": {"enabled": train.precision == "bfloat16"},
        "fp16": {"enabled": train.precision == "float16", "initial_scale_power": FIRST_LOSS_SCALE_POWER, "hysteresis": 1},
        "zero_optimization": _zero(train.zero, stage),
        "steps_per_print": NEVER,
    }


def _zero(zero: ZeroSpec, stage: int) -> JsonObject:
    if stage == 0:
        return {"stage": 0}
    bucket = zero.bucket_elements - zero.bucket_elements % 2  # DeepSpeed requires an even number
    config: JsonObject = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        config |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": LIVE_BUCKETS * bucket,
            "stage3_max_reuse_distance": LIVE_BUCKETS * bucket,
            "stage3_param_persistence_threshold": WHOLE_ELEMENTS,
        }
    nvme = {"nvme_path": zero.nvme_path}
    if zero.offload_optimizer != "none":
        config["offload_optimizer"] = {"device": zero.offload_optimizer} | (nvme if zero.offload_optimizer == "nvme" else {})
    if zero.offload_parameters != "none" and stage == 3:
        config["offload_param"] = {"device": zero.offload_parameters} | (nvme if zero.offload_parameters == "nvme" else {})
    return config
