"""cluster/local.yaml, tried for real: a head with token authentication, nodes that come when work waits and go when it is done."""

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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_files.autoscaler import CLUSTER, MARKET, ON_DEMAND, SPOT, decide, read
from tests.cluster_files.ports import free_ports
from tests.sweep.stubs import ROOT, write_stub_sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow]

IDLE_SECONDS = 3.0
"""Instead of the file's minute."""
SLACK_SECONDS = 20.0
"""For the autoscaler to look, drain a node and end it, on a busy machine."""
RESOURCES = {
    "train_workers": 1,
    "train_cpus_per_worker": 4.0,
    "scoring_actors": {"min": 0, "max": 2},
    "scoring_cpus_per_actor": 4.0,
    "scoring_idle_seconds": 1.0,
}
"""A worker and an actor fill a node each."""
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
worked_on = ray.get(place.remote(), timeout=180)
during = sorted(alive())
print(json.dumps({"before": before, "worked_on": worked_on, "during": during, "after": after(1, 180)}))
"""


def documented() -> list[str]:
    """The commands of the file's first comment."""
    head = CLUSTER.joinpath("local.yaml").read_text().split("cluster_name:")[0]
    return [line.removeprefix("#").strip() for line in head.splitlines() if line.startswith("#     ")]


@dataclass(frozen=True)
class LocalCluster:
    """One that the documented commands have started, at ports and in a folder of its own and with a shorter patience."""

    address: str
    dashboard: str
    environment: dict[str, str]
    config: dict[str, Any]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    from ray._private.services import get_node_ip_address

    tmp_path = tmp_path_factory.mktemp("cluster")
    port, dashboard, client = free_ports(3)
    address = f"{get_node_ip_address()}:{port}"
    config = read("local.yaml")
    config["idle_timeout_minutes"] = IDLE_SECONDS / 60
    config["provider"]["gcs_address"] = address
    file = tmp_path / "local.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    make_token, *exports, start = documented()[:4]
    subprocess.run(shlex.split(make_token), env=environment, check=True, capture_output=True)
    here = {"$PWD": str(ROOT), "${PYTHONPATH:-}": os.environ.get("PYTHONPATH", "")}
    for name, value in re.findall(r"(\w+)=(\S+)", " ".join(exports)):
        environment[name] = re.sub("|".join(map(re.escape, here)), lambda found: here[found[0]], value)
    session = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie below it
    own = f"--port={port} --dashboard-port={dashboard} --ray-client-server-port={client} --dashboard-agent-listen-port=0"
    command = [*shlex.split(start.replace("cluster/local.yaml", str(file))), *own.split()]
    command += [f"--temp-dir={session}", "--disable-usage-stats"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        yield LocalCluster(address=address, dashboard=f"http://127.0.0.1:{dashboard}", environment=environment, config=config)
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


def test_a_node_comes_for_work_and_goes_without(cluster: LocalCluster) -> None:
    environment = cluster.environment
    command = [sys.executable, "-c", WORK, cluster.address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {"before": ["on-demand"], "worked_on": "spot", "during": ["on-demand", "spot"], "after": ["on-demand"]}
    stranger = environment | {"RAY_AUTH_TOKEN": "f" * 64}
    refused = subprocess.run(command, env=stranger, capture_output=True, text=True, check=False, timeout=300)
    assert refused.returncode != 0
    assert "auth" in refused.stderr.lower()


@pytest.fixture(scope="module")
def diary(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """Of the cluster while a sweep of four trials is submitted to it, two of which train, until nothing is left of it."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep = write_stub_sweep(folder, max_concurrent_trials=2, **{f"trial.resources.{name}": value for name, value in RESOURCES.items()})
    file = folder / "diary.jsonl"
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    (submit,) = [command for command in documented() if command.startswith("ray job submit")]
    options = ["--address", cluster.dashboard, "--runtime-env-json", json.dumps({"env_vars": variables}), "--"]
    assert submit.startswith("ray job submit --address http://127.0.0.1:8265")
    job = ["python", "-m", "tests.cluster_files.held_sweep", folder / "held.jsonl", sweep, "--storage", folder / "runs"]
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
    written = subprocess.Popen([sys.executable, "-m", "tests.cluster_files.cluster_diary", cluster.address, str(file)], env=environment)

    def looks() -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []

    try:
        done = subprocess.run(
            [*shlex.split(submit)[:3], *options, *map(str, job)], env=environment, capture_output=True, text=True, check=False, timeout=1500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        ledgers = list((folder / "runs" / "trials").glob("*/cells.jsonl"))
        assert [ledger.read_bytes().count(b"\n") for ledger in ledgers] == [12] * 4
        assert len((folder / "held.jsonl").read_text().splitlines()) == 2
        until = time.monotonic() + 240
        while looks()[-1]["workers"]:
            assert time.monotonic() < until, looks()[-1]
            time.sleep(0.5)
        yield looks()
    finally:
        written.kill()
        written.wait()


def test_a_sweep_takes_the_cluster_from_nothing_to_what_it_plans_and_back(cluster: LocalCluster, diary: list[dict[str, Any]]) -> None:
    """Trials on nodes that stay; workers and actors, each of which takes a node, as many as trials run at a time."""
    assert diary[0]["workers"] == []
    most: dict[tuple[float, tuple[str, ...]], int] = {}
    for look in diary:
        for resources, labels, is_infeasible, number in look["pending"]:
            assert not is_infeasible, look
            kind = (resources.pop("CPU"), tuple(labels))
            assert not resources, "something was asked for that no part of a sweep takes"
            most[kind] = max(most.get(kind, 0), number)
    whole = cluster.config["available_node_types"]["goes"]["resources"]["CPU"]
    for tasks in ((1.0, ()), (0.5, ())):  # that write rows, where the trials' places do not do
        most.pop(tasks, None)
    assert most.keys() <= {(1.0, (f"{MARKET}=on-demand",)), (float(whole), ())}  # trials find room at once where rows were just written
    trial_places = [[{"CPU": 1.0}, {MARKET: "on-demand"}]]
    assert max(look["groups"].count(trial_places) for look in diary) == 2, "trials at a time"
    assert 1 <= most[float(whole), ()] <= 4, "a worker and an actor for each of two trials"
    assert {worker["kind"] for look in diary for worker in look["workers"]} == {"stays", "goes"}
    assert 3 <= max(len(look["workers"]) for look in diary) <= cluster.config["max_workers"]
    assert not any(bundle.keys() - {"CPU"} or bundle["CPU"] > 1 for look in diary for bundle, _ in look["wanted"]), "a node for no work"


def test_no_node_idles_longer_than_the_file_says(cluster: LocalCluster, diary: list[dict[str, Any]]) -> None:
    idle = [(worker["idle_seconds"], look["time"], later["time"]) for look, later in pairwise(diary) for worker in look["workers"]]
    assert max(seconds for seconds, _, _ in idle) <= IDLE_SECONDS + SLACK_SECONDS
    assert max(seconds + later - now for seconds, now, later in idle) >= IDLE_SECONDS, (
        "gone before its time, at the latest by the next look"
    )


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
