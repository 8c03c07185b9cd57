"""The private interfaces that training uses exist in the installed libraries.

After an upgrade, a failure here names the interface that changed.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest


def source_of(owner: Any) -> str:
    return inspect.getsource(owner)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("owner", "assigned"),
    [
        ("runtime.engine.DeepSpeedEngine", ["self.basic_optimizer = ", "self.skipped_steps = ", "self.optimizer = "]),
        ("runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3", ["self.fp32_partitioned_groups_flat = "]),
        ("runtime.zero.partition_parameters.Init", ["param.ds_tensor = ", "param.ds_shape = ", "param.ds_process_group = "]),
        ("runtime.zero.partition_parameters.Init", ["param.convert_to_zero_parameters = "]),
        ("runtime.fp16.fused_optimizer.FP16_Optimizer", ["self.loss_scale_config = "]),
        ("runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer", ["self.loss_scale_config = "]),
        ("runtime.fp16.loss_scaler.DynamicLossScaler", ["self.cur_scale = ", "self.cur_iter = ", "self.last_overflow_iter = "]),
        ("runtime.fp16.loss_scaler.DynamicLossScaler", ["self.cur_hysteresis = "]),
        ("utils.mixed_precision_linkage", ["._hp_mapping = "]),
        ("comm.torch", ["deepspeed.ops.__compatible_ops__.get("]),
    ],
)
def test_deepspeed_keeps_its_state_under_these_names(owner: str, assigned: list[str]) -> None:
    import pkgutil

    code = source_of(pkgutil.resolve_name(f"deepspeed.{owner}"))
    assert [text for text in assigned if text not in code] == []


@pytest.mark.torch
def test_deepspeed_links_optimizer_state_to_parameters_in_this_method() -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for optimizer in (BF16_Optimizer, DeepSpeedZeroOptimizer):
        assert list(inspect.signature(optimizer._lazy_init_hp_params_optimizer_state).parameters) == ["self"]


@pytest.mark.torch
def test_peft_makes_layers_with_these_arguments_and_attributes() -> None:
    from peft.tuners.lora.layer import Linear, LoraLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    for layer in (LoraLayer, Linear):
        assert list(inspect.signature(layer.update_layer).parameters)[1:5] == ["adapter_name", "r", "lora_alpha", "config"]
    forward = inspect.signature(TrainableTokensLayer.forward_adapters).parameters
    assert list(forward)[:3] == ["self", "x", "active_adapters"]
    assert list(inspect.signature(TrainableTokensLayer._get_embed_scale).parameters) == ["self"]
    code = source_of(TrainableTokensLayer)
    for name in ("trainable_tokens_delta", "trainable_tokens_original", "token_indices"):
        assert f"self.{name} = " in code
    assert "self.token_adapter = " in source_of(TrainableTokensWrapper)


@pytest.mark.ray
def test_ray_train_answers_interrupts_in_this_method() -> None:
    from ray.train.torch import TorchTrainer

    assert list(inspect.signature(TorchTrainer._register_sigint_handler).parameters) == ["self", "controller"]
    assert "self._register_sigint_handler(controller)" in source_of(TorchTrainer._initialize_and_run_controller)


@pytest.mark.ray
def test_ray_train_keeps_the_cause_of_a_failure_under_these_names() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    cause = ValueError("cause")
    assert WorkerGroupError("told", {0: cause}).worker_failures == {0: cause}
    assert ControllerError(cause).controller_failure is cause
    assert WorkerHealthCheckFailedError("told", cause).health_check_failure is cause
    assert UserExceptionWithTraceback(cause, "")._base_exc is cause
    assert ActorDiedError().preempted is False
