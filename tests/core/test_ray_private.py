"""The private interfaces of Ray that the package uses: after an upgrade, the test that fails names what is gone or changed."""

from __future__ import annotations

import importlib
import inspect

import pytest

from pause_ray.core import ray_cluster

pytestmark = pytest.mark.ray

SIGNATURES = {
    "ray._private.state:GlobalState.get_cluster_config": ["self"],
    "ray._private.state:GlobalState.get_max_resources_from_cluster_config": ["self"],
    "ray._private.node:Node.get_session_dir_path": ["self"],
    "ray.autoscaler._private.util:format_readonly_node_type": ["node_id"],
    "ray.experimental.internal_kv:_internal_kv_get": ["key", "namespace"],
    "ray.data._internal.cluster_autoscaler:get_or_create_autoscaling_coordinator": [],
    "ray.tune.execution.tune_controller:TuneController._cleanup_cached_actors": ["self", "force_all"],
}
"""Module and function → the parameters that the package relies on."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_private_function_of_ray_takes_what_it_is_given(name: str) -> None:
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    assert callable(found)
    parameters = list(inspect.signature(found).parameters)
    assert parameters[: len(SIGNATURES[name])] == SIGNATURES[name]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("ray._private.ray_constants", "DEBUG_AUTOSCALING_STATUS"),
        ("ray._private.state", "state"),
        ("ray._private.worker", "global_worker"),
        ("ray._private.worker", "_global_node"),
        ("ray.tune.execution.class_cache", "ENV_VARS_TO_PROPAGATE"),
    ],
)
def test_a_private_variable_of_ray_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("GetClusterStatusReply", {"cluster_resource_state", "autoscaling_state"}),
        ("ClusterResourceState", {"pending_resource_requests", "pending_gang_resource_requests", "cluster_resource_state_version"}),
        (
            "AutoscalingState",
            {"infeasible_resource_requests", "infeasible_gang_resource_requests", "last_seen_cluster_resource_state_version"},
        ),
        ("ClusterConfig", {"node_group_configs"}),
        ("NodeGroupConfig", {"name", "resources", "max_count"}),
        ("GangResourceRequest", {"requests", "details", "bundle_selectors"}),
    ],
)
def test_a_message_of_rays_autoscaler_has_the_fields_that_are_read(message: str, fields: set[str]) -> None:
    from ray.core.generated import autoscaler_pb2

    assert fields <= set(getattr(autoscaler_pb2, message).DESCRIPTOR.fields_by_name)


def test_ray_says_in_these_words_that_it_took_too_long_to_start() -> None:
    from ray._private.node import Node

    assert ray_cluster.STARTUP_TIMEOUT in inspect.getsource(Node.__init__)


def test_tune_keeps_idle_processes_in_a_cache() -> None:
    from ray.tune.execution.tune_controller import TuneController

    source = inspect.getsource(TuneController)
    assert "self._actor_cache" in source
    assert "num_cached_objects" in source


@pytest.mark.usefixtures("ray_cluster")
def test_a_running_ray_answers_through_its_private_interfaces() -> None:
    import ray

    [node] = ray.nodes()
    assert ray_cluster.session_folder().is_dir()
    assert ray_cluster.pending_requests() is None
    assert ray_cluster.agent_address("no node") is None
    assert ray_cluster.total("CPU") == node["Resources"]["CPU"]
