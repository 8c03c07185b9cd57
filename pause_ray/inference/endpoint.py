"""The engine of a server that speaks the OpenAI protocol: vLLM, SGLang, TGI, ``transformers serve``, or a vendor's.

``completions`` sends the token ids that were counted; ``chat`` sends messages, which the server turns into tokens.
The server decides on precision, limits and prefix caching. Requests are sent in the order of the steps, so that neighbours hit its cache.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pause_ray.core.errors import ModelError
from pause_ray.core.spec import JsonObject, digest
from pause_ray.core.storage import file_sha256
from pause_ray.inference.engine import Completion, EndpointSpec, EngineError, LoadedAs, PromptStep
from pause_ray.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pause_ray.text.prompts import BuiltPrompt
from pause_ray.text.tokenizer import ModelTokenizer

OK = 200
_BUSY = {408, 425, 429}
"""Statuses below 500 that a later attempt may not get again."""
_LONGEST_PAUSE_SECONDS = 60.0
_CONNECT_SECONDS = 30.0
_LARGEST_BODY = 16 * 1024**2
"""The largest accepted reply in bytes; an answer has a few thousand."""
_QUOTED_CHARS = 240
_SHORTEST_SECRET = 8
"""A key with fewer characters is a placeholder, such as ``EMPTY``, and may occur in an answer, so it is not removed from replies."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Reply of a server, whatever its status."""

    status: int
    """Status of the HTTP reply, or that of an error in its body, which gateways send under 200."""
    text: str
    data: Any
    """The body parsed as JSON; None if it is not JSON."""
    location: str
    """Target of a redirect; usually empty."""
    seconds: float
    """Duration of the successful attempt."""

    @property
    def quoted(self) -> str:
        """The status and the message, short enough for one line."""
        return f"{self.status}: {_shortened(_message(self.data) or self.text) or 'an empty body'}"


class Connection:
    """Sends requests to the base URL of a spec, with its key, timeout and retries."""

    def __init__(self, spec: EndpointSpec, *, first_pause_seconds: float) -> None:
        self.url = spec.url.rstrip("/")
        self._key_variable = spec.key_variable
        self._timeout_seconds = spec.timeout_seconds
        self._retries = spec.retries
        self._first_pause_seconds = first_pause_seconds

    def check_key(self) -> None:
        """Check that the key can be sent.

        Raises:
            ModelError: The variable is not set, or its value cannot be a key.
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
        """POST ``body`` as JSON, or GET if it is None, until the server gives a final reply.

        Args:
            path: The path below the base URL.
            body: The body to send.
            retries: The number of attempts after the first; None for the spec's.
            wants_json: Whether a reply of 200 that is not complete JSON counts as lost.
            stop: Ends the pause between attempts when it is set.

        Raises:
            EngineError: No attempt brought a final reply, or the server asks for a longer pause than the timeout.
        """
        stop = stop or threading.Event()
        retries = self._retries if retries is None else retries
        for attempt in range(retries + 1):
            reply, problem, wanted_pause = self._attempt(path, body, wants_json=wants_json)
            if reply is not None:
                return reply
            if attempt == retries or wanted_pause > self._timeout_seconds or stop.wait(max(wanted_pause, self._pause(attempt))):
                break
        pause = f", it asks to wait {wanted_pause:g} s" if wanted_pause else ""
        raise EngineError(f"{self.url}/{path}: {problem}{pause} (attempt {attempt + 1} of {retries + 1})")

    def _attempt(self, path: str, body: JsonObject | None, *, wants_json: bool) -> tuple[Reply | None, str, float]:
        """Return a final reply, or None with the problem and the pause in seconds that the server asks for."""
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
            return None, f"no connection, or it was lost ({self._without_key(_cause(error))})", 0.0
        text = self._without_key(content.decode("utf-8", errors="replace"))
        reply = Reply(
            status=_status(response.status_code, _parsed(text)),
            text=text,
            data=_parsed(text),
            location=self._without_key(response.headers.get("Location", "")),
            seconds=time.monotonic() - started,
        )
        if reply.status in _BUSY or reply.status >= 500:
            return None, reply.quoted, _seconds_to_wait(response.headers.get("Retry-After", ""))
        if reply.status == OK and wants_json and reply.data is None:
            return None, f"200 with a body that is no whole JSON ({_shortened(text) or 'empty'})", 0.0
        return reply, "", 0.0

    def _read(self, response: Any, *, deadline: float) -> bytes:
        """Return the body, read byte by byte because a larger piece could wait for its last byte past the deadline."""
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
        """Return the pause after an attempt in seconds: exponential with jitter."""
        longest = min(_LONGEST_PAUSE_SECONDS, self._first_pause_seconds * 2.0**attempt)
        return longest * (0.5 + random.random() / 2)  # noqa: S311 (spreads requests in time, changes no result)

    def _key(self) -> str:
        """Read the key from the environment; it is stored nowhere, so that no dump of an object shows it."""
        return os.environ.get(self._key_variable, "").strip() if self._key_variable else ""

    def _sign(self, request: Any) -> Any:
        # Passed to requests as ``auth``, because requests would otherwise send a password of ~/.netrc instead of the key.
        if key := self._key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _without_key(self, text: str) -> str:
        """Return ``text`` without the key, which a server may repeat in its reply."""
        key = self._key()
        return text.replace(key, "[key]") if len(key) >= _SHORTEST_SECRET else text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _status(status: int, data: Any) -> int:
    """Return the status in the body of an error that came as 200, otherwise ``status``."""
    error = data.get("error") if isinstance(data, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    if status != OK or isinstance(code, bool) or not str(code).isdecimal():
        return status
    return int(str(code)) if 400 <= int(str(code)) < 600 else status


def _message(data: Any) -> str:
    """Return the message of an error body; vendors put it under different names."""
    for name in ("error", "message", "detail"):
        if isinstance(data, dict) and data.get(name):
            return _message(data[name]) or str(data[name])
    return ""


def _seconds_to_wait(retry_after: str) -> float:
    """Return the seconds of a ``Retry-After`` header (RFC 9110, 10.2.3); 0 without one and for an invalid one."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return Retry().parse_retry_after(retry_after)
    except InvalidHeader:
        return 0.0


