"""What the training log's figures mean, against counts by hand and torch's own."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_ray.core.spec import read_yaml
from pause_ray.data.shards import PackedRow
from pause_ray.models.shape import ModelShape
from pause_ray.training.batching import GlobalBatch, assign_rows, collate
from pause_ray.training.metrics import (
    PEAK_TFLOPS,
    known_shape,
    model_flops_utilization,
    step_flops,
    step_record,
    step_summary,
    training_series,
)

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def record(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 1e-4,
        "gradient_norm": 0.3,
        "tokens": 300,
        "loss_tokens": 30,
        "computed_tokens": 400,
        "seconds": 2.0,
        "peak_memory_bytes": 1024,
    }
    return step_record(**(values | changes))


def test_a_row_has_no_field_for_what_was_not_measured() -> None:
    assert record()["padding_share"] == 0.25
    assert record()["tokens_per_second"] == 150.0
    assert "mfu" not in record()
    assert record(mfu=0.0)["mfu"] == 0.0


@given(st.lists(st.integers(1, 50), min_size=12, max_size=12), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]))
def test_computed_tokens_are_those_of_the_batches_that_workers_get(lengths: list[int], micro_rows: int, parts: int) -> None:
    passes = assign_rows(range(12), lengths=lengths, micro_rows=micro_rows, groups=1)
    rows = [
        PackedRow(input_ids=np.ones(tokens, np.int32), labels=np.ones(tokens, np.int32), num_pauses=0, num_documents=1)
        for tokens in lengths
    ]
    batches = [collate([rows[number] for number in chosen]) for chosen in passes[0]]
    computed = sum(batch.part(index, of=parts).input_ids.size for batch in batches for index in range(parts))
    batch = GlobalBatch(numbers=list(range(12)), rows=dict(enumerate(rows)), passes=passes, loss_tokens=1)
    assert batch.computed_tokens(parts=parts) == computed


@pytest.mark.parametrize("window", [None, 3, 100])
def test_attention_counts_the_pairs_that_a_mask_leaves(window: int | None) -> None:
    plain = ModelShape.from_config(LLAMA)
    kinds = {} if window is None else {"model_type": "mistral", "sliding_window": window, "layer_types": ["sliding_attention"] * 2}
    shape = ModelShape.from_config(LLAMA | kinds)
    tokens = 8
    seen = sum(1 for query, key in itertools.product(range(tokens), repeat=2) if key <= query and (window is None or query - key < window))
    linear_only = 2 * (step_flops(shape, document_tokens=[tokens], loss_tokens=0)) - step_flops(
        shape, document_tokens=[tokens, tokens], loss_tokens=0
    )
    assert linear_only == 0, "documents add up"
    attention = 3 * 4 * 4 * 16 * seen * 2  # forward once and backward twice; heads × head size, two products of two operations; layers
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
    assert step_flops(shape, document_tokens=[tokens], loss_tokens=0) == 2 * 2 * weights * tokens + attention
    head = step_flops(plain, document_tokens=[], loss_tokens=5)
    assert head == 2 * 2 * 5 * 64 * 300


def test_many_short_documents_cost_less_than_a_long_one() -> None:
    shape = ModelShape.from_config(LLAMA)
    long, short = ([64], [8] * 8)
    assert step_flops(shape, document_tokens=long, loss_tokens=8) > step_flops(shape, document_tokens=short, loss_tokens=8)


@pytest.mark.torch
def test_operations_are_those_that_torch_counts_with_a_frozen_base() -> None:
    """But for attention, of which torch counts the masked half too, and the first layer, whose input needs no gradient."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    tokens = 24
    config = {name: value for name, value in LLAMA.items() if name != "model_type"} | {"num_hidden_layers": 6}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="eager"))
    model.requires_grad_(False)
    embedded = torch.randn(1, tokens, 64, requires_grad=True)  # as if something below the first layer were trained
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    shape = ModelShape.from_config(LLAMA | {"num_hidden_layers": 6})
    score_flops = 4 * 4 * 16 * 6
    masked = 3 * score_flops * (tokens * tokens - tokens * (tokens + 1) // 2)
    rotary = counter.get_total_flops() - step_flops(shape, document_tokens=[tokens], loss_tokens=tokens) - masked
    assert 0 <= rotary <= 0.001 * counter.get_total_flops()


def peak_flops(device_name: str) -> float | None:
    utilization = model_flops_utilization(1e12, seconds=1, device_name=device_name)
    return None if utilization is None else round(1e12 / utilization)


def test_a_gpu_is_known_by_the_name_its_driver_gives() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756.4e12
    assert peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 311.8e12
    assert peak_flops("NVIDIA A10G") == 70e12
    assert peak_flops("NVIDIA GeForce GTX 1060") is None


def test_no_entry_hides_a_later_one() -> None:
    assert [peak_flops(f"NVIDIA {name}") for name in PEAK_TFLOPS] == [1e12 * peak for peak in PEAK_TFLOPS.values()]


def test_utilization_is_of_all_workers() -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    assert model_flops_utilization(989.4e12, seconds=2.0, device_name=h100) == pytest.approx(0.5)
    assert model_flops_utilization(989.4e12, seconds=2.0, device_name=h100, workers=4) == pytest.approx(0.125)


def test_memory_of_a_process_grows_with_what_it_holds() -> None:
    code = (
        "import numpy; from pause_ray.training.metrics import peak_memory_bytes\n"
        "before = peak_memory_bytes('cpu'); held = numpy.ones(2**27, dtype=numpy.uint8); print(peak_memory_bytes('cpu') - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert 2**26 <= grown <= 2**28


def test_a_model_that_is_not_understood_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert known_shape(tmp_path) == ModelShape.from_config(LLAMA)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert known_shape(tmp_path) is None


def test_curves_have_the_steps_that_have_a_value() -> None:
    rows = [record(), {**record(step=2), "validation_loss": 1.5}, record(step=3)]
    series = training_series(rows)
    assert series["training_validation_loss"] == [(2, 1.5)]
    assert [step for step, _ in series["training_loss"]] == [1, 2, 3]
    assert "training_mfu" not in series


def test_a_progress_line_says_loss_speed_and_use_of_the_gpu() -> None:
    assert step_summary(record(loss=0.41234, tokens=2_400_000)) == "loss 0.412 · 1,200,000 tokens/s"
    assert step_summary(record(mfu=0.461)).endswith(" · MFU 46%")


def test_the_table_of_gpus_has_the_same_peaks() -> None:
    for gpu in read_yaml(ROOT / "cluster" / "gpus.yaml")["gpus"]:
        assert peak_flops(f"NVIDIA {gpu['name']}") == 1e12 * gpu["bf16_tflops"], gpu["name"]
