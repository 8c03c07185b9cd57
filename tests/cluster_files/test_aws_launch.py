"""`ray up` with cluster/aws.yaml, all of Ray's own code, against Amazon's interface on loopback; only ssh is recorded, not run."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.cluster_files.autoscaler import ACCELERATOR, CLUSTER, ON_DEMAND, Machine, autoscaler_config, decide, read
from tests.cluster_files.image import environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """An account with what the file's placeholders stand for, and the file with those names in it."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    from ray.autoscaler._private.aws import config, utils

    for cached in (utils.resource_cache, utils.client_cache, config._get_subnets_or_die):
        cached.cache_clear()
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"")  # an account outlives its server
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "HOME": str(tmp_path),
        "RAY_UP_enable_autoscaler_v2": "1",
    }.items():
        monkeypatch.setenv(name, value)
    region = read("aws.yaml")["provider"]["region"]
    ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{number}.0/24", AvailabilityZone=region + zone)["Subnet"]["SubnetId"]
        for number, zone in enumerate("ab")
    ]
    group = ec2.create_security_group(GroupName="pause-ray", Description="inside", VpcId=vpc)["GroupId"]
    iam.create_instance_profile(InstanceProfileName="pause-ray-head")
    text = (CLUSTER / "aws.yaml").read_text()
    for placeholder, name in {
        "subnet-0aaaaaaaaaaaaaaaa": subnets[0],
        "subnet-0bbbbbbbbbbbbbbbb": subnets[1],
        "sg-0123456789abcdef0": group,
    }.items():
        assert placeholder in text
        text = text.replace(placeholder, name)
    path = tmp_path / "aws.yaml"
    path.write_text(text)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    yield SimpleNamespace(ec2=ec2, subnets=subnets, group=group, path=path, region=region)
    moto.stop()


def instances(account: SimpleNamespace) -> list[dict[str, Any]]:
    found = [one for reservation in account.ec2.describe_instances()["Reservations"] for one in reservation["Instances"]]
    return [one | {"tags": {tag["Key"]: tag["Value"] for tag in one["Tags"]}} for one in found if one["State"]["Name"] == "running"]


def of_type(account: SimpleNamespace, node_type: str) -> list[dict[str, Any]]:
    return [one for one in instances(account) if one["tags"]["ray-user-node-type"] == node_type]


def start_head(account: SimpleNamespace) -> Machine:
    from ray.autoscaler._private import commands

    machine = Machine(image_environment=environment(), gpus=False)
    config = commands._bootstrap_config(yaml.safe_load(account.path.read_text()), no_config_cache=True)
    commands.get_or_create_head_node(config, str(account.path), False, False, True, None, _runner=machine)
    return machine


def test_ray_up_starts_one_head_on_demand_and_the_head_starts_spot_workers(account: SimpleNamespace) -> None:
    """From nothing to a head, to the machines that a demand needs, and back to the head."""
    machine = start_head(account)
    (head,) = instances(account)
    assert head["tags"] | {"ray-node-type": "head", "ray-user-node-type": "head", "ray-node-status": "up-to-date"} == head["tags"]
    assert head["InstanceType"] == "m7i.2xlarge"
    assert "InstanceLifecycle" not in head
    assert_private_and_tagged(account, head)
    assert head["IamInstanceProfile"]["Arn"].endswith("/pause-ray-head")
    assert_set_up(machine, head["InstanceId"], account)

    remote = machine.bootstrap
    assert "ssh_proxy_command" not in remote["auth"]
    demand = [({"CPU": 1, "GPU": 1}, {ACCELERATOR: "H100"})] * 2 + [({"CPU": 1}, ON_DEMAND)]
    wanted, _, _ = decide(remote, tasks=demand, together=[({"CPU": 8, "GPU": 8}, {ACCELERATOR: "H200"})])
    assert wanted == {"cpu": 1, "h100x1": 2, "h200x8": 1}
    provider, asked = launch(remote, wanted)
    assert asked == wanted
    assert {name: len(of_type(account, name)) for name in wanted} == dict.fromkeys(wanted, 1)
    for worker in [one for one in instances(account) if one["InstanceId"] != head["InstanceId"]]:
        spot = worker["tags"]["ray-user-node-type"] != "cpu"
        assert worker.get("InstanceLifecycle") == ("spot" if spot else None)
        assert "IamInstanceProfile" not in worker
        assert_private_and_tagged(account, worker)
    assert of_type(account, "h200x8")[0]["InstanceType"] == "p5en.48xlarge"

    assert_worker_set_up(remote, provider, of_type(account, "h100x1")[0], head)
    provider.terminate_nodes([one["InstanceId"] for one in instances(account) if one["tags"]["ray-node-type"] == "worker"])
    assert [one["InstanceId"] for one in instances(account)] == [head["InstanceId"]]


