"""Training on several ranks of this machine without Ray, as under torchrun: processes of a server that imported the libraries once."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "transformers", "peft", "deepspeed", "pause_ray.training.worker", "tests.training.ranks"]
SECONDS = 240


def train_on_ranks(config: Any, *, num_ranks: int) -> list[Exception | None]:
    """Run an ``WorkerConfig`` to its end on each rank; returns what each raised."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = processes.Queue()
    ranks = [processes.Process(target=_run, args=(config, rank, num_ranks, port, queue), daemon=True) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    ended = dict(queue.get(timeout=SECONDS) for _ in ranks)
    for rank in ranks:
        rank.join()
    return [ended[rank] for rank in range(num_ranks)]


def _run(config: Any, rank: int, num_ranks: int, port: int, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import ray.train
    from ray.train.torch import TorchTrainer

    from pause_ray.training.worker import train_on_worker

    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"worker": config},
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name="ranks", storage_path=str(Path(config.folder).absolute())),
    )
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001 (a process's border: the test looks at it)
        queue.put((rank, error))
    else:
        queue.put((rank, None))
