"""Ray's own launcher and autoscaler, asked about a cluster file: what it would run on a machine, which machines it would start."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
MARKET, ACCELERATOR = "ray.io/market-type", "ray.io/accelerator-type"
SPOT, ON_DEMAND = {MARKET: "spot"}, {MARKET: "on-demand"}
VM_FILES = ("aws.yaml", "gcp.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def gpu_names() -> dict[str, dict[str, Any]]:
    return {gpu["name"]: gpu for gpu in read("gpus.yaml")["gpus"]}


def autoscaler_config(prepared: dict[str, Any]) -> Any:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    return AutoscalingConfig(prepared, skip_content_hash=True)


def _request(resources: Mapping[str, float], labels: Mapping[str, str]) -> Any:
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    selector = [(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in labels.items()]
    return ResourceRequestUtil.make(dict(resources), label_selectors=[selector] if selector else None)


def head_instance(config: Any) -> Any:
    """The running head, idle for a day."""
    return _instance(config, config.get_head_node_type(), idle_seconds=86_400, head=True)


def _instance(config: Any, node_type: str, *, idle_seconds: float, head: bool = False) -> Any:
    from ray.autoscaler.v2.schema import AutoscalerInstance
    from ray.core.generated.autoscaler_pb2 import NodeState, NodeStatus
    from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

    resources = {name: float(number) for name, number in config.get_node_resources(node_type).items()}
    name = f"{node_type}-{idle_seconds:g}"
    state = NodeState(
        node_id=name.encode(),
        instance_id=name,
        ray_node_type_name=node_type,
        total_resources=resources,
        available_resources=resources,
        status=NodeStatus.IDLE,
        idle_duration_ms=int(idle_seconds * 1000),
        labels=config.get_node_labels(node_type),
    )
    instance = Instance(
        instance_id=name,
        cloud_instance_id=name,
        node_id=name.encode().hex(),
        status=Instance.RAY_RUNNING,
        instance_type=node_type,
        node_kind=NodeKind.HEAD if head else NodeKind.WORKER,
    )
    return AutoscalerInstance(cloud_instance_id=name, ray_node=state, im_instance=instance)


def decide(
    prepared: dict[str, Any],
    *,
    tasks: Sequence[tuple[Mapping[str, float], Mapping[str, str]]] = (),
    together: Sequence[tuple[Mapping[str, float], Mapping[str, str]]] = (),
    idle: Mapping[str, float] | None = None,
) -> tuple[Counter[str], set[str], int]:
    """What the autoscaler does about a demand when the head and ``idle`` workers run.

    Args:
        prepared: The cluster file as the head gets it.
        tasks: (resources, label selector) of tasks and actors that wait.
        together: The same of a placement group.
        idle: Node type → for how many seconds one of it has had nothing to do.

    Returns:
        Node types to launch with numbers, node types of which one is taken away, and how many requests nothing can ever fit.
    """
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest

    config = autoscaler_config(prepared)
    group = [GangResourceRequest(requests=[_request(*bundle) for bundle in together])] if together else []
    running = [_instance(config, name, idle_seconds=seconds) for name, seconds in (idle or {}).items()]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([_request(*task) for task in tasks]),
            gang_resource_requests=group,
            current_instances=[head_instance(config), *running],
            idle_timeout_s=config.get_idle_timeout_s(),
            disable_launch_config_check=True,
        )
    )
    launched = Counter({request.instance_type: request.count for request in reply.to_launch})
    ended = {request.instance_type for request in reply.to_terminate}
    return launched, ended, len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests)


class Machine:
    """Stands for ``subprocess`` where the launcher runs ssh and rsync: keeps each command and answers as such a machine would."""

    DEVNULL = subprocess.DEVNULL
    CalledProcessError = subprocess.CalledProcessError

    def __init__(self, *, image_environment: Mapping[str, str], gpus: bool) -> None:
        self.commands: list[str] = []
        self.bootstrap: dict[str, Any] = {}
        self._answers = {
            "command -v docker": "/usr/bin/docker",
            "json .Config.Env": json.dumps([f"{name}={value}" for name, value in image_environment.items()]),
            "printenv HOME": image_environment["HOME"],
            "info -f": "map[nvidia-container-runtime:{} runc:{}]" if gpus else "map[runc:{}]",
            "/proc/meminfo": "MemAvailable:   32000000 kB",
        }

    def check_call(self, command: Sequence[str], *_args: object, **_more: object) -> None:
        self._note(command)

    def check_output(self, command: Sequence[str], *_args: object, **_more: object) -> bytes:
        text = self._note(command)
        return next((answer for asked, answer in self._answers.items() if asked in text), "").encode()

    def _note(self, command: Sequence[str]) -> str:
        text = " ".join(command)
        self.commands.append(text)
        for word in command:
            if "ray-bootstrap-" in word and Path(word).is_file():
                self.bootstrap = json.loads(Path(word).read_text())
                (Path.home() / "ray_bootstrap_key.pem").write_text("key")  # this process plays the head's next
        return text

    def run(self, *words: str) -> list[str]:
        """The commands with all these words in them."""
        return [command for command in self.commands if all(word in command for word in words)]
