"""The interface of an engine: it takes prompts and yields greedy answers.

A model is named by a ``ModelSpec`` and loaded from a local folder of safetensors with its tokenizer, which
``models.sources.resolve_model`` makes from every kind of source. An ``EngineSpec`` names the engine that computes. The module
knows no model library, no Ray and no task; docs/extending.md shows how to add an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

from pydantic import Discriminator, Field, Tag, model_validator

from pause_ray.core.errors import PauseRayError
from pause_ray.core.spec import JsonObject, Spec
from pause_ray.text.prompts import BuiltPrompt
from pause_ray.text.tokenizer import MarkerToken

Reuse = Literal["full", "depth", "none"]
"""Prefixes that prompts share. ``full``: every common prefix is prefilled once; ``depth``: only prefixes common to prompts of one
asked length; ``none``: each prompt is prefilled from its first token, as the reference. Answers are the same."""


class HfEngineSpec(Spec):
    """A Hugging Face model in this project's own processes. The fields change how long an answer takes, not the answer.

    Below float32 (``depends_on_shapes``) the rounding of ``chunk_tokens``, ``drafts`` and ``decode_batch`` can decide a near-tie;
    a numerics check measures how often.
    """

    kind: Literal["hf"] = "hf"
    reuse: Reuse = "full"
    """Prefixes that prompts share: ``full``, ``depth`` (among prompts of one length) or ``none``."""
    drafts: bool = True
    """Verify the reference answer, then text from the prompt, as speculative drafts."""
    chunk_tokens: int | None = Field(default=None, ge=16)
    """Prompt tokens per forward pass; null: 512 on a CPU, 2,048 on a GPU."""
    decode_batch: int | None = Field(default=None, ge=1)
    """Answers that are decoded together in one forward pass once their prompts are prefilled; their keys and values take up to as
    much memory as the longest prompt's. null: 8 in float32; 1 in other precisions, where an answer could depend on the others in
    its batch, and with ``kv: host``."""
    kv: Literal["device", "host"] = "device"
    """Memory that holds keys and values. ``host``: the machine's memory, where a GPU is too small for a long context."""
    numerics_check_cells: int | None = Field(default=None, ge=0)
    """Cells of a trial that are answered a second time with other chunk shapes, to measure how often rounding changes an answer.
    null: none in float32, 12 in other precisions and with quantized weights."""

    @model_validator(mode="after")
    def _batch_is_on_device(self) -> Self:
        if self.kv == "host" and (self.decode_batch or 1) > 1:
            raise ValueError(f"decode_batch {self.decode_batch}: answers go on together with kv: device only; set it to 1, or leave it out")
        return self

    def identity(self) -> JsonObject:
        """Return the fields that change an answer: none."""
        return {}

    def answers_together(self, *, dtype: str, quantize: str | None) -> int:
        """Return how many answers are decoded in one forward pass in this precision."""
        if self.kv == "host":
            return 1
        return self.decode_batch or default_decode_batch(dtype=dtype, quantize=quantize)


CPU_CHUNK_TOKENS = 512
GPU_CHUNK_TOKENS = 2048


def default_chunk_tokens(*, on_gpu: bool) -> int:
    """Return the prompt tokens per forward pass where a spec names none."""
    return GPU_CHUNK_TOKENS if on_gpu else CPU_CHUNK_TOKENS


def depends_on_shapes(*, dtype: str, quantize: str | None) -> bool:
    """Return whether other chunk shapes can change an answer by rounding; they do not with float32 weights."""
    return dtype != "float32" or quantize is not None


def default_decode_batch(*, dtype: str, quantize: str | None) -> int:
    """Return how many answers are decoded together where a spec names no number."""
    return 1 if depends_on_shapes(dtype=dtype, quantize=quantize) else 8


def default_prefix_block_size(*, dtype: str, quantize: str | None, chunk_tokens: int) -> int:
    """Return the block size of prefix caching: only multiples of it are kept from one prompt to the next.

    It is 1 in float32, where recomputing with other shapes changes logits by about 1e-6, less than any near-tie seen. In other
    precisions rounding depends on shapes, so only whole chunks are kept: every key and value then comes out of a forward pass
    of the same shape with reuse and without, and answers are equal bit by bit.
    """
    return chunk_tokens if depends_on_shapes(dtype=dtype, quantize=quantize) else 1


class Prices(Spec):
    """Prices of an endpoint, in its currency."""

    input_per_million: float = Field(ge=0)
    """Price of a million prompt tokens."""
    cached_input_per_million: float | None = Field(default=None, ge=0)
    """Price of a million prompt tokens that the server had cached; null: the price of other prompt tokens."""
    output_per_million: float = Field(ge=0)
    """Price of a million answer tokens."""
    currency: str = "USD"
    """Currency that the report shows."""

    def cost(self, *, prompt_tokens: int, cached_tokens: int, answer_tokens: int) -> float:
        """Return the price of one answer."""
        cached_price = self.input_per_million if self.cached_input_per_million is None else self.cached_input_per_million
        prompt = (prompt_tokens - cached_tokens) * self.input_per_million + cached_tokens * cached_price
        return (prompt + answer_tokens * self.output_per_million) / 1e6


