"""cluster/local.yaml, tried for real: a head with token authentication, a node that comes when work waits and goes when it is done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_files.autoscaler import CLUSTER, MARKET, ON_DEMAND, SPOT, decide, read
from tests.cluster_files.ports import free_ports

pytestmark = pytest.mark.ray

WORK = """
import json, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=3, label_selector={"ray.io/market-type": "spot"})
def place():
    return ray.get_runtime_context().get_node_labels()["ray.io/market-type"]

def alive():
    return [node["Labels"].get("ray.io/market-type") for node in ray.nodes() if node["Alive"]]

def after(number, seconds):
    until = time.monotonic() + seconds
    while len(alive()) != number and time.monotonic() < until:
        time.sleep(0.5)
    return alive()

before = alive()
worked_on = ray.get(place.remote(), timeout=60)
during = sorted(alive())
print(json.dumps({"before": before, "worked_on": worked_on, "during": during, "after": after(1, 60)}))
"""


def documented() -> list[str]:
    """The commands of the file's first comment."""
    head = CLUSTER.joinpath("local.yaml").read_text().split("cluster_name:")[0]
    return [line.removeprefix("#").strip() for line in head.splitlines() if line.startswith("#     ")]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The documented commands, at ports and in a folder of their own and with a shorter patience; their address and environment."""
    from ray._private.services import get_node_ip_address

    port, dashboard, client = free_ports(3)
    address = f"{get_node_ip_address()}:{port}"
    config = read("local.yaml")
    config["idle_timeout_minutes"] = 0.05
    config["provider"]["gcs_address"] = address
    file = tmp_path / "local.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    make_token, export, start, *_ = documented()
    subprocess.run(shlex.split(make_token), env=environment, check=True, capture_output=True)
    environment |= dict(re.findall(r"(\w+)=(\S+)", export))
    session = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie below it
    own = f"--port={port} --dashboard-port={dashboard} --ray-client-server-port={client} --dashboard-agent-listen-port=0"
    command = [*shlex.split(start.replace("cluster/local.yaml", str(file))), *own.split()]
    command += [f"--temp-dir={session}", "--include-dashboard=false", "--disable-usage-stats"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        yield address, environment
    finally:
        end(session, address)


def end(session: str, address: str) -> None:
    """Ends the processes of this cluster, which name its folder or its address, and no others."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if process.pid != os.getpid() and (session in words or address in words):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    shutil.rmtree(session, ignore_errors=True)


def test_a_node_comes_for_work_and_goes_without(cluster: tuple[str, dict[str, str]]) -> None:
    address, environment = cluster
    command = [sys.executable, "-c", WORK, address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {"before": ["on-demand"], "worked_on": "spot", "during": ["on-demand", "spot"], "after": ["on-demand"]}
    stranger = environment | {"RAY_AUTH_TOKEN": "f" * 64}
    refused = subprocess.run(command, env=stranger, capture_output=True, text=True, check=False, timeout=100)
    assert refused.returncode != 0
    assert "auth" in refused.stderr.lower()


def test_the_file_is_whole_as_it_stands() -> None:
    """The head reads it without anybody's defaults."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = read("local.yaml")
    assert decide(config, tasks=[({"CPU": 1}, {})])[0] == {"stays": 1}
    assert decide(config, tasks=[({"CPU": 4}, SPOT)] * 2)[0] == {"goes": 2}
    assert decide(config, tasks=[({"CPU": 4}, ON_DEMAND)] * 3)[0] == {"stays": 2}
    assert decide(config, idle={"goes": 61, "stays": 59})[1] == {"goes"}
    validate_config(prepare_config(config))
    (start,) = [command for command in documented() if command.startswith("ray start")]
    assert f"--labels={MARKET}=on-demand" in start
    assert "--num-cpus=0" in start
