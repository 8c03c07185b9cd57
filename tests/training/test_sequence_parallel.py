"""Two processes that share the tokens of each row (Ulysses) compute the loss and the gradients of one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pause_ray.data.shards import NO_LOSS, PackedRow
from tests.training.tiny_llama import make_rows

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]


def make_llama(folder: Path, *, heads: int, groups: int) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=8 * heads,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def packed_row() -> PackedRow:
    """Three documents of 90 tokens in all, one of which two workers share."""
    ids = np.random.default_rng(5).integers(2, 290, size=90, dtype=np.int32)
    labels = np.where(np.arange(90) % 3 == 0, NO_LOSS, ids).astype(np.int32)
    starts = np.array([0, 30, 61], np.int32)
    return PackedRow(input_ids=ids, labels=labels, num_pauses=0, num_documents=3, document_starts=starts)


def test_two_workers_share_the_tokens_of_rows(tmp_path: Path) -> None:
    """Heads that divide evenly, that do not (as in SmolLM2, 9 and 3), and fewer key heads than workers; recomputed; a part without loss."""
    import torch

    from tests.training.sequence_worker import loss_and_gradients

    rows = make_rows(3)
    models = [make_llama(tmp_path / f"{heads}-{groups}", heads=heads, groups=groups) for heads, groups in ((4, 2), (9, 3), (3, 1))]
    tasks = [
        {"model_dir": models[0], "rows": [packed_row(), *rows], "gradient_checkpointing": False},
        {"model_dir": models[0], "rows": [packed_row(), *rows], "gradient_checkpointing": True},
        {"model_dir": models[1], "rows": [packed_row(), rows[0]], "gradient_checkpointing": False},
        {"model_dir": models[2], "rows": [packed_row()], "gradient_checkpointing": True},
        {"model_dir": models[0], "rows": [max(rows, key=lambda row: len(row.input_ids))], "gradient_checkpointing": False},
    ]
    (tmp_path / "tasks.pickle").write_bytes(pickle.dumps(tasks))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.sequence_worker", str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    told = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(told)
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1)]
    for number, task in enumerate(tasks):
        loss, gradients = loss_and_gradients(task)
        (loss_0, first), (loss_1, second) = (parts[number] for parts in found)
        assert loss_0 + loss_1 == pytest.approx(loss, rel=1e-5), number
        assert first.keys() == second.keys() == gradients.keys()
        for name, gradient in gradients.items():
            largest = float(gradient.abs().max())
            assert torch.allclose(first[name] + second[name], gradient, rtol=1e-3, atol=1e-5 * largest), (number, name)
        if number == len(tasks) - 1:
            assert loss_0 == 0, "its answer stands in the second part"
