"""The resource requests that Ray has not placed: Ray's status read, and a real cluster asked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray
autoscaler_pb2 = pytest.importorskip("ray.core.generated.autoscaler_pb2")

from pause_ray.core import ray_cluster  # noqa: E402

STAYS = {"ray.io/market-type": "on-demand"}
A_GPU, A_CPU = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}


def request(resources: dict[str, float], labels: dict[str, str] | None = None) -> Any:
    from tests.cluster_files.autoscaler import _request

    return _request(resources, labels or {})


def status() -> Any:
    """A status in which two tasks wait for a GPU each, and a group for two CPUs on nodes that stay."""
    found = autoscaler_pb2.GetClusterStatusReply()
    found.cluster_resource_state.pending_resource_requests.add(request=request(A_GPU), count=2)
    group = found.cluster_resource_state.pending_gang_resource_requests.add(details="ab12:PACK|PENDING")
    group.requests.extend([request(A_CPU, STAYS)] * 2)
    return found


def test_requests_are_named_with_their_labels_and_what_is_infeasible_with_that(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = status()
    monkeypatch.setattr(ray_cluster, "_cluster_status", lambda: asked)
    group, gpu = (
        "{'CPU': 1.0} on ray.io/market-type=on-demand * 2: 1+ pending placement groups",
        "{'CPU': 1.0, 'GPU': 1.0}: 2+ pending tasks/actors",
    )
    assert ray_cluster.pending_requests() == f"{gpu}, {group}"
    asked.autoscaling_state.infeasible_gang_resource_requests.add(details="ab12:PACK|PENDING").requests.extend([request(A_CPU, STAYS)] * 2)
    assert ray_cluster.pending_requests() == f"{gpu}, {group} (infeasible)"
    asked.autoscaling_state.infeasible_resource_requests.append(request(A_GPU))
    assert ray_cluster.pending_requests() == f"{gpu} (infeasible), {group} (infeasible)"


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_that_wait_within_their_own_group_are_no_pending_requests(tmp_path: Path) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    go_on = tmp_path / "go-on"

    @ray.remote(num_cpus=1)
    def take_turns() -> None:
        while not go_on.exists():
            time.sleep(0.1)

    group = placement_group([A_CPU])
    within = take_turns.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group))
    turns = [within.remote() for _ in range(2)]
    try:
        until = time.monotonic() + 120
        while not any(
            name.startswith(ray_cluster.GROUP_RESOURCE)
            for entry in ray_cluster._cluster_status().cluster_resource_state.pending_resource_requests
            for name in entry.request.resources_bundle
        ):
            assert time.monotonic() < until, "no task waits"
            time.sleep(0.1)
        assert ray_cluster.pending_requests() is None
    finally:
        go_on.touch()
        ray.get(turns, timeout=120)
        remove_placement_group(group)


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_is_asked_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster without an autoscaler that answers, the nodes that there are can be used, and no others."""
    monkeypatch.setattr(ray_cluster, "AUTOSCALER_SECONDS", 3.0)
    assert ray_cluster.can_place(A_CPU, number=8, labels={})
    assert not ray_cluster.can_place(A_CPU, number=9, labels={})
    assert not ray_cluster.can_place(A_CPU, number=1, labels=STAYS)
    assert ray_cluster.can_place(A_CPU, number=8, labels={}), "what was asked for is asked for no longer"
