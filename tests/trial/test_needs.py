"""The needs of a trial: GPUs and their prices, time and money, the smallest cluster."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import read_yaml
from pause_ray.models.shape import PUBLISHED, ModelShape
from pause_ray.planning.forecast import forecast_trial
from pause_ray.training.batching import collate
from pause_ray.training.memory import ROOM
from pause_ray.training.metrics import PEAK_TFLOPS
from pause_ray.training.spec import TrainSpec
from pause_ray.trial.needs import (
    HOST_LINK_GB_PER_SECOND,
    LOCAL_DISK_GB_PER_SECOND,
    GpuTable,
    Hardware,
    Plan,
    Rows,
    grid_of,
    make_plan,
)
from pause_ray.trial.spec import TrialSpec
from tests.evaluation.tiny import make_haystack_folder, make_suite, make_tokenizer_folder
from tests.training.tiny_llama import make_rows

ROOT = Path(__file__).resolve().parents[2]
SMALL, MIDDLE, LARGE = (ModelShape.from_config(config) for config in PUBLISHED.values())
ROWS = Rows(longest_tokens=4096, mean_tokens=2048, loss_tokens=64)
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def table() -> GpuTable:
    return GpuTable.parse(read_yaml(ROOT / "cluster" / "gpus.yaml"), origin="test")


@pytest.fixture
def hardware(table: GpuTable) -> Hardware:
    return Hardware(gpu=table.choose(name="H100", memory_gb=None), gpus=8, gpus_per_node=8, utilization=0.4, network_gb_per_second=50)


def train_of(**fields: Any) -> TrainSpec:
    return TrainSpec.parse({"micro_batch_size": 1, "gradient_accumulation_steps": 8, "zero": {"stage": "auto"}} | fields, origin="test")


def planned(hardware: Hardware, train: TrainSpec | None = None, *, shape: ModelShape = MIDDLE, rows: Rows = ROWS, **changes: Any) -> Plan:
    here = dataclasses.replace(hardware, **changes)
    return make_plan("plan", shape=shape, train=train or train_of(), rows=rows, grid=None, hardware=here)


def test_the_shipped_table_has_the_peaks_that_training_is_measured_by(table: GpuTable) -> None:
    names = [gpu.name for gpu in table.gpus]
    assert len(set(names)) == len(names)
    for gpu in table.gpus:
        assert gpu.bf16_tflops == PEAK_TFLOPS[gpu.name]
        assert gpu.price_source.startswith("https://")


def test_a_gpu_is_chosen_by_name_or_memory(table: GpuTable) -> None:
    assert table.choose(name="rtx 4090", memory_gb=None).memory_gb == 24
    assert table.choose(name=None, memory_gb=48).name == "RTX A6000"
    assert table.choose(name=None, memory_gb=None).memory_gb == 80
    assert table.choose(name="A100", memory_gb=40).memory_gb == 40
    with pytest.raises(SpecError, match=r"--gpu TPU: not in the table of GPUs, which has B200 \(180 GB\), .*name one of them"):
        table.choose(name="TPU", memory_gb=None)
    with pytest.raises(SpecError, match=r"--gpu-memory 33GB: not in the table"):
        table.choose(name=None, memory_gb=33)


def test_time_and_money_follow_the_assumptions(hardware: Hardware) -> None:
    usual = planned(hardware).training
    assert usual is not None
    assert usual.tokens == 60 * 8 * 2048
    for changes, factor in (({"utilization": 0.8}, 0.5), ({"gpus": 4}, 2)):
        other = planned(hardware, **changes).training
        assert other is not None
        assert other.seconds == pytest.approx(factor * usual.seconds)
        assert other.cost == pytest.approx(other.seconds / 3600 * changes.get("gpus", 8) * hardware.gpu.price_per_hour)
    recomputed = planned(hardware, train_of(gradient_checkpointing=True)).training
    assert recomputed is not None
    assert usual.flops < recomputed.flops < 1.5 * usual.flops


def test_weights_that_are_gathered_over_a_slow_network_decide_the_time(hardware: Hardware) -> None:
    found = [
        planned(hardware, train_of(gradient_accumulation_steps=16), shape=LARGE, gpus=16, network_gb_per_second=speed).training
        for speed in (1000, 1, 0.5)
    ]
    assert [its.bound_by for its in found if its] == ["computing", "moving weights", "moving weights"]
    seconds = [its.seconds for its in found if its]
    assert seconds[2] == pytest.approx(2 * seconds[1])


def test_weights_that_wait_in_the_machine_come_over_its_link(hardware: Hardware) -> None:
    def seconds(where: str, gpus: int) -> tuple[float, str]:
        zero = {"stage": 3, "offload_parameters": where} | ({"nvme_path": "/local"} if where == "nvme" else {})
        found = planned(hardware, train_of(gradient_checkpointing=True, zero=zero), shape=LARGE, gpus=gpus).training
        assert found is not None
        return found.seconds, found.bound_by

    assert seconds("none", 1)[1] == seconds("cpu", 8)[1] == "computing"
    moved = 60 * 2 * 8 * LARGE.weight_bytes("bfloat16")  # there and back in each of eight passes
    assert seconds("cpu", 1) == (pytest.approx(moved / (HOST_LINK_GB_PER_SECOND * 1e9)), "moving weights")
    assert seconds("nvme", 1) == (pytest.approx(moved / (LOCAL_DISK_GB_PER_SECOND * 1e9)), "moving weights")


def test_an_answer_reads_the_keys_of_its_own_prompt_and_not_of_the_longest(hardware: Hardware, tmp_path: Path) -> None:
    suite = make_suite(make_haystack_folder(tmp_path / "essays"), context_tokens=[1000, 3000])
    found = grid_of(suite, shape=MIDDLE, hardware=hardware, dtype="bfloat16")
    assert found.kv_bytes == 2000 * MIDDLE.kv_bytes_per_token(2) < found.prompts.kv_bytes


@pytest.mark.parametrize("tokens", [512, 131_072])
def test_recomputing_takes_one_more_pass_through_the_layers_and_none_through_the_output(hardware: Hardware, tokens: int) -> None:
    rows = Rows(longest_tokens=tokens, mean_tokens=tokens, loss_tokens=tokens)
    kept, again = (planned(hardware, train_of(max_steps=1, gradient_checkpointing=on), rows=rows).training for on in (False, True))
    assert kept is not None
    assert again is not None
    one_pass = MIDDLE.forward_flops(new_tokens=tokens, past_tokens=0, logit_rows=0)
    attention = 4 * MIDDLE.num_heads * MIDDLE.head_dim * MIDDLE.num_layers * tokens * (tokens - 1) // 2  # above the diagonal: not needed
    assert again.flops - kept.flops == 8 * (one_pass - attention)


@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE])
@pytest.mark.parametrize("memory_gb", [24, 80])
@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "quantize": "nf4"}])
def test_the_smallest_cluster_is_the_first_that_fits(
    hardware: Hardware, shape: ModelShape, memory_gb: float, fields: dict[str, Any]
) -> None:
    train = train_of(gradient_accumulation_steps=32, **fields)
    gpu = hardware.gpu.model_copy(update={"memory_gb": memory_gb})
    sizes = [1, 2, 4, 8, 16, 32]  # that 32 rows can be shared by
    fitting = [size for size in sizes if planned(hardware, train, shape=shape, gpus=size, gpu=gpu).remedy is None]
    assert planned(hardware, train, shape=shape, gpu=gpu).smallest == (fitting[0] if fitting else None)


def test_a_cluster_larger_than_a_step_has_rows_needs_more_rows(hardware: Hardware) -> None:
    gpu = hardware.gpu.model_copy(update={"memory_gb": 24})
    train, here = train_of(gradient_checkpointing=True), dataclasses.replace(hardware, gpu=gpu)
    fixed, growing = (
        make_plan("plan", shape=LARGE, train=train, rows=ROWS, grid=None, hardware=here, rows_may_grow=grow).smallest
        for grow in (False, True)
    )
    assert fixed is None
    assert growing is not None
    assert growing > train.rows_per_step


def test_a_model_that_one_gpu_cannot_hold_is_spread(hardware: Hardware, tmp_path: Path) -> None:
    suite = make_suite(make_haystack_folder(tmp_path / "essays"), context_tokens=[512, 2048])
    plans = [
        make_plan(
            "plan",
            shape=shape,
            train=None,
            rows=ROWS,
            grid=grid_of(suite, shape=shape, hardware=hardware, dtype="bfloat16"),
            hardware=hardware,
        )
        for shape in (SMALL, LARGE)
    ]
    assert plans[0].gpus_per_model == 1
    assert (plans[1].gpus_per_model - 1) * ROOM * 80e9 < 2 * LARGE.num_parameters < plans[1].gpus_per_model * ROOM * 80e9
    assert plans[1].smallest == plans[1].gpus_per_model
    assert plans[0].memory is None
    alone = dataclasses.replace(hardware, gpus=1)
    assert (
        make_plan(
            "plan", shape=LARGE, train=None, rows=ROWS, grid=grid_of(suite, shape=LARGE, hardware=alone, dtype="bfloat16"), hardware=alone
        ).evaluation
        is None
    )


def test_a_grid_without_its_texts_is_about_that_with_them(hardware: Hardware, tmp_path: Path) -> None:
    model = make_tokenizer_folder(tmp_path / "model", limit_tokens=5000)
    config = json.loads((model / "config.json").read_text()) | TINY
    (model / "config.json").write_text(json.dumps(config))
    suite = make_suite(make_haystack_folder(tmp_path / "essays"), context_tokens=[1024, 2048, 4096])
    trial = TrialSpec.parse({"model": {"source": str(model)}, "eval": suite.resolved()}, origin="test")
    exact = forecast_trial(trial, cache=tmp_path).by_reuse["full"]
    alone = dataclasses.replace(hardware, gpus=1)
    found = grid_of(suite, shape=ModelShape.from_config(config), hardware=alone, dtype="float32")
    assert found.answer_tokens == suite.max_new_tokens
    assert found.prompts.num_prompts == exact.num_prompts
    assert found.prompts.prefilled_tokens == pytest.approx(exact.prefilled_tokens, rel=0.1)
    assert found.prompts.kv_bytes == pytest.approx(exact.kv_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": {"rank": 5000}}, r"train\.lora\.rank 5000: above the model's hidden size 4096"),
        (
            {"lora": {"targets": ["q_proj", "query"]}},
            r"train\.lora\.targets: \['query'\] name no linear layer of the model; it has \['down_proj'",
        ),
        ({"gradient_accumulation_steps": 9}, r"= 9 rows per step cannot be shared by 8 workers"),
        ({"sequence_parallel": 3}, r"train\.sequence_parallel 3 needs groups of 3 workers"),
        ({"sequence_parallel": 64}, r"train\.sequence_parallel 64 is more workers than the model's 32 attention heads"),
    ],
)
def test_what_a_training_would_refuse_is_refused(hardware: Hardware, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        planned(hardware, train_of(**fields))


def test_a_plan_that_does_not_fit_says_what_would(hardware: Hardware) -> None:
    found = planned(hardware, train_of(zero={"stage": 1}), shape=LARGE)
    assert found.remedy is not None
    assert found.remedy.startswith("what would fit: train.zero.stage: auto")
    assert found.memory is not None
    assert found.memory.stage == 1
    data = json.loads(json.dumps(found.as_json()))
    assert data["memory"]["gpu_bytes"] == sum(data["memory"]["gpu_parts"].values()) > hardware.memory_bytes


@pytest.mark.torch
@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_operations_are_those_that_torch_counts(hardware: Hardware, tmp_path: Path, checkpointing: bool) -> None:
    loss, model, flops = (
        pytest.importorskip(name) for name in ("pause_ray.training.loss", "pause_ray.training.model", "torch.utils.flop_counter")
    )
    from tests.inference.tiny_model import make_model

    folder = make_model(tmp_path / "model", hidden_size=128, intermediate_size=320, num_hidden_layers=8)
    train = train_of(
        max_steps=1,
        micro_batch_size=8,
        gradient_accumulation_steps=1,
        precision="float32",
        lora={"rank": 1},
        gradient_checkpointing=checkpointing,
    )
    wrapped = loss.LossModel(model.load_trainable(train, model_dir=folder, marker=None, seed=0, device="cpu", stage=0))
    batch = collate(make_rows(8))
    with flops.FlopCounterMode(display=False) as counter:
        wrapped(**loss.tensors(batch, device="cpu")).backward()
    tokens = batch.input_ids.shape[1] / 8
    rows = Rows(longest_tokens=41, mean_tokens=tokens, loss_tokens=3)
    found = planned(hardware, train, shape=ModelShape.load(folder), rows=rows, gpus=1).training
    assert found is not None
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.15)
