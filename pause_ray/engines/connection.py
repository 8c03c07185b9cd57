"""HTTP to a server that may hang, drop, refuse or lie: deadlines, retries, and a key that shows up nowhere.

Knows JSON, no model and no prompt. Every request has a connection of its own: against seconds of prefill its set-up is
nothing, and a kept one that the server closed meanwhile looks like a lost answer.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

from pause_ray.engines.engine import EngineError
from pause_ray.errors import ModelError
from pause_ray.spec import JsonObject

OK = 200
_BUSY = {408, 425, 429}
"""Statuses below 500 that a later attempt may not get."""
_LONGEST_PAUSE_SECONDS = 60.0
_CONNECT_SECONDS = 30.0
_LARGEST_BODY = 16 * 1024**2
"""Bytes of one reply; an answer has a few thousand."""
_QUOTED_CHARS = 240
_SHORTEST_SECRET = 8
"""Characters; what is shorter stands in for a key where a server wants none, such as ``EMPTY``, and may be a word of an answer."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered, whatever it was."""

    status: int
    """Of the HTTP reply; of its body where that holds an error with a status, as gateways send under 200."""
    text: str
    data: Any
    """The body as JSON; None if it is none."""
    location: str
    """Where a redirect points to; usually empty."""
    seconds: float
    """Of the attempt that brought it."""

    @property
    def quoted(self) -> str:
        """Status and message, short enough for one line."""
        return f"{self.status}: {_shortened(_message(self.data) or self.text) or 'an empty body'}"


class Connection:
    """A base URL, how long to wait for it, and how often to try."""

    def __init__(self, url: str, *, key_variable: str | None, timeout_seconds: float, retries: int, first_pause_seconds: float) -> None:
        self.url = url.rstrip("/")
        self._key_variable = key_variable
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._first_pause_seconds = first_pause_seconds

    def check_key(self) -> None:
        """Look whether there is a key that can be sent.

        Raises:
            ModelError: the variable is not set, or holds what cannot be a key.
        """
        key, variable = self._key(), self._key_variable
        if variable is not None and not key:
            raise ModelError(f"engine.key_variable: the environment variable {variable} is not set where {self.url} is asked; set it there")
        if not (key.isascii() and key.isprintable()):
            raise ModelError(f"engine.key_variable: {variable} holds characters that no key has, such as a line end; set it again")

    def ask(
        self,
        path: str,
        body: JsonObject | None = None,
        *,
        retries: int | None = None,
        wants_json: bool = True,
        stop: threading.Event | None = None,
    ) -> Reply:
        """POST ``body``, or GET, until the server gives an answer that is final.

        Args:
            path: Below the base URL.
            body: JSON to send; None for GET.
            retries: Attempts after the first; None for the connection's own number.
            wants_json: A reply of 200 that is no whole JSON counts as lost on the way.
            stop: Ends the waiting between attempts.

        Raises:
            EngineError: no final answer in any attempt, or the server asks to wait longer than an answer may take.
        """
        stop = stop or threading.Event()
        retries = self._retries if retries is None else retries
        for attempt in range(retries + 1):
            reply, trouble, wanted_pause = self._attempt(path, body, wants_json=wants_json)
            if reply is not None:
                return reply
            if attempt == retries or wanted_pause > self._timeout_seconds or stop.wait(max(wanted_pause, self._pause(attempt))):
                break
        patience = f", it asks to wait {wanted_pause:g} s" if wanted_pause else ""
        raise EngineError(f"{self.url}/{path}: {trouble}{patience} (attempt {attempt + 1} of {retries + 1})")

    def _attempt(self, path: str, body: JsonObject | None, *, wants_json: bool) -> tuple[Reply | None, str, float]:
        """A final reply, or what went wrong and the pause that the server asks for, in seconds."""
        import requests

        started = time.monotonic()
        try:
            with requests.request(
                "GET" if body is None else "POST",
                f"{self.url}/{path}",
                json=body,
                auth=self._sign,
                timeout=(min(_CONNECT_SECONDS, self._timeout_seconds), self._timeout_seconds),
                stream=True,
                allow_redirects=False,
            ) as response:
                content = self._read(response, deadline=started + self._timeout_seconds)
        except requests.Timeout:
            return None, f"no answer within {self._timeout_seconds:g} s", 0.0
        except requests.RequestException as error:
            return None, f"no connection, or it was lost ({self._blotted(_cause(error))})", 0.0
        text = self._blotted(content.decode("utf-8", errors="replace"))
        reply = Reply(
            status=_status(response.status_code, _parsed(text)),
            text=text,
            data=_parsed(text),
            location=self._blotted(response.headers.get("Location", "")),
            seconds=time.monotonic() - started,
        )
        if reply.status in _BUSY or reply.status >= 500:
            return None, reply.quoted, _seconds_to_wait(response.headers.get("Retry-After", ""))
        if reply.status == OK and wants_json and reply.data is None:
            return None, f"200 with a body that is no whole JSON ({_shortened(text) or 'empty'})", 0.0
        return reply, "", 0.0

    def _read(self, response: Any, *, deadline: float) -> bytes:
        """The body; byte by byte, since a larger piece would wait for its last byte past any deadline."""
        import requests

        content = bytearray()
        for byte in response.iter_content(1):
            content += byte
            if time.monotonic() > deadline:
                raise requests.Timeout
            if len(content) > _LARGEST_BODY:
                raise requests.ConnectionError(f"a body of more than {_LARGEST_BODY} bytes")
        return bytes(content)

    def _pause(self, attempt: int) -> float:
        """Twice as long each time, and never the same for two that wait."""
        longest = min(_LONGEST_PAUSE_SECONDS, self._first_pause_seconds * 2.0**attempt)
        return longest * (0.5 + random.random() / 2)  # noqa: S311 (spreads requests in time, changes no result)

    def _key(self) -> str:
        """Read when it is needed and kept nowhere, so that no dump of an object shows it."""
        return os.environ.get(self._key_variable, "").strip() if self._key_variable else ""

    def _sign(self, request: Any) -> Any:
        # Given to requests as its ``auth``: otherwise it would put a password of ~/.netrc in the key's place.
        if key := self._key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _blotted(self, text: str) -> str:
        """``text`` without the key: a server may repeat it in what it answers."""
        key = self._key()
        return text.replace(key, "[key]") if len(key) >= _SHORTEST_SECRET else text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _status(status: int, data: Any) -> int:
    """``status``, or the one in the body of an error that came as 200."""
    error = data.get("error") if isinstance(data, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    if status != OK or isinstance(code, bool) or not str(code).isdecimal():
        return status
    return int(str(code)) if 400 <= int(str(code)) < 600 else status


def _message(data: Any) -> str:
    """The part of an error body that is for people; vendors put it in different places."""
    for name in ("error", "message", "detail"):
        if isinstance(data, dict) and data.get(name):
            return _message(data[name]) or str(data[name])
    return ""


def _seconds_to_wait(retry_after: str) -> float:
    """Of a ``Retry-After`` header: seconds, or a date (RFC 9110, 10.2.3); 0 for none and for nonsense."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())


def _cause(error: Exception) -> str:
    """The innermost reason: requests wraps it in pools, URLs and retries that it did not make."""
    inner: Any = error.args[0] if error.args else error
    reason = getattr(inner, "reason", None) or inner
    return _shortened(str(reason).rpartition(": ")[2]) or type(error).__name__


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _QUOTED_CHARS else f"{line[: _QUOTED_CHARS - 3]}..."
