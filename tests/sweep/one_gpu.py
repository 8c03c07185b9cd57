"""A stubbed sweep on a cluster with one (logical) GPU, whose stub of training holds what Ray Train would hold; run by ``test_sharing``.

python -m tests.sweep.one_gpu FOLDER CHANGES
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from pause_ray.core.storage import Storage
from pause_ray.sweep.spec import read_sweep
from pause_ray.training.spec import WorkerConfig
from tests.sweep.stub_processes import FEW_CPUS, use_stubs
from tests.sweep.stubs import write_adapter, write_stub_sweep

PATIENCE_SECONDS = 90


def train_holding(config: WorkerConfig, *, told: Path, scaling: Any) -> None:
    """Wait for a worker group's place, as Ray Train does, or use what the trial's process has, and write down how many GPUs that is."""
    import ray

    num_workers, needs = scaling.num_workers, scaling.resources_per_worker
    group = ray.util.placement_group([needs] * num_workers) if num_workers else None
    try:
        assert group is None or group.wait(PATIENCE_SECONDS), "the worker group got no place"
        gpus = ray.get_runtime_context().get_assigned_resources().get("GPU", 0) if group is None else needs.get("GPU", 0) * num_workers
        with told.open("a") as lines:
            lines.write(json.dumps({"gpus": gpus}) + "\n")
        write_adapter(config, step_seconds=0.05)
    finally:
        if group is not None:
            ray.util.remove_placement_group(group)


def use_holding_stubs(told: Path) -> None:
    use_stubs(cell_seconds=0.05, step_seconds=0.0)
    from pause_ray.training import launch

    launch.run_workers = functools.partial(train_holding, told=told)


def main(folder: Path, changes: dict[str, Any]) -> None:
    import ray

    from pause_ray.sweep.runner import run_sweep

    sweep = read_sweep(write_stub_sweep(folder, **{"max_concurrent_trials": 3, **changes}), {})
    hook = functools.partial(use_holding_stubs, folder / "held.jsonl")
    ray.init(
        address="local",
        num_cpus=FEW_CPUS,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 * 1024**2,
        runtime_env={"worker_process_setup_hook": lambda: hook()},
    )
    storage = Storage.open(folder / "runs")
    outcome = run_sweep(sweep, storage=storage, console=Console(), command="")
    assert outcome.is_complete, outcome


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