class EndpointSpec(Spec):
    """A server that speaks the OpenAI protocol: vLLM, SGLang, TGI, ``transformers serve``, or a vendor's."""

    kind: Literal["endpoint"]
    url: str = Field(pattern=r"^https?://[^\s@?#]+$")
    """Base URL up to and without ``/completions``, for example ``http://127.0.0.1:8000/v1``. Keys do not belong here."""
    model: str = Field(min_length=1)
    """The model's name on the server."""
    api: Literal["completions", "chat"] = "completions"
    """``completions`` sends exactly the token ids that were counted; ``chat`` sends messages, and the server applies its own template."""
    key_variable: str | None = None
    """Environment variable that holds the API key; null: no key is sent."""
    concurrency: int = Field(default=8, ge=1)
    """Concurrent requests of each scoring actor."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for one answer in seconds."""
    retries: int = Field(default=5, ge=0)
    """Attempts after the first, with growing pauses, on 429, 5xx, lost connections and timeouts; never on another 4xx."""
    load_adapters: bool = False
    """Ask the server to load a checkpoint under a name of its own (vLLM's ``/load_lora_adapter``); it must see the storage root."""
    prices: Prices | None = None
    """Prices from which the cost of each cell is computed."""

    def identity(self) -> JsonObject:
        """Return the fields that change an answer."""
        return {"kind": self.kind, "url": self.url, "model": self.model, "api": self.api}


def _kind(data: object) -> str | None:
    return data.get("kind", "hf") if isinstance(data, dict) else getattr(data, "kind", None)


EngineSpec = Annotated[Annotated[HfEngineSpec, Tag("hf")] | Annotated[EndpointSpec, Tag("endpoint")], Discriminator(_kind)]
"""The engine that answers; ``hf`` where no kind is named."""


@dataclass(frozen=True, kw_only=True)
class LoadedAs:
    """The model that an engine must have loaded to answer: base weights, the marker's embedding row, an adapter."""

    model_dir: Path
    """Folder of weights and tokenizer; an endpoint reads only the tokenizer."""
    dtype: str
    quantize: str | None = None
    marker: MarkerToken | None = None
    """Added or reserved marker token; None where markers are ordinary text or absent. An adapter brings the one it was trained with."""
    adapter_dir: Path | None = None
    """Checkpoint folder (``models.checkpoint.Checkpoint.folder``), or None for the base model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptStep:
    """One prompt of a prefix plan (``evaluation.prefix_plan``), as an engine gets it."""

    prompt: BuiltPrompt
    keep_tokens: int
    """Leading tokens that the prompt shares with the one before it and that need no prefill; 0 for the first."""
    draft_ids: tuple[int, ...]
    """Likely beginning of the answer without an end token, verified in one forward pass; empty for no drafts at all."""
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One greedy answer."""

    text: str
    ids: tuple[int, ...]
    """Token ids of the answer without the end token; empty where an endpoint does not return them."""
    prefilled_tokens: int
    """Prompt tokens that went through the model; less than the prompt's length where a prefix was reused."""
    decoded_tokens: int
    """Tokens of the answer."""
    seconds: float
    forwards: int = 0
    """Forward passes after the prompt's; at most ``decoded_tokens``, fewer where drafts were right."""
    margin: float | None = None
    """Smallest gap between the best and the second-best logit over the answer and its end."""
    reference_margin: float | None = None
    """Gap between the chosen token's logit and the draft's where the answer first leaves the draft; None if it never does."""
    cost: float | None = None
    """Cost in the currency of the endpoint's prices; None without prices."""


class EngineError(PauseRayError, RuntimeError):
    """One prompt could not be answered although the model is there; its cell is unscored, and the next cell is asked."""


class Engine(Protocol):
    """One way to get text from a model."""

    name: str
    """Name of the engine in the ledger's ``engine`` column."""

    @property
    def prefix_block_size(self) -> int:
        """Block size of prefix caching: only multiples of it are kept from one prompt to the next; 1 where any number can be."""

    def use(self, wanted: LoadedAs) -> None:
        """Load the parts of ``wanted`` that differ from the loaded ones: the base rarely, the adapter often."""

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        """Yield the index of a prompt and its greedy answer, up to the end token or ``max_new_tokens``, as soon as it is computed.

        Answers may come in any order. A caller exhausts or closes the iterator before it asks the engine again.

        Raises:
            ModelError: a prompt is longer than the model takes, or the model cannot be asked at all.
        """
