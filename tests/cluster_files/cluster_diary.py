"""Writes down what a cluster has and is asked for, a line of JSON for each look, until it is ended.

    python -m tests.cluster_files.cluster_diary ADDRESS FILE

ADDRESS is the head's, as for ``ray start``.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS = 0.25
IN_A_GROUP = "bundle_group_"
"""Prefix of the resource of work within a placement group, which waits for no node."""


def piece(request: Any) -> str:
    """JSON of a request's resources and labels."""
    labels = [f"{its.label_key}={'|'.join(its.label_values)}" for selector in request.label_selectors for its in selector.label_constraints]
    return json.dumps([dict(request.resources_bundle), sorted(set(labels))], sort_keys=True)


def requests_of(group: Any) -> Any:
    """The requests of a placement group, by its first alternative if it has several."""
    return group.bundle_selectors[0].resource_requests if group.bundle_selectors else group.requests


def pending(status: Any) -> list[list[Any]]:
    """Each kind of request that waits: resources, labels, whether the autoscaler calls it infeasible, and how often."""
    state, autoscaler = status.cluster_resource_state, status.autoscaling_state
    infeasible = set(map(piece, autoscaler.infeasible_resource_requests))
    infeasible |= {piece(request) for group in autoscaler.infeasible_gang_resource_requests for request in requests_of(group)}
    counts: Counter[str] = Counter()
    for entry in state.pending_resource_requests:
        if not any(name.startswith(IN_A_GROUP) for name in entry.request.resources_bundle):
            counts[piece(entry.request)] += entry.count
    counts.update(piece(request) for group in state.pending_gang_resource_requests for request in requests_of(group))
    return [[*json.loads(kind), kind in infeasible, number] for kind, number in counts.items()]


def look(client: Any, state_accessor: Any) -> dict[str, Any]:
    """Workers by type and how long they have been idle; groups of places; what waits for room; nodes that somebody wants to be there."""
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    status = autoscaler_pb2.GetClusterStatusReply()
    status.ParseFromString(client.get_cluster_status(timeout_s=10))
    state = status.cluster_resource_state
    alive = [node for node in state.node_states if node.status != autoscaler_pb2.NodeStatus.DEAD]
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
        "pending": pending(status),
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
