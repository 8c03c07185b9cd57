"""One of the workers that share the tokens of a batch: ``python -m tests.training.sequence_worker FOLDER RANK``.

FOLDER holds the task of ``test_sequence_parallel`` and takes this worker's loss and gradients.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import deepspeed.comm
import deepspeed.ops
import torch

from pause_ray.training.attention import sequence_group
from pause_ray.training.batching import collate
from pause_ray.training.loss import LossModel, tensors
from pause_ray.training.model import load_trainable
from pause_ray.training.spec import TrainSpec


def loss_and_gradients(task: dict[str, Any], *, group: Any = None, part: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one part of the task's batch; without ``group``, of all of it."""
    train = TrainSpec(precision="float32", gradient_checkpointing=task["gradient_checkpointing"])
    peft_model = load_trainable(train, model_dir=task["model_dir"], marker=None, seed=0, device="cpu", stage=0)
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = LossModel(peft_model, sequence_group=group)
    batch = collate(task["rows"]).part(part, of=group.size() if group else 1)
    loss = model(**tensors(batch, device="cpu"))
    loss.backward()
    return loss.item(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def main(folder: Path, rank: int) -> None:
    """Compute this worker's part of each task, between the same processes."""
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__ = {}  # as in a training: nothing is compiled
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    deepspeed.comm.init_distributed(verbose=False)
    group = sequence_group(2)
    tasks = pickle.loads((folder / "tasks.pickle").read_bytes())
    found = [loss_and_gradients(task, group=group, part=rank) for task in tasks]
    torch.save(found, folder / f"found-{rank}.pt")
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
