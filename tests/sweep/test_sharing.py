"""Training and scoring share a cluster without waiting for each other for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pause_ray.core import ray_cluster
from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, with_overrides
from pause_ray.sweep.resources import Placement
from pause_ray.sweep.spec import SweepSpec, expand
from tests.sweep.test_spec import SWEEP

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("ray")


def placement_of(monkeypatch: pytest.MonkeyPatch, *, cpus: float, gpus: float, nodes: int = 1, **changes: Any) -> Placement:
    """What is decided for the small sweep on a cluster of equal nodes that cannot grow; ``changes`` are of ``resources`` or the sweep."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    node = {"CPU": cpus / nodes, "GPU": gpus / nodes}
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})
    monkeypatch.setattr(
        ray_cluster.ray,
        "nodes",
        lambda: [{"Alive": True, "NodeID": str(n), "NodeManagerAddress": str(n), "Resources": node} for n in range(nodes)],
    )
    monkeypatch.setattr(ray_cluster.ray._private.state.state, "get_cluster_config", lambda: None)
    overrides = {name if name == "max_concurrent_trials" else f"trial.resources.{name}": value for name, value in changes.items()}
    sweep = SweepSpec.parse(with_overrides(SWEEP, overrides), origin="test")
    return Placement.of(sweep, [trial.spec for trial in expand(sweep)])


TAKING_TURNS: JsonObject = {"train_gpus_per_worker": 1.0, "scoring_gpus_per_actor": 1.0, "scoring_actors": {"min": 0, "max": 1}}


def test_a_range_of_actors_leaves_no_gpu_with_a_trial_that_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = placement_of(monkeypatch, cpus=8, gpus=4, scoring_actors=1)
    assert (fixed.trial_bundle(), fixed.resources.train_workers, fixed.concurrent_trials) == ({"CPU": 1, "GPU": 1}, 0, 3)
    turns = placement_of(monkeypatch, cpus=8, gpus=1, **TAKING_TURNS)
    assert (turns.trial_bundle(), turns.resources.train_workers, turns.concurrent_trials) == ({"CPU": 1, "GPU": 0}, 1, 1)
    on_cpus = placement_of(monkeypatch, cpus=8, gpus=0, scoring_actors={"min": 0, "max": 1})
    assert on_cpus.resources.train_workers == 0, "processes are started for GPUs only"


def test_one_gpu_is_not_enough_for_both_at_once_and_what_helps_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {**TAKING_TURNS, "scoring_actors": 1}
    with pytest.raises(
        SpecError, match=r"hold 2 GPUs at a time, and the cluster has 1; .* take turns with scoring_actors: {min: 0, max: 1}"
    ):
        placement_of(monkeypatch, cpus=8, gpus=1, **both)
    assert placement_of(monkeypatch, cpus=8, gpus=1, **TAKING_TURNS).held_at_a_time() == {"CPU": 2, "GPU": 1}


def test_a_piece_that_no_node_can_give_is_refused_though_all_nodes_together_could(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"a scoring actor takes 2 GPUs on one node, and the largest, node 0 0, has 1"):
        placement_of(monkeypatch, cpus=16, gpus=4, nodes=4, scoring_gpus_per_actor=2.0)
    with pytest.raises(SpecError, match=r"a training worker takes 5 CPUs on one node, and the largest, node 0 0, has 4"):
        placement_of(monkeypatch, cpus=16, gpus=0, nodes=4, train_workers=1, train_cpus_per_worker=5.0)


@pytest.mark.parametrize(
    ("changes", "cpus", "gpus", "at_a_time"),
    [
        ({"max_concurrent_trials": 100}, 8, 0, 7),  # one CPU for the actor that they all wait for
        ({"max_concurrent_trials": 100, "train_workers": 2}, 8, 0, 5),  # two for workers and one for the actor that stays
        ({"max_concurrent_trials": 100, "train_workers": 4, "scoring_actors": {"min": 0, "max": 9}}, 8, 0, 4),
        ({"max_concurrent_trials": 2}, 8, 0, 2),
        ({"max_concurrent_trials": 100, **TAKING_TURNS}, 8, 1, 7),
        ({}, 8, 0, 1),
        ({}, 64, 8, 7),
        ({"scoring_actors": {"min": 0, "max": 8}}, 64, 8, 7),
    ],
)
def test_trials_leave_room_for_what_they_wait_for(
    monkeypatch: pytest.MonkeyPatch, changes: JsonObject, cpus: float, gpus: float, at_a_time: int
) -> None:
    assert placement_of(monkeypatch, cpus=cpus, gpus=gpus, **changes).concurrent_trials == at_a_time


@pytest.mark.ray
@pytest.mark.parametrize(
    "resources",
    [
        {"train_workers": 0, **TAKING_TURNS},
        pytest.param({"train_workers": 1, **TAKING_TURNS}, marks=pytest.mark.slow),
        pytest.param({"train_workers": 0}, marks=pytest.mark.slow),
    ],
    ids=["in_the_trial", "in_a_worker", "half_a_gpu_each"],
)
def test_a_cluster_of_one_gpu_finishes_a_sweep(tmp_path: Path, resources: JsonObject) -> None:
    """Three trials at a time, of which two train, and all are scored."""
    num_gpus = run_on_one_gpu(tmp_path, {f"trial.resources.{name}": value for name, value in resources.items()})
    ledgers = list((tmp_path / "runs" / "trials").glob("*/cells.jsonl"))
    assert [ledger.read_bytes().count(b"\n") for ledger in ledgers] == [12] * 4
    assert num_gpus == [0.5 if len(resources) == 1 else 1] * 2, "each of two trainings once"


def run_on_one_gpu(folder: Path, changes: JsonObject) -> list[float]:
    """Run a stub sweep on a cluster of one GPU; return the GPUs of each training that was started."""
    command = [sys.executable, "-m", "tests.sweep.one_gpu", str(folder), json.dumps(changes)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line)["gpus"] for line in (folder / "held.jsonl").read_text().splitlines()]
