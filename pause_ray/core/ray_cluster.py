"""The connection to Ray and the state of its cluster: nodes, resources, pending requests, room for a bundle.

This is the only module of the package that uses private interfaces of Ray itself; ``tests/core/test_ray_private.py`` names
the one that a new version of Ray took away. (``sweep/trainable`` and ``training/launch`` use some of Ray Tune and Ray Train.)
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from joblib import cpu_count
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler._private.util import format_readonly_node_type
from ray.core.generated import autoscaler_pb2, common_pb2
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from pause_ray.core.errors import ClusterError, SpecError

LOCAL_LOGICAL_CPUS = 8
"""Least number of Ray's CPUs on this machine. They are places, not cores: a trial, its scoring actor, the progress actor and shard tasks
need places at the same time even on two cores; threads are capped where the computing is done."""
LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2
"""Prompts and rows pass by path, so little goes through the object store."""
HOST_AND_PORT = re.compile(r"\[?(?P<host>[^/]+?)\]?:(?P<port>\d{1,5})")
ANSWER_SECONDS = 20
"""Time in which a head must take a connection."""
DASHBOARD_ADDRESS = "is where jobs are handed in; unset it, or hand this in there: pause-ray submit FILE, or ray job submit"
VERSION = re.compile(r"^\s+(Ray|Python): (\S+)$", re.MULTILINE)
TRACEBACK = "Traceback (most recent call last):"
TOKEN_WORDS = re.compile(r"\btoken\b|auth(entic|oriz)", re.IGNORECASE)
WAITED_IN_VAIN = re.compile(r"(timed out|(failed|unable) to connect|deadline).*\bGCS\b", re.IGNORECASE)
MARKET = "ray.io/market-type"
STAYS: Mapping[str, str] = {MARKET: "on-demand"}
"""Labels of nodes that the cloud does not take away."""
STARTUP_TIMEOUT = "timed out during startup"
"""Part of the message of the bare ``Exception`` that Ray raises when its own processes take too long to start."""
MISSING_MODULE = re.compile(r"No module named '(?P<package>\w+)[\w.]*'")
AGENT_KEY = "DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX"
"""Prefix of the key under which a node's dashboard agent publishes its address."""
STATUS_SECONDS = 10
"""Timeout of a request for the cluster's status."""
AUTOSCALER_SECONDS = 20.0
"""Time in which an autoscaler, which looks at requests every five seconds, must have looked at a new one."""
GROUP_RESOURCE = "bundle_group_"
"""Prefix of the resource by which Ray sends work to the nodes of a placement group that has its resources."""
logger = logging.getLogger("pause_ray")


