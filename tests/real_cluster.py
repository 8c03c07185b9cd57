"""A Ray head with token authentication and further raylets, each a process of its own, as ``ray start`` makes them on machines."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import requests

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_SECONDS = 240
ENDS_AT_ONCE = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
"""A raylet that is asked to end waits half a minute for its workers otherwise."""


@dataclass(frozen=True, kw_only=True)
class RealCluster:
    """A cluster that runs."""

    address: str
    """Of its jobs API."""
    gcs: str
    """Where further raylets join."""
    token: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of Ray itself, such as ``RAY_health_check_period_ms``."""

    @property
    def environment(self) -> dict[str, str]:
        """For processes that may use it."""
        return {**_bare_environment(), **self.settings, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextlib.contextmanager
def running_cluster(folder: Path, *, workers: int, cpus: int = 4, settings: Mapping[str, str] | None = None) -> Iterator[RealCluster]:
    """A head without CPUs of its own and ``workers`` raylets of ``cpus`` logical CPUs; all end with the block."""
    port, dashboard = free_port(), free_port()
    cluster = RealCluster(
        address=f"http://127.0.0.1:{dashboard}", gcs=f"127.0.0.1:{port}", token=secrets.token_hex(32), settings=settings or {}
    )
    head = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
    with contextlib.ExitStack() as processes:

        def join(arguments: list[str], *, log: str) -> None:
            # One each: a copied working directory that two raylets unpack into one folder is torn away under the first's jobs.
            place = processes.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            processes.enter_context(raylet(cluster, [*arguments, f"--temp-dir={place}"], log=folder / log))

        join([*head, "--num-cpus=0"], log="head.log")
        _wait_for_head(cluster, folder / "head.log")
        for number in range(workers):
            join([f"--address={cluster.gcs}", f"--num-cpus={cpus}", "--num-gpus=0"], log=f"worker-{number}.log")
            wait_for_nodes(cluster, 2 + number)
        yield cluster


@contextlib.contextmanager
def raylet(cluster: RealCluster, arguments: list[str], *, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``ray start --block`` with these arguments; ends with the block."""
    # Several raylets share this machine, and Ray's defaults for these two are fixed ports.
    ports = [f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}"]
    memory = ["--object-store-memory=100000000", "--disable-usage-stats", "--block", *ports]
    environment = {**ENDS_AT_ONCE, **cluster.environment, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen([*RAY, "start", *arguments, *memory], env=environment, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=180)


def wait_for_nodes(cluster: RealCluster, number: int) -> None:
    """Until so many have joined, the head included."""
    until = time.monotonic() + START_SECONDS
    url = f"{cluster.address}/api/v0/nodes"
    while True:
        told = requests.get(url, timeout=120, headers={"Authorization": f"Bearer {cluster.token}"}).json()
        alive = [node for node in told["data"]["result"]["result"] if node["state"] == "ALIVE"]
        if len(alive) == number:
            return
        assert time.monotonic() < until, told
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _bare_environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    return {**{name: value for name, value in os.environ.items() if not name.startswith("RAY_")}, "PATH": path}


def _wait_for_head(cluster: RealCluster, log: Path) -> None:
    """Until it takes jobs, which its agent must be up for."""
    until = time.monotonic() + START_SECONDS
    authorized = {"Authorization": f"Bearer {cluster.token}"}
    while True:
        try:
            requests.post(f"{cluster.address}/api/jobs/", json={"entrypoint": "true"}, timeout=60, headers=authorized).raise_for_status()
        except requests.RequestException:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        else:
            return
