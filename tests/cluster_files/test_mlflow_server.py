"""The MLflow server of cluster/mlflow: Compose's rules, then the very commands and settings of its services, run on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_files.autoscaler import CLUSTER
from tests.cluster_files.ports import free_ports

pytestmark = pytest.mark.slow

FOLDER = CLUSTER / "mlflow"
COMPOSE = FOLDER / "compose.yaml"
SECRETS = {
    line.rstrip("="): f"{line[:4]}-{number}-not-to-be-seen"
    for number, line in enumerate((FOLDER / "mlflow.env.example").read_text().split())
    if line.endswith("=")
}
"""A value for each variable of the env file."""
START_SECONDS = 120.0


def services() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())["services"]


# What Compose and Kubernetes make of the files


def test_compose_accepts_it() -> None:
    """By a second implementation of its specification, which refuses what it does not know."""
    compose_spec = pytest.importorskip("compose_spec")
    options = compose_spec.PyOptions(apply_merge=True)
    text = COMPOSE.read_text()
    options.from_yaml(text).validate()
    for right, wrong in {"cap_drop": "cap_dropp", "networks: [inside]": "networks: [insde]", "service_healthy": "service_helthy"}.items():
        with pytest.raises(ValueError, match=re.search(r"\w+(?=\]?$)", wrong)[0]):
            options.from_yaml(text.replace(right, wrong, 1)).validate()


def test_docker_compose_accepts_it(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    secrets = tmp_path / "mlflow.env"
    secrets.write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
    command = [docker, "compose", "-f", str(COMPOSE), "--env-file", str(secrets), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_env_file_has_what_the_services_ask_for_and_nothing_else() -> None:
    assert set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text())) == set(SECRETS)


def test_each_service_gets_only_its_own_secrets() -> None:
    given = {name: set(re.findall(r"\$\{(\w+)", json.dumps(service))) for name, service in services().items()}
    assert given["postgres"] == {"POSTGRES_PASSWORD"}
    assert given["minio"] == given["bucket"] == {"MINIO_ROOT_PASSWORD"}
    assert given["mlflow"] == set(SECRETS)


def test_the_server_alone_is_reached_from_outside_and_from_this_machine_only() -> None:
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published == {"mlflow": ["127.0.0.1:5000:5000"]}
    assert yaml.safe_load(COMPOSE.read_text())["networks"]["inside"] == {"internal": True}
    assert {name for name, service in services().items() if "outside" in service["networks"]} == {"mlflow"}


def test_no_container_can_gain_rights() -> None:
    for service in services().values():
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
        assert not service.get("privileged")


def test_kubernetes_starts_the_same_server() -> None:
    deployment = next(one for one in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()) if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    own = services()["mlflow"]
    assert (container["image"], container["command"]) == (own["image"], own["command"])
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    elsewhere = {"MLFLOW_ARTIFACTS_DESTINATION", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"}
    for name, value in own["environment"].items():
        if name not in elsewhere and not name.startswith("AWS_"):
            assert values[name] == (None if "${" in value else value), name


# The services' own commands, run here


@pytest.fixture
def postgres() -> Iterator[int]:
    """The port of a PostgreSQL that lets user mlflow into database mlflow, with the password of the env file."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("initdb") or "/").parent]
    if not (found[-1] / "initdb").exists():
        pytest.skip("PostgreSQL is not installed")
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder, port = Path(tempfile.mkdtemp()), free_ports(1)[0]
    (folder / "password").write_text(SECRETS["POSTGRES_PASSWORD"])
    for path in (folder, folder / "password"):
        path.chmod(0o755)
        if as_user:
            shutil.chown(path, "postgres")

    def run(*words: str) -> None:
        subprocess.run([*as_user, str(found[-1] / words[0]), *words[1:]], check=True, capture_output=True, cwd="/")

    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "mlflow", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run("pg_ctl", "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    psql = [str(found[-1] / "psql"), "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "-d", "postgres", "-c", "create database mlflow"]
    subprocess.run(psql, check=True, capture_output=True, env={**os.environ, "PGPASSWORD": SECRETS["POSTGRES_PASSWORD"]})
    yield port
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def bucket_address() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def environment(name: str, places: dict[str, str]) -> dict[str, str]:
    """A service's variables with the env file filled in, and its neighbours' names replaced by where they are here."""
    variables = {"PATH": os.environ["PATH"]}
    for key, value in services()[name]["environment"].items():
        filled = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: SECRETS[found[1]], str(value))
        variables[key] = replaced(filled, places)
    return variables


