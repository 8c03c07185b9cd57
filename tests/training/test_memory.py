"""Memory plans: what they are made of, which stage they choose, what they say when nothing fits; and that autograd keeps what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import parse_assignments, with_overrides
from pause_ray.models.shape import PUBLISHED, ModelShape, published_config
from pause_ray.training.batching import batch_layout, collate
from pause_ray.training.memory import (
    MemoryPlan,
    Workers,
    cheapest_plan,
    plan_memory,
    possible_stages,
    resolve_stage,
    what_would_fit,
)
from pause_ray.training.spec import TrainSpec
from tests.training.tiny_llama import make_rows

SMALL, MIDDLE, LARGE = (ModelShape.from_config(config) for config in PUBLISHED.values())
AUTO: dict[str, Any] = {"zero": {"stage": "auto"}}
GPU = 80_000_000_000


def train_of(**fields: Any) -> TrainSpec:
    return TrainSpec.parse(AUTO | fields, origin="test")


def planned(train: TrainSpec, *, shape: ModelShape = MIDDLE, number: int = 8, stage: int = 0, tokens: int = 4096) -> MemoryPlan:
    return plan_memory(train, shape=shape, workers=Workers(number=number, per_node=8), stage=stage, longest_row_tokens=tokens)


@pytest.mark.parametrize(("shape", "billions"), [(SMALL, 3.21), (MIDDLE, 8.03), (LARGE, 70.6)])
def test_published_models_have_their_published_sizes(shape: ModelShape, billions: float) -> None:
    assert shape.num_parameters == pytest.approx(billions * 1e9, rel=2e-3)
    assert planned(TrainSpec(), shape=shape).worker["weights"] == 2 * shape.num_parameters - 2 * shape.hidden_size


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "8B", "8b"])
def test_a_published_model_is_found_by_its_name_or_size(name: str) -> None:
    assert published_config(name) is PUBLISHED["meta-llama/Llama-3.1-8B"]
    assert published_config("Qwen/Qwen3-8B") is None


@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE])
@pytest.mark.parametrize("number", [2, 8, 16])
def test_each_stage_divides_one_thing_more_among_the_workers(shape: ModelShape, number: int) -> None:
    train = train_of()
    plans = [planned(train, shape=shape, number=number, stage=stage).worker for stage in range(4)]
    for part, since in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
        for stage, plan in enumerate(plans):
            share = number if stage >= since else 1
            assert plan[part] == pytest.approx(plans[0][part] / share, rel=1e-6), (part, stage)
    assert plans[3]["gathered weights"] == 2 * 20 * train.zero.bucket_elements
    assert all("gathered weights" not in plan for plan in plans[:3])


@pytest.mark.parametrize(
    ("fields", "part", "low", "high"),
    [
        ({"gradient_checkpointing": True}, "activations", 1 / 32, 1 / 8),  # one of 32 layers, and what goes into each
        ({"micro_batch_size": 1, "gradient_accumulation_steps": 8}, "activations", 0.5, 0.5),
        ({"lora": {"rank": 32}}, "adapter", 2, 2),
        ({"lora": {"rank": 32}}, "optimizer", 2, 2),
        ({"precision": "float32"}, "weights", 2, 2),
        ({"quantize": "nf4"}, "weights", 1 / 4, 3 / 8),  # embeddings stay as they are
        ({"quantize": "int8"}, "weights", 1 / 2, 5 / 8),
        ({"lora": {"dropout": 0.1}}, "activations", 1.2, 2),
        ({"lora": {"dora": True}}, "activations", 1.2, 2),
        ({"lora": {"targets": ["q_proj", "v_proj"]}}, "activations", 0.7, 0.95),
    ],
)
def test_a_setting_changes_its_part(fields: dict[str, Any], part: str, low: float, high: float) -> None:
    zero = {"zero": {"stage": 0}}
    before, after = (planned(train_of(**(zero | changes)), number=1).worker for changes in ({}, fields))
    assert low - 1e-3 <= after[part] / before[part] <= high + 1e-3


def test_what_is_offloaded_leaves_the_gpu_for_the_machine() -> None:
    here = planned(train_of(), stage=3, shape=LARGE)
    away = planned(train_of(zero={"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}), stage=3, shape=LARGE)
    assert "optimizer" not in away.worker
    assert "weights" not in away.worker
    assert away.host["offloaded"] == 8 * (here.worker["optimizer"] + here.worker["weights"])
    assert away.host_bytes == away.host["processes"] + away.host["offloaded"], "reading the weights is over by then"
    disk = planned(train_of(zero={"stage": 3, "offload_parameters": "nvme", "nvme_path": "/local"}), stage=3, shape=LARGE)
    assert disk.host["offloaded"] < away.host["offloaded"] / 10


def test_workers_that_share_a_row_hold_a_part_of_it() -> None:
    whole, part = (planned(train_of(sequence_parallel=number, micro_batch_size=1, gradient_accumulation_steps=8)) for number in (1, 4))
    assert part.worker["activations"] == pytest.approx(whole.worker["activations"] / 4, rel=1e-3)


def test_activations_grow_with_the_row_and_nothing_with_its_square() -> None:
    for shape in (
        MIDDLE,
        ModelShape.from_config(dict(PUBLISHED["meta-llama/Llama-3.1-8B"]) | {"model_type": "mistral", "sliding_window": 4096}),
    ):
        sizes = [planned(train_of(), shape=shape, tokens=tokens).worker["activations"] for tokens in (8192, 16_384)]
        assert sizes[1] == pytest.approx(2 * sizes[0], rel=1e-3)


@pytest.mark.parametrize(
    ("zero", "stages"),
    [
        ({"stage": "auto"}, (0, 1, 2, 3)),
        ({"stage": "auto", "offload_optimizer": "cpu"}, (1, 2, 3)),
        ({"stage": "auto", "offload_parameters": "cpu"}, (3,)),
        ({"stage": 2}, (2,)),
    ],
)
def test_offloads_need_the_stages_that_have_them(zero: dict[str, Any], stages: tuple[int, ...]) -> None:
    assert possible_stages(train_of(zero=zero)) == stages


@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE])
def test_auto_takes_the_first_stage_that_fits(shape: ModelShape) -> None:
    train, chosen = train_of(gradient_checkpointing=True, lora={"rank": 256}), set[int]()
    for memory in np.geomspace(8e9, 400e9, 60):
        sizes = [planned(train, shape=shape, stage=stage, number=16).worker_bytes for stage in range(4)]
        found = cheapest_plan(train, shape=shape, workers=Workers(number=16, per_node=8), memory_bytes=int(memory), longest_row_tokens=4096)
        fitting = [stage for stage, size in enumerate(sizes) if size <= 0.9 * int(memory)]
        assert (found.stage if found else None) == (fitting[0] if fitting else None)
        chosen |= set(fitting[:1])
    assert {0, 3} <= chosen


def test_a_given_stage_stays_and_cpus_are_not_checked() -> None:
    train = train_of(zero={"stage": 1})
    assert resolve_stage(train, shape=LARGE, workers=8, memory_bytes=None, longest_row_tokens=4096) == 1
    assert resolve_stage(train, shape=None, workers=8, memory_bytes=GPU, longest_row_tokens=4096) == 1
    assert resolve_stage(train, shape=SMALL, workers=8, memory_bytes=GPU, longest_row_tokens=4096) == 1
    assert resolve_stage(train_of(), shape=LARGE, workers=8, memory_bytes=None, longest_row_tokens=4096) == 0


@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 2}, {"stage": "auto"}, {"stage": 2, "offload_optimizer": "cpu"}])
@pytest.mark.parametrize(
    ("shape", "workers", "tokens"),
    [
        (MIDDLE, 1, 8192),
        (MIDDLE, 1, 131_072),
        (MIDDLE, 8, 65_536),
        (LARGE, 1, 8192),
        (LARGE, 1, 65_536),
        (LARGE, 8, 8192),
        (LARGE, 8, 65_536),
    ],
)
def test_what_is_said_to_fit_does_fit_and_nothing_of_it_is_needless(
    zero: dict[str, Any], shape: ModelShape, workers: int, tokens: int
) -> None:
    def fits(assignments: list[str], number: int) -> bool:
        changed = with_overrides({"zero": zero, "precision": "bfloat16"}, parse_assignments(assignments))
        train, who = TrainSpec.parse(changed, origin="test"), Workers(number=number, per_node=8)
        return cheapest_plan(train, shape=shape, workers=who, memory_bytes=GPU, longest_row_tokens=tokens) is not None

    with pytest.raises(
        SpecError, match=r"train\.zero\.stage .* GB \(.*\) for .* at stage \d exceed the 80\.0 GB of a GPU; what would fit: "
    ) as caught:
        resolve_stage(train_of(zero=zero), shape=shape, workers=workers, memory_bytes=GPU, longest_row_tokens=tokens)
    assert "\n" not in str(caught.value)
    remedy = str(caught.value).split("what would fit: ")[1]
    more = re.match(r"(\d+) workers", remedy)
    number = int(more[1]) if more else workers
    changes = [f"{path}={value}" for path, value in re.findall(r"train\.([\w.]+): (\w+)", remedy)]
    if any("offload_parameters" in change for change in changes):
        changes.append("zero.stage=auto")
    assert changes
    assert fits(changes, number)
    for change in changes:
        if not change.startswith(("zero", "gradient_accumulation_steps")):
            assert not fits([other for other in changes if other != change], number)


@pytest.mark.parametrize("rows", [3, 5, 9])
def test_more_workers_are_offered_only_where_they_can_share_the_rows(rows: int) -> None:
    train, alone = (
        train_of(micro_batch_size=1, gradient_accumulation_steps=rows, gradient_checkpointing=True),
        Workers(number=1, per_node=8),
    )
    remedy = what_would_fit(train, shape=LARGE, workers=alone, memory_bytes=24 * 10**9, longest_row_tokens=8192)
    workers, parts = (re.search(pattern, remedy) for pattern in (r"(\d+) workers", r"sequence_parallel: (\d+)"))
    assert workers
    changed = train.model_copy(update={"sequence_parallel": int(parts[1]) if parts else 1})
    assert batch_layout(changed, num_workers=int(workers[1])).rows_per_step == rows


def test_where_nothing_helps_that_is_said() -> None:
    train = train_of(quantize="nf4")
    with pytest.raises(SpecError, match=r"nothing makes rows of 100,000,000 tokens fit; choose shorter ones \(corpus\.sequence_len\)"):
        resolve_stage(train, shape=LARGE, workers=1, memory_bytes=GPU, longest_row_tokens=100_000_000)


def test_more_workers_are_asked_for_where_they_are_what_is_missing() -> None:
    train = train_of(
        gradient_checkpointing=True,
        micro_batch_size=1,
        gradient_accumulation_steps=64,
        quantize="nf4",
        zero={"stage": "auto", "offload_parameters": "cpu"},
    )
    with pytest.raises(SpecError, match=r"what would fit: \d+ workers"):
        resolve_stage(train, shape=LARGE, workers=1, memory_bytes=24_000_000_000, longest_row_tokens=131_072)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "precision", "checkpointing"),
    [
        *((kind, "bfloat16", False) for kind in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text")),
        ("llama", "float32", False),
        ("llama", "bfloat16", True),
    ],
)
def test_autograd_keeps_what_is_planned(tmp_path: Path, kind: str, precision: Any, checkpointing: bool) -> None:
    import torch

    from pause_ray.training import loss, model
    from tests.inference.tiny_model import make_model

    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "head_dim": 32, "layer_types": None}
    folder = make_model(tmp_path / "model", kind=kind, **{name: size for name, size in sizes.items() if size or kind.startswith("gemma")})
    shape = ModelShape.load(folder)
    train = train_of(precision=precision, gradient_checkpointing=checkpointing, micro_batch_size=8, gradient_accumulation_steps=1)
    trainable = model.load_trainable(train, model_dir=folder, marker=None, seed=0, device="cpu", stage=0)
    wrapped = loss.LossModel(trainable)
    batch = collate(make_rows(8))
    tokens = batch.input_ids.shape[1]
    own = {parameter.untyped_storage().data_ptr() for parameter in wrapped.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = wrapped(**loss.tensors(batch, device="cpu"))
    assert total.requires_grad
    plan = plan_memory(
        train,
        shape=shape,
        workers=Workers(number=1, per_node=1, on_gpu=False),
        stage=0,
        longest_row_tokens=tokens // 8,
        loss_tokens=3,
    )
    value = 4 if precision == "float32" else 2
    later = 3 * tokens * value * max(outputs for _, outputs in shape.linear_layers.values())
    if checkpointing:  # what one layer keeps is there on the way back only
        inputs = tokens * shape.hidden_size * (shape.num_layers * value + 4 + value)
        assert inputs < plan.worker["activations"] - later
        later = plan.worker["activations"] - inputs
    assert sum(kept.values()) == pytest.approx(plan.worker["activations"] - later, rel=0.12)
