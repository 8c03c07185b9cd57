"""What workers of one training agree on, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch


def choose(rank: int, folder: Path) -> None:
    """One of two processes, each of which sees another checkpoint as the last."""
    import torch

    from pause_ray.training.distributed import WorkerGroup

    store = torch.distributed.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    workers = WorkerGroup(torch.device("cpu"))
    chosen = [
        workers.from_first_worker(lambda: f"step-{40 - 20 * rank}"),
        workers.from_first_worker(lambda: None if rank == 0 else "step-20"),
    ]
    (folder / f"{rank}.json").write_text(json.dumps(chosen))
    torch.distributed.destroy_process_group()


def test_all_workers_go_on_where_the_first_one_does(tmp_path: Path) -> None:
    import torch

    torch.multiprocessing.spawn(choose, (tmp_path,), nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [["step-40", None]] * 2
