"""The engine of a transformers model in this process: base weights, the marker's embedding row, an adapter.

The base is loaded once; a marker's row and an adapter are set and removed without touching its other weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch

from pause_ray.core.errors import ModelError
from pause_ray.core.storage import is_complete
from pause_ray.inference.decoding import Answer, GreedyDecoder
from pause_ray.inference.engine import (
    Completion,
    EngineError,
    HfEngineSpec,
    LoadedAs,
    PromptStep,
    default_chunk_tokens,
    default_prefix_block_size,
)
from pause_ray.inference.kv_cache import prefix_cache
from pause_ray.inference.prefix_attention import use_prefix_attention
from pause_ray.models.checkpoint import Checkpoint
from pause_ray.models.sources import model_limit_tokens, row_limit_tokens
from pause_ray.models.weights import (
    SPREAD,
    add_marker_row,
    hold_positions,
    load_adapter,
    load_base,
    num_rows,
    put_in_rows,
    take_back_rows,
    vocabulary_tables,
)
from pause_ray.text.tokenizer import MarkerToken, ModelTokenizer

log = logging.getLogger("pause_ray")

LENGTH_STEP = 1024
"""Beyond its window a model with dynamic RoPE gets the frequencies of the next multiple, so that prompts of one length share them."""
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def _default_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return SPREAD if torch.cuda.device_count() > 1 else "cuda"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory was short; torch has an exception class for its GPU allocator only, others have a message."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def _marker_of(adapter_dir: Path | None) -> MarkerToken | None:
    """Return the marker whose row an adapter was trained with and needs even without pauses; folders of plain PEFT name none."""
    return Checkpoint.open(adapter_dir).marker if adapter_dir is not None and is_complete(adapter_dir) else None


class _OutOfMemory(EngineError):
    """The device or the machine has too little memory for a prompt."""


class _Request(NamedTuple):
    """A prompt and its answer, finished or not."""

    number: int
    step: PromptStep
    answer: Answer


@contextmanager
def _record_out_of_memory(requests: Sequence[_Request]) -> Iterator[None]:
    """Make an out-of-memory error inside the block the outcome of all unfinished requests; other errors propagate."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        for _, step, answer in requests:
            if not answer.finished:
                answer.finished = True
                answer.error = _OutOfMemory(f"out of memory on a prompt of {len(step.prompt.ids)} tokens")


