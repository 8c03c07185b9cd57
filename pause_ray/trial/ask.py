"""A trained trial that answers anyone's questions: the chat, pauses, adapter and precision that it was scored with. No grid, no score.

A folder holds such a trial: ``trial.json`` (its resolved spec) and, where it was trained, ``adapter/`` (a whole checkpoint).
The base model is fetched or found by the spec, unless ``PAUSE_RAY_MODEL`` names its folder. Knows no Ray, and MLflow only by the
name that it asks of a loader.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pause_ray.core.errors import ModelError
from pause_ray.core.storage import is_complete, read_json
from pause_ray.inference.engine import EngineError, HfEngineSpec, LoadedAs, PromptStep
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.models.sources import model_digest, model_limit_tokens, resolve_model
from pause_ray.text.prompts import BuiltPrompt
from pause_ray.text.tokenizer import ModelTokenizer, insert_pauses, resolve_marker
from pause_ray.trial.spec import TrialSpec

TRIAL, ADAPTER = "trial.json", "adapter"
MODEL_VARIABLE, CACHE_VARIABLE = "PAUSE_RAY_MODEL", "PAUSE_RAY_CACHE"


class Answerer:
    """Greedy answers of one trial's model. For one thread at a time."""

    def __init__(self, spec: TrialSpec, *, model_dir: Path, adapter: Checkpoint | None, cache: Path) -> None:
        """Load the model.

        Args:
            spec: Of the trial.
            model_dir: Its base model.
            adapter: What it was trained to; None for the base model alone.
            cache: Remembers digests of weights.

        Raises:
            CheckpointError: the adapter was trained on another base model, or with other pauses.
            ModelError: the model cannot be loaded.
            TextError: the marker does not fit the tokenizer.
        """
        from pause_ray.inference.hf import HfEngine

        self._spec = spec
        self._tokenizer = ModelTokenizer.load(model_dir)
        self._marker = resolve_marker(self._tokenizer, spec.pauses)
        if adapter is not None:
            base_digest = model_digest(model_dir, cache=cache)
            adapter.check_fits(base_digest=base_digest, tokenizer_digest=self._tokenizer.digest, marker=self._marker.token)
        engine = spec.engine if isinstance(spec.engine, HfEngineSpec) else HfEngineSpec()
        self._engine = HfEngine(engine)
        self._engine.use(
            LoadedAs(
                model_dir=model_dir,
                dtype=spec.model.dtype,
                quantize=spec.model.quantize,
                marker=self._marker.token,
                adapter_dir=adapter.folder if adapter else None,
            )
        )
        self._limit_tokens = model_limit_tokens(model_dir)

    @classmethod
    def open(cls, folder: Path) -> Answerer:
        """The trial in ``folder``.

        Raises:
            UserError: a file is missing or damaged, or the base model is not the one it was trained on, or cannot be had.
        """
        spec = TrialSpec.parse(read_json(folder / TRIAL), origin=str(folder / TRIAL))
        cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "pause_ray").expanduser()
        given = os.environ.get(MODEL_VARIABLE)
        model = spec.model.model_copy(update={"source": given, "sha256": None, "revision": None}) if given else spec.model
        try:
            model_dir = resolve_model(model, cache=cache)
        except ModelError as error:
            raise ModelError(f"{error}; {MODEL_VARIABLE} may name the folder of the base model") from error
        adapter = Checkpoint.open(folder / ADAPTER) if is_complete(folder / ADAPTER) else None
        return cls(spec, model_dir=model_dir, adapter=adapter, cache=cache)

    def prompt(self, context: str, question: str) -> BuiltPrompt:
        """Build the prompt as in the trial, with all of ``context`` and no needle hidden in it.

        Raises:
            TextError: the marker or a control token is in the context.
            ModelError: it leaves no room for an answer.
        """
        policy, chat = self._spec.pauses, self._spec.eval.prompt
        document = insert_pauses(self._tokenizer.encode(context), policy=policy, marker=self._marker, seed=self._spec.data_seed)
        after = chat.user_after(question=question, instruction=policy.instruction if policy else None)
        prefix, suffix = self._tokenizer.chat_frame(chat.system, chat.before, after, marker=self._marker.token)
        ids = np.concatenate([np.array(prefix, np.int32), document.ids, np.array(suffix, np.int32)])
        if len(ids) + self._spec.eval.max_new_tokens > self._limit_tokens:
            raise ModelError(
                f"context of {document.num_content} tokens: with chat, pauses and {self._spec.eval.max_new_tokens} tokens for the answer "
                f"it exceeds the {self._limit_tokens} that {self._spec.model.source} can read; give a shorter one"
            )
        return BuiltPrompt.plain(ids, system=chat.system, user=f"{chat.before}{context}{after}")

    def answer(self, context: str, question: str) -> str:
        """The model's answer, at most as long as in the trial.

        Raises:
            TextError: as ``prompt``.
            ModelError: as ``prompt``.
            EngineError: no answer could be computed.
        """
        step = PromptStep(prompt=self.prompt(context, question), keep_tokens=0, draft_ids=(), max_new_tokens=self._spec.eval.max_new_tokens)
        [(_, outcome)] = self._engine.answer([step])
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome.text


class _Served:
    """The model that MLflow calls with a table of contexts and questions."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer

    def predict(self, asked: Any, params: dict[str, Any] | None = None) -> list[str]:
        """An answer for each row of a data frame with the columns ``context`` and ``question``."""
        rows: Iterable[tuple[str, str]] = zip(asked["context"], asked["question"], strict=True)
        return [self._answerer.answer(context, question) for context, question in rows]


def _load_pyfunc(path: str) -> _Served:
    """The name and signature that ``mlflow.pyfunc`` wants of a loader module."""
    return _Served(Answerer.open(Path(path)))
