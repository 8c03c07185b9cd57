"""Real ``mlflow server`` processes for tests: on SQLite or on a PostgreSQL of their own, open or behind basic auth."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

USER, PASSWORD = "admin", "a-long-password-of-tests"
POSTGRES_USER = "postgres"
"""The server refuses to be run by root."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class MlflowServer:
    """One that can be killed and started again on the same store and port."""

    folder: Path
    backend: str
    """Of the tracking store."""
    auth: bool = False
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, timeout_seconds: float = 180) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self.backend, "--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            environment.pop(name, None)
        if self.auth:
            command += ["--app-name", "basic-auth"]
            config = self.folder / "auth.ini"
            lines = ["[mlflow]", "default_permission = READ", f"database_uri = sqlite:///{self.folder / 'auth.db'}"]
            config.write_text("\n".join([*lines, f"admin_username = {USER}", f"admin_password = {PASSWORD}", ""]))
            environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of tests"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + timeout_seconds
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """As a lost machine does: every process at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def what_postgres_lacks() -> str | None:
    """Why no PostgreSQL can be started here."""
    if _postgres_program("initdb") is None:
        return "PostgreSQL is not installed (apt install postgresql)"
    if importlib.util.find_spec("psycopg2") is None:
        return "psycopg2 is not installed (pip install psycopg2-binary)"
    return None


def what_auth_lacks() -> str | None:
    """Why no server with basic auth can be started here."""
    return None if importlib.util.find_spec("flask_wtf") else "Flask-WTF is not installed (pip install Flask-WTF)"


def _postgres_program(name: str) -> str | None:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(installed[-1]) if installed else None)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """URI of an empty database of a PostgreSQL that lives as long as the block."""
    folder.mkdir()
    port, root = free_port(), os.geteuid() == 0
    user = POSTGRES_USER if root else None
    if root:
        shutil.chown(folder, POSTGRES_USER)
        for parent in folder.parents[:-2]:
            parent.chmod(parent.stat().st_mode | 0o011)
    initdb, server = _postgres_program("initdb"), _postgres_program("postgres")
    assert initdb is not None
    assert server is not None
    subprocess.run([initdb, "-D", "data", "-U", "mlflow", "--no-sync"], cwd=folder, user=user, check=True, capture_output=True)
    command = [server, "-D", "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(folder)]
    with (folder / "postgres.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, user=user, stdout=log, stderr=log)
    try:
        import psycopg2

        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", dbname="postgres").close()
                break
            except psycopg2.OperationalError:
                assert time.monotonic() < deadline, (folder / "postgres.log").read_text()
                time.sleep(0.1)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