def replaced(text: str, places: dict[str, str]) -> str:
    for there, here in places.items():
        text = text.replace(there, here)
    return text


def answer(url: str, *, password: str | None = None, host: str | None = None) -> int:
    """The status of a request."""
    request = urllib.request.Request(url)
    if password is not None:
        request.add_header("Authorization", "Basic " + b64encode(f"admin:{password}".encode()).decode())
    if host is not None:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


USE = """
import mlflow, pathlib, sys
client = mlflow.MlflowClient()
run = client.create_run(client.create_experiment("sweep")).info.run_id
client.log_metric(run, "score", 0.5)
pathlib.Path("cells.parquet").write_text("cells")
client.log_artifact(run, "cells.parquet")
assert client.get_run(run).data.metrics == {"score": 0.5}
assert [one.path for one in client.list_artifacts(run)] == ["cells.parquet"]
"""


@pytest.mark.mlflow
def test_the_server_keeps_runs_in_postgres_and_files_in_the_bucket_and_asks_for_the_password(
    tmp_path: Path, postgres: int, bucket_address: str
) -> None:
    (port,) = free_ports(1)
    config = tmp_path / "basic_auth.ini"
    places = {
        "postgres:5432": f"127.0.0.1:{postgres}",
        "http://minio:9000": bucket_address,
        "/etc/mlflow/basic_auth.ini": str(config),
        "--host=0.0.0.0": "--host=127.0.0.1",
        "--port=5000": f"--port={port}",
        "127.0.0.1:5000": f"127.0.0.1:{port}",
        "--workers=4": "--workers=1",
    }
    config.write_text(replaced((FOLDER / "basic_auth.ini").read_text(), places))
    for _ in range(2):  # made once, found the second time
        command = [sys.executable, *services()["bucket"]["command"][1:]]
        subprocess.run(command, check=True, env=environment("bucket", places), cwd=tmp_path)

    own = services()["mlflow"]
    command = [str(Path(sys.executable).parent / "mlflow"), *(replaced(word, places) for word in own["command"][1:])]
    assert not any(secret in " ".join(command) for secret in SECRETS.values())
    variables = environment("mlflow", places)
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_healthy([sys.executable, *(replaced(word, places) for word in own["healthcheck"]["test"][2:])], server, tmp_path / "log")
        runs = f"{url}/api/2.0/mlflow/experiments/search?max_results=5"
        password = SECRETS["MLFLOW_AUTH_ADMIN_PASSWORD"]
        assert [answer(runs), answer(runs, password="password1234"), answer(runs, password=password)] == [401, 401, 200]
        assert answer(runs, password=password, host="elsewhere.example.com") == 403
        user = {"MLFLOW_TRACKING_URI": url, "MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
        subprocess.run(
            [sys.executable, "-c", USE], check=True, cwd=tmp_path, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **user}
        )
    finally:
        with contextlib.suppress(ProcessLookupError):  # where it ended by itself, that has been said
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(120)
    assert stored(bucket_address)
    assert not (tmp_path / "mlflow.db").exists()
    assert not any(secret in (tmp_path / "log").read_text() for secret in SECRETS.values())


def wait_until_healthy(check: list[str], server: subprocess.Popen[bytes], log: Path) -> None:
    """By the service's own health check."""
    until = time.monotonic() + START_SECONDS
    while subprocess.run(check, capture_output=True, check=False).returncode:
        assert server.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < until, log.read_text()[-2000:]
        time.sleep(1)


def stored(bucket_address: str) -> list[str]:
    """Files in the bucket."""
    import boto3

    access = {"aws_access_key_id": "mlflow", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    objects = boto3.client("s3", endpoint_url=bucket_address, **access).list_objects_v2(Bucket="mlflow", Prefix="artifacts/")
    return [one["Key"] for one in objects.get("Contents", []) if one["Key"].endswith("cells.parquet")]
