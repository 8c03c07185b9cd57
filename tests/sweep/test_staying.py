"""Trials' own processes run on nodes that stay, where there are such and it costs no trial its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pause_ray.core import ray_cluster
from pause_ray.core.spec import with_overrides
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.spec import SweepSpec, expand
from tests.sweep.test_spec import SWEEP

pytest.importorskip("ray")

ON_DEMAND, SPOT = {"ray.io/market-type": "on-demand"}, {"ray.io/market-type": "spot"}
Node = tuple[Mapping[str, str], float]
"""Labels and CPUs."""


def labels_on(monkeypatch: pytest.MonkeyPatch, *nodes: Node, can_come: bool = False, gpus: float = 0, **changes: Any) -> Mapping[str, str]:
    """Of the nodes that trials of the small sweep run on, on a joined cluster; ``changes`` are of ``resources`` or the sweep."""
    asked: list[int] = []
    there = [
        {"Alive": True, "NodeID": str(number), "NodeManagerAddress": str(number), "Labels": labels, "Resources": {"CPU": cpus, "GPU": gpus}}
        for number, (labels, cpus) in enumerate(nodes)
    ]
    total = {"CPU": sum(cpus for _, cpus in nodes), "GPU": gpus * len(nodes)}
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: there)
    monkeypatch.setattr(ray_cluster.ray._private.state.state, "get_cluster_config", lambda: None)
    monkeypatch.setattr(ray_cluster, "has_no_autoscaler", lambda: False)
    monkeypatch.setattr(ray_cluster, "can_place", lambda bundle, *, number, labels: asked.append(number) or can_come)
    overrides = {name if name == "max_concurrent_trials" else f"trial.resources.{name}": value for name, value in changes.items()}
    sweep = SweepSpec.parse(with_overrides(SWEEP, overrides), origin="test")
    placement = Placement.of(sweep, [trial.spec for trial in expand(sweep)])
    assert len(asked) <= 1
    assert all(number > placement.concurrent_trials for number in asked), "an actor may sit where a trial is to go"
    return placement.trial_labels


def test_where_nodes_stay_trials_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert labels_on(monkeypatch, (ON_DEMAND, 0), (ON_DEMAND, 4), (SPOT, 4)) == ON_DEMAND


def test_a_cluster_that_says_nothing_or_has_spot_nodes_only_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert labels_on(monkeypatch, ({}, 0), ({}, 8), can_come=True) == {}
    assert labels_on(monkeypatch, (ON_DEMAND, 0), (SPOT, 8)) == {}


def test_nodes_that_can_come_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert labels_on(monkeypatch, (ON_DEMAND, 0), can_come=True) == ON_DEMAND
    assert labels_on(monkeypatch, (ON_DEMAND, 0), can_come=False) == {}


@pytest.mark.parametrize(
    ("cpus", "changes", "is_kept"),
    [
        (4, {"max_concurrent_trials": 3}, True),
        (4, {"max_concurrent_trials": 4}, False),  # with the actor that may sit there
        (4, {"scoring_actors": 4}, False),
        (5, {"scoring_actors": 4}, True),
        (4, {"scoring_cpus_per_actor": 3.0}, True),
        (3, {"scoring_cpus_per_actor": 3.0}, False),
        (4, {"scoring_actors": {"min": 0, "max": 8}}, True),  # those above the fewest make way
        (4, {"train_cpus_per_worker": 3.0}, False),  # a trial that trains in its own process takes as much
    ],
)
def test_trials_stay_only_where_all_of_them_have_room_beside_the_actors(
    monkeypatch: pytest.MonkeyPatch, cpus: float, changes: dict[str, Any], is_kept: bool
) -> None:
    """Otherwise one would wait for ever for a place that an actor has for as long as the sweep lasts."""
    assert labels_on(monkeypatch, (ON_DEMAND, cpus), (SPOT, 16), **changes) == (ON_DEMAND if is_kept else {})


def test_a_trial_that_trains_on_a_gpu_itself_goes_where_gpus_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(**changes: Any) -> Mapping[str, str]:
        return labels_on(monkeypatch, (ON_DEMAND, 8), (SPOT, 8), gpus=0, train_gpus_per_worker=1.0, scoring_gpus_per_actor=1.0, **changes)

    assert of(train_workers=0) == {}
    assert of(train_workers=1) == ON_DEMAND


def test_tune_holds_a_trials_place_on_those_nodes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from pause_ray.sweep.trainable import trial_bundles

    sweep = SweepSpec.parse(SWEEP, origin="test")
    placement = Placement(
        resources=expand(sweep)[0].spec.resources, train_gpus=0, scoring_gpus=0, trains=True, concurrent_trials=2, trial_labels=ON_DEMAND
    )
    group = trial_bundles(placement)
    assert (group.bundles, group._bound.arguments["bundle_label_selector"]) == ([{"CPU": 1.0}], [ON_DEMAND])


def test_a_lost_process_fails_by_a_users_mistake_or_with_a_trace() -> None:
    from ray.exceptions import RayActorError, RayTaskError

    from pause_ray.core.errors import StorageError
    from pause_ray.core.ray_cluster import explain_missing_package
    from pause_ray.sweep.trainable import failure_of_lost_process

    unseen = StorageError("/mnt/runs: not seen by b; give --storage another path")
    mistake = failure_of_lost_process(RayTaskError("step", "Traceback", unseen))
    assert (mistake.error, mistake.trace) == (unseen, None)
    account = "The actor died because of an error raised in its creation task\n  File x\n"
    no_package = "ModuleNotFoundError: No module named 'peft'"
    lost = failure_of_lost_process(RayActorError(error_msg=account + no_package))
    assert (lost.message, lost.trace) == (explain_missing_package(no_package), None)
    out_of_memory = "Task was killed due to the node running low on memory."
    lost = failure_of_lost_process(RayActorError(error_msg=account + out_of_memory))
    assert (lost.message, lost.trace) == (out_of_memory, account + out_of_memory)