def launch(remote: dict[str, Any], wanted: dict[str, int]) -> tuple[Any, dict[str, int]]:
    """What the autoscaler on the head does about its own decision.

    Returns:
        The provider, and per node type how many machines Amazon was asked for at most. (The one on loopback gives the fewest that
        will do, one; the real one as many as it has.)
    """
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

    config = autoscaler_config(remote)
    provider = _get_node_provider(remote["provider"], remote["cluster_name"])
    asked: dict[str, int] = {}

    def note(params: dict[str, Any], **_more: Any) -> None:
        tags = {tag["Key"]: tag["Value"] for tag in params["TagSpecifications"][0]["Tags"]}
        asked[tags["ray-user-node-type"]] = params["MaxCount"]

    provider.ec2_fail_fast.meta.client.meta.events.register("provide-client-params.ec2.RunInstances", note)
    adapter = NodeProviderAdapter(provider, SimpleNamespace(get_cached_autoscaling_config=lambda: config))
    adapter.launch(dict(wanted), "request")
    until = time.monotonic() + 120
    while len(adapter.get_non_terminated()) < 1 + len(wanted):
        errors = [error.__cause__ for error in adapter.poll_errors()]
        assert not errors
        assert time.monotonic() < until, "not all machines came"
        time.sleep(0.1)
    return provider, asked


def assert_private_and_tagged(account: SimpleNamespace, one: dict[str, Any]) -> None:
    assert not one.get("PublicIpAddress")
    assert one["SubnetId"] in account.subnets
    assert [group["GroupId"] for group in one["SecurityGroups"]] == [account.group]
    assert one["MetadataOptions"]["HttpTokens"] == "required"
    assert one["tags"] | {"project": "pause-ray", "ray-cluster-name": "pause-ray"} == one["tags"]


def assert_set_up(machine: Machine, node_id: str, account: SimpleNamespace) -> None:
    """Over Systems Manager; storage and scratch before the container, the token into it, Ray with the dashboard on loopback."""
    first_ssh = next(command for command in machine.commands if command.startswith("ssh"))
    assert f"ProxyCommand=aws ssm start-session --region {account.region}" in first_ssh
    assert f"ubuntu@{node_id}" in first_ssh
    order = ["mount -t nfs4", "docker run", "ray start --head"]
    places = [next(at for at, command in enumerate(machine.commands) if words in command) for words in order]
    assert places == sorted(places)
    (run,) = machine.run("docker run")
    assert "-e RAY_AUTH_MODE=token" in run
    assert f"/.ray/auth_token:{environment()['HOME']}/.ray/auth_token" in run
    assert "-v /mnt/shared:/mnt/shared" in run
    (start,) = machine.run("ray start --head")
    assert "--dashboard-host=127.0.0.1" in start
    assert "RAY_enable_autoscaler_v2=1" in start
    assert '"ray.io/market-type":"on-demand"' in start
    assert '"CPU":0' in start
    assert not machine.run("pip install")


def assert_worker_set_up(remote: dict[str, Any], provider: Any, worker: dict[str, Any], head: dict[str, Any]) -> None:
    """As the head does it: straight over the private address, with the token that the head has."""
    from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
    from ray.core.generated.instance_manager_pb2 import Instance

    machine = Machine(image_environment=environment(), gpus=True)
    instance = Instance(cloud_instance_id=worker["InstanceId"], instance_type="h100x1")
    RayInstaller(provider, autoscaler_config(remote), machine).install_ray(instance, head["PrivateIpAddress"])
    assert machine.run("ssh", f"ubuntu@{worker['PrivateIpAddress']}")
    assert not machine.run("ssm")
    (run,) = machine.run("docker run")
    assert "--runtime=nvidia" in run
    assert f"/.ray/auth_token:{environment()['HOME']}/.ray/auth_token" in run
    assert machine.run("rsync", "/.ray/auth_token")
    (start,) = machine.run("ray start")
    assert f"RAY_HEAD_IP={head['PrivateIpAddress']}" in start
    assert '"ray.io/market-type":"spot"' in start
    assert '"ray.io/accelerator-type":"H100"' in start


def test_what_the_file_says_of_a_machine_is_what_amazon_says(account: SimpleNamespace) -> None:
    """CPUs, GPUs and their name, that the type can be had on the spot market, and that it has disks of its own."""
    types = read("aws.yaml")["available_node_types"]
    for name, kind in types.items():
        (facts,) = account.ec2.describe_instance_types(InstanceTypes=[kind["node_config"]["InstanceType"]])["InstanceTypes"]
        gpus = facts.get("GpuInfo", {}).get("Gpus", [])
        assert kind["resources"].get("GPU", 0) == sum(gpu["Count"] for gpu in gpus), name
        assert [gpu["Name"] for gpu in gpus] == ([kind["labels"][ACCELERATOR]] if gpus else [])
        if name != "head":
            assert kind["resources"]["CPU"] == facts["VCpuInfo"]["DefaultVCpus"]
        if gpus:
            assert "spot" in facts["SupportedUsageClasses"]
            assert facts["InstanceStorageSupported"]
            gigabytes = next(gpu["memory_gb"] for gpu in read("gpus.yaml")["gpus"] if gpu["name"] == gpus[0]["Name"])
            assert gpus[0]["MemoryInfo"]["SizeInMiB"] * 2**20 / 1e9 == pytest.approx(gigabytes, rel=0.1)
