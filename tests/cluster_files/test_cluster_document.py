"""docs/cluster/ followed on this machine with secrets in every process's environment: its commands work, and no secret is written.

The blocks that need no cloud run as they stand, in one shell, but for ports and for the sweep, which is a tiny one in the quickstart's
place. Everything is written below one folder and one session of Ray, and every byte of both is looked through.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import yaml

from tests.cluster_files.autoscaler import ROOT
from tests.cluster_files.document import RUN_HERE, blocks
from tests.cluster_files.ports import free_ports
from tests.cluster_files.test_local import end
from tests.inference.endpoint_server import EndpointServer, completion
from tests.sweep.tiny_sweep import answers, write_model, write_sweep
from tests.tracking.mlflow_server import PASSWORD, USER, MlflowServer, what_auth_lacks

pytestmark = [pytest.mark.ray, pytest.mark.skipif(what_auth_lacks() is not None, reason=str(what_auth_lacks())), pytest.mark.slow]

JUDGE_KEY = "TINY_JUDGE_KEY"
PLANTED = {
    name: f"planted-{name.lower()}-{secrets.token_hex(12)}"
    for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", JUDGE_KEY, "OPENAI_API_KEY", "PGPASSWORD")
}
PASSWORDS = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
"""Those of a server that refuses others, so that they are known to have been used."""
SECRETS_FILE = "secrets.env"
"""Of Kubernetes, in the folder that is copied to the cluster with a job."""
MARK = "=== "


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What following the document has left."""

    project: Path
    home: Path
    session: Path
    """Of Ray: its logs, and what it was sent."""
    told: list[str]
    """By each block."""
    jobs: str
    """What the head tells of all jobs."""
    token: str
    """Of the cluster."""
    mlflow: Path
    environment: dict[str, str]
    driver_environment: bytes
    """Of the head's raylet, from which everything on the cluster inherits."""

    @property
    def runs(self) -> Path:
        return self.project / "runs"


def make_project(folder: Path, *, address: str) -> Path:
    """What the document's commands name, with a sweep that takes seconds."""
    project = folder / "project"
    for name in ("cluster", "sweeps", "eval"):
        shutil.copytree(ROOT / name, project / name)
    shutil.copy(ROOT / ".gitignore", project)
    (project / SECRETS_FILE).write_text(f"HF_TOKEN={PLANTED['HF_TOKEN']}\n")
    tiny = write_sweep(project, write_model(folder / "model"), steps=2)
    sweep = yaml.safe_load(tiny.read_text()) | {"name": "quickstart", "search": {"pauses.every": {"grid": [1]}}}
    tiny.rename(project / "sweeps" / "quickstart.yaml").write_text(yaml.safe_dump(sweep))
    local = project / "cluster" / "local.yaml"
    config = yaml.safe_load(local.read_text())
    config["provider"]["gcs_address"] = address
    local.write_text(yaml.safe_dump(config))
    return project


def make_environment(folder: Path, *, dashboard: int, mlflow: str) -> dict[str, str]:
    """A user's shell: a home, the two programs on the path, and every secret that anything may want."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "pause-ray").write_text(f'#!/bin/sh\nexec {sys.executable} -m pause_ray "$@"\n')
    (programs / "pause-ray").chmod(0o755)
    (folder / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "PAUSE_RAY_"))}
    return kept | {
        "HOME": str(folder / "home"),
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "MLFLOW_TRACKING_URI": mlflow,
        **PASSWORDS,
        **PLANTED,
    }


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    from ray._private.services import get_node_ip_address

    folder = tmp_path_factory.mktemp("followed")
    port, dashboard, client, agent, agent_grpc = free_ports(5)
    address = f"{get_node_ip_address()}:{port}"
    (folder / "mlflow").mkdir()
    server = MlflowServer(folder / "mlflow", backend=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}", auth=True)
    environment = make_environment(folder, dashboard=dashboard, mlflow=server.uri)
    project = make_project(folder, address=address)
    session = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie below it
    own = f"--head --port={port} --dashboard-port={dashboard} --ray-client-server-port={client} --disable-usage-stats"
    own += f" --dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={agent_grpc} --temp-dir={session}"
    script = ["set -eu"]
    for number, block in enumerate(block for block in blocks() if block.mark == RUN_HERE):
        text = block.text.replace("ray start --head", f"ray start {own}").replace("127.0.0.1:8265", f"127.0.0.1:{dashboard}")
        script += [f"echo '{MARK}{number}'", text]
    try:
        server.start()
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=project,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout
        token = (folder / "home" / ".ray" / "auth_token").read_text().strip()
        head = {"Authorization": f"Bearer {token}"}
        jobs = requests.get(f"http://127.0.0.1:{dashboard}/api/jobs/", headers=head, timeout=120).text
        yield Followed(
            project=project,
            home=folder / "home",
            session=session,
            told=re.split(rf"^{MARK}\d+\n", done.stdout, flags=re.MULTILINE)[1:],
            jobs=jobs,
            token=token,
            mlflow=folder / "mlflow",
            environment=environment,
            driver_environment=environment_of_a_raylet(session),
        )
    finally:
        server.kill()
        end(str(session), address)


def environment_of_a_raylet(session: Path) -> bytes:
    import psutil

    pids = [its.pid for its in psutil.process_iter(["name", "cmdline"]) if its.info["name"] == "raylet" and str(session) in str(its.info)]
    return Path(f"/proc/{pids[0]}/environ").read_bytes()


def written(*places: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below, sockets and pipes aside."""
    for place in places:
        for path in place.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path, path.read_bytes()


