"""A transformers model in this process: base weights, the marker's row, an adapter. Knows no Ray and no task.

The base is loaded once; a marker's row and an adapter are put in and taken out without touching its other weights.
Answers are computed by ``engines.greedy`` along a path of keys and values that is kept from prompt to prompt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from safetensors import SafetensorError

from pause_ray.checkpoint import Checkpoint
from pause_ray.engines.attention import use_path_attention
from pause_ray.engines.engine import Completion, EngineError, HfEngineSpec, LoadedAs, Step, default_chunk_tokens, grain_of
from pause_ray.engines.greedy import Answer, GreedyReader
from pause_ray.engines.kv import path_cache
from pause_ray.engines.model_source import model_limit_tokens
from pause_ray.errors import CheckpointError, ModelError
from pause_ray.storage import is_complete
from pause_ray.text.tokens import MarkerToken, ModelTokenizer

log = logging.getLogger("pause_ray")

SPREAD = "auto"
"""Device of a model whose layers are spread over all GPUs that the process sees."""

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def load_base(
    model_dir: Path, *, dtype: str, marker: MarkerToken | None, device: str, quantize: str | None = None
) -> transformers.PreTrainedModel:
    """The base model in eval mode with ``sdpa`` attention, and the row of an added marker at its initial value.

    Args:
        model_dir: Folder with config.json and *.safetensors.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        marker: Marker token that needs a row, or None.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for layers spread over all GPUs.
        quantize: ``nf4`` for 4-bit linear layers that compute in ``dtype``, or None.

    Raises:
        ModelError: the folder holds no causal language model that transformers can load without remote code.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **_placement(device, dtype=dtype, quantize=quantize),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"model folder {model_dir}: transformers cannot load it ({reason})") from error
    if device != SPREAD and quantize is None:
        model = model.to(device)
    _keep_plain_quantization(model)
    if marker is not None:
        add_marker_row(model, marker)
    return model.eval()


def _placement(device: str, *, dtype: str, quantize: str | None) -> dict[str, Any]:
    """Arguments of loading; plain weights for one device are moved there afterwards, which is fastest."""
    if quantize is not None:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
        return {"quantization_config": quantization, "device_map": device if device == SPREAD else {"": device}}
    return {"device_map": SPREAD} if device == SPREAD else {}


def _keep_plain_quantization(model: transformers.PreTrainedModel) -> None:
    """No special form of 4-bit weights for some processors.

    bitsandbytes 0.50 packs them at the first forward pass where a CPU knows AVX512-BF16, rounds their scales, and cannot go on
    after ``state_dict()``, which PEFT calls when an adapter comes: the base then answers differently.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _own_device() -> str:
    """Where a model goes that no one gave a place."""
    if not torch.cuda.is_available():
        return "cpu"
    return SPREAD if torch.cuda.device_count() > 1 else "cuda"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was short; torch has a class of its own for its GPU allocator only, others say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


@torch.no_grad()
def add_marker_row(model: transformers.PreTrainedModel, marker: MarkerToken) -> None:
    """Give ``marker`` a row in the input and output embeddings; a reserved marker's rows stay as they are.

    The tables grow only where ``token_id`` lies beyond them (many models have spare rows). An added marker starts as
    the mean of the rows of its own text in ordinary tokens, in both tables, so the result has no chance in it.
    """
    if marker.token_id >= _num_rows(model):
        model.resize_token_embeddings(marker.token_id + 1, mean_resizing=False)
    if marker.added:
        sources = list(marker.initial_ids)
        for table in _vocabulary_tables(model):
            table[marker.token_id] = table[sources].float().mean(0).to(table.dtype)


def load_adapter(base: transformers.PreTrainedModel, adapter_dir: Path) -> peft.PeftModel:
    """``base`` with the adapter of a checkpoint folder on it; ``unload()`` of the result gives ``base`` back.

    Raises:
        CheckpointError: no adapter there, one of another base model, or one that overwrites base weights.
    """
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter_dir))
        weights = peft.load_peft_weights(str(adapter_dir), device=str(base.device))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"adapter {adapter_dir}: cannot be read ({reason}); train it again") from error
    whole_layers = [name for name in weights if name.endswith(".weight") and ".lora_" not in name]
    if whole_layers:
        raise CheckpointError(
            f"adapter {adapter_dir}: holds whole layers of a model ({whole_layers[0]}); save it with save_embedding_layers=False"
        )
    config.inference_mode = True
    misfit = f"adapter {adapter_dir}: was made for another base model than {base.name_or_path}"
    try:
        model = peft.PeftModel(base, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise CheckpointError(f"{misfit} ({' '.join(str(error).split())})") from error
    try:
        outcome = peft.set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError) as error:
        model.unload()
        raise CheckpointError(f"{misfit} ({str(error).splitlines()[-1].strip()})") from error
    strangers = [*outcome.unexpected_keys, *_unfilled(model, outcome.missing_keys)]
    if strangers:
        model.unload()
        raise CheckpointError(f"{misfit}: {strangers[0]} has no counterpart")
    return model.eval()


def _own_marker(adapter_dir: Path | None) -> MarkerToken | None:
    """The marker whose row an adapter was trained with and needs, pauses in the prompt or not; plain PEFT's folders name none."""
    return Checkpoint.open(adapter_dir).marker if adapter_dir is not None and is_complete(adapter_dir) else None


