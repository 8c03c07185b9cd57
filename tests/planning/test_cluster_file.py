"""Whether a node type of a cluster file can hold each request of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pause_ray.cli.main import app
from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, with_overrides
from pause_ray.planning.preflight import read_node_types, requests_of, unschedulable
from pause_ray.trial.spec import TrialSpec
from tests.sweep.stubs import write_stub_sweep
from tests.sweep.test_spec import SWEEP

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
BIG = {"h100x8": {"CPU": 64.0, "GPU": 8.0}, "cpu": {"CPU": 15.0, "GPU": 0.0}}


def trial(**changes: Any) -> TrialSpec:
    return TrialSpec.parse(with_overrides(SWEEP["trial"], changes), origin="test")


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
def test_the_shipped_files_can_hold_what_the_largest_shipped_sweep_requests(name: str) -> None:
    kinds = read_node_types(CLUSTER / name)
    assert len([kind for kind in kinds.values() if kind["GPU"]]) >= 3
    assert any(kind["CPU"] and not kind["GPU"] for kind in kinds.values())
    done = CliRunner().invoke(app, ["check", str(ROOT / "sweeps" / "scale_70b.yaml"), "--cluster-file", str(CLUSTER / name)])
    assert done.exit_code == 0, done.output


def test_a_request_that_no_node_type_holds_is_named_with_the_node_types() -> None:
    spec = trial(**{"resources.train_workers": 1, "resources.scoring_gpus_per_actor": 16, "resources.train_cpus_per_worker": 65})
    actor, worker = unschedulable(requests_of(spec, open_gpus=1.0), BIG)
    there = "h100x8 (64 CPUs and 8 GPUs), cpu (15 CPUs and 0 GPUs)"
    assert actor == f"a scoring actor takes 1 CPUs and 16 GPUs on one node, and none has that: {there}"
    assert worker == f"a training worker takes 65 CPUs and 1 GPUs on one node, and none has that: {there}"
    assert unschedulable(requests_of(trial(), open_gpus=1.0), BIG) == []
    assert len(unschedulable(requests_of(trial(), open_gpus=1.0), {"cpu": BIG["cpu"]})) == 2


def test_answers_of_a_server_need_no_gpu() -> None:
    asked = {"kind": "endpoint", "url": "http://127.0.0.1:1/v1", "model": "m", "api": "chat"}
    spec = trial(train=None, pauses=None, engine=asked)
    assert unschedulable(requests_of(spec, open_gpus=1.0), {"cpu": {"CPU": 4.0, "GPU": 0.0}}) == []


def written(folder: Path, *documents: JsonObject) -> Path:
    file = folder / "file.yaml"
    file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return file


def test_node_types_without_nodes_do_not_count(tmp_path: Path) -> None:
    """Ray gives the head's type no workers where the file does not say otherwise."""
    types = {"head": {"resources": {}}, "free": {"resources": {"CPU": 4}}, "none": {"resources": {"CPU": 400}, "max_workers": 0}}
    file = written(tmp_path, {"head_node_type": "head", "available_node_types": types})
    assert read_node_types(file) == {"free": {"CPU": 4.0, "GPU": 0.0}}


def test_a_part_of_a_cpu_is_read_as_kubernetes_writes_it(tmp_path: Path) -> None:
    limits = {"cpu": "500m", "nvidia.com/gpu": "2"}
    group = {"groupName": "a", "maxReplicas": 1, "template": {"spec": {"containers": [{"resources": {"limits": limits}}]}}}
    file = written(tmp_path, {"kind": "Secret"}, {"spec": {"rayClusterSpec": {"workerGroupSpecs": [group]}}})
    assert read_node_types(file) == {"a": {"CPU": 0.5, "GPU": 2.0}}


@pytest.mark.parametrize("resources", [{}, None, {"GPU": 8}, {"CPU": "many"}])
def test_a_node_type_without_numbers_is_refused(tmp_path: Path, resources: JsonObject | None) -> None:
    """Ray fills them in from the kind of machine."""
    with pytest.raises(SpecError, match="node type big: its number of CPUs or GPUs cannot be read"):
        read_node_types(written(tmp_path, {"available_node_types": {"big": {"resources": resources}}}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "x"}, "has neither available_node_types"),
        ({"spec": {"workerGroupSpecs": [{"groupName": "a", "maxReplicas": 1}]}}, "node type a: its number of CPUs or GPUs cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: JsonObject, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_node_types(written(tmp_path, content))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"gone\.yaml: cannot be read"):
        read_node_types(tmp_path / "gone.yaml")


def test_the_command_checks_a_sweep_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    sweep = write_stub_sweep(tmp_path / "sweep")
    file = written(tmp_path, {"available_node_types": {"only": {"resources": {"CPU": 8}}}})
    refused = CliRunner().invoke(app, ["check", str(sweep), "--cluster-file", str(file), "--storage", str(tmp_path / "runs")]).exception
    assert isinstance(refused, SpecError)
    assert "a scoring actor takes 1 CPUs and 1 GPUs on one node, and none has that: only (8 CPUs and 0 GPUs)" in str(refused)
    assert not (tmp_path / "runs").exists()
