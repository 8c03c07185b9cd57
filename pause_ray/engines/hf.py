"""A transformers model in this process: base weights, the marker's row, an adapter. Knows no Ray and no task.

The base is loaded once; a marker's row and an adapter are put in and taken out without touching its other weights.
One key-value cache is kept, and the next prompt goes on from the whole chunks that it shares with the last one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers.cache_utils import DynamicLayer

from pause_ray.checkpoint import Checkpoint
from pause_ray.engines.engine import Completion, EngineError, LoadedAs
from pause_ray.engines.model_source import model_limit_tokens
from pause_ray.engines.prefix import reusable_tokens
from pause_ray.errors import CheckpointError, ModelError
from pause_ray.storage import is_complete
from pause_ray.text.tokens import MarkerToken, ModelTokenizer

Ids = NDArray[np.int32]
CHUNK_TOKENS = 256
"""Default length of a prefill step, and the grain of reuse: a prompt recomputes 128 shared tokens on average."""


def load_base(model_dir: Path, *, dtype: str, marker: MarkerToken | None, device: str) -> transformers.PreTrainedModel:
    """The base model in eval mode with ``sdpa`` attention, and the row of an added marker at its initial value.

    Args:
        model_dir: Folder with config.json and *.safetensors.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        marker: Marker token that needs a row, or None.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

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
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"model folder {model_dir}: transformers cannot load it ({reason})") from error
    model = model.to(device)
    if marker is not None:
        add_marker_row(model, marker)
    return model.eval()


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


class HfEngine:
    """Greedy answers of a transformers model.

    Args:
        device: ``cpu`` or ``cuda``; None takes a GPU where there is one.
        threads: Threads of CPU computation in this process; None leaves them as they are.
        chunk_tokens: Prompt tokens in one forward pass.
        reuse: Go on from what the last prompt shares with the next. False computes every prompt from its first token:
            the reference, which gives the same answers.
    """

    name = "hf"

    def __init__(
        self, *, device: str | None = None, threads: int | None = None, chunk_tokens: int = CHUNK_TOKENS, reuse: bool = True
    ) -> None:
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        self._chunk_tokens = chunk_tokens
        self._reuse = reuse
        self._base: _Base | None = None
        self._reader: _Reader | None = None
        self._loaded: LoadedAs | None = None

    def use(self, wanted: LoadedAs) -> None:
        """Load what differs from what is loaded: the base rarely, the adapter often.

        Raises:
            ModelError: the model folder cannot be loaded.
            CheckpointError: the adapter cannot be read or was made for another base model.
        """
        if wanted == self._loaded:
            return
        if self._reader is not None and isinstance(self._reader.model, peft.PeftModel):
            self._reader.model.unload()
        self._reader = self._loaded = None
        if self._base is None or (self._base.model_dir, self._base.dtype) != (wanted.model_dir, wanted.dtype):
            self._base = None  # frees the old weights before the new ones come
            self._base = _Base(wanted.model_dir, wanted.dtype, device=self._device)
        self._base.place(wanted.marker or _own_marker(wanted.adapter_dir))
        model = load_adapter(self._base.model, wanted.adapter_dir) if wanted.adapter_dir else self._base.model
        self._reader = _Reader(model, self._base.model.config, chunk_tokens=self._chunk_tokens, reuse=self._reuse)
        self._loaded = wanted

    @torch.inference_mode()
    def complete(self, prompt_ids: Sequence[int], *, max_new_tokens: int) -> Completion:
        """Greedy continuation of ``prompt_ids`` up to an end token, ``max_new_tokens`` or the model's limit.

        Raises:
            ModelError: the prompt alone is as long as the model's limit.
            EngineError: no answer could be computed: out of memory, or logits that are not numbers.
        """
        if self._base is None or self._reader is None:
            raise RuntimeError("HfEngine.complete before HfEngine.use")
        prompt = np.asarray(prompt_ids, dtype=np.int32)
        limit = self._base.limit_tokens
        if len(prompt) >= limit:
            raise ModelError(
                f"a prompt of {len(prompt)} tokens (pauses included) does not fit model {self._base.model_dir}, whose limit is "
                f"{limit} with the answer; ask for shorter contexts, or set pauses.budget to total"
            )
        start = time.perf_counter()
        try:
            ids, prefilled = self._reader.answer(prompt, most=min(max_new_tokens, limit - len(prompt)), end_ids=self._base.end_ids)
        except torch.OutOfMemoryError as error:
            self._reader.forget()
            raise EngineError(f"out of memory on a prompt of {len(prompt)} tokens") from error
        except EngineError:
            self._reader.forget()
            raise
        return Completion(
            text=self._base.tokenizer.decode(ids),
            ids=tuple(ids),
            prefilled_tokens=prefilled,
            decoded_tokens=len(ids),
            seconds=time.perf_counter() - start,
        )


