"""`ray up` with cluster/gcp.yaml, all of Ray's own code; Google's interface is answered here, ssh is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster_files.autoscaler import ACCELERATOR, ON_DEMAND, Machine, autoscaler_config, decide, read
from tests.cluster_files.image import environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PROJECT = "my-project"


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    httplib2 = pytest.importorskip("httplib2")
    pytest.importorskip("googleapiclient")
    from ray.autoscaler._private.gcp import node

    from tests.cluster_files.compute_engine import ComputeEngine

    answers = ComputeEngine(PROJECT)
    monkeypatch.setattr(httplib2.Http, "request", lambda _self, *args, **more: answers.request(*args, **more))
    monkeypatch.setattr(node, "POLL_INTERVAL", 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_UP_enable_autoscaler_v2", "1")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    return answers


def start_head() -> Machine:
    from ray.autoscaler._private import commands

    config = read("gcp.yaml")
    config["provider"]["gcp_credentials"] = {"type": "credentials_token", "credentials": "token"}
    machine = Machine(image_environment=environment(), gpus=False)
    prepared = commands._bootstrap_config(config, no_config_cache=True)
    commands.get_or_create_head_node(prepared, "cluster/gcp.yaml", False, False, True, None, _runner=machine)
    return machine


def known_to_google(body: dict[str, Any]) -> list[str]:
    import googleapiclient

    from tests.cluster_files.compute_engine import unknown_fields

    documents = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]
    return unknown_fields(body, schemas["Instance"], schemas)


def test_ray_up_starts_one_head_on_demand_and_the_head_starts_spot_workers(google: Any) -> None:
    machine = start_head()
    (head,) = google.asked
    assert head["machineType"].endswith("/n2-standard-8")
    assert head["scheduling"]["provisioningModel"] == "STANDARD"
    (start,) = machine.run("ray start --head")
    assert "--dashboard-host=127.0.0.1" in start
    assert machine.run("ssh", f"ProxyCommand=gcloud compute start-iap-tunnel %h %p --listen-on-stdin --project={PROJECT}")
    (run,) = machine.run("docker run")
    assert "-e RAY_AUTH_MODE=token" in run
    assert f"/.ray/auth_token:{environment()['HOME']}/.ray/auth_token" in run

    wanted, _, _ = decide(machine.bootstrap, tasks=[({"GPU": 1}, {})] * 2 + [({"CPU": 1}, ON_DEMAND)])
    assert wanted == {"a100x1": 2, "cpu": 1}
    launch(machine.bootstrap, wanted)
    workers = google.asked[1:]
    assert sorted(worker["labels"]["ray-user-node-type"] for worker in workers) == ["a100x1", "a100x1", "cpu"]
    for worker in workers:
        spot = worker["labels"]["ray-user-node-type"] != "cpu"
        assert (worker["scheduling"]["provisioningModel"] == "SPOT") == spot
        assert "serviceAccounts" not in worker  # of all machines the head alone can start others


def launch(remote: dict[str, Any], wanted: dict[str, int]) -> None:
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

    config = autoscaler_config(remote)
    provider = _get_node_provider(remote["provider"], remote["cluster_name"])
    adapter = NodeProviderAdapter(provider, SimpleNamespace(get_cached_autoscaling_config=lambda: config))
    for node_type, number in wanted.items():
        adapter._launch_nodes_by_type(node_type, number, "request")
    assert [error.__cause__ for error in adapter.poll_errors()] == []


@pytest.mark.parametrize("node_type", sorted(read("gcp.yaml")["available_node_types"]))
def test_google_knows_every_field_and_no_machine_is_public(google: Any, node_type: str) -> None:
    machine = start_head()
    if node_type != "head":
        launch(machine.bootstrap, {node_type: 1})
    body = google.asked[-1]
    assert body["labels"]["ray-user-node-type"] == node_type
    assert known_to_google(body) == []
    assert known_to_google(body | {"machinetype": "x"}) == [".machinetype: unknown"]
    assert all("accessConfigs" not in interface for interface in body["networkInterfaces"])
    assert body["labels"]["project"] == "pause-ray"


MACHINES = {
    "a2-ultragpu-1g": (12, 1, "A100"),
    "a2-ultragpu-8g": (96, 8, "A100"),
    "a3-highgpu-1g": (26, 1, "H100"),
    "a3-highgpu-8g": (208, 8, "H100"),
}
"""CPUs, GPUs and their name (docs.cloud.google.com/compute/docs/accelerator-optimized-machines)."""


def test_what_the_file_says_of_a_machine_is_what_google_lists() -> None:
    for kind in read("gcp.yaml")["available_node_types"].values():
        if not kind["resources"].get("GPU"):
            continue
        listed = MACHINES[kind["node_config"]["machineType"]]
        assert (kind["resources"]["CPU"], kind["resources"]["GPU"], kind["labels"][ACCELERATOR]) == listed
