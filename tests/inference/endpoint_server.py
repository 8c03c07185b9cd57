"""A real HTTP server on loopback that behaves as badly as a test wants, and keeps a record of what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None

    @property
    def is_greeting(self) -> bool:
        """A question of one token, or one for the list of models."""
        return self.body is None or self.body.get("max_tokens") == 1


@dataclass(frozen=True, kw_only=True)
class Act:
    """What the server does with one request."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False
    """Says nothing until the server ends."""
    drops: bool = False
    """Closes the connection without a word."""
    cut_bytes: int = 0
    """Announces the whole body and closes the connection this many bytes before its end."""
    trickle_seconds: float = 0.0
    """Between two bytes of the body."""


def completion(text: str, *, prompt_tokens: int = 7, finish_reason: str = "stop", chat: bool = False, **usage: Any) -> Act:
    """A good answer."""
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": 3} | usage
    return Act(body=json.dumps({"choices": [{"index": 0, "finish_reason": finish_reason} | said], "usage": counts}))


def models(*names: str) -> Act:
    """The list of what is served."""
    return Act(body=json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in names]}))


class EndpointServer:
    """Answers each request with ``respond(request)``, in a thread of its own; greetings and lists with ``greet(request)``."""

    def __init__(self, respond: Callable[[Asked], Act], *, greet: Callable[[Asked], Act] | None = None) -> None:
        self.respond = respond
        self.greet = greet or (lambda asked: models("tiny") if asked.body is None else completion("H", chat="messages" in asked.body))
        self.asked: list[Asked] = []
        self.max_in_flight = 0
        self._in_flight = 0
        self._counting = threading.Lock()
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def prompts(self) -> list[Asked]:
        """What was asked, without greetings, in the order of arrival."""
        return [asked for asked in self.asked if not asked.is_greeting]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _enter(self, asked: Asked) -> None:
        with self._counting:
            self.asked.append(asked)
            if not asked.is_greeting:
                self._in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self._in_flight)

    def _leave(self, asked: Asked) -> None:
        with self._counting:
            self._in_flight -= not asked.is_greeting

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._serve(None)

            def do_POST(self) -> None:
                self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: a test says what it expects."""

            def _serve(self, body: dict[str, Any] | None) -> None:
                asked = Asked(path=self.path, headers=dict(self.headers), body=body)
                server._enter(asked)
                try:
                    act = server.greet(asked) if asked.is_greeting else server.respond(asked)
                finally:
                    # Before the answer goes out: its reader may ask again before this thread goes on.
                    server._leave(asked)
                self._do(act)

            def _do(self, act: Act) -> None:
                self.close_connection = True
                if act.hangs:
                    server._ended.wait()
                if act.hangs or act.drops:
                    return
                content = act.body.encode()
                self.send_response(act.status)
                for name, value in {"Content-Length": str(len(content)), **act.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                content = content[: len(content) - act.cut_bytes]
                try:
                    for piece in [content] if not act.trickle_seconds else [bytes([byte]) for byte in content]:
                        self.wfile.write(piece)
                        server._ended.wait(act.trickle_seconds)
                except (BrokenPipeError, ConnectionResetError):
                    """Whoever asked has gone."""

        return Handler
