"""What an engine is: prompts in, greedy answers out. Knows no model library, no Ray and no task.

A model is named by a ``ModelSpec``; what is loaded is a local folder of safetensors with its tokenizer
(``engines.model_source.resolve_model`` makes one from every kind of source). An ``EngineSpec`` says who computes.
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
"""What prompts share. ``full``: every common beginning is computed once; ``depth``: only between prompts of one asked length;
``none``: each prompt is computed from its first token, the reference. Answers are the same."""


class HfEngineSpec(Spec):
    """transformers in this project's own processes. Its fields change how long an answer takes, not what it is.

    Where shapes decide near-ties (``depends_on_shapes``), ``chunk_tokens``, ``drafts`` and ``decode_batch`` do so too, as often as a
    recheck finds.
    """

    kind: Literal["hf"] = "hf"
    reuse: Reuse = "full"
    """What prompts share."""
    drafts: bool = True
    """Verify the reference answer, then text from the prompt, as speculative drafts."""
    chunk_tokens: int | None = Field(default=None, ge=16)
    """Prompt tokens per forward pass; null: 512 on a CPU, 2,048 on a GPU."""
    decode_batch: int | None = Field(default=None, ge=1)
    """Answers that go on together in one forward pass, once their prompts are read; their keys and values take up to as much memory
    as the longest prompt's. null: 8 in float32; 1 in other precisions, where an answer could depend on those beside it, and with
    ``kv: host``."""
    kv: Literal["device", "host"] = "device"
    """Where keys and values are kept. ``host``: in the memory of the machine, when a GPU is too small for a long context."""
    recheck_cells: int | None = Field(default=None, ge=0)
    """Cells of a trial that are answered a second time in other shapes, to measure how often the precision alone changes an answer.
    null: none in float32, 12 in other precisions and with quantized weights."""

    @model_validator(mode="after")
    def _batch_is_on_device(self) -> Self:
        if self.kv == "host" and (self.decode_batch or 1) > 1:
            raise ValueError(f"decode_batch {self.decode_batch}: answers go on together with kv: device only; set it to 1, or leave it out")
        return self

    def identity(self) -> JsonObject:
        """What of it changes an answer: nothing."""
        return {}

    def answers_together(self, *, dtype: str, quantize: str | None) -> int:
        """How many answers go on in one forward pass, in this precision."""
        if self.kv == "host":
            return 1
        return self.decode_batch or default_decode_batch(dtype=dtype, quantize=quantize)


CPU_CHUNK_TOKENS = 512
GPU_CHUNK_TOKENS = 2048


def default_chunk_tokens(*, on_gpu: bool) -> int:
    """Prompt tokens per forward pass where a spec names none."""
    return GPU_CHUNK_TOKENS if on_gpu else CPU_CHUNK_TOKENS


def depends_on_shapes(*, dtype: str, quantize: str | None) -> bool:
    """Whether rounding changes answers where the same prompt is computed in other shapes; not in float32 weights."""
    return dtype != "float32" or quantize is not None


def default_decode_batch(*, dtype: str, quantize: str | None) -> int:
    """Answers that go on together where a spec does not say."""
    return 1 if depends_on_shapes(dtype=dtype, quantize=quantize) else 8


def grain_of(*, dtype: str, quantize: str | None, chunk_tokens: int) -> int:
    """Only multiples of this many tokens are kept from one prompt to the next.

    In float32 any number: what is recomputed in other shapes differs by 1e-6, less than any near-tie seen. Below it rounding
    depends on shapes, so only whole chunks are kept: then every key and value comes out of a forward pass of the same shape
    with reuse and without, and answers are equal bit by bit.
    """
    return chunk_tokens if depends_on_shapes(dtype=dtype, quantize=quantize) else 1


class Prices(Spec):
    """What an endpoint charges, in its currency."""

    input_per_million: float = Field(ge=0)
    """Of prompt tokens."""
    cached_input_per_million: float | None = Field(default=None, ge=0)
    """Of prompt tokens that the server had cached; null: as for others."""
    output_per_million: float = Field(ge=0)
    """Of answer tokens."""
    currency: str = "USD"
    """For the report."""


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
    """Environment variable that holds the key; null: none is sent."""
    concurrency: int = Field(default=8, ge=1)
    """Requests at the same time, of each scoring actor."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for one answer."""
    retries: int = Field(default=5, ge=0)
    """Attempts after the first, with growing pauses, on 429, 5xx, lost connections and timeouts; never on another 4xx."""
    load_adapters: bool = False
    """Ask the server to load a checkpoint under a name of its own (vLLM's ``/load_lora_adapter``); it must see the storage root."""
    prices: Prices | None = None
    """For the cost of each cell."""

    def identity(self) -> JsonObject:
        """What of it changes an answer."""
        return {"kind": self.kind, "url": self.url, "model": self.model, "api": self.api}


