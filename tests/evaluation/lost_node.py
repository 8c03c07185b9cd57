"""A driver that scores on a cluster of two nodes of its own on this machine and loses one of them; run by ``test_scoring_pool``.

python -m tests.evaluation.lost_node TOKENIZER ESSAYS TOLD
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from pause_ray.evaluation.ledger import CellResult
from pause_ray.evaluation.scoring_pool import ScoringPool
from tests.evaluation.test_scoring_pool import FACTS, SlowEngine, job_of, within

SYSTEM = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 8}
"""Eight seconds until a node counts as lost; with two, a busy machine loses nodes that are there."""
NODE = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 1024**2}


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def main(tokenizer: Path, essays: Path, told: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": SYSTEM})
    other = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    job, asked = job_of(tokenizer, essays, depth_percent={"from": 0, "to": 100, "count": 10})
    pool = ScoringPool.start(num_actors=2, cpus=1, threads=1, engine=SlowEngine(facts=FACTS, cell_seconds=0.5))
    within(180, lambda: len(pool.state().pids) == 2)
    before = pool.state().pids
    raylet = other.all_processes["raylet"][0].process.pid
    there = [pid for pid in before if parent_of(pid) == raylet]
    results: list[CellResult] = []

    def note(result: CellResult) -> None:
        results.append(result)
        if len(results) == 4:
            for pid in (raylet, *there):
                os.kill(pid, signal.SIGKILL)

    pool.score(job, asked, on_result=note)
    told.write_text(
        json.dumps(
            {
                "up_before": len(before),
                "on_the_lost_node": len(there),
                "up_after": len(pool.state().pids),
                "without_room": pool.state().starting,
                "asked": [cell.id for cell in asked],
                "answered": [result.cell_id for result in results],
            }
        )
    )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
