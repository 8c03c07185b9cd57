"""Looking at a cluster before it is used: what a look means, and looks at real raylets."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pause_ray.core import node_probe
from pause_ray.core.node_probe import PACKAGES, Gpu, NodeActor, NodeInfo, parse_gpus, probe_node, usable_memory
from pause_ray.core.spec import with_overrides
from pause_ray.models.shape import PUBLISHED
from pause_ray.planning import preflight
from pause_ray.planning.preflight import FREE_BYTES, FREE_SHARE, ModelReplica, Node, Requirement, problems
from pause_ray.text.tokenizer import Marker
from pause_ray.trial.prepare import PreparedTrial
from pause_ray.trial.spec import TrialSpec
from tests.real_cluster import running_cluster
from tests.sweep.test_spec import SWEEP
from tests.sweep.tiny_sweep import ROOT, write_model, write_sweep

GOOD = NodeInfo(
    versions={"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")},
    gpus=(Gpu(name="H100", memory_bytes=80 * 10**9),),
    free_bytes=10**12,
    storage="ok",
    unseen={},
)
NEEDED = Requirement(gpu_bytes=60 * 10**9, host_bytes=200 * 10**9)
HEAD = Node(name="10.0.0.1 (head)", gpus=0, look=replace(GOOD, gpus=()))
WORKER = Node(name="10.0.0.2", gpus=1, look=GOOD)


def told(worker: Node) -> str:
    [problem] = problems([HEAD, worker], needed=NEEDED)
    assert problem.node == worker.name
    assert problem.remedy
    return problem.what


def test_nodes_that_agree_and_see_the_storage_have_no_problems() -> None:
    assert problems([HEAD, WORKER, WORKER], needed=NEEDED) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"versions": {**GOOD.versions, "ray": "0.9"}}, "ray 0.9, elsewhere 1.0"),
        ({"versions": {name: its for name, its in GOOD.versions.items() if name != "deepspeed"}}, "deepspeed is missing, elsewhere 1.0"),
        ({"storage": "not there", "free_bytes": None}, "storage root: not there"),
        ({"free_bytes": int(FREE_BYTES) - 1}, "storage root has 20.0 GB free"),
        ({"unseen": {"/data/essays": "/data/essays is not there"}}, "/data/essays is not there"),
        ({"gpus": ()}, "Ray counts 1 GPUs, the driver shows none"),
        ({"gpus": (Gpu(name="T4", memory_bytes=16 * 10**9),)}, "T4 has 16 GB, the plan needs 60 GB"),
        ({"memory_bytes": 100 * 10**9}, "the machine has 100 GB of memory, the plan needs 200 GB"),
        ({"free_share": FREE_SHARE / 2}, "the disk of Ray's own files is 98% full"),
    ],
)
def test_what_differs_is_told_of_the_node_that_differs(change: dict[str, object], what: str) -> None:
    assert told(replace(WORKER, look=replace(GOOD, **change))) == what


@pytest.mark.parametrize(
    ("copy_bytes", "gpus", "told_of_it"),
    [
        (60 * 10**9, 1, []),
        (140 * 10**9, 1, ["H100 has 80 GB, and scoring needs 2 of them for one copy of the model"]),
        (140 * 10**9, 2, []),
        (140 * 10**9, 8, []),  # which no actor gets on this node
    ],
)
def test_a_model_that_an_actors_gpus_do_not_hold_is_told(copy_bytes: int, gpus: float, told_of_it: list[str]) -> None:
    worker = replace(WORKER, gpus=2)
    found = problems([HEAD, worker], needed=NEEDED, replica=ModelReplica(bytes_=copy_bytes, gpus=gpus))
    assert [problem.what for problem in found] == told_of_it


def test_a_worker_without_the_package_is_told_so() -> None:
    [problem] = problems([HEAD, Node(name="w", gpus=0, look=None, failure="ModuleNotFoundError: No module named 'pause_ray'")], needed=None)
    assert problem.remedy.startswith("install pause_ray there")


def test_nodes_that_cannot_reach_each_other_are_named() -> None:
    assert told(replace(WORKER, unreachable=("the object store of head",))) == "cannot connect to the object store of head"


def test_a_node_that_did_not_say_what_it_can_reach_is_a_problem() -> None:
    assert told(replace(WORKER, failure="no answer within 120 seconds")) == "no answer within 120 seconds"


def test_places_that_drop_what_they_are_sent_are_tried_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_probe, "CONNECT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, socket.create_server(("127.0.0.1", 0)) as listens:
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:  # nobody accepts them: once its queue is full, the kernel drops whoever else asks
            each.setblocking(False)
            each.connect_ex(deaf.getsockname())
        others = {f"place {number}": deaf.getsockname() for number in range(20)} | {"good": listens.getsockname()}
        begun = time.monotonic()
        assert NodeActor().unreachable(others) == tuple(name for name in others if name != "good")
        assert 1 <= time.monotonic() - begun < 10, "one after another they take twenty seconds"
        for each in waiting:
            each.close()


@pytest.mark.parametrize(("told", "bytes_"), [("max\n", 1000), ("600\n", 600), ("9223372036854771712\n", 1000), (None, 1000)])
def test_memory_is_what_the_container_may_use(tmp_path: Path, told: str | None, bytes_: int) -> None:
    if told is not None:
        (tmp_path / "limit").write_text(told)
    assert usable_memory(1000, limits=[tmp_path / "gone", tmp_path / "limit"]) == bytes_


def test_memory_that_the_driver_does_not_tell_is_not_taken_for_none() -> None:
    unknown = replace(GOOD, gpus=(Gpu(name="Orin", memory_bytes=None),), memory_bytes=0)
    assert problems([HEAD, replace(WORKER, look=unknown)], needed=NEEDED) == []


LISTED = """GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)
  MIG 3g.40gb     Device  0: (UUID: MIG-1)
  MIG 1g.10gb+me  Device  1: (UUID: MIG-2)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-2)