class HfEngine:
    """Answers greedily with a transformers model.

    Args:
        spec: Settings of the computation, which do not change answers.
        device: ``cpu``, ``cuda`` or ``cuda:N``. None means all GPUs of this process, over which layers are spread, or else the CPU.
        threads: The number of CPU threads of torch; None leaves it as it is.
    """

    name = "hf"

    def __init__(self, spec: HfEngineSpec | None = None, *, device: str | None = None, threads: int | None = None) -> None:
        self._spec = spec or HfEngineSpec()
        self._device = device or _default_device()
        if threads is not None:
            torch.set_num_threads(threads)
        self._chunk_tokens = self._spec.chunk_tokens or default_chunk_tokens(on_gpu=self._device != "cpu")
        self._base: _Base | None = None
        self._decoder: GreedyDecoder | None = None
        self._loaded: LoadedAs | None = None
        self._call = 0

    @property
    def prefix_block_size(self) -> int:
        """1 in float32, otherwise whole chunks; more tokens than any prompt has where the cache cannot be truncated."""
        base, _ = self._ready()
        return base.prefix_block_size(self._chunk_tokens) if base.can_truncate else base.limit_tokens

    @property
    def chunk_tokens(self) -> int:
        """The number of prompt tokens in one forward pass."""
        return self._chunk_tokens

    @property
    def model(self) -> Any:
        """The loaded model, for measurements of it."""
        return self._ready()[1].model

    @property
    def kv_bytes(self) -> int:
        """The bytes of all keys and values in memory."""
        return self._decoder.kv_bytes if self._decoder is not None else 0

    def use(self, wanted: LoadedAs) -> None:
        """Load the parts of ``wanted`` that differ from the loaded ones.

        Raises:
            ModelError: The model folder cannot be loaded.
            CheckpointError: The adapter cannot be read or was made for another base model.
        """
        if wanted == self._loaded:
            return
        self._call += 1
        if self._decoder is not None and isinstance(self._decoder.model, peft.PeftModel):
            take_back_rows(self._decoder.model)
            self._decoder.model.unload()
        self._decoder = self._loaded = None
        if self._base is None or not self._base.is_for(wanted):
            self._base = None  # frees the old weights before the new ones are loaded
            self._base = _Base(wanted, device=self._device)
        self._base.set_marker(wanted.marker or _marker_of(wanted.adapter_dir))
        model = self._base.model
        if wanted.adapter_dir is not None:
            model = load_adapter(model, wanted.adapter_dir)
            put_in_rows(model)
        self._decoder = self._new_decoder(model, chunk_tokens=self._chunk_tokens)
        self._loaded = wanted

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        """Yield the index of each step and its greedy answer, those of one forward pass before those that waited for a batch.

        Raises:
            ModelError: A prompt alone is as long as the model's limit; nothing has been computed then.
            RuntimeError: The engine was used for something else before all answers were taken.
        """
        _, decoder = self._ready()
        call = self._begin_call(decoder)
        decoder.reserve(max((len(step.prompt.ids) + self._max_tokens(step) for step in steps), default=0))
        requests: list[_Request] = []
        for index, step in enumerate(steps):
            self._check_call(call)
            if not self._positions_fit(step):
                self._decode_waiting(decoder, requests)
                yield from self._finished(requests)
                requests = []
                self._check_call(call)
                self._set_positions(decoder, step)
            self._decode_waiting(decoder, requests, before=step)
            requests.append(self._decode(decoder, index, step, drafts=self._spec.drafts, wait=True))
            if requests[-1].answer.error is not None:
                self._decode_waiting(decoder, requests)
                requests[-1] = self._retry(decoder, requests[-1])
            yield from self._finished(requests)
            requests = [request for request in requests if not request.answer.finished]
        self._check_call(call)
        self._decode_waiting(decoder, requests)
        yield from self._finished(requests)

    def answer_with_other_shapes(self, step: PromptStep) -> Completion:
        """Return the answer to ``step`` with half the chunk, no cached prefix and no drafts; it is equal up to rounding.

        Raises:
            ModelError: The prompt alone is as long as the model's limit.
            EngineError: No answer could be computed.
        """
        _, decoder = self._ready()
        self._begin_call(decoder)
        decoder.reset()
        self._set_positions(decoder, step)
        other = self._new_decoder(decoder.model, chunk_tokens=max(1, self._chunk_tokens // 2))
        [(_, outcome)] = self._finished([self._decode(other, 0, step, drafts=False, wait=False)])
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    def _positions_fit(self, step: PromptStep) -> bool:
        """Return whether the RoPE frequencies are those for the length of ``step``."""
        base, _ = self._ready()
        return base.positions_for(len(step.prompt.ids) + self._max_tokens(step)) == base.held_positions

    def _set_positions(self, decoder: GreedyDecoder, step: PromptStep) -> None:
        """Set the RoPE frequencies for the length of ``step``; keys that were rotated by others are dropped."""
        base, _ = self._ready()
        if not self._positions_fit(step):
            decoder.reset()
            base.hold_positions(base.positions_for(len(step.prompt.ids) + self._max_tokens(step)))

    def _begin_call(self, decoder: GreedyDecoder) -> int:
        """Return the number of a new call, and drop the answers that an abandoned call left waiting."""
        decoder.drop_waiting()
        self._call += 1
        return self._call

    def _check_call(self, call: int) -> None:
        """Refuse to continue a call after another one, which dropped its waiting answers and may have changed the model."""
        if call != self._call:
            raise RuntimeError("HfEngine was asked for something else before all answers were taken")

    def _decode(self, decoder: GreedyDecoder, index: int, step: PromptStep, *, drafts: bool, wait: bool) -> _Request:
        """Prefill a prompt and decode its answer, or leave that to a batch if ``wait`` is set."""
        base, _ = self._ready()
        answer = Answer(max_tokens=self._max_tokens(step), end_ids=base.end_ids, reference=step.draft_ids)
        request = _Request(index, step, answer)
        decoder.reserve(len(step.prompt.ids) + answer.max_tokens)
        with _record_out_of_memory([request]), torch.inference_mode():
            drafts = drafts and bool(step.draft_ids)
            decoder.decode(step.prompt.ids, answer, keep_tokens=step.keep_tokens, drafts=drafts, wait=wait)
        return request

    def _decode_waiting(self, decoder: GreedyDecoder, requests: list[_Request], *, before: PromptStep | None = None) -> None:
        """Finish the waiting requests, or only as many as must be finished ``before`` another prompt is prefilled.

        If memory is short for all of them at once, they are decoded again one after the other.
        """
        waiting = [place for place, request in enumerate(requests) if not request.answer.finished]
        with _record_out_of_memory([requests[place] for place in waiting]), torch.inference_mode():
            if before is None:
                decoder.finish()
            else:
                decoder.make_room(before.prompt.ids, keep_tokens=before.keep_tokens)
        for place in waiting:
            if isinstance(requests[place].answer.error, _OutOfMemory):
                requests[place] = self._retry(decoder, requests[place])

    def _retry(self, decoder: GreedyDecoder, request: _Request) -> _Request:
        """Reset the decoder after an error; if memory was short, try the request once more alone."""
        decoder.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if isinstance(request.answer.error, _OutOfMemory):
            request = self._decode(decoder, request.number, request.step, drafts=self._spec.drafts, wait=False)
            if request.answer.error is not None:
                decoder.reset()
        return request

    def _finished(self, requests: Sequence[_Request]) -> Iterator[tuple[int, Completion | EngineError]]:
        base, _ = self._ready()
        for index, _, answer in requests:
            if answer.error is not None:
                yield index, answer.error
            elif answer.finished:
                completion = Completion(
                    text=base.tokenizer.decode(answer.ids),
                    ids=tuple(answer.ids),
                    prefilled_tokens=answer.prefilled_tokens,
                    decoded_tokens=len(answer.ids),
                    seconds=answer.seconds,
                    forwards=answer.forwards,
                    margin=answer.margin,
                    reference_margin=answer.reference_margin,
                )
                yield index, completion

    def _max_tokens(self, step: PromptStep) -> int:
        """Return the largest number of tokens of an answer to ``step``."""
        base, _ = self._ready()
        room = base.limit_tokens - len(step.prompt.ids)
        if room < 1:
            raise ModelError(
                f"a prompt of {len(step.prompt.ids)} tokens (pauses included) does not fit model {base.model_dir}, whose limit is "
                f"{base.limit_tokens} with the answer; ask for shorter contexts, or set pauses.budget to total"
            )
        return min(step.max_new_tokens, room)

    def _new_decoder(self, model: Any, *, chunk_tokens: int) -> GreedyDecoder:
        if self._base is None:
            raise RuntimeError("no base is loaded")
        return GreedyDecoder(
            model,
            self._base.model.config,
            chunk_tokens=chunk_tokens,
            prefix_block_size=self._base.prefix_block_size(chunk_tokens),
            host=self._spec.kv == "host",
            decode_batch=self._spec.answers_together(dtype=self._base.dtype, quantize=self._base.quantize),
        )

    def _ready(self) -> tuple[_Base, GreedyDecoder]:
        if self._base is None or self._decoder is None:
            raise RuntimeError("HfEngine asked before HfEngine.use")
        return self._base, self._decoder


class _Base:
    """The base weights and the marker's embedding row, which can be removed again exactly."""

    def __init__(self, wanted: LoadedAs, *, device: str) -> None:
        self.model_dir = wanted.model_dir
        self.dtype, self.quantize = wanted.dtype, wanted.quantize
        self.tokenizer = ModelTokenizer.load(wanted.model_dir)
        self.end_ids = frozenset(self.tokenizer.end_ids)
        self.limit_tokens = model_limit_tokens(wanted.model_dir)
        self._window = row_limit_tokens(wanted.model_dir)
        self.held_positions = 0
        self.model = load_base(wanted.model_dir, dtype=wanted.dtype, marker=None, device=device, quantize=wanted.quantize)
        use_prefix_attention(self.model)
        self.can_truncate = prefix_cache(self.model.config, host=False) is not None
        if not self.can_truncate:
            log.warning(
                "%s models keep states that cannot be truncated: every prompt is computed whole, and drafts are not verified",
                self.model.config.model_type,
            )
        self._num_rows = num_rows(self.model)
        self._marker: MarkerToken | None = None
        self._overwritten: tuple[int, list[torch.Tensor]] = (0, [])

    def positions_for(self, num_tokens: int) -> int:
        """Return the length whose dynamic RoPE frequencies ``num_tokens`` tokens get; 0 within the window or without dynamic RoPE."""
        return 0 if num_tokens <= self._window else -(-num_tokens // LENGTH_STEP) * LENGTH_STEP

    def hold_positions(self, num_tokens: int) -> None:
        """Set the RoPE frequencies for sequences of ``num_tokens``."""
        hold_positions(self.model, num_tokens=num_tokens)
        self.held_positions = num_tokens

    def prefix_block_size(self, chunk_tokens: int) -> int:
        """Return the block size of prefix caching in this precision."""
        return default_prefix_block_size(dtype=self.dtype, quantize=self.quantize, chunk_tokens=chunk_tokens)

    def is_for(self, wanted: LoadedAs) -> bool:
        """Return whether ``wanted`` needs these weights in this precision."""
        return (self.model_dir, self.dtype, self.quantize) == (wanted.model_dir, wanted.dtype, wanted.quantize)

    @torch.no_grad()
    def set_marker(self, marker: MarkerToken | None) -> None:
        """Replace the embedding row of the last marker by that of ``marker``."""
        if marker == self._marker:
            return
        if num_rows(self.model) > self._num_rows:
            self.model.resize_token_embeddings(self._num_rows, mean_resizing=False)
        place, rows = self._overwritten
        for table, row in zip(vocabulary_tables(self.model), rows, strict=bool(rows)):
            table[place] = row
        self._overwritten = (0, [])
        if marker is not None:
            if marker.added and marker.token_id < self._num_rows:
                self._overwritten = (marker.token_id, [table[marker.token_id].clone() for table in vocabulary_tables(self.model)])
            add_marker_row(self.model, marker)
        self._marker = marker
