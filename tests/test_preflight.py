"""Looking at a cluster before it is used: what a look means, and looks at real raylets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pause_ray.preflight import FREE_BYTES, PACKAGES, Gpu, Look, Node, look, problems
from tests.real_cluster import running_cluster
from tests.sweep.tiny_sweep import ROOT, write_model, write_sweep

GOOD = Look(
    versions={"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")},
    gpus=(Gpu(name="H100", memory_bytes=80 * 10**9),),
    free_bytes=10**12,
    storage="ok",
    missing=(),
)
HEAD = Node(name="10.0.0.1 (head)", gpus=0, look=replace(GOOD, gpus=()))
WORKER = Node(name="10.0.0.2", gpus=1, look=GOOD)


def told(worker: Node) -> str:
    [problem] = problems([HEAD, worker], needed_gpu_bytes=60 * 10**9)
    assert problem.node == worker.name
    assert problem.remedy
    return problem.what


def test_nodes_that_agree_and_see_the_storage_have_no_problems() -> None:
    assert problems([HEAD, WORKER, WORKER], needed_gpu_bytes=60 * 10**9) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"versions": {**GOOD.versions, "ray": "0.9"}}, "ray 0.9, elsewhere 1.0"),
        ({"versions": {name: its for name, its in GOOD.versions.items() if name != "deepspeed"}}, "deepspeed is missing, elsewhere 1.0"),
        ({"storage": "not there", "free_bytes": None}, "storage root: not there"),
        ({"free_bytes": int(FREE_BYTES) - 1}, "storage root has 20.0 GB free"),
        ({"missing": ("/data/essays",)}, "/data/essays is not there"),
        ({"gpus": ()}, "Ray counts 1 GPUs, the driver shows none"),
        ({"gpus": (Gpu(name="T4", memory_bytes=16 * 10**9),)}, "T4 has 16 GB, the plan needs 60 GB"),
    ],
)
def test_what_differs_is_told_of_the_node_that_differs(change: dict[str, object], what: str) -> None:
    assert told(replace(WORKER, look=replace(GOOD, **change))) == what


def test_a_worker_without_the_package_is_told_so() -> None:
    [problem] = problems(
        [HEAD, Node(name="w", gpus=0, look=None, failure="ModuleNotFoundError: No module named 'pause_ray'")], needed_gpu_bytes=None
    )
    assert problem.remedy.startswith("install pause_ray there")


def test_nodes_that_cannot_reach_each_other_are_named() -> None:
    assert told(replace(WORKER, unreachable=(HEAD.name,))) == "cannot connect to a free port of 10.0.0.1 (head)"


def test_a_storage_root_of_this_node_alone_is_not_taken_for_the_shared_one(tmp_path: Path) -> None:
    assert look(tmp_path / "runs", probe="x", paths=[]).storage == "not there"
    assert not (tmp_path / "runs").exists(), "a look makes nothing"
    assert look(tmp_path, probe="x", paths=[]).storage.startswith("another folder than the driver's")
    (tmp_path / "x").touch()
    found = look(tmp_path, probe="x", paths=[str(tmp_path), str(tmp_path / "gone")])
    assert (found.storage, found.missing) == ("ok", (str(tmp_path / "gone"),))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.ray
def test_every_node_of_a_real_cluster_is_looked_at(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, write_model(tmp_path / "model"))
    sweep.write_text(re.sub(r"path: (training|haystack)", rf"path: {tmp_path}/\1", sweep.read_text()))
    with running_cluster(tmp_path, workers=1) as cluster:
        env = {**cluster.environment, "RAY_ADDRESS": cluster.gcs, "PYTHONPATH": str(ROOT)}

        def check(*more: str) -> tuple[int, dict[str, list[dict[str, object]]]]:
            command = [
                sys.executable,
                "-m",
                "pause_ray",
                "check",
                sweep.name,
                "--cluster",
                "--json",
                "--storage",
                str(tmp_path / "runs"),
                *more,
            ]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.stdout, done.stderr
            return done.returncode, json.loads(done.stdout)

        code, found = check()
        assert (code, found["problems"]) == (0, [])
        assert [" (head)" in str(node["name"]) for node in found["nodes"]] == [True, False]
        env["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
        code, found = check()
        assert code == 2
        assert [problem["node"] for problem in found["problems"]] == ["driver"]
        assert "MLflow at http://127.0.0.1:9" in str(found["problems"][0]["what"])
    assert not list((tmp_path / "runs").glob(".preflight-*")), "nothing is left behind"
