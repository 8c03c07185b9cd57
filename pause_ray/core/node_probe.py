"""One machine as a sweep will find it: packages, GPUs, memory, disks, paths, and which other machines it reaches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pause_ray.core.errors import SourceError
from pause_ray.core.files import is_seen

PACKAGES = ("pause_ray", "ray", "torch", "transformers", "peft", "deepspeed", "tokenizers", "bitsandbytes")
"""Packages that must have the same version on all nodes: they decide results, or their objects travel pickled."""
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with a container's memory limit (cgroup v2, v1): ``max``, or a number larger than any memory, where there is none."""
MIG_SLICE = re.compile(r"\s+MIG (?P<profile>\S*?(?P<gigabytes>\d+)gb\S*)")
"""A line of a slice in the output of ``nvidia-smi -L``."""
CONNECT_SECONDS = 5
CONNECT_AT_ONCE = 256
"""Connections that a node tries at the same time; those to a thousand nodes, if none answers, take less than a minute."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a node."""

    name: str
    """The name of the GPU, with the profile if it is a slice (MIG)."""
    memory_bytes: int | None
    """None where the driver does not report it; 0 for a GPU in MIG mode without slices."""


NO_SLICE = Gpu(name="without slices", memory_bytes=0)


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """The state of one machine."""

    versions: Mapping[str, str]
    """Versions of ``python`` and of those of ``PACKAGES`` that are installed."""
    gpus: tuple[Gpu, ...]
    free_bytes: int | None
    """Free space under the storage root; None where the root is not visible."""
    storage: str
    """``ok``, or the problem of the storage root."""
    unseen: Mapping[str, str]
    """The problem of each requested path that is not visible on this machine."""
    free_share: float = 1.0
    """Free share of the disk with Ray's spilled objects, working directories and logs."""
    memory_bytes: int = 0
    """Memory of the machine, or the limit of its container; 0 where it is not known."""


def probe_node(root: Path, *, probe: str, paths: Sequence[str], session: Path | None = None) -> NodeInfo:
    """Return the state of this machine as a sweep will find it.

    Args:
        root: The storage root; it is not made here, since a folder of this node alone would hide that it is not shared.
        probe: Name of the file that the driver has put there; another of that name and this process's id is written beside it.
        paths: Files, folders and globs that the sweep's specs name, local or in buckets.
        session: Folder of Ray's own files on this node.
    """
    storage, free = _storage(root, probe=probe)
    disk = shutil.disk_usage(session) if session is not None else None
    return NodeInfo(
        versions={"python": platform.python_version(), **{name: found for name in PACKAGES if (found := _version(name))}},
        gpus=_gpus(),
        free_bytes=free,
        storage=storage,
        unseen={path: wrong for path in paths if (wrong := _unseen(path))},
        free_share=disk.free / disk.total if disk else 1.0,
        memory_bytes=usable_memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), limits=MEMORY_LIMITS),
    )


def usable_memory(machine_bytes: int, *, limits: Sequence[Path]) -> int:
    """Return the memory that a process may use; files that do not exist or hold no number are ignored."""
    found = [path.read_text().strip() for path in limits if path.is_file()]
    return min([machine_bytes, *(int(limit) for limit in found if limit.isdigit())])


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


def _unseen(path: str) -> str:
    try:
        return "" if is_seen(path) else f"{path} is not there"
    except SourceError as error:
        return str(error)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that ``nvidia-smi`` lists, which needs no torch; none where it is not installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()

    def ask(*arguments: str) -> str:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, check=False, timeout=30).stdout  # noqa: S603 (no shell)

    return parse_gpus(ask("--query-gpu=name,memory.total,mig.mode.current", "--format=csv,noheader,nounits"), listed=ask("-L"))


def parse_gpus(table: str, *, listed: str) -> tuple[Gpu, ...]:
    """Return the GPUs that a process can use.

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
        of_gpu = slices[number] if number < len(slices) else []
        gpus += [Gpu(name=f"{name} MIG {part.name}", memory_bytes=part.memory_bytes) for part in of_gpu or [NO_SLICE]]
    return tuple(gpus)


class NodeActor:
    """An actor that looks at its own node, and listens on a free port so that other nodes can try to connect."""

    def __init__(self) -> None:
        self._server = socket.create_server(("", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            self._server.accept()[0].close()

    def probe(self, root: Path, *, probe: str, paths: Sequence[str]) -> tuple[NodeInfo, int]:
        """Return what this node is like, and the port that other nodes try."""
        from pause_ray.core.ray_cluster import session_folder

        return probe_node(root, probe=probe, paths=paths, session=session_folder()), int(self._server.getsockname()[1])

    def unreachable(self, others: Mapping[str, tuple[str, int]]) -> tuple[str, ...]:
        """Return the names of those of the others (name → host and port) that take no connection."""
        with ThreadPoolExecutor(CONNECT_AT_ONCE) as pool:  # a connection that is dropped takes its whole time
            answers = list(pool.map(_takes_connections, others.values()))
        return tuple(name for name, answered in zip(others, answers, strict=True) if not answered)


def _takes_connections(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
