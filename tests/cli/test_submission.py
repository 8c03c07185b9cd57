"""``pause-ray submit``, and what the README gives in its place, against a real head with token authentication and two more raylets."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pause_ray.cli.cluster import check_no_secrets
from pause_ray.cli.main import app
from pause_ray.core.errors import SpecError
from tests.real_cluster import RealCluster, free_port, running_cluster
from tests.sweep.tiny_sweep import ROOT, answers, run_sweep_to_its_end, write_model, write_sweep

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_TRACKING_PASSWORD", "x"),
        ("HF_TOKEN", "x"),
        ("JUDGE_KEY", "x"),
        ("STORE", "redis://:word@host"),
        ("PLACE", "https://ghp_word@host"),
        ("AWS_ACCESS_KEY_ID", "x"),
        ("MLFLOW_TRACKING_URI", "https://me:word@host"),
    ],
)
def test_variables_that_everybody_on_the_cluster_could_read_are_refused(name: str, value: str) -> None:
    with pytest.raises(SpecError, match=f"--env {name}: looks like a secret") as caught:
        check_no_secrets("python -m pause_ray sweep x", {name: value})
    assert "word@" not in str(caught.value)


def test_a_command_with_a_password_is_refused() -> None:
    with pytest.raises(SpecError, match="the command has a URL with a password") as caught:
        check_no_secrets("python -m pause_ray sweep x --set trial.engine.url=http://me:word@host", {})
    assert "word@" not in str(caught.value)


def test_plain_settings_pass() -> None:
    env = {
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "PAUSE_RAY_CACHE": "/mnt/cache",
        "TOKENIZERS_PARALLELISM": "false",
        "STORE": "postgresql://mlflow@host/db",
    }
    check_no_secrets("python -m pause_ray sweep tiny.yaml", env)


def test_a_mistake_in_a_search_that_learns_is_found_before_a_head_is_asked() -> None:
    changes = ["search={train.lora.rank: {int: [1, 64]}}", "algorithm={kind: tpe, points: 6, random_points: 2}", "trial.train=null"]
    options = [part for change in changes for part in ("--set", change)]
    refused = CliRunner().invoke(app, ["submit", "sweeps/quickstart.yaml", "--storage", "/mnt/runs", *options]).exception
    assert isinstance(refused, SpecError)
    assert "no trial reads train.lora.rank" in str(refused)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), workers=2) as found:
        yield found


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    return write_sweep(folder, write_model(folder / "model"))


def submit(cluster: RealCluster, sweep: Path, storage: Path, *more: str, **environment: str | None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pause_ray", "submit", sweep.name, "--storage", str(storage), "--address", cluster.address]
    command += ["--env", f"PYTHONPATH={ROOT}", "--env", "OMP_NUM_THREADS=1", *more]
    wanted = {**cluster.environment, "PYTHONPATH": str(ROOT), **environment}
    env = {name: value for name, value in wanted.items() if value is not None}
    return subprocess.Popen(command, cwd=sweep.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def as_documented(cluster: RealCluster, sweep: Path, storage: Path) -> subprocess.Popen[str]:
    """The README's ``ray job submit`` with this cluster, sweep and storage in it; what is not installed here goes along as variables."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    [command] = re.findall(r"^ *(RAY_AUTH_MODE=token ray job submit [^#\n]+)", text, flags=re.MULTILINE)
    here = {"http://HEAD:8265": cluster.address, "sweeps/quickstart.yaml": sweep.name, "/mnt/shared/runs": str(storage)}
    words = [here.get(word, word) for word in shlex.split(command)]
    assert set(here.values()) <= set(words)
    variables = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    words.insert(words.index("--"), f"--runtime-env-json={json.dumps(variables)}")
    env = {name: value for name, value in cluster.environment.items() if name != "RAY_AUTH_MODE"}
    return subprocess.Popen(["env", *words], cwd=sweep.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.mark.ray
def test_stopped_and_submitted_again_it_ends_with_what_a_local_run_ends_with(
    cluster: RealCluster, sweep_file: Path, tmp_path: Path
) -> None:
    """The second time with Ray's own command."""
    storage = tmp_path / "runs"
    first = submit(cluster, sweep_file, storage, "--json")
    until = time.monotonic() + 240
    while not any((storage / "trials").glob("*/cells.jsonl")):
        assert first.poll() is None, ended(first)
        assert time.monotonic() < until
        time.sleep(0.1)
    code, _, err = ended(submit(cluster, sweep_file, storage))
    assert code == 2
    [stopped] = re.findall(r"(tiny-[0-9a-f]{8}-1) runs the same command", " ".join(err.split()))
    stop = ["ray", "job", "stop", "--address", cluster.address, stopped]
    subprocess.run(stop, env=cluster.environment, check=True, capture_output=True, timeout=600)
    code, out, err = ended(first)
    assert (code, json.loads(out)) == (1, {"job": stopped, "status": "STOPPED"}), "whoever follows it hears of its end"
    assert "training data for pause_tuned" in err, "whoever follows it hears what it says"
    code, out, err = ended(as_documented(cluster, sweep_file, storage))
    assert code == 0, out + err
    [report] = re.findall(r"^report +(.+)$", out, flags=re.MULTILINE)
    assert Path(report).is_relative_to(storage), "its log is followed to its end"
    assert Path(report).is_file()
    run_sweep_to_its_end(sweep_file, tmp_path / "local")
    assert answers(storage) == answers(tmp_path / "local")
    code, out, err = ended(submit(cluster, sweep_file, storage, "--json"))
    again = {"job": stopped.removesuffix("1") + "2", "status": "SUCCEEDED"}
    assert (code, json.loads(out)) == (0, again), err


@pytest.mark.ray
@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "the head refuses this token; put the cluster's token"),
        ({"RAY_AUTH_TOKEN": None, "HOME": "/nonexistent"}, "the head asks for a token, and none is found here"),
    ],
)
def test_without_the_clusters_token_nothing_is_submitted(
    cluster: RealCluster, sweep_file: Path, tmp_path: Path, environment: dict[str, str | None], told: str
) -> None:
    code, _, err = ended(submit(cluster, sweep_file, tmp_path / "runs", **environment))
    assert code == 2, err
    assert told in " ".join(err.split())


@pytest.mark.ray
def test_an_address_without_a_head_is_told_in_one_line(cluster: RealCluster, sweep_file: Path, tmp_path: Path) -> None:
    code, _, err = ended(submit(cluster, sweep_file, tmp_path / "runs", "--address", f"http://127.0.0.1:{free_port()}"))
    assert code == 2, err
    assert "no Ray head answers there" in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.ray
def test_a_mistake_in_the_sweep_is_found_before_a_head_is_asked(sweep_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pause_ray", "submit", sweep_file.name, "--set", "trial.train.max_steps=0", "--storage", str(tmp_path)]
    done = subprocess.run(
        command, cwd=sweep_file.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "train.max_steps" in done.stderr
