"""What workers of one training agree on, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pause_ray.checkpoint import RunningTraining
from pause_ray.train.assignment import Assignment
from pause_ray.train.spec import TrainSpec
from tests.train.tiny_llama import make_rows, make_shards

pytestmark = pytest.mark.torch


def choose(rank: int, folder: Path) -> None:
    """One of two processes, each of which sees another checkpoint as the last."""
    import torch

    from pause_ray.train.crew import Crew

    store = torch.distributed.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    crew = Crew(torch.device("cpu"))
    chosen = [crew.first_ones(lambda: f"step-{40 - 20 * rank}"), crew.first_ones(lambda: None if rank == 0 else "step-20")]
    (folder / f"{rank}.json").write_text(json.dumps(chosen))
    torch.distributed.destroy_process_group()


def test_all_workers_go_on_where_the_first_one_does(tmp_path: Path) -> None:
    import torch

    torch.multiprocessing.spawn(choose, (tmp_path,), nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [["step-40", None]] * 2


def resume(rank: int, folder: Path) -> None:
    """One of two processes with a side of a training; the second one's machine shows two steps more."""
    import torch

    from pause_ray.train import state
    from pause_ray.train.adapters import name_alone, name_of
    from pause_ray.train.crew import Crew
    from pause_ray.train.side_by_side import Side

    store = torch.distributed.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    running = RunningTraining(folder=folder / f"seen-{rank}", belongs_to={})
    adapter = name_of(0)
    weight = f"layer.lora_A.{adapter}.weight"
    for step in (2, 4)[: rank + 1]:
        tensors = {f"{kind}/{name_alone(weight, adapter)}": torch.full((3,), float(step)) for kind in (state.MASTER, *state.MOMENTS)}
        running.save(
            step,
            write_tensors=lambda path, tensors=tensors: state.write_tensors(path, tensors),  # type: ignore[misc]
            log_rows=[{"step": number} for number in range(1, step + 1)],
            facts={"applied_steps": step},
            keep_last=2,
        )
    assignment = Assignment(
        train=TrainSpec(steps=6),
        model_dir=folder,
        shards=folder / "shards",
        marker=None,
        seed=0,
        threads=1,
        on_gpu=False,
        folder=folder,
        running=running,
    )
    parameter = torch.nn.Parameter(torch.zeros(3))
    side = Side(assignment, adapter=adapter, parameters={weight: parameter}, crew=Crew(torch.device("cpu")))
    side.resume()
    (folder / f"{rank}.json").write_text(json.dumps([side.done, parameter.tolist(), len(side.log.rows)]))
    torch.distributed.destroy_process_group()


def test_a_training_beside_others_goes_on_at_the_first_workers_checkpoint(tmp_path: Path) -> None:
    import torch

    make_shards(tmp_path / "shards", make_rows(4))
    torch.multiprocessing.spawn(resume, (tmp_path,), nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[2, [2.0, 2.0, 2.0], 2]] * 2


def test_one_worker_alone_chooses_for_itself() -> None:
    import torch

    from pause_ray.train.crew import Crew

    assert Crew(torch.device("cpu")).first_ones(lambda: "step-40") == "step-40"
