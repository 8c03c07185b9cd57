"""A driver that trains on a cluster of two nodes of its own on this machine and lets something happen to it; run by ``test_faults``.

    python -m tests.training.faulty_cluster SCENARIO MODEL SHARDS STORAGE EVENTS

Writes to the JSON file EVENTS what it did, and which rows the training log had then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 8}
"""Eight seconds until a node counts as lost; with two, a busy machine lost nodes that were there."""
QUICKLY = {
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "OMP_NUM_THREADS": "1",
}
"""Environment of the driver: how soon Ray Train looks; its defaults are for real networks."""
NODE = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 1024**2}
DRAINED_SECONDS = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "killed": {"max_steps": 300, "checkpoint_every": 5, "learning_rate": 1e-3},
    "drained": {"max_steps": 1000, "checkpoint_every": 10_000, "learning_rate": 1e-4},
}
"""Of the training in each scenario; a drained node has to be noticed before the last step."""


@dataclass(frozen=True, kw_only=True)
class Happening:
    """Something that is done once, when a training has come so far."""

    name: str
    after_steps: int
    """Since the one before."""
    act: Callable[[], None] = lambda: None
    ready: Callable[[], bool] = lambda: True


def workers_of(raylet: int) -> list[int]:
    """Process ids of the training workers that a raylet has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                name = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if parent == raylet and b"RayTrainWorker" in name:
                found.append(int(entry.name))
    return found


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def kill_workers(node: Any) -> None:
    for pid in workers_of(raylet_of(node)):
        os.kill(pid, signal.SIGKILL)


def kill_machine(node: Any) -> None:
    """Workers whose raylet alone has died train on for as long as the node is not counted as lost."""
    workers = workers_of(raylet_of(node))
    for pid in (raylet_of(node), *workers):
        os.kill(pid, signal.SIGKILL)


def drain(node: Any, address: str) -> None:
    """What a cloud's notice makes of a node: it goes away in some seconds."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(DRAINED_SECONDS)], check=True, stdout=subprocess.DEVNULL)


def main(scenario: str, model: Path, shards: Path, storage: Path, events: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from pause_ray.core.errors import PauseRayError, StoppedError
    from pause_ray.core.storage import Storage, read_json_lines
    from pause_ray.models.checkpoint import TRAINING_LOG
    from pause_ray.training.launch import fit
    from tests.training.test_launch import job_of

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": SYSTEM})
    other = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    happenings = {
        "killed": [
            Happening(name="worker", after_steps=3, act=lambda: kill_workers(other)),
            Happening(name="machine", after_steps=10, act=lambda: kill_machine(other)),
        ],
        "drained": [
            Happening(name="drain", after_steps=3, act=lambda: drain(other, cluster.address)),
            Happening(name="gone", after_steps=1, ready=lambda: sum(node["Alive"] for node in ray.nodes()) == 1),
            Happening(name="stop", after_steps=10, act=lambda: os.kill(os.getpid(), signal.SIGTERM)),
        ],
    }[scenario]
    done: list[dict[str, Any]] = []

    def watch(step: int, steps: int, row: dict[str, Any]) -> None:
        since = len(done[-1]["rows"]) if done else 0
        happening = happenings[len(done)] if len(done) < len(happenings) else None
        if happening and step >= since + happening.after_steps and happening.ready():
            happening.act()
            (log,) = (storage / "checkpoints").glob(f".*.partial/{TRAINING_LOG}")
            done.append({"name": happening.name, "rows": read_json_lines(log)})

    def train(num_workers: int | tuple[int, int]) -> str:
        job = job_of(model, shards, **SETTINGS[scenario])
        root = Storage.open(storage)
        return str(fit(job, storage=root, num_workers=num_workers, cpus_per_worker=1, gpus_per_worker=0, progress=watch).folder)

    outcome: dict[str, Any] = {}
    try:
        outcome["checkpoint"] = train((1, 2))
    except StoppedError as stopped:
        outcome |= {"stopped": str(stopped), "checkpoint": train(0)}
    except PauseRayError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    events.write_text(json.dumps({"happened": done, **outcome}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], *(Path(argument) for argument in sys.argv[2:]))
