"""A transformers model in this process: base weights, the marker's row, an adapter. Knows no Ray and no task.

The base is loaded once; a marker's row and an adapter are put in and taken out without touching its other weights.
Answers are computed by ``engines.greedy`` along a path of keys and values that is kept from prompt to prompt.
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
from pause_ray.inference.kv_cache import path_cache, use_path_attention
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
"""Beyond its window a model of dynamic frequencies gets those for the next multiple, so that prompts of one asked length share them."""
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def _own_device() -> str:
    """Where a model goes that no one gave a place."""
    if not torch.cuda.is_available():
        return "cpu"
    return SPREAD if torch.cuda.device_count() > 1 else "cuda"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was short; torch has a class of its own for its GPU allocator only, others say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def _own_marker(adapter_dir: Path | None) -> MarkerToken | None:
    """The marker whose row an adapter was trained with and needs, pauses in the prompt or not; plain PEFT's folders name none."""
    return Checkpoint.open(adapter_dir).marker if adapter_dir is not None and is_complete(adapter_dir) else None


class _OutOfMemory(EngineError):
    """The device, or the machine, has too little memory for a prompt."""


class _Asked(NamedTuple):
    """A prompt and its answer, complete or not."""

    place: int
    step: PromptStep
    answer: Answer


@contextmanager
def _memory_errors_kept(asked: Sequence[_Asked]) -> Iterator[None]:
    """Where memory is short inside, that is the answer to what is not settled; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        for _, step, answer in asked:
            if not answer.settled:
                answer.settled = True
                answer.error = _OutOfMemory(f"out of memory on a prompt of {len(step.prompt.ids)} tokens")


class HfEngine:
    """Greedy answers of a transformers model.

    Args:
        spec: How answers are computed, which does not change them.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None takes the GPUs that this process sees, a model that needs several spread over
            them layer by layer, or the CPU where there is none.
        threads: Threads of CPU computation in this process; None leaves them as they are.
    """

    name = "hf"

    def __init__(self, spec: HfEngineSpec | None = None, *, device: str | None = None, threads: int | None = None) -> None:
        self._spec = spec or HfEngineSpec()
        self._device = device or _own_device()
        if threads is not None:
            torch.set_num_threads(threads)
        self._chunk_tokens = self._spec.chunk_tokens or default_chunk_tokens(on_gpu=self._device != "cpu")
        self._base: _Base | None = None
        self._reader: GreedyDecoder | None = None
        self._loaded: LoadedAs | None = None
        self._turn = 0

    @property
    def prefix_block_size(self) -> int:
        """1 in float32; otherwise whole chunks, or, where nothing can be kept, more tokens than a prompt has."""
        base, _ = self._ready()
        return base.prefix_block_size(self._chunk_tokens) if base.can_rewind else base.limit_tokens

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens in one forward pass."""
        return self._chunk_tokens

    @property
    def model(self) -> Any:
        """The loaded model, for measurements of it."""
        return self._ready()[1].model

    @property
    def kv_bytes(self) -> int:
        """Memory of the keys and values that are held now."""
        return self._reader.kv_bytes if self._reader is not None else 0

    def use(self, wanted: LoadedAs) -> None:
        """Load what differs from what is loaded: the base rarely, the adapter often.

        Raises:
            ModelError: the model folder cannot be loaded.
            CheckpointError: the adapter cannot be read or was made for another base model.
        """
        if wanted == self._loaded:
            return
        self._turn += 1
        if self._reader is not None and isinstance(self._reader.model, peft.PeftModel):
            take_back_rows(self._reader.model)
            self._reader.model.unload()
        self._reader = self._loaded = None
        if self._base is None or not self._base.is_for(wanted):
            self._base = None  # frees the old weights before the new ones come
            self._base = _Base(wanted, device=self._device)
        self._base.place(wanted.marker or _own_marker(wanted.adapter_dir))
        model = self._base.model
        if wanted.adapter_dir is not None:
            model = load_adapter(model, wanted.adapter_dir)
            put_in_rows(model)
        self._reader = self._reader_of(model, chunk_tokens=self._chunk_tokens)
        self._loaded = wanted

    def answer(self, steps: Sequence[PromptStep]) -> Iterator[tuple[int, Completion | EngineError]]:
        """Index of a step and its greedy answer, those that take one forward pass before those that waited; see ``engine.Engine``.

        Raises:
            ModelError: a prompt alone is as long as the model's limit; nothing has been computed then.
            RuntimeError: the engine was asked for something else before all answers were taken.
        """
        _, reader = self._ready()
        turn = self._begin_turn(reader)
        reader.reserve(max((len(step.prompt.ids) + self._most(step) for step in steps), default=0))
        asked: list[_Asked] = []
        for index, step in enumerate(steps):
            self._check_turn(turn)
            if not self._positions_fit(step):
                self._go_on(reader, asked)
                yield from self._settled(asked)
                asked = []
                self._check_turn(turn)
                self._set_positions(reader, step)
            self._go_on(reader, asked, before=step)
            asked.append(self._ask(reader, index, step, drafts=self._spec.drafts, wait=True))
            if asked[-1].answer.error is not None:
                self._go_on(reader, asked)
                asked[-1] = self._recovered(reader, asked[-1])
            yield from self._settled(asked)
            asked = [waiting for waiting in asked if not waiting.answer.settled]
        self._check_turn(turn)
        self._go_on(reader, asked)
        yield from self._settled(asked)

    def answer_with_other_shapes(self, step: PromptStep) -> Completion:
        """The answer to ``step`` in other shapes: half the chunk, nothing kept, no drafts. Equal up to rounding.

        Raises:
            ModelError: the prompt alone is as long as the model's limit.
            EngineError: no answer could be computed.
        """
        _, reader = self._ready()
        self._begin_turn(reader)
        reader.forget()
        self._set_positions(reader, step)
        other = self._reader_of(reader.model, chunk_tokens=max(1, self._chunk_tokens // 2))
        [(_, outcome)] = self._settled([self._ask(other, 0, step, drafts=False, wait=False)])
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    def _positions_fit(self, step: PromptStep) -> bool:
        """Whether the frequencies are those for the length of ``step``."""
        base, _ = self._ready()
        return base.positions_for(len(step.prompt.ids) + self._most(step)) == base.held_positions

    def _set_positions(self, reader: GreedyDecoder, step: PromptStep) -> None:
        """Give ``step`` the frequencies for its length; keys that others have turned are of no use to it."""
        base, _ = self._ready()
        if not self._positions_fit(step):
            reader.forget()
            base.hold_positions(base.positions_for(len(step.prompt.ids) + self._most(step)))

    def _begin_turn(self, reader: GreedyDecoder) -> int:
        """The number of a new call; answers that wait are of a call whose caller took no more of them."""
        reader.give_up()
        self._turn += 1
        return self._turn

    def _check_turn(self, turn: int) -> None:
        """Another call has taken the answers that wait, and perhaps exchanged the model: going on would lose some, or be wrong."""
        if turn != self._turn:
            raise RuntimeError("HfEngine was asked for something else before all answers were taken")

    def _ask(self, reader: GreedyDecoder, index: int, step: PromptStep, *, drafts: bool, wait: bool) -> _Asked:
        """Read a prompt and begin its answer, which may ``wait`` for others to go on with."""
        base, _ = self._ready()
        answer = Answer(most=self._most(step), end_ids=base.end_ids, reference=step.draft_ids)
        asked = _Asked(index, step, answer)
        reader.reserve(len(step.prompt.ids) + answer.most)
        with _memory_errors_kept([asked]), torch.inference_mode():
            drafts = drafts and bool(step.draft_ids)
            reader.answer(step.prompt.ids, answer, keep_tokens=step.keep_tokens, drafts=drafts, wait=wait)
        return asked

    def _go_on(self, reader: GreedyDecoder, asked: list[_Asked], *, before: PromptStep | None = None) -> None:
        """Settle the answers that wait, or as many as must be settled ``before`` another prompt is read.

        Where memory is short for all of them at once they are asked anew, one after the other.
        """
        waiting = [place for place, one in enumerate(asked) if not one.answer.settled]
        with _memory_errors_kept([asked[place] for place in waiting]), torch.inference_mode():
            if before is None:
                reader.finish()
            else:
                reader.make_way(before.prompt.ids, keep_tokens=before.keep_tokens)
        for place in waiting:
            if isinstance(asked[place].answer.error, _OutOfMemory):
                asked[place] = self._recovered(reader, asked[place])

    def _recovered(self, reader: GreedyDecoder, asked: _Asked) -> _Asked:
        """After an error: nothing is kept, and where memory was short, one more try with room for this prompt alone."""
        short = isinstance(asked.answer.error, _OutOfMemory)
        reader.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if short:
            asked = self._ask(reader, asked.place, asked.step, drafts=self._spec.drafts, wait=False)
            if asked.answer.error is not None:
                reader.forget()
        return asked

    def _settled(self, asked: Sequence[_Asked]) -> Iterator[tuple[int, Completion | EngineError]]:
        base, _ = self._ready()
        for index, _, answer in asked:
            if answer.error is not None:
                yield index, answer.error
            elif answer.settled:
                yield (
                    index,
                    Completion(
                        text=base.tokenizer.decode(answer.ids),
                        ids=tuple(answer.ids),
                        prefilled_tokens=answer.prefilled_tokens,
                        decoded_tokens=len(answer.ids),
                        seconds=answer.seconds,
                        forwards=answer.forwards,
                        margin=answer.margin,
                        reference_margin=answer.reference_margin,
                    ),
                )

    def _most(self, step: PromptStep) -> int:
        """Longest answer to ``step``."""
        base, _ = self._ready()
        room = base.limit_tokens - len(step.prompt.ids)
        if room < 1:
            raise ModelError(
                f"a prompt of {len(step.prompt.ids)} tokens (pauses included) does not fit model {base.model_dir}, whose limit is "
                f"{base.limit_tokens} with the answer; ask for shorter contexts, or set pauses.budget to total"
            )
        return min(step.max_new_tokens, room)

    def _reader_of(self, model: Any, *, chunk_tokens: int) -> GreedyDecoder:
        if self._base is None:
            raise RuntimeError("no base is loaded")
        return GreedyDecoder(
            model,
            self._base.model.config,
            chunk_tokens=chunk_tokens,
            prefix_block_size=self._base.prefix_block_size(chunk_tokens),
            host=self._spec.kv == "host",
            decode_batch=self._base.answers_together(self._spec),
        )

    def _ready(self) -> tuple[_Base, GreedyDecoder]:
        if self._base is None or self._reader is None:
            raise RuntimeError("HfEngine asked before HfEngine.use")
        return self._base, self._reader


class _Base:
    """Base weights and the marker's row, which can be taken out again exactly."""

    def __init__(self, wanted: LoadedAs, *, device: str) -> None:
        self.model_dir = wanted.model_dir
        self._precision = (wanted.dtype, wanted.quantize)
        self.tokenizer = ModelTokenizer.load(wanted.model_dir)
        self.end_ids = frozenset(self.tokenizer.end_ids)
        self.limit_tokens = model_limit_tokens(wanted.model_dir)
        self._window = row_limit_tokens(wanted.model_dir)
        self.held_positions = 0
        self.model = load_base(wanted.model_dir, dtype=wanted.dtype, marker=None, device=device, quantize=wanted.quantize)
        use_path_attention(self.model)
        self.can_rewind = path_cache(self.model.config, host=False) is not None
        if not self.can_rewind:
            log.warning(
                "%s models keep states that cannot be rewound: every prompt is computed whole, and drafts are not verified",
                self.model.config.model_type,
            )
        self._num_rows = num_rows(self.model)
        self._marker: MarkerToken | None = None
        self._overwritten: tuple[int, list[torch.Tensor]] = (0, [])

    def positions_for(self, num_tokens: int) -> int:
        """The length whose dynamic frequencies a sequence of ``num_tokens`` gets; 0 within the window, and where they are not dynamic."""
        return 0 if num_tokens <= self._window else -(-num_tokens // LENGTH_STEP) * LENGTH_STEP

    def hold_positions(self, num_tokens: int) -> None:
        """Turn positions by the frequencies for sequences of ``num_tokens``."""
        hold_positions(self.model, num_tokens=num_tokens)
        self.held_positions = num_tokens

    def prefix_block_size(self, chunk_tokens: int) -> int:
        """Return the block size of prefix caching in this precision."""
        dtype, quantize = self._precision
        return default_prefix_block_size(dtype=dtype, quantize=quantize, chunk_tokens=chunk_tokens)

    def answers_together(self, spec: HfEngineSpec) -> int:
        """How many answers go on in one forward pass, in this precision."""
        dtype, quantize = self._precision
        return spec.answers_together(dtype=dtype, quantize=quantize)

    def is_for(self, wanted: LoadedAs) -> bool:
        """Whether ``wanted`` stands on these weights in this precision."""
        return (self.model_dir, *self._precision) == (wanted.model_dir, wanted.dtype, wanted.quantize)

    @torch.no_grad()
    def place(self, marker: MarkerToken | None) -> None:
        """Make the vocabulary that of ``marker``: the last one's row goes, the new one's comes."""
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
