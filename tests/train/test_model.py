"""Properties of the trained model's loss, on a tiny random Llama."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pause_ray.rows import NO_LOSS, PackedRow
from pause_ray.train.loop import collate, num_labelled
from pause_ray.train.spec import TrainSpec
from tests.train.tiny_llama import added_marker, make_model, make_rows

pytestmark = pytest.mark.torch
TRAIN = TrainSpec(precision="float32")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama") / "model")


def test_the_loss_of_a_padded_batch_is_the_sum_of_its_rows(llama: Path) -> None:
    from pause_ray.train.model import load_trainable, summed_loss

    model = load_trainable(TRAIN, model_dir=llama, marker=None, seed=0, device="cpu")
    rows = make_rows(6)
    alone = sum(summed_loss(model, collate([row]), device="cpu").item() for row in rows)
    assert summed_loss(model, collate(rows), device="cpu").item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("learned", ["all", "some"])
def test_the_loss_is_the_one_of_transformers(llama: Path, learned: str) -> None:
    import torch

    from pause_ray.train.model import load_trainable, summed_loss

    model = load_trainable(TRAIN, model_dir=llama, marker=None, seed=0, device="cpu")
    ids = np.random.default_rng(3).integers(2, 290, size=30, dtype=np.int32)
    labels = ids.copy() if learned == "all" else np.where(np.arange(30) % 11 == 5, ids, NO_LOSS).astype(np.int32)
    row = PackedRow(input_ids=ids, labels=labels, num_pauses=0, num_documents=1)
    theirs = model(input_ids=torch.from_numpy(ids).long()[None], labels=torch.from_numpy(labels).long()[None]).loss.item()
    assert summed_loss(model, collate([row]), device="cpu").item() == pytest.approx(theirs * num_labelled(row), rel=1e-5)


def test_only_the_adapter_and_the_markers_row_are_trained(llama: Path) -> None:
    from pause_ray.train.model import load_trainable

    marker = added_marker(llama)
    model = load_trainable(TRAIN, model_dir=llama, marker=marker, seed=0, device="cpu")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = [parameter for name, parameter in trained.items() if "lora_" not in name]
    assert [tuple(row.shape) for row in rows] == [(1, 32)]
    table = model.get_input_embeddings().weight
    assert rows[0][0].tolist() == pytest.approx(table[list(marker.initial_ids)].mean(dim=0).tolist())


def test_the_seed_decides_the_adapters_first_values(llama: Path) -> None:
    from pause_ray.train.model import load_trainable

    models = [load_trainable(TRAIN, model_dir=llama, marker=None, seed=seed, device="cpu") for seed in (0, 0, 1)]
    first, same, other = ([p.detach().clone() for p in model.parameters() if p.requires_grad] for model in models)
    assert all(bool((a == b).all()) for a, b in zip(first, same, strict=True))
    assert any(bool((a != b).any()) for a, b in zip(first, other, strict=True))