def _cause(error: Exception) -> str:
    """Return the innermost reason, which requests wraps in texts about pools, URLs and retries."""
    inner: Any = error.args[0] if error.args else error
    reason = getattr(inner, "reason", None) or inner
    return _shortened(str(reason).rpartition(": ")[2]) or type(error).__name__


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _QUOTED_CHARS else f"{line[: _QUOTED_CHARS - 3]}..."


log = logging.getLogger("pause_ray")

_PROBE = "Hi"
_CHAT_COUNT_TOLERANCE = 0.02
"""The share by which a chat server's count of tokens may differ, beside ``_FEW_TOKENS``, since it tokenizes text around markers anew."""
_FEW_TOKENS = 8
_PATHS = {"completions": "completions", "chat": "chat/completions"}
_NOT_ACCEPTED, _NOT_FOUND = {401, 403}, {404, 405}
_PAYMENT = 402


class EndpointEngine:
    """Asks one model on one server with ``spec.concurrency`` threads.

    A failed request is an ``EngineError`` of its cell if the server then still answers a probe of one token, otherwise a ``ModelError``,
    since no later request would be answered either.

    Args:
        spec: The server and the model.
        first_pause_seconds: The pause before the second attempt of a request; each later pause is twice as long.
    """

    prefix_block_size = 1
    """The server decides what it reuses; ``keep_tokens`` and drafts are ignored."""

    def __init__(self, spec: EndpointSpec, *, first_pause_seconds: float = 0.5) -> None:
        self.name = f"endpoint:{spec.api}:{spec.model}"
        self._spec = spec
        self._connection = Connection(spec, first_pause_seconds=first_pause_seconds)
        self._model: str | None = None
        """Name of the base model or of an adapter on the server."""
        self._model_dir: Path | None = None
        self._tokenizer: ModelTokenizer | None = None
        self._probing = threading.Lock()
        self._counting = threading.Lock()
        self._count_is_known = False

    def use(self, wanted: LoadedAs) -> None:
        """Check that the server answers as ``wanted``, apart from its precision.

        Raises:
            ModelError: There is no key or no server, it does not know the model, or it cannot have the adapter or marker.
        """
        self._connection.check_key()
        if wanted.marker is not None and wanted.marker.added:
            raise ModelError(
                f"{self._spec.url}: a server has no row for the added marker {wanted.marker.text!r}; "
                "use pauses.token: text or reserved, or engine: {kind: hf}"
            )
        if wanted.model_dir != self._model_dir:
            self._tokenizer, self._model_dir = None, wanted.model_dir
            _warn_of_penalties(wanted.model_dir)
        model = self._spec.model if wanted.adapter_dir is None else self._loaded_adapter(wanted.adapter_dir)
        if model != self._model:
            self._probe(model)
            self._model, self._count_is_known = model, False

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        """Yield answers as they arrive; requests start in the order of ``steps``, at most ``concurrency`` at a time.

        Raises:
            ModelError: The server is gone, refuses the key or the model, or a prompt cannot be sent over this ``api``.
        """
        if self._model is None:
            raise RuntimeError("EndpointEngine.answer before EndpointEngine.use")
        if any(len(step.prompt.ids) for step in steps):
            self._known_tokenizer()  # once, not once per thread
        pending, pending_lock, stop = iter(enumerate(steps)), threading.Lock(), threading.Event()
        done: queue.SimpleQueue[tuple[int, Completion | EngineError | ModelError | None]] = queue.SimpleQueue()

        def work() -> None:
            while not stop.is_set():
                with pending_lock:
                    index, step = next(pending, (-1, None))
                if step is None:
                    return
                result: Completion | EngineError | ModelError | None = None
                try:
                    result = self._ask(step, stop)
                except ModelError as error:
                    result = error
                finally:
                    # Before ``stop`` is set, so that no thread that pauses between attempts reports before the reason to stop.
                    done.put((index, result))
                    if not isinstance(result, Completion | EngineError):
                        stop.set()

        # Daemon threads, because an interrupted run must not wait for a server that hangs.
        for _ in range(min(self._spec.concurrency, len(steps))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in steps:
                index, result = done.get()
                if result is None:
                    raise RuntimeError("a thread that asks the endpoint died; its traceback is above")
                if isinstance(result, ModelError):
                    raise result
                yield index, result
        finally:
            stop.set()

    def _ask(self, step: PromptStep, stop: threading.Event) -> Completion | EngineError:
        body = {"model": self._model, **self._content(step.prompt), "max_tokens": step.max_new_tokens, "temperature": 0}
        try:
            reply = self._connection.ask(_PATHS[self._spec.api], body, stop=stop)
            if reply.status != OK:
                self._check_admitted(reply, str(self._model))
                return EngineError(f"{self._spec.url}: refused the prompt of {step.prompt.prompt_tokens} tokens ({reply.quoted})")
            answer = _Answer.read(reply, self._spec.api)
        except EngineError as error:
            with self._probing:
                if not stop.is_set():
                    self._probe(str(self._model), after=f" after {error}")
            return error
        if answer.finish_reason == "content_filter":
            return EngineError(f"{self._spec.url}: its content filter stopped the answer")
        self._compare_counts(answer, step.prompt)
        return self._completion(answer, step, seconds=reply.seconds)

    def _content(self, prompt: BuiltPrompt) -> JsonObject:
        if self._spec.api == "completions":
            return {"prompt": prompt.ids.tolist()}
        if prompt.answer_prefix:
            raise ModelError(
                f"{self._spec.url}: a chat request cannot begin the answer (with {prompt.answer_prefix!r}); use engine.api: completions"
            )
        context = prompt.ids[prompt.prefix_tokens : len(prompt.ids) - prompt.suffix_tokens]
        text = self._context_text(context) if len(context) else ""
        user = {"role": "user", "content": f"{prompt.user_before}{text}{prompt.user_after}"}
        return {"messages": [user] if prompt.system is None else [{"role": "system", "content": prompt.system}, user]}

    def _context_text(self, context: NDArray[np.int32]) -> str:
        """Return the text that the server's tokenizer decodes from these ids."""
        tokenizer = self._known_tokenizer()
        visible = tokenizer.decode(context)
        for token_id in tokenizer.chat_ids:
            control = tokenizer.decode([token_id], skip_special_tokens=False)
            if control and control in visible:
                raise ModelError(
                    f"{self._spec.url}: the context contains the text {control}, which a chat server takes for a control token; "
                    "use engine.api: completions, or remove it"
                )
        return tokenizer.decode(context, skip_special_tokens=False)

    def _known_tokenizer(self) -> ModelTokenizer:
        if self._tokenizer is None:
            if self._model_dir is None:
                raise RuntimeError("EndpointEngine has no tokenizer before EndpointEngine.use")
            self._tokenizer = ModelTokenizer.load(self._model_dir)
        return self._tokenizer

    def _probe(self, model: str, *, after: str = "") -> None:
        """Ask for one token.

        Raises:
            ModelError: The server does not answer.
        """
        if self._spec.api == "completions":
            content: JsonObject = {"prompt": self._known_tokenizer().encode(_PROBE).ids.tolist()}
        else:
            content = {"messages": [{"role": "user", "content": _PROBE}]}
        body = {"model": model, **content, "max_tokens": 1, "temperature": 0}
        try:
            reply = self._connection.ask(_PATHS[self._spec.api], body, retries=min(1, self._spec.retries))
            if reply.status == OK:
                _Answer.read(reply, self._spec.api)
                return
        except EngineError as error:
            raise ModelError(
                f"no answer to a question of one token{after}: {error}; is the server there, and is engine.url right?"
            ) from error
        self._check_admitted(reply, model)
        hint = "a server that takes no token ids needs engine.api: chat" if self._spec.api == "completions" else "see what it asks for"
        raise ModelError(f"{self._spec.url}: model {model} refuses a question of one token{after} ({reply.quoted}); {hint}{self._offer()}")

    def _check_admitted(self, reply: Reply, model: str) -> None:
        """Check whether a refusal concerns this request only.

        Raises:
            ModelError: The server would refuse every request.
        """
        url, variable = self._connection.url, self._spec.key_variable
        if reply.status in _NOT_ACCEPTED:
            remedy = (
                f"check the key in {variable}" if variable else "name the environment variable that holds the key in engine.key_variable"
            )
            raise ModelError(f"{url}: does not let us in ({reply.quoted}); {remedy}")
        if reply.status == _PAYMENT:
            raise ModelError(f"{url}: wants to be paid first ({reply.quoted})")
        if reply.status in _NOT_FOUND:
            raise ModelError(
                f"{url}: has no {_PATHS[self._spec.api]} or no model {model} ({reply.quoted}); "
                f"check engine.url, engine.api and engine.model{self._offer()}"
            )
        if reply.status < 400:
            to = f" to {reply.location}" if reply.location else ""
            raise ModelError(f"{url}: answers {reply.status}{to} instead of an answer; give the server's own address in engine.url")

    def _served(self) -> tuple[str, ...]:
        """Return the names of the models that the server lists; empty without a list."""
        try:
            data = self._connection.ask("models", retries=0).data
        except EngineError:
            return ()
        entries = data.get("data") if isinstance(data, dict) else None
        return tuple(str(entry["id"]) for entry in entries or () if isinstance(entry, dict) and "id" in entry)

    def _offer(self) -> str:
        served = self._served()
        return f"; it serves {', '.join(served[:8])}" if served else ""

    def _loaded_adapter(self, folder: Path) -> str:
        """Return the name under which the server answers with the adapter in ``folder``.

        The name holds a digest of the adapter, because servers cache keys and values by name and would answer from old ones if the name
        came back with other weights (vLLM issues 30931 and 42125).
        """
        if not self._spec.load_adapters:
            raise ModelError(
                f"{self._spec.url}: serves {self._spec.model} without the adapter {folder}; set engine.load_adapters: true "
                "(vLLM: --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True), or use engine: {kind: hf}"
            )
        try:
            config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
            content = [config, file_sha256(folder / ADAPTER_WEIGHTS)]
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: no adapter can be read ({error}); train it again") from error
        if config.get("trainable_token_indices"):
            raise ModelError(
                f"{folder}: has a trained marker row, which servers do not load; score it with engine: {{kind: hf}}, "
                "or train with pauses.token: text"
            )
        name = f"pause-ray-{folder.name}-{digest(content)}"
        if name in self._served():
            return name
        try:
            reply = self._connection.ask("load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())}, wants_json=False)
        except EngineError as error:
            raise ModelError(f"the adapter {folder} was not loaded: {error}") from error
        # If another process was quicker, the server refuses and lists the name.
        if reply.status != OK and name not in self._served():
            raise ModelError(
                f"{self._spec.url}: did not load the adapter {folder} ({reply.quoted}); start the server with LoRA at run time "
                "(vLLM: --enable-lora, --max-lora-rank, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True) where it sees the storage root"
            )
        return name

    def _compare_counts(self, answer: _Answer, prompt: BuiltPrompt) -> None:
        if answer.prompt_tokens is None or not prompt.prompt_tokens:
            return
        with self._counting:
            if self._count_is_known:
                return
            self._count_is_known = True
        allowed = 0.0 if self._spec.api == "completions" else _FEW_TOKENS + _CHAT_COUNT_TOLERANCE * prompt.prompt_tokens
        if abs(answer.prompt_tokens - prompt.prompt_tokens) > allowed:
            log.warning(
                "%s: counted %d tokens in a prompt of %d by the tokenizer in %s; lengths and depths are off where the server's "
                "tokenizer or chat template is another",
                self._spec.url,
                answer.prompt_tokens,
                prompt.prompt_tokens,
                self._model_dir,
            )

    def _completion(self, answer: _Answer, step: PromptStep, *, seconds: float) -> Completion:
        prompt_tokens = step.prompt.prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens
        cached_tokens, prices = min(answer.cached_tokens, prompt_tokens), self._spec.prices
        decoded = self._counted(answer, step) if answer.completion_tokens is None else answer.completion_tokens
        return Completion(
            text=answer.text,
            ids=(),
            prefilled_tokens=prompt_tokens - cached_tokens,
            decoded_tokens=decoded,
            seconds=seconds,
            cost=None if prices is None else prices.cost(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, answer_tokens=decoded),
        )

    def _counted(self, answer: _Answer, step: PromptStep) -> int:
        """Count the tokens of an answer whose length the server does not report; 0 without a tokenizer, as for a chat judge."""
        if answer.finish_reason == "length":
            return step.max_new_tokens
        known = self._model_dir is not None and (self._model_dir / "tokenizer.json").is_file()
        return len(self._known_tokenizer().encode(answer.text).ids) if known else 0


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The answer in a reply with status 200."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    cached_tokens: int
    completion_tokens: int | None

    @classmethod
    def read(cls, reply: Reply, api: str) -> _Answer:
        """Read an answer; an error under 200, no choices or no text raise ``EngineError``."""
        data = reply.data
        choices = data.get("choices") if isinstance(data, dict) and not data.get("error") else None
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        holder = choice if api == "completions" else choice.get("message")
        name = "text" if api == "completions" else "content"
        if not isinstance(holder, dict) or not isinstance(holder.get(name), str | None) or name not in holder:
            raise EngineError(f"the server sent no answer ({reply.quoted})")
        usage = data.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        return cls(
            # Null means that the model wrote only reasoning or a tool call.
            text=holder[name] or "",
            finish_reason=choice.get("finish_reason"),
            prompt_tokens=_count(usage, "prompt_tokens"),
            cached_tokens=_count(details, "cached_tokens") or 0,
            completion_tokens=_count(usage, "completion_tokens"),
        )


def _count(data: Any, name: str) -> int | None:
    value = data.get(name) if isinstance(data, dict) else None
    return value if type(value) is int and value >= 0 else None


def _warn_of_penalties(model_dir: Path) -> None:
    """Warn about a repetition penalty in generation_config.json, which servers apply by default and which changes greedy answers."""
    file = model_dir / "generation_config.json"
    settings = json.loads(file.read_bytes()) if file.is_file() else {}
    penalty = settings.get("repetition_penalty")
    if penalty not in (None, 1, 1.0):
        log.warning(
            "%s: sets repetition_penalty %s, which a server may apply by itself; for the plain greedy answer set it to 1 in the "
            "server's folder, or start vLLM with --generation-config vllm",
            file,
            penalty,
        )