GPU 2: NVIDIA A100-SXM4-80GB (UUID: GPU-3)
"""


@pytest.mark.parametrize(
    ("table", "listed", "gpus"),
    [
        ("", "", []),
        ("NVIDIA H100 80GB HBM3, 81559, Disabled\n", "", [("NVIDIA H100 80GB HBM3", 81559 * 2**20)]),
        ("NVIDIA GeForce RTX 4090, 24564, [N/A]\n", "", [("NVIDIA GeForce RTX 4090", 24564 * 2**20)]),
        ("Orin (nvgpu), [N/A], [N/A]\n", "", [("Orin (nvgpu)", None)]),
        (
            "A100, 81920, Enabled\nA100, 81920, Disabled\nA100, 81920, Enabled\n",
            LISTED,
            [
                ("A100 MIG 3g.40gb", 40 * 10**9),
                ("A100 MIG 1g.10gb+me", 10 * 10**9),
                ("A100", 81920 * 2**20),
                ("A100 MIG without slices", 0),
            ],
        ),
        ("Failed to initialize NVML: Driver/library version mismatch\n", "", []),
    ],
)
def test_gpus_are_those_that_a_process_can_have(table: str, listed: str, gpus: list[tuple[str, int | None]]) -> None:
    assert [(gpu.name, gpu.memory_bytes) for gpu in parse_gpus(table, listed=listed)] == gpus


def test_a_storage_root_of_this_node_alone_is_not_taken_for_the_shared_one(tmp_path: Path) -> None:
    assert probe_node(tmp_path / "runs", probe="x", paths=[]).storage == "not there"
    assert not (tmp_path / "runs").exists(), "a look makes nothing"
    assert probe_node(tmp_path, probe="x", paths=[]).storage.startswith("another folder than the driver's")
    (tmp_path / "x").touch()
    assert probe_node(tmp_path, probe="x", paths=[]).storage == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_paths_that_a_machine_does_not_see_are_told_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "essays").mkdir()
    (tmp_path / "odd[1].txt").touch()
    seen = [f"{tmp_path}/essays", f"{tmp_path}/essays/**/*.txt", f"{tmp_path}/odd[1].txt", f"file://{tmp_path}/essays/*"]
    gone = [f"{tmp_path}/gone", f"{tmp_path}/gone/*.txt", f"file://{tmp_path}/gone"]
    found = probe_node(tmp_path, probe="x", paths=[*seen, *gone, "ftp://host/essays"]).unseen
    assert {path: found[path] for path in gone} == {path: f"{path} is not there" for path in gone}
    assert found.keys() - gone == {"ftp://host/essays"}
    assert found["ftp://host/essays"].startswith("ftp://host/essays: cannot be read (")


@pytest.mark.parametrize(("gpus", "is_held"), [(None, True), (1, True), (0, False)])
def test_a_training_on_cpus_is_not_held_against_the_memory_of_gpus(gpus: float | None, is_held: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(PUBLISHED["meta-llama/Llama-3.2-3B"])))
    spec = TrialSpec.parse(with_overrides(SWEEP["trial"], {"resources.train_gpus_per_worker": gpus}), origin="test")
    trial = PreparedTrial(spec=spec, digest="", model_dir=tmp_path, base_digest="", marker=Marker((), None), shards=None)
    needed = preflight.needed_memory([trial], gpus_per_node=1)
    assert (needed is not None and needed.gpu_bytes > 6e9) == is_held


def why_not_joined(environment: dict[str, str]) -> str:
    """The one line of whoever would join that cluster."""
    code = "import sys\nfrom pause_ray.cli.main import main\nfrom pause_ray.core import ray_cluster\n"
    code += "from pause_ray.cli.terminal import app\n@app.command()\ndef join():\n    with ray_cluster.connection(): pass\nmain()"
    done = subprocess.run([sys.executable, "-c", code, "join"], env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.slow
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
        code, found = check("--set", "trial.resources.scoring_cpus_per_actor=99")
        [large] = [str(problem["what"]) for problem in found["problems"]]
        assert (code, found["notes"]) == (2, [])
        assert large.startswith("a scoring actor takes 99 CPUs and 0 GPUs on one node, and none has that: ")
        assert " (4 CPUs and 0 GPUs)" in large
        command = [
            sys.executable,
            "-m",
            "pause_ray",
            "sweep",
            sweep.name,
            "--storage",
            "runs",
            "--set",
            "trial.resources.scoring_cpus_per_actor=99",
        ]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 2, done.stderr
        assert "has 4; lower it, or start nodes that have it" in " ".join(done.stderr.split())
        env["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
        code, found = check()
        assert code == 2
        assert [problem["node"] for problem in found["problems"]] == ["driver"]
        assert "MLflow at http://127.0.0.1:9" in str(found["problems"][0]["what"])
        no_entry = "the cluster's token is missing here or is another one"
        changes: list[tuple[dict[str, str | None], str]] = [
            ({"RAY_AUTH_TOKEN": None, "HOME": str(tmp_path / "nobody")}, no_entry),
            ({"RAY_AUTH_TOKEN": "0" * 64}, no_entry),
            ({"RAY_ADDRESS": "127.0.0.1:9"}, "no Ray cluster answers there"),
            ({"RAY_ADDRESS": "127.0.0.1:9/"}, "no Ray cluster answers there"),
            ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "unset it, or hand this in there: pause-ray submit FILE"),
        ]
        changed = [{name: its for name, its in {**env, **change}.items() if its is not None} for change, _ in changes]
        with ThreadPoolExecutor() as pool:  # Ray asks for 20 seconds whether a wrong token is a right one
            for (_, told), line in zip(changes, pool.map(why_not_joined, changed), strict=True):
                assert told in line
    assert not list((tmp_path / "runs").glob(".preflight-*")), "nothing is left behind"