class _Reader:
    """A model with the keys and values of the last prompt's whole chunks."""

    def __init__(self, model: Any, config: transformers.PreTrainedConfig, *, chunk_tokens: int, reuse: bool) -> None:
        self.model = model
        self._config = config
        self._chunk_tokens = chunk_tokens
        self._reuse = reuse
        self.forget()

    def forget(self) -> None:
        """Drop the keys and values."""
        self._cache = transformers.DynamicCache(config=self._config)
        self._computed: Ids = np.empty(0, dtype=np.int32)

    def answer(self, prompt: Ids, *, most: int, end_ids: frozenset[int]) -> tuple[list[int], int]:
        """Up to ``most`` greedy ids without the end token, and how many prompt tokens went through the model."""
        reused = reusable_tokens(self._computed, prompt, chunk_tokens=self._chunk_tokens)
        self._go_back_to(reused)
        for begin in range(reused, len(prompt), self._chunk_tokens):
            logits = self._forward(torch.as_tensor(prompt[begin : begin + self._chunk_tokens], dtype=torch.long))
        ids: list[int] = []
        for _ in range(most):
            if logits.isnan().any():
                raise EngineError("the model's logits are not numbers; score in float32 or bfloat16")
            token = logits.argmax()
            if int(token) in end_ids:
                break
            ids.append(int(token))
            if len(ids) < most:
                logits = self._forward(token.view(1))
        # What came after the last whole chunk was computed in shapes that no other prompt would have.
        self._computed = prompt[: len(prompt) - len(prompt) % self._chunk_tokens]
        self._go_back_to(len(self._computed) if self._reuse else 0)
        return ids, len(prompt) - reused

    def _go_back_to(self, num_tokens: int) -> None:
        """Keep the keys and values of the first ``num_tokens`` tokens only."""
        # Sliding windows and recurrent states have dropped what going back would need.
        if num_tokens == 0 or any(type(layer) is not DynamicLayer for layer in self._cache.layers):
            self.forget()
        else:
            self._cache.crop(num_tokens - self._cache.get_seq_length())
            self._computed = self._computed[:num_tokens]

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [vocabulary] after ``ids`` [tokens], which go on from the cache."""
        output = self.model(input_ids=ids[None].to(self.model.device), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        last: torch.Tensor = output.logits[0, -1]
        return last


class _Base:
    """Base weights and the marker's row, which can be taken out again exactly."""

    def __init__(self, model_dir: Path, dtype: str, *, device: str) -> None:
        self.model_dir = model_dir
        self.dtype = dtype
        self.tokenizer = ModelTokenizer.load(model_dir)
        self.end_ids = frozenset(self.tokenizer.end_ids)
        self.limit_tokens = model_limit_tokens(model_dir)
        self.model = load_base(model_dir, dtype=dtype, marker=None, device=device)
        self._num_rows = _num_rows(self.model)
        self._marker: MarkerToken | None = None
        self._overwritten: tuple[int, list[torch.Tensor]] = (0, [])

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
