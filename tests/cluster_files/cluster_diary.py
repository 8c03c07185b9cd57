"""Writes down what a cluster has and is asked for, a line of JSON for each look, until it is ended.

    python -m tests.cluster_files.cluster_diary ADDRESS FILE

ADDRESS is the head's, as for ``ray start``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 0.25


def look(client: Any, state_accessor: Any) -> dict[str, Any]:
    """Workers by type and how long they have been idle; groups of places; what waits for room; nodes that somebody wants to be there."""
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    from pause_ray.demand import demand_of

    status = autoscaler_pb2.GetClusterStatusReply()
    status.ParseFromString(client.get_cluster_status(timeout_s=10))
    state = status.cluster_resource_state
    alive = [node for node in state.node_states if node.status != autoscaler_pb2.NodeStatus.DEAD]
    wishes = demand_of(status).wishes
    groups = [gcs_pb2.PlacementGroupTableData.FromString(group) for group in state_accessor.get_placement_group_table()]
    return {
        "time": time.monotonic(),
        "workers": [
            {
                "name": node.instance_id,
                "kind": node.ray_node_type_name,
                "idle_seconds": node.idle_duration_ms / 1000 if node.status == autoscaler_pb2.NodeStatus.IDLE else 0.0,
            }
            for node in alive
            if "node:__internal_head__" not in node.total_resources
        ],
        "groups": [
            [[dict(bundle.unit_resources), dict(bundle.label_selector)] for bundle in group.bundles]
            for group in groups
            if group.state != gcs_pb2.PlacementGroupTableData.REMOVED
        ],
        "wishes": [[dict(wish.resources), list(wish.labels), wish.is_hopeless, number] for wish, number in wishes.items()],
        "wanted": [
            [dict(request.request.resources_bundle), request.count]
            for constraint in state.cluster_resource_constraints
            for request in constraint.resource_requests
        ],
    }


def main(address: str, file: Path) -> None:
    from ray._raylet import GcsClient, GcsClientOptions, GlobalStateAccessor

    client = GcsClient(address)
    state_accessor = GlobalStateAccessor(GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False))
    assert state_accessor.connect()
    with file.open("w") as lines:
        while True:
            lines.write(json.dumps(look(client, state_accessor)) + "\n")
            lines.flush()
            time.sleep(SECONDS)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