def _unfilled(model: peft.PeftModel, missing: Sequence[str]) -> list[str]:
    """Adapter tensors that the file did not fill; those that are tied to a filled one are."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".default" in name}
    filled = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
    return [name for name in missing if name in state and state[name].data_ptr() not in filled]


@torch.no_grad()
def _put_in_rows(model: peft.PeftModel) -> None:
    """Write an adapter's trained vocabulary rows into the tables, where PEFT would copy a whole table in every forward pass."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            for name in layer.active_adapters:
                weight = layer.get_base_layer().weight
                weight[layer.token_indices[name]] = layer.trainable_tokens_delta[name].to(weight)
                layer.merged_adapters.append(name)


@torch.no_grad()
def _take_back_rows(model: peft.PeftModel) -> None:
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer) and layer.merged:
            layer.unmerge()


class _OutOfMemory(EngineError):
    """The device, or the machine, has too little memory for a prompt."""


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
        self._reader: GreedyReader | None = None
        self._loaded: LoadedAs | None = None

    @property
    def grain_tokens(self) -> int:
        """1 in float32; otherwise whole chunks, or, where nothing can be kept, more tokens than a prompt has."""
        base, _ = self._ready()
        return base.grain_tokens(self._chunk_tokens) if base.can_rewind else base.limit_tokens

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
        if self._reader is not None and isinstance(self._reader.model, peft.PeftModel):
            _take_back_rows(self._reader.model)
            self._reader.model.unload()
        self._reader = self._loaded = None
        if self._base is None or not self._base.is_for(wanted):
            self._base = None  # frees the old weights before the new ones come
            self._base = _Base(wanted, device=self._device)
        self._base.place(wanted.marker or _own_marker(wanted.adapter_dir))
        model = self._base.model
        if wanted.adapter_dir is not None:
            model = load_adapter(model, wanted.adapter_dir)
            _put_in_rows(model)
        self._reader = self._reader_of(model, chunk_tokens=self._chunk_tokens)
        self._loaded = wanted

    def answer(self, steps: Sequence[Step]) -> Iterator[tuple[int, Completion | EngineError]]:
        """Index of a step and its greedy answer, in the order of ``steps``; see ``engine.Engine``.

        Raises:
            ModelError: a prompt alone is as long as the model's limit; nothing has been computed then.
        """
        _, reader = self._ready()
        reader.reserve(max((len(step.prompt.ids) + self._most(step) for step in steps), default=0))
        for index, step in enumerate(steps):
            yield index, self._outcome(reader, step, drafts=self._spec.drafts and bool(step.draft_ids))

    def answer_otherwise(self, step: Step) -> Completion:
        """The answer to ``step`` in other shapes: half the chunk, nothing kept, no drafts. Equal up to rounding.

        Raises:
            ModelError: the prompt alone is as long as the model's limit.
            EngineError: no answer could be computed.
        """
        _, reader = self._ready()
        reader.forget()
        other = self._reader_of(reader.model, chunk_tokens=max(1, self._chunk_tokens // 2))
        outcome = self._outcome(other, step, drafts=False)
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    def _outcome(self, reader: GreedyReader, step: Step, *, drafts: bool) -> Completion | EngineError:
        """The answer, or why there is none; where the room for the longest prompt of the walk is too much, with room for this one."""
        needed = len(step.prompt.ids) + self._most(step)
        reader.reserve(needed)
        outcome, room = self._attempt(reader, step, drafts=drafts), reader.reserved_tokens
        if isinstance(outcome, Completion):
            return outcome
        reader.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if isinstance(outcome, _OutOfMemory) and room > needed:
            return self._outcome(reader, step, drafts=drafts)
        return outcome

    def _attempt(self, reader: GreedyReader, step: Step, *, drafts: bool) -> Completion | EngineError:
        base, _ = self._ready()
        start = time.perf_counter()
        answer = Answer(most=self._most(step), end_ids=base.end_ids, reference=step.draft_ids)
        try:
            with torch.inference_mode():
                reader.answer(step.prompt.ids, answer, keep_tokens=step.keep_tokens, drafts=drafts)
        except EngineError as error:
            return error.with_traceback(None)  # which holds the tensors of the failed step
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return _OutOfMemory(f"out of memory on a prompt of {len(step.prompt.ids)} tokens")
        return Completion(
            text=base.tokenizer.decode(answer.ids),
            ids=tuple(answer.ids),
            prefilled_tokens=answer.prefilled_tokens,
            decoded_tokens=len(answer.ids),
            seconds=time.perf_counter() - start,
            forwards=answer.forwards,
            margin=answer.margin,
            reference_margin=answer.reference_margin,
        )

    def _most(self, step: Step) -> int:
        """Longest answer to ``step``."""
        base, _ = self._ready()
        room = base.limit_tokens - len(step.prompt.ids)
        if room < 1:
            raise ModelError(
                f"a prompt of {len(step.prompt.ids)} tokens (pauses included) does not fit model {base.model_dir}, whose limit is "
                f"{base.limit_tokens} with the answer; ask for shorter contexts, or set pauses.budget to total"
            )
        return min(step.max_new_tokens, room)

    def _reader_of(self, model: Any, *, chunk_tokens: int) -> GreedyReader:
        if self._base is None:
            raise RuntimeError("no base is loaded")
        grain, host = self._base.grain_tokens(chunk_tokens), self._spec.kv == "host"
        return GreedyReader(model, self._base.model.config, chunk_tokens=chunk_tokens, grain_tokens=grain, host=host)

    def _ready(self) -> tuple[_Base, GreedyReader]:
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
        self.model = load_base(wanted.model_dir, dtype=wanted.dtype, marker=None, device=device, quantize=wanted.quantize)
        use_path_attention(self.model)
        self.can_rewind = path_cache(self.model.config, host=False) is not None
        if not self.can_rewind:
            log.warning(
                "%s models keep states that cannot be rewound: every prompt is computed whole, and drafts are not verified",
                self.model.config.model_type,
            )
        self._num_rows = _num_rows(self.model)
        self._marker: MarkerToken | None = None
        self._overwritten: tuple[int, list[torch.Tensor]] = (0, [])

    def grain_tokens(self, chunk_tokens: int) -> int:
        """What can be kept in this precision."""
        dtype, quantize = self._precision
        return grain_of(dtype=dtype, quantize=quantize, chunk_tokens=chunk_tokens)

    def is_for(self, wanted: LoadedAs) -> bool:
        """Whether ``wanted`` stands on these weights in this precision."""
        return (self.model_dir, *self._precision) == (wanted.model_dir, wanted.dtype, wanted.quantize)

    @torch.no_grad()
    def place(self, marker: MarkerToken | None) -> None:
        """Make the vocabulary that of ``marker``: the last one's row goes, the new one's comes."""
        if marker == self._marker:
            return
        if _num_rows(self.model) > self._num_rows:
            self.model.resize_token_embeddings(self._num_rows, mean_resizing=False)
        place, rows = self._overwritten
        for table, row in zip(_vocabulary_tables(self.model), rows, strict=bool(rows)):
            table[place] = row
        self._overwritten = (0, [])
        if marker is not None:
            if marker.added and marker.token_id < self._num_rows:
                self._overwritten = (marker.token_id, [table[marker.token_id].clone() for table in _vocabulary_tables(self.model)])
            add_marker_row(self.model, marker)
        self._marker = marker


def _num_rows(model: transformers.PreTrainedModel) -> int:
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def _vocabulary_tables(model: transformers.PreTrainedModel) -> list[torch.Tensor]:
    """The tensors with one row per vocabulary entry: input embeddings, and the output layer's where it is not tied."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("weight", "bias")]
    return list({tensor.data_ptr(): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}.values())