def told_by(followed: Followed, line: str) -> str:
    """What the block with this line printed."""
    run = [block.text.splitlines() for block in blocks() if block.mark == RUN_HERE]
    [number] = [number for number, lines in enumerate(run) if line in lines]
    return followed.told[number]


SUBMIT = "pause-ray submit sweeps/quickstart.yaml --storage $PWD/runs"


def test_every_block_does_what_is_said_of_it(followed: Followed) -> None:
    looked = told_by(followed, "pause-ray check sweeps/quickstart.yaml")
    assert "2 trials, 12 cells, no mistakes found" in looked
    assert "0 of 2 trials are finished" in looked
    assert "no problems found" in looked
    stopped = told_by(followed, "ray job stop --address http://127.0.0.1:8265 $JOB")
    [job] = re.findall(r"^submitted (quickstart-[0-9a-f]{8}-\d): ", stopped, flags=re.MULTILINE)
    assert f"Job '{job}' was stopped" in stopped
    assert re.search(r"^quickstart-[0-9a-f]{8}-\d succeeded$", told_by(followed, SUBMIT), flags=re.MULTILINE)
    read = told_by(followed, "pause-ray status quickstart --storage $PWD/runs")
    assert "baseline" in read
    assert {"SUCCEEDED", "STOPPED"} <= set(re.findall(r"[A-Z]+", read))
    assert "16 × H100" in told_by(followed, "pause-ray plan --model 70B --gpus 16 --gpu H100")


def test_every_cell_was_answered_once(followed: Followed) -> None:
    assert [len({row.cell_id for row in rows}) for rows in answers(followed.runs).values()] == [6, 6]
    assert [len(rows) for rows in answers(followed.runs).values()] == [6, 6]


@pytest.fixture(scope="module")
def judged(followed: Followed) -> Path:
    """A ledger of the sweep, graded by a judge who wants a key."""
    folder = followed.project / "judged"
    with EndpointServer(lambda asked: completion("Grade: 7", chat=True)) as judge:
        changes = ["kind=endpoint", f"url={judge.url}", "model=tiny", "api=chat", f"key_variable={JUDGE_KEY}"]
        command = [sys.executable, "-m", "pause_ray", "rescore", "quickstart:baseline", "--judge", "eval/judges/single.yaml"]
        command += [part for change in changes for part in ("--set", f"engine.{change}")]
        command += ["--out", str(folder), "--storage", str(followed.runs)]
        done = subprocess.run(command, cwd=followed.project, env=followed.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert {asked.headers.get("Authorization") for asked in judge.prompts} == {f"Bearer {PLANTED[JUDGE_KEY]}"}
    (folder / "told.txt").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.usefixtures("judged")
def test_no_secret_is_written_anywhere(followed: Followed) -> None:
    """The token's own file and that of the secrets aside."""
    everywhere = {**PLANTED, "MLFLOW_TRACKING_PASSWORD": PASSWORD, "RAY_AUTH_TOKEN": followed.token}
    for name in PLANTED | PASSWORDS:
        assert f"{name}=".encode() in followed.driver_environment, "there was nothing to leak"
    found = {
        (name, str(path))
        for path, content in written(followed.project, followed.home, followed.session, followed.mlflow)
        if path.name != "auth.ini" and path != followed.project / SECRETS_FILE
        for name, secret in everywhere.items()
        if secret.encode() in content
    }
    assert found == {("RAY_AUTH_TOKEN", str(followed.home / ".ray" / "auth_token"))}
    shown = "".join(followed.told).replace(followed.token, "", 1)  # by the command that makes it
    for name, secret in everywhere.items():
        assert secret not in followed.jobs, name
        assert secret not in shown, name


def test_the_places_that_are_looked_through_have_what_was_written(followed: Followed, judged: Path) -> None:
    """So that an empty folder does not pass for a clean one."""
    assert list(judged.glob("*.jsonl"))
    names = {path.name for path, _ in written(followed.project, followed.session, followed.mlflow)}
    assert {"cells.jsonl", "spec.json", "training.jsonl", "report.html", "raylet.out", "cells.parquet", "mlflow.db", "told.txt"} <= names
    assert any(name.startswith("job-driver-quickstart-") for name in names)
    assert len(json.loads(followed.jobs)) >= 3