def _kind(data: object) -> str | None:
    return data.get("kind", "hf") if isinstance(data, dict) else getattr(data, "kind", None)


EngineSpec = Annotated[Annotated[HfEngineSpec, Tag("hf")] | Annotated[EndpointSpec, Tag("endpoint")], Discriminator(_kind)]
"""Who answers; ``hf`` where no kind is named."""


@dataclass(frozen=True, kw_only=True)
class LoadedAs:
    """What an engine must be to answer: base weights, the marker's row, an adapter."""

    model_dir: Path
    """Weights and tokenizer; an endpoint reads only the tokenizer."""
    dtype: str
    quantize: str | None = None
    marker: MarkerToken | None = None
    """None when markers are ordinary text or there are none; an adapter brings the marker it was trained with."""
    adapter_dir: Path | None = None
    """Checkpoint folder (``checkpoint.Checkpoint.folder``), or None for the base model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One prompt of a walk (``needle.walk``), as an engine gets it."""

    prompt: BuiltPrompt
    keep_tokens: int
    """Leading tokens that the prompt shares with the one before it and that need no computing; 0 for the first."""
    draft_ids: tuple[int, ...]
    """How the answer probably begins, without an end token; verified in one forward pass. Empty for no drafts at all."""
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One greedy answer."""

    text: str
    ids: tuple[int, ...]
    """Of the answer, without the end token; empty where an endpoint does not tell them."""
    prefilled_tokens: int
    """Prompt tokens that went through the model; less than the prompt's length where a prefix was reused."""
    decoded_tokens: int
    """Tokens of the answer."""
    seconds: float
    forwards: int = 0
    """Forward passes after the prompt's; at most ``decoded_tokens``, fewer where drafts were right."""
    margin: float | None = None
    """Smallest gap between the best and the second-best logit over the answer and its end: how near it was to another answer."""
    reference_margin: float | None = None
    """Gap between the chosen token's logit and the draft's where the answer first leaves the draft; None if it never does."""
    cost: float | None = None
    """In the currency of the endpoint's prices."""


class EngineError(PauseRayError, RuntimeError):
    """No answer to one prompt, although the model is there: its cell is unscored, the next cell is asked."""


class Engine(Protocol):
    """One way to get text from a model."""

    name: str
    """For the ledger's ``engine`` column."""

    @property
    def grain_tokens(self) -> int:
        """Only multiples of this many leading tokens can be kept from one prompt to the next; 1 where any number can."""

    def use(self, wanted: LoadedAs) -> None:
        """Load what differs from what is loaded: the base rarely, the adapter often."""

    def answer(self, steps: Sequence[Step]) -> Iterator[tuple[int, Completion | EngineError]]:
        """Index of a step and its greedy answer, up to the model's end token or ``max_new_tokens``, as soon as it is there.

        In any order: answers are computed side by side. They are taken, or left for good, before the engine is asked for something else.

        Raises:
            ModelError: a prompt is longer than the model takes, or the model cannot be asked at all.
        """
