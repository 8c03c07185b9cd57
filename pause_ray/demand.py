"""What is asked of a cluster and not there, and what its autoscaler says of that. Knows Ray; starts no node and holds none.

Autoscalers of Ray's second version say what they can never start, what is starting and what failed; the first version and clusters
without one say nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.core.generated import autoscaler_pb2, common_pb2
from ray.util.placement_group import placement_group, remove_placement_group

ANSWER_SECONDS = 20.0
"""For an autoscaler to look at what is asked, which it does every five."""
LOOK_SECONDS = 0.5
RPC_SECONDS = 10
NODE_RESOURCES = ("CPU", "GPU")
"""Of all that a node has, what people count."""
WITHIN_A_GROUP = "bundle_group_"
"""How the resource begins by which Ray sends work to the nodes of a placement group that has its places."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A piece of one node that somebody waits for; who waits within what is held already waits for nothing of the cluster."""

    resources: tuple[tuple[str, float], ...]
    """Name and number, sorted."""
    labels: tuple[str, ...] = ()
    """What the node must be, such as ``ray.io/market-type=on-demand``."""
    is_hopeless: bool = False
    """The autoscaler has said that it can start nothing that gives this."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A moment of a cluster."""

    wishes: Mapping[Wish, int]
    """What waits for room, and how often."""
    nodes: int
    """That are alive, the head included."""
    total: Mapping[str, float]
    """CPUs and GPUs of them."""
    free: Mapping[str, float]
    """Of these, those that nobody holds."""
    starting: Mapping[str, int] = field(default_factory=dict)
    """Node type → how many are on their way."""
    failed: tuple[str, ...] = ()
    """Node types that could not be started, with the reason, newest last."""


def demand() -> Demand:
    """What is asked now. Freshly asked things are among it for a moment. Ray must be initialised."""
    return demand_of(_status())


def demand_of(status: Any) -> Demand:
    """The same of Ray's ``GetClusterStatusReply``."""
    state, told = status.cluster_resource_state, status.autoscaling_state
    hopeless_pieces = {_piece(request) for request in told.infeasible_resource_requests}
    hopeless_groups = {_group_id(group) for group in told.infeasible_gang_resource_requests}
    wishes: Counter[Wish] = Counter()
    for entry in state.pending_resource_requests:
        if any(name.startswith(WITHIN_A_GROUP) for name in entry.request.resources_bundle):
            continue
        wishes[_wish(entry.request, is_hopeless=_piece(entry.request) in hopeless_pieces)] += entry.count
    for group in state.pending_gang_resource_requests:
        wishes.update(_wish(request, is_hopeless=_group_id(group) in hopeless_groups) for request in _requests_of(group))
    starting = Counter({request.ray_node_type_name: request.count for request in told.pending_instance_requests})
    starting.update(instance.ray_node_type_name for instance in told.pending_instances)
    failures = sorted(told.failed_instance_requests, key=lambda request: request.failed_ts)
    alive = [node for node in state.node_states if node.status != autoscaler_pb2.NodeStatus.DEAD]
    return Demand(
        wishes=dict(wishes),
        nodes=len(alive),
        total=_summed(node.total_resources for node in alive),
        free=_summed(node.available_resources for node in alive),
        starting=dict(starting),
        failed=tuple(f"{request.ray_node_type_name} ({' '.join(request.reason.split())})" for request in failures),
    )


def can_come(bundle: Mapping[str, float], *, number: int, labels: Mapping[str, str]) -> bool:
    """Whether nodes with these labels can give ``bundle`` ``number`` times: now, or as soon as the autoscaler has started them.

    It is asked for, and no longer when the answer is there. Where nobody answers within ``ANSWER_SECONDS`` the answer is no.
    """
    group = placement_group([dict(bundle)] * number, bundle_label_selector=[dict(labels)] * number)
    asked_in: int | None = None
    until = time.monotonic() + ANSWER_SECONDS
    try:
        while time.monotonic() < until:
            if group.wait(LOOK_SECONDS):
                return True
            status = _status()
            state, told = status.cluster_resource_state, status.autoscaling_state
            if asked_in is None:
                if group.id.hex() in map(_group_id, state.pending_gang_resource_requests):
                    asked_in = state.cluster_resource_state_version
            elif told.last_seen_cluster_resource_state_version > asked_in:
                return group.id.hex() not in map(_group_id, told.infeasible_gang_resource_requests)
        return False
    finally:
        remove_placement_group(group)


def _status() -> Any:
    reply = autoscaler_pb2.GetClusterStatusReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_status(timeout_s=RPC_SECONDS))
    return reply


def _requests_of(group: Any) -> Any:
    """Of the ways to fulfil it that a group may have, the first, which is the one that its owner wants."""
    return group.bundle_selectors[0].resource_requests if group.bundle_selectors else group.requests


def _group_id(group: Any) -> str:
    """Ray tells it before a colon and the strategy."""
    return str(group.details).partition(":")[0]


def _piece(request: Any) -> tuple[tuple[tuple[str, float], ...], tuple[str, ...]]:
    resources = tuple(sorted((name, float(number)) for name, number in request.resources_bundle.items()))
    labels = {_words(constraint) for selector in request.label_selectors for constraint in selector.label_constraints}
    return resources, tuple(sorted(labels))


def _words(constraint: Any) -> str:
    sign = "!=" if constraint.operator == common_pb2.LABEL_OPERATOR_NOT_IN else "="
    return f"{constraint.label_key}{sign}{'|'.join(constraint.label_values)}"


def _wish(request: Any, *, is_hopeless: bool) -> Wish:
    resources, labels = _piece(request)
    return Wish(resources=resources, labels=labels, is_hopeless=is_hopeless)


def _summed(nodes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    each = list(nodes)
    return {name: sum(node.get(name, 0.0) for node in each) for name in NODE_RESOURCES}
