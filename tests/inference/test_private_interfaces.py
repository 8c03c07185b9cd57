"""The private interfaces of torch and transformers that inference uses exist in the installed libraries.

After an upgrade, a failure here names the interface that changed.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

pytestmark = pytest.mark.torch


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_torch_has_flash_attention_kernels_with_these_arguments() -> None:
    import torch

    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    names = [argument.name for argument in kernel.default._schema.arguments]
    assert names[:5] == ["query", "key", "value", "dropout_p", "is_causal"]
    assert "scale" in names
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default._schema.arguments
    assert [argument.name for argument in on_cpu][:3] == ["query", "key", "value"]


def test_torch_counts_the_operations_of_attention_from_shapes() -> None:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

    assert parameters(sdpa_flop)[:3] == ["query_shape", "key_shape", "value_shape"]
    assert {"display", "custom_mapping"} <= set(parameters(FlopCounterMode))


def test_transformers_registers_attention_and_masks_under_a_name() -> None:
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    for registry in (transformers.AttentionInterface, AttentionMaskInterface):
        assert parameters(registry.register) == ["key", "value"]
    arguments = ["module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"]
    assert parameters(sdpa_attention_forward)[: len(arguments)] == arguments
    given = {"q_length", "kv_length", "q_offset", "kv_offset", "attention_mask", "local_size", "allow_is_causal_skip", "device", "dtype"}
    assert given - set(parameters(sdpa_mask)) == {"dtype"}, "dtype is one of the further keyword arguments"


def test_transformers_says_under_these_names_which_attention_a_model_has() -> None:
    import transformers

    assert isinstance(transformers.PreTrainedModel._supports_sdpa, bool)
    config = transformers.AutoConfig.for_model("llama", attn_implementation="eager")
    assert config._attn_implementation == "eager"
    assert callable(transformers.PreTrainedModel.set_attn_implementation)


def test_a_layer_of_a_cache_has_exactly_these_abstract_methods() -> None:
    from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

    methods = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
    assert CacheLayerMixin.__abstractmethods__ == methods
    assert DynamicSlidingWindowLayer(7).sliding_window == 7
