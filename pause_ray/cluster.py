"""Connecting to Ray: the cluster this process belongs to, or one of its own on this machine. Knows no trial."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

from pause_ray.errors import SpecError

LOCAL_LOGICAL_CPUS = 8
"""Ray's CPUs are a count of places, not of cores. A trial, its scoring actor, the progress board and shard tasks need
places at the same time even on two cores; threads are capped where the computing is done."""
LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
"""Prompts and rows pass by path, so little goes through the object store."""
logger = logging.getLogger("pause_ray")


@contextlib.contextmanager
def connection() -> Iterator[None]:
    """Ray for the duration of the block.

    Joins the cluster of ``RAY_ADDRESS`` (set inside ``ray job submit``); without one starts a cluster on this machine
    and stops it at the end. A connection that exists already is used and kept.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **quiet)
    else:
        ray.init(
            address="local",  # not one that happens to run on this machine
            num_cpus=max(LOCAL_LOGICAL_CPUS, os.cpu_count() or 1),
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            **quiet,
        )
    try:
        yield
    finally:
        ray.shutdown()


def check_room(needed: Mapping[str, float], *, remedy: str = "lower train_workers, or what each of them takes") -> None:
    """Refuse what a cluster of this machine has no room for, since Ray would wait for it for ever.

    One that was joined may grow: as far as its autoscaler says, and where it does not say, it is only warned.

    Args:
        needed: ``CPU`` and ``GPU`` → how many are held at the same time.
        remedy: What can be done.

    Raises:
        SpecError: naming both numbers.
    """
    for name, number in needed.items():
        has = total(name)
        if number <= has:
            continue
        _tell(f"resources: training and scoring hold {number:g} {name}s at a time, and the cluster has {has:g}", remedy)


def check_nodes(takers: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse what no node can ever give in one piece.

    Args:
        takers: Who takes it, for people → ``CPU`` and ``GPU`` and how many of each, all on one node.

    Raises:
        SpecError: naming taker, resource and the largest node, where all nodes that there can be are known.
    """
    nodes = _possible_nodes()
    for taker, takes in takers.items():
        if any(_gives(node, takes) for node in nodes.values()):
            continue
        for name, number in takes.items():
            largest = max(nodes, key=lambda node: nodes[node].get(name, 0), default=None)
            has = nodes[largest].get(name, 0) if largest else 0
            if has < number:
                _tell(f"resources: {taker} takes {number:g} {name}s on one node, and the largest, {largest}, has {has:g}", "lower it")
                break
        else:
            asked = " and ".join(f"{number:g} {name}s" for name, number in takes.items())
            _tell(f"resources: {taker} takes {asked} on one node, and no node has both", "lower one of them")


def _tell(problem: str, remedy: str) -> None:
    if is_known_to_grow_no_further():
        raise SpecError(f"{problem}; {remedy}")
    logger.warning("%s; waiting until it has grown", problem)


def _autoscaler() -> Any | None:
    """What an autoscaler has told Ray about the nodes that it can start, or None; those of ``ray up`` tell nothing."""
    config = ray._private.state.state.get_cluster_config()
    return config if config is not None and config.node_group_configs else None


def _possible_nodes() -> dict[str, Mapping[str, float]]:
    """Every node that there is, and a node of each kind that the autoscaler can start: name → all that it has."""
    nodes: dict[str, Mapping[str, float]] = {
        f"node {node['NodeManagerAddress']}": node["Resources"] for node in ray.nodes() if node["Alive"]
    }
    kinds = getattr(_autoscaler(), "node_group_configs", ())
    return nodes | {f"node type {kind.name}": dict(kind.resources) for kind in kinds if kind.max_count}


def groups_without_room(holding: Mapping[str, float]) -> frozenset[str]:
    """Placement groups of anybody that wait for something of which ``holding`` has some, and that a node could give.

    Trials of Tune and workers of Ray Train come as placement groups. Freshly asked ones are among them for a moment.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return frozenset(
        name
        for name, group in placement_group_table().items()
        if group["state"] in ("PENDING", "RESCHEDULING")
        if any(bundle.get(resource) and held for bundle in group["bundles"].values() for resource, held in holding.items())
        if all(any(_gives(node, bundle) for node in nodes) for bundle in group["bundles"].values())
    )


def _gives(node: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= number for name, number in bundle.items())


def total(resource: str) -> float:
    """``CPU`` or ``GPU`` of the cluster, those in use included; of an autoscaler that tells it, what there can be."""
    grown = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return max(float(ray.cluster_resources().get(resource, 0)), float(grown.get(resource, 0)))


def is_known_to_grow_no_further() -> bool:
    """Whether ``total`` is all that there can ever be."""
    return not os.environ.get("RAY_ADDRESS") or _autoscaler() is not None


def total_gpus() -> float:
    """GPUs of the cluster as it is now, those in use included."""
    return float(ray.cluster_resources().get("GPU", 0))