@contextlib.contextmanager
def connection() -> Iterator[None]:
    """Connect to Ray for the duration of the block.

    Joins the cluster of ``RAY_ADDRESS`` (set inside ``ray job submit``); without one starts a cluster on this machine
    and stops it at the end. A connection that exists already is used and kept.

    Raises:
        ClusterError: there is no such cluster, it refuses, it is of other versions, or it does not come up here.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address := os.environ.get("RAY_ADDRESS"):
        if address.startswith(("http://", "https://")):
            raise ClusterError(f"RAY_ADDRESS {address}: {DASHBOARD_ADDRESS}")
        place, answers = HOST_AND_PORT.fullmatch(address), False
        try:
            if place:  # Ray would try for minutes
                socket.create_connection((place["host"], int(place["port"])), timeout=ANSWER_SECONDS).close()
                answers = True
            ray.init(address="auto", **quiet)
        except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
            raise ClusterError(f"RAY_ADDRESS {address}: {_explain_refusal(_error_chain(error), answers=answers)}") from error
    else:
        # A thread that spins while it waits keeps the core from the one that it waits for, in another process too.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            ray.init(
                address="local",  # not one that happens to run on this machine
                num_cpus=max(LOCAL_LOGICAL_CPUS, cpu_count()),
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        except Exception as error:
            if type(error) is Exception and STARTUP_TIMEOUT in str(error):  # Ray has no class of its own for it
                raise ClusterError(
                    "Ray has not come up on this machine within half a minute, which happens where others keep all cores busy; "
                    "run the same command again when there is less to do here"
                ) from error
            raise
    try:
        yield
    finally:
        # Tune leaves cycles that hold object references. If a thread (that imports MLflow, say) happens to collect one while Ray's client
        # is being taken down, Ray ends the process: exit code 1, no traceback.
        gc.collect()
        gc.disable()
        try:
            ray.shutdown()
        finally:
            gc.enable()


def create_shared_actor_here() -> None:
    """Create the actor that Ray Data and Ray Train share, which outlives both, in this process.

    It is made where either is first used, and Ray does not take a node away that any actor is on: a training in a trial's process
    would hold its node for as long as the cluster lives.
    """
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator  # Ray 2.60

    get_or_create_autoscaling_coordinator()


def _error_chain(error: BaseException | None) -> str:
    """Return the messages of an error and of its causes, one per line; of a traceback in a message only its last line."""
    lines = []
    while error is not None:
        before, _, traceback = str(error).partition(TRACEBACK)
        lines += [before, *traceback.strip().splitlines()[-1:]]
        error = error.__cause__
    return "\n".join(lines)


def _explain_refusal(reason: str, *, answers: bool) -> str:
    """Return in one line, with a remedy, why a cluster could not be joined. A wrong token shows only as a wait in vain."""
    versions = VERSION.findall(reason)
    if "Version mismatch" in reason and len(versions) == 4:
        theirs, ours = " and ".join(" ".join(each) for each in versions[:2]), " and ".join(" ".join(each) for each in versions[2:])
        return f"the cluster has {theirs}, and this machine {ours}; use one image, or constraints.txt, on both"
    words = " ".join(reason.split())
    if TOKEN_WORDS.search(words) or (answers and WAITED_IN_VAIN.search(words)):
        return (
            "what answers there does not let this process in: the cluster's token is missing here or is another one, or it is no head; "
            "put the token (on the head: ray get-auth-token) into RAY_AUTH_TOKEN or ~/.ray/auth_token, with RAY_AUTH_MODE=token "
            f"({words})"
        )
    return (
        f"{'this process cannot join the cluster there' if answers else 'no Ray cluster answers there'} ({words}); run this on one of its "
        "nodes, or submit it to the head's dashboard (pause-ray submit); without RAY_ADDRESS it runs on this machine alone"
    )


def missing_package(account: str) -> str | None:
    """Return the package whose absence kept a process from starting, from Ray's account of its end; None if the cause was another."""
    found = MISSING_MODULE.search(account)
    return found["package"] if found else None


def explain_missing_package(account: str) -> str | None:
    """Return one line with a remedy if a process could not start because its node lacks a package; None if the cause was another."""
    remedy = "use one image on all nodes (cluster/Dockerfile makes it); pause-ray check --cluster says of every node what it lacks"
    return f"a node of the cluster has no {package}: {remedy}" if (package := missing_package(account)) else None


def session_folder() -> Path:
    """Return the folder with Ray's own files (logs, spilled objects, working directories) on this node."""
    return Path(ray._private.worker._global_node.get_session_dir_path())


def agent_address(node_id: str) -> tuple[str, int] | None:
    """Return host and port of a node's dashboard agent; None where none has started. Port 0: the agent takes no jobs and shows no logs."""
    if published := internal_kv._internal_kv_get(f"{AGENT_KEY}:{node_id}", namespace="dashboard"):
        host, port, _ = json.loads(published)
        return host, port
    return None


