"""Heads that are not what they should be, as a loopback server that answers in their place."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator

import pytest

from pause_ray.cli import cluster
from pause_ray.cli.cluster import connect
from pause_ray.core.errors import ClusterError

pytestmark = pytest.mark.ray


@contextlib.contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """Address of a server that gives this one answer to everything."""

    class Always(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Always) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, json.dumps({"ray_version": "2.9.0", "version": "4"}), r"the head runs Ray 2\.9\.0, and this machine \d"),
        (200, json.dumps({"ray_version": "1.8.0", "version": "1"}), r"Ray version 1\.8\.0 is running on the cluster.*; give --address"),
        (200, "<html>", "no Ray head answers there"),
        (404, "", "no Ray head answers there.*; give --address"),
        (503, "", "no Ray head answers there"),
    ],
)
def test_what_is_no_head_or_another_one_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, status: int, body: str, told: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with answering(status, body) as address, pytest.raises(ClusterError, match=told) as caught:
        connect(address)
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_takes_a_connection_and_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ClusterError, match="no Ray head answers there"):
        connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
