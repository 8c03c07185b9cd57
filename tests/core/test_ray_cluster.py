"""What a cluster has room for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pause_ray.core import ray_cluster
from pause_ray.core.errors import ClusterError, SpecError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' cluster as if it were one that ``ray up`` has started."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray_cluster, "_reported_kinds", lambda: {"gpu-worker"})


@pytest.fixture
def autoscaler(joined: None) -> Iterator[None]:
    """Told Ray that it can start two machines of 64 CPUs and 8 GPUs."""
    from ray import _raylet
    from ray.core.generated import autoscaler_pb2
    from ray.experimental import internal_kv

    key, namespace = (name.encode() for name in (_raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, _raylet.GCS_AUTOSCALER_STATE_NAMESPACE))
    kind = autoscaler_pb2.NodeGroupConfig(name="eight-gpus", resources={"CPU": 64, "GPU": 8}, max_count=2)
    told = autoscaler_pb2.ClusterConfig(node_group_configs=[kind])
    internal_kv._internal_kv_put(key, told.SerializeToString(), namespace=namespace)
    yield
    internal_kv._internal_kv_del(key, namespace=namespace)


def test_what_this_machine_will_never_have_room_for_is_refused_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_cluster.check_capacity({"CPU": 8, "GPU": 0})
    with pytest.raises(SpecError, match=r"hold 8\.5 CPUs at a time, and the cluster has 8; lower train_workers"):
        ray_cluster.check_capacity({"CPU": 8.5, "GPU": 0})


def test_a_cluster_that_was_joined_may_grow(joined: None, caplog: pytest.LogCaptureFixture) -> None:
    ray_cluster.check_capacity({"CPU": 8, "GPU": 0})
    ray_cluster.check_nodes({"a trial": {"CPU": 8, "GPU": 0}})
    assert not caplog.messages
    ray_cluster.check_capacity({"CPU": 64, "GPU": 0})
    assert "64 CPUs at a time, and the cluster has 8; waiting until it has grown; if it cannot, lower train_workers" in caplog.text
    ray_cluster.check_nodes({"a scoring actor": {"CPU": 1, "GPU": 2}})
    assert "a scoring actor takes 2 GPUs" in caplog.text


def test_a_cluster_that_was_started_by_hand_does_not_grow(joined: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    [node] = ray.nodes()
    monkeypatch.setattr(ray_cluster, "_reported_kinds", lambda: {f"node_{node['NodeID']}"})
    with pytest.raises(SpecError, match=r"hold 64 CPUs at a time, and the cluster has 8; .*, or start nodes that have it"):
        ray_cluster.check_capacity({"CPU": 64, "GPU": 0})


def test_what_no_node_can_give_is_said_with_the_largest_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_cluster.check_nodes({"a trial": {"CPU": 8, "GPU": 0}})
    with pytest.raises(SpecError, match=r"a training worker takes 2 GPUs on one node, and the largest, node [\d.]+ \w{6}, has 0; lower it"):
        ray_cluster.check_nodes({"a trial": {"CPU": 1}, "a training worker": {"CPU": 1, "GPU": 2}})


def test_an_autoscaler_that_tells_what_it_can_start_is_believed(autoscaler: None) -> None:
    ray_cluster.check_nodes({"a training worker": {"CPU": 4, "GPU": 8}})
    ray_cluster.check_capacity({"CPU": 100, "GPU": 16})
    assert (ray_cluster.total("GPU"), ray_cluster.total_gpus()) == (16, 0)
    with pytest.raises(SpecError, match="takes 9 GPUs on one node, and the largest, node type eight-gpus, has 8"):
        ray_cluster.check_nodes({"a training worker": {"CPU": 4, "GPU": 9}})
    with pytest.raises(SpecError, match="hold 17 GPUs at a time, and the cluster has 16"):
        ray_cluster.check_capacity({"CPU": 1, "GPU": 17})


def test_groups_without_room_are_those_that_ask_for_what_is_held_and_a_node_could_give() -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    holder = placement_group([{"CPU": 6}])
    ray.get(holder.ready())
    groups = {"waits": placement_group([{"CPU": 4}]), "never": placement_group([{"CPU": 99}])}
    try:
        assert ray_cluster.blocked_groups({"CPU": 1, "GPU": 0}) == {groups["waits"].id.hex()}
        assert ray_cluster.blocked_groups({"CPU": 0, "GPU": 1}) == frozenset()
        remove_placement_group(holder)
        assert groups["waits"].wait(120)
        assert ray_cluster.blocked_groups({"CPU": 1, "GPU": 0}) == frozenset()
    finally:
        for group in groups.values():
            remove_placement_group(group)


def test_a_machine_that_is_too_busy_for_ray_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def never_up(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because")  # noqa: TRY002 (as Ray does)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster.ray, "init", never_up)
    with pytest.raises(ClusterError, match=r"has not come up on this machine .* when there is less to do here"):
        with ray_cluster.connection():
            pass


def test_why_a_cluster_cannot_be_joined_is_told_in_one_line() -> None:
    versions = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.10.1\nThis process on 10.0.0.1 was started with:\n"
    )
    told = ray_cluster._explain_refusal(f"{versions}    Ray: 2.60.0\n    Python: 3.11.7\n", answers=True)
    assert told.startswith("the cluster has Ray 2.9.0 and Python 3.10.1, and this machine Ray 2.60.0 and Python 3.11.7; ")
    assert ray_cluster._explain_refusal("[Errno 111]\nConnection refused", answers=False).startswith(
        "no Ray cluster answers there ([Errno 111] "
    )


@pytest.mark.parametrize(
    ("told", "is_token"),
    [
        ("Timed out while waiting for GCS to become available.", True),
        ("Token authentication is enabled but no token was found", True),
        ("RpcError: Unauthenticated", True),
        ("No node info found matching attributes: '' when trying to resolve node to connect to.", False),
        ("[Errno 28] No space left on device: '/tmp/ray/session'", False),
    ],
)
def test_a_token_is_blamed_only_where_it_can_be_one(told: str, is_token: bool) -> None:
    words = ray_cluster._explain_refusal(f"Failed to connect to Ray cluster at 10.0.0.1:6379\n{told}", answers=True)
    assert ("RAY_AUTH_TOKEN" in words, "run this on one of its nodes" in words) == (is_token, not is_token)
    assert told in words


def test_what_ray_told_is_looked_for_in_what_its_error_came_of() -> None:
    """It says where it could not connect, and only the error before says why."""
    trace = 'Last connection error: Traceback (most recent call last):\n  File "token.py", line 1\nRpcError: Deadline Exceeded\n'
    try:
        try:
            raise RuntimeError(f"Failed to connect to GCS. {trace}")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from error
    except ConnectionError as error:
        told = ray_cluster._error_chain(error)
    assert "token.py" not in told
    words = ray_cluster._explain_refusal(told, answers=True)
    assert words.endswith(
        "(Failed to connect to Ray cluster at 10.0.0.1:6379 Failed to connect to GCS. Last connection error: RpcError: Deadline Exceeded)"
    )
    assert "RAY_AUTH_TOKEN" in words