def check_capacity(needed: Mapping[str, float], *, remedy: str = "lower train_workers, or what each of them takes") -> None:
    """Refuse what a cluster of this machine has no room for, since Ray would wait for it forever.

    One that was joined may grow: as far as its autoscaler says, and where it does not say, it is only warned.

    ``needed`` has the numbers of ``CPU`` and ``GPU`` that are held at the same time.

    Raises:
        SpecError: naming both numbers.
    """
    for name, number in needed.items():
        has = total(name)
        if number > has:
            _refuse_or_warn(f"resources: training and scoring hold {number:g} {name}s at a time, and the cluster has {has:g}", remedy)


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
        amounts = " and ".join(f"{number:g} {name}s" for name, number in takes.items())
        problem, remedy = f"{taker} takes {amounts} on one node, and no node has both", "lower one of them"
        for name, number in takes.items():
            largest = max(nodes, key=lambda node: nodes[node].get(name, 0), default=None)
            has = nodes[largest].get(name, 0) if largest else 0
            if has < number:
                problem = f"{taker} takes {number:g} {name}s on one node, and the largest, {largest}, has {has:g}"
                remedy = "lower it"
                break
        _refuse_or_warn(f"resources: {problem}", remedy)


def _refuse_or_warn(problem: str, remedy: str) -> None:
    if is_fixed_size():
        raise SpecError(f"{problem}; {remedy}{', or start nodes that have it' if os.environ.get('RAY_ADDRESS') else ''}")
    logger.warning("%s; waiting until it has grown; if it cannot, %s", problem, remedy)


def _autoscaler() -> Any | None:
    """Return the autoscaler's report of the nodes that it can start, or None; an autoscaler of ``ray up`` reports nothing."""
    config = ray._private.state.state.get_cluster_config()
    return config if config is not None and config.node_group_configs else None


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _possible_nodes() -> dict[str, Mapping[str, float]]:
    """Return the resources of every node that there is, and of a node of each kind that the autoscaler can start, by name."""
    nodes: dict[str, Mapping[str, float]] = {
        f"node {node['NodeManagerAddress']} {node['NodeID'][:6]}": node["Resources"] for node in _alive_nodes()
    }
    kinds = getattr(_autoscaler(), "node_group_configs", ())
    return nodes | {f"node type {kind.name}": dict(kind.resources) for kind in kinds if kind.max_count}


def blocked_groups(holding: Mapping[str, float]) -> frozenset[str]:
    """Return the waiting placement groups, of any job, that need something of which ``holding`` has some and that a node could give.

    Trials of Tune and workers of Ray Train come as placement groups. Freshly asked ones are among them for a moment.
    """
    nodes = [node["Resources"] for node in _alive_nodes()]
    return frozenset(
        name
        for name, group in placement_group_table().items()
        if group["state"] in ("PENDING", "RESCHEDULING")
        if any(bundle.get(resource) and held for bundle in group["bundles"].values() for resource, held in holding.items())
        if all(any(_gives(node, bundle) for node in nodes) for bundle in group["bundles"].values())
    )


def _gives(node: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= number for name, number in bundle.items())


def has_market_labels() -> bool:
    """Return whether any node is labelled with its market type (on demand or spot)."""
    return any(MARKET in node.get("Labels", {}) for node in _alive_nodes())


def on_demand_nodes() -> list[Mapping[str, float]]:
    """Return the resources of each node that is labelled as on demand."""
    return [node["Resources"] for node in _alive_nodes() if STAYS.items() <= node.get("Labels", {}).items()]


def total(resource: str) -> float:
    """Return the ``CPU`` or ``GPU`` of the cluster, those in use included; where an autoscaler reports its limit, that limit."""
    grown = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return max(float(ray.cluster_resources().get(resource, 0)), float(grown.get(resource, 0)))


def is_fixed_size() -> bool:
    """Return whether ``total`` is all that there can ever be."""
    return _autoscaler() is not None or has_no_autoscaler()


def has_no_autoscaler() -> bool:
    """Return whether nothing starts more nodes: the cluster is this machine's own, or its head has no file of nodes to start.

    Such a head reports each node as a kind of its own.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return True
    kinds = _reported_kinds()
    return bool(kinds) and kinds <= {format_readonly_node_type(node["NodeID"]) for node in ray.nodes()}


def _reported_kinds() -> set[str]:
    """Return the kinds of the existing nodes as the head's monitor names them; none before its first report."""
    report = internal_kv._internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    return set(json.loads(report).get("autoscaler_report", {}).get("active_nodes", {})) if report else set()


