"""Under ZeRO stage 3 no process ever holds the model: measured in two real ones, which also train on 4-bit weights."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core.errors import ModelError
from pause_ray.training.spec import LoraSpec, TrainSpec, ZeroSpec
from tests.inference.tiny_model import added_marker, make_model

pytestmark = pytest.mark.torch
LAYERS, WIDTH = 8, 384
TRAIN = TrainSpec(precision="float32", lora=LoraSpec(rank=4))


def private_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """The most private memory that was seen inside, above that at the beginning."""

    def __enter__(self) -> Peak:
        self.before = self.most = private_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.growth = self.most - self.before

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.most = max(self.most, private_bytes())


QUANTISED = TrainSpec(
    precision="bfloat16",
    quantize="nf4",
    micro_batch_size=1,
    gradient_accumulation_steps=2,
    learning_rate=2e-2,
    lora=LoraSpec(rank=4),
    zero=ZeroSpec(stage=3),
)


def losses_with_four_bits(model_dir: Path, *, stage: int) -> list[float]:
    """Of one row, before an optimizer step and, under stage 3, after it."""
    import deepspeed
    import torch

    from pause_ray.training.batching import batch_layout
    from pause_ray.training.loss import LossModel
    from pause_ray.training.model import load_trainable
    from pause_ray.training.zero_config import deepspeed_config

    ids = torch.arange(5, 30).unsqueeze(0)
    row: dict[str, Any] = {"input_ids": ids, "position_ids": ids - 5, "targets": ids.roll(-1), "documents": ((0, 25),)}
    model = LossModel(load_trainable(QUANTISED, model_dir=model_dir, marker=None, seed=0, device="cpu", stage=stage))
    if stage == 0:
        return [model(**row).item()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = deepspeed_config(QUANTISED, layout=batch_layout(QUANTISED, num_workers=2), stage=stage, world_size=2)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # tensors this small would stay whole
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    loss = engine(**row)
    engine.backward(loss / 25)
    engine.step()
    return [loss.item(), engine(**row).item()]


def load_in_two(rank: int, folder: Path, seed: int) -> None:
    """One of two processes: load, note the peak, then compare every gathered weight with that of a plain load."""
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    import deepspeed
    import deepspeed.ops
    import torch

    from pause_ray.training.model import load_trainable

    deepspeed.ops.__compatible_ops__ = {}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    deepspeed.comm.init_distributed(verbose=False)
    marker = added_marker(folder / "model")
    settings: dict[str, Any] = {"model_dir": folder / "model", "marker": marker, "seed": seed, "device": "cpu"}
    with Peak() as peak:
        model = load_trainable(TRAIN, stage=3, **settings)
    whole = dict(load_trainable(TRAIN, stage=0, **settings).named_parameters()) if rank == 0 else {}
    different = []
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if rank == 0 and not torch.equal(parameter, whole[name]):
                different.append(name)
    before, after = losses_with_four_bits(folder / "small", stage=3)
    reference = losses_with_four_bits(folder / "small", stage=0)
    found = {"peak": peak.growth, "different": different, "losses": [*reference, before, after]}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_hold_half_the_model_each_and_never_more_than_a_layer_besides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    model_dir = make_model(tmp_path / "model", hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS)
    transformers.AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(model_dir, max_shard_size="20MB")
    (model_dir / "model.safetensors").unlink()
    make_model(tmp_path / "small", hidden_size=64, intermediate_size=128)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors go back to the system at once
    torch.multiprocessing.spawn(load_in_two, (tmp_path, 0), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    model_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    assert [one["different"] for one in found] == [[], []]
    for one in found:
        alone, before, after = one["losses"]
        assert before == pytest.approx(alone, rel=1e-2)
        assert after < before
    assert min(one["peak"] for one in found) / model_bytes > 0.4
    assert max(one["peak"] for one in found) / model_bytes < 0.7


def test_a_weight_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    import safetensors.torch

    from pause_ray.models.weights import StoredWeights, empty_base

    model_dir = make_model(tmp_path / "model")
    path = model_dir / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.torch.save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    stored = StoredWeights(model_dir, empty_base(model_dir, dtype="float32", marker=None))
    assert name not in stored
    with pytest.raises(ModelError, match=f"hold no {name}"):
        stored.read(name)


def test_a_shard_that_is_cut_off_is_named(tmp_path: Path) -> None:
    from pause_ray.models.weights import StoredWeights, empty_base

    model_dir = make_model(tmp_path / "model")
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        StoredWeights(model_dir, empty_base(model_dir, dtype="float32", marker=None))


def test_a_model_whose_weights_are_fused_on_loading_is_refused(tmp_path: Path) -> None:
    """Of experts, the files hold each one and a model all together."""
    from pause_ray.models.weights import StoredWeights, empty_base

    model_dir = make_model(tmp_path / "model", kind="mixtral", num_local_experts=2)
    with pytest.raises(ModelError, match=r"experts.* is made of several stored tensors"):
        StoredWeights(model_dir, empty_base(model_dir, dtype="float32", marker=None))
