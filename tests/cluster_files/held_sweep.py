"""``pause-ray sweep`` on the cluster of RAY_ADDRESS with stubs, whose stub of training holds what Ray Train would hold.

    python -m tests.cluster_files.held_sweep TOLD SWEEP STORAGE

TOLD gets a line for each training: what it held.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path


def main(told: Path, *arguments: str) -> None:
    import ray

    from pause_ray.cli.main import main as pause_ray
    from tests.sweep.one_gpu import use_holding_stubs

    hook = functools.partial(use_holding_stubs, told)
    ray.init(address="auto", log_to_driver=False, runtime_env={"worker_process_setup_hook": lambda: hook()})
    sys.argv = ["pause-ray", "sweep", *arguments]
    pause_ray()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