def free_gpus() -> float:
    """Return the GPUs of the cluster, as it is now, that nobody holds."""
    return float(ray.available_resources().get("GPU", 0))


def total_gpus() -> float:
    """Return the GPUs of the cluster as it is now, those in use included."""
    return float(ray.cluster_resources().get("GPU", 0))


def pending_requests() -> str | None:
    """Return one line with the resource requests that Ray has not placed, in the words of ``ray status``; None where all are placed.

    Requests within a placement group that has its resources are left out: more nodes would not help them. Ray does not say whose
    requests these are, so those of other jobs are among them. Only an autoscaler of Ray's second version says what is infeasible.
    """
    status = _cluster_status()
    state, autoscaler = status.cluster_resource_state, status.autoscaling_state
    infeasible = {
        *map(_format_request, autoscaler.infeasible_resource_requests),
        *map(_format_group, autoscaler.infeasible_gang_resource_requests),
    }
    counts: Counter[tuple[str, str]] = Counter()
    for entry in state.pending_resource_requests:
        if not any(name.startswith(GROUP_RESOURCE) for name in entry.request.resources_bundle):
            counts[_format_request(entry.request), "tasks/actors"] += entry.count
    counts.update((_format_group(group), "placement groups") for group in state.pending_gang_resource_requests)
    lines = (
        f"{words}: {count}+ pending {kind}{' (infeasible)' if words in infeasible else ''}"
        for (words, kind), count in sorted(counts.items())
    )
    return ", ".join(lines) or None


def _cluster_status() -> Any:
    reply = autoscaler_pb2.GetClusterStatusReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_status(timeout_s=STATUS_SECONDS))
    return reply


def _format_request(request: Any) -> str:
    wanted = [constraint for selector in request.label_selectors for constraint in selector.label_constraints]
    negations = {common_pb2.LABEL_OPERATOR_NOT_IN: "!="}
    labels = sorted(f"{each.label_key}{negations.get(each.operator, '=')}{'|'.join(each.label_values)}" for each in wanted)
    return f"{dict(sorted(request.resources_bundle.items()))}{' on ' + ', '.join(labels) if labels else ''}"


def _format_group(group: Any) -> str:
    requests = (
        group.bundle_selectors[0].resource_requests if group.bundle_selectors else group.requests
    )  # the first alternative is preferred
    return ", ".join(f"{words} * {number}" for words, number in sorted(Counter(map(_format_request, requests)).items()))


def can_place(bundle: Mapping[str, float], *, number: int, labels: Mapping[str, str]) -> bool:
    """Return whether nodes with these labels can hold ``bundle`` ``number`` times: now, or once the autoscaler has started them.

    A placement group asks for it, and is removed when the answer is there. Without an answer within ``AUTOSCALER_SECONDS`` the
    answer is no.
    """
    group = placement_group([dict(bundle)] * number, bundle_label_selector=[dict(labels)] * number)
    asked_in: int | None = None
    until = time.monotonic() + AUTOSCALER_SECONDS
    try:
        while time.monotonic() < until:
            if group.wait(0.5):
                return True
            status = _cluster_status()
            state, autoscaler = status.cluster_resource_state, status.autoscaling_state
            if asked_in is None:
                if _is_among(group.id.hex(), state.pending_gang_resource_requests):
                    asked_in = state.cluster_resource_state_version
            elif autoscaler.last_seen_cluster_resource_state_version > asked_in:
                return not _is_among(group.id.hex(), autoscaler.infeasible_gang_resource_requests)
        return False
    finally:
        remove_placement_group(group)


def _is_among(group_id: str, groups: Any) -> bool:
    return any(str(group.details).partition(":")[0] == group_id for group in groups)
