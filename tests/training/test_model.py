"""Properties of the trained model's loss, on a tiny random Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_ray.training.spec import LoraSpec, TrainSpec
from tests.inference import tiny_model
from tests.training.tiny_llama import added_marker

pytestmark = pytest.mark.torch
TRAIN = TrainSpec(precision="float32")


def test_only_the_adapter_and_the_markers_row_are_trained(llama: Path) -> None:
    from pause_ray.training.model import load_trainable

    marker = added_marker(llama)
    model = load_trainable(TRAIN, model_dir=llama, marker=marker, seed=0, device="cpu", stage=0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = [parameter for name, parameter in trained.items() if "lora_" not in name]
    assert [tuple(row.shape) for row in rows] == [(1, 32)]
    table = model.get_input_embeddings().weight
    assert rows[0][0].tolist() == pytest.approx(table[list(marker.initial_ids)].mean(dim=0).tolist())


def test_the_seed_decides_the_adapters_first_values(llama: Path) -> None:
    from pause_ray.training.model import load_trainable

    models = [load_trainable(TRAIN, model_dir=llama, marker=None, seed=seed, device="cpu", stage=0) for seed in (0, 0, 1)]
    first, same, other = ([p.detach().clone() for p in model.parameters() if p.requires_grad] for model in models)
    assert all(bool((a == b).all()) for a, b in zip(first, same, strict=True))
    assert any(bool((a != b).any()) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_markers_row_gets_the_gradient_it_has_in_peft(tmp_path: Path, kind: str, tied: bool) -> None:
    """Which copies the whole table in every pass; Gemma scales what it reads there."""
    import peft
    import torch

    from pause_ray.models.weights import load_base
    from pause_ray.training.model import load_trainable

    folder = tiny_model.make_model(tmp_path / "model", kind=kind, tied=tied)
    marker = tiny_model.added_marker(folder)
    ours = load_trainable(TRAIN, model_dir=folder, marker=marker, seed=0, device="cpu", stage=0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [marker.token_id]})
    theirs = peft.get_peft_model(load_base(folder, dtype="float32", marker=marker, device="cpu"), config)
    ids = torch.tensor([[5, marker.token_id, 9, 30, marker.token_id, 12, 7]])
    found = []
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(next(parameter.grad for name, parameter in model.named_parameters() if "trainable_tokens" in name))
    assert float(found[1].abs().max()) > 1e-3
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_first_values_do_not_depend_on_precision_or_on_other_layers(llama: Path) -> None:
    import torch

    from pause_ray.training.model import load_trainable

    def inner(train: TrainSpec) -> dict[str, torch.Tensor]:
        model = load_trainable(train, model_dir=llama, marker=None, seed=0, device="cpu", stage=0)
        return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_A" in name}

    everything, half = inner(TRAIN), inner(TrainSpec(precision="bfloat16"))
    few = inner(TrainSpec(precision="float32", lora=LoraSpec(targets=("down_proj",))))
    assert len({tuple(tensor.flatten().tolist()) for tensor in everything.values()}) == len(everything) == 14
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in everything.items())
    assert len(few) == 2
    assert all(torch.equal(everything[name], tensor) for name, tensor in few.items())


def test_attention_and_mlp_of_the_decoder_get_an_adapter_by_default(tmp_path: Path) -> None:
    from pause_ray.training.model import load_trainable

    wanted = {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    }
    for kind, names in wanted.items():
        folder = tiny_model.make_model(tmp_path / kind, kind=kind, tied=False)
        model = load_trainable(TRAIN, model_dir=folder, marker=None, seed=0, device="cpu", stage=0)
        assert set(model.peft_config["default"].target_modules) == names
        assert not any("lm_head" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_four_bit_weights_are_doubly_quantised_and_stored_in_the_training_precision(tmp_path: Path) -> None:
    import torch

    from pause_ray.training.model import load_trainable

    folder = tiny_model.make_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    train = TrainSpec(quantize="nf4", precision="bfloat16")
    model = load_trainable(train, model_dir=folder, marker=None, seed=0, device="cpu", stage=0)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.quant_state.nested
    assert weight.quant_state.quant_type == "nf4"
    assert (weight.dtype, weight.numel() * 4) == (torch.bfloat16, 64 * 128)
