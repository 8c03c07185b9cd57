"""How tests of the endpoint engine ask: a prompt, an engine without long pauses, and what came of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pause_ray.inference.endpoint import EndpointEngine
from pause_ray.inference.engine import Completion, EndpointSpec, EngineError, LoadedAs, PromptStep
from pause_ray.text.prompts import BuiltPrompt
from pause_ray.text.tokenizer import ModelTokenizer
from tests.inference.endpoint_server import Act, Asked, EndpointServer, completion

GOOD = completion("fine")


def step_of(
    folder: Path, context: str, *, system: str | None = "Be short.", answer_prefix: str = "", max_new_tokens: int = 8
) -> PromptStep:
    tokenizer = ModelTokenizer.load(folder)
    after = "\n\nWhat is it?"
    prefix, suffix = tokenizer.chat_frame(system, "Read this:\n", after)
    ids = np.concatenate([prefix, tokenizer.encode(context).ids, suffix, tokenizer.encode(answer_prefix).ids]).astype(np.int32)
    prompt = BuiltPrompt(
        ids=ids,
        context_tokens=len(ids),
        content_tokens=len(ids) - len(prefix) - len(suffix),
        num_pauses=0,
        needle_tokens=(len(prefix),),
        prefix_tokens=len(prefix),
        suffix_tokens=len(suffix) + len(tokenizer.encode(answer_prefix).ids),
        rule="blank_line",
        system=system,
        user_before="Read this:\n",
        user_after=after,
        answer_prefix=answer_prefix,
    )
    return PromptStep(prompt=prompt, keep_tokens=0, draft_ids=(), max_new_tokens=max_new_tokens)


def engine_for(server: EndpointServer, folder: Path, *, adapter_dir: Path | None = None, **changes: Any) -> EndpointEngine:
    spec = EndpointSpec(**{"kind": "endpoint", "url": server.url, "model": "tiny", "retries": 2, "timeout_seconds": 20.0} | changes)
    engine = EndpointEngine(spec, first_pause_seconds=0.01)
    engine.use(LoadedAs(model_dir=folder, dtype="float32", adapter_dir=adapter_dir))
    return engine


def in_turn(*acts: Act) -> Callable[[Asked], Act]:
    """One act after the other; the last one for ever."""
    endless = itertools.chain(acts, itertools.repeat(acts[-1]))
    return lambda _: next(endless)


def only(engine: EndpointEngine, step: PromptStep) -> Completion | EngineError:
    [(index, outcome)] = engine.answer([step])
    assert index == 0
    return outcome


def good(outcome: Completion | EngineError) -> Completion:
    assert isinstance(outcome, Completion), outcome
    return outcome


def failed(outcome: Completion | EngineError, match: str) -> None:
    with pytest.raises(EngineError, match=match):
        if isinstance(outcome, EngineError):
            raise outcome
