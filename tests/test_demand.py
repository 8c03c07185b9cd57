"""What is asked of a cluster: Ray's account of it read, and its autoscaler asked for real."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray
autoscaler_pb2 = pytest.importorskip("ray.core.generated.autoscaler_pb2")

STAYS = {"ray.io/market-type": "on-demand"}
A_GPU, A_CPU = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}


def request(resources: dict[str, float], labels: dict[str, str] | None = None) -> Any:
    from tests.cluster_files.autoscaler import _request

    return _request(resources, labels or {})


def status() -> Any:
    """A head and a node of four CPUs; a GPU twice for tasks, and a group of two pieces on nodes that stay, wait."""
    found = autoscaler_pb2.GetClusterStatusReply()
    for cpus, free in ((0.0, 0.0), (4.0, 3.0)):
        node = found.cluster_resource_state.node_states.add(status=autoscaler_pb2.NodeStatus.RUNNING)
        node.total_resources.update({"CPU": cpus})
        node.available_resources.update({"CPU": free})
    found.cluster_resource_state.node_states.add(status=autoscaler_pb2.NodeStatus.DEAD).total_resources.update({"CPU": 8.0})
    found.cluster_resource_state.pending_resource_requests.add(request=request(A_GPU), count=2)
    group = found.cluster_resource_state.pending_gang_resource_requests.add(details="ab12:PACK|PENDING")
    group.requests.extend([request(A_CPU, STAYS)] * 2)
    return found


def test_what_waits_is_counted_by_what_it_is() -> None:
    from pause_ray.demand import Wish, demand_of

    found = demand_of(status())
    gpu = Wish(resources=(("CPU", 1.0), ("GPU", 1.0)))
    staying = Wish(resources=(("CPU", 1.0),), labels=("ray.io/market-type=on-demand",))
    assert found.wishes == {gpu: 2, staying: 2}
    assert (found.nodes, found.total, found.free) == (2, {"CPU": 4, "GPU": 0}, {"CPU": 3, "GPU": 0})
    assert (found.starting, found.failed) == ({}, ())


def test_what_an_autoscaler_says_of_it_is_told_of_the_right_piece() -> None:
    from pause_ray.demand import demand_of

    asked = status()
    told = asked.autoscaling_state
    told.infeasible_gang_resource_requests.add(details="ab12:PACK|PENDING")
    told.pending_instance_requests.add(ray_node_type_name="h100x1", count=2)
    told.pending_instances.add(ray_node_type_name="h100x1")
    told.failed_instance_requests.add(ray_node_type_name="b", reason="no\ncapacity", failed_ts=2)
    told.failed_instance_requests.add(ray_node_type_name="a", reason="quota", failed_ts=1)
    found = demand_of(asked)
    assert {wish.labels: wish.is_hopeless for wish in found.wishes} == {(): False, ("ray.io/market-type=on-demand",): True}
    assert (found.starting, found.failed) == ({"h100x1": 3}, ("a (quota)", "b (no capacity)"))
    told.infeasible_resource_requests.append(request(A_GPU))
    assert all(wish.is_hopeless for wish in demand_of(asked).wishes)


@pytest.mark.usefixtures("ray_cluster")
def test_who_waits_within_places_that_are_held_asks_the_cluster_for_nothing(tmp_path: Path) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from pause_ray.demand import _status, demand_of

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
        while not (seen := _status()).cluster_resource_state.pending_resource_requests:
            assert time.monotonic() < until, "nobody waits"
            time.sleep(0.1)
        assert demand_of(seen).wishes == {}
    finally:
        go_on.touch()
        ray.get(turns, timeout=120)
        remove_placement_group(group)


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_is_asked_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without an autoscaler that answers: what is there can come, all else cannot."""
    from pause_ray import demand

    monkeypatch.setattr(demand, "ANSWER_SECONDS", 3.0)
    assert demand.can_come({"CPU": 1.0}, number=8, labels={})
    assert not demand.can_come({"CPU": 1.0}, number=9, labels={})
    assert not demand.can_come({"CPU": 1.0}, number=1, labels=STAYS)
    assert demand.can_come({"CPU": 1.0}, number=8, labels={}), "what was asked for is asked for no longer"
