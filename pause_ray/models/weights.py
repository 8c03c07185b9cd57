"""Weights in this process: the base model, the marker's row, an adapter, put in and taken out. Knows no prompt and no Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import peft
import safetensors
import torch
import transformers
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from safetensors import SafetensorError
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers import AutoHfQuantizer

from pause_ray.core.errors import CheckpointError, ModelError
from pause_ray.text.tokenizer import MarkerToken

SPREAD = "auto"
"""Device name of a model whose layers are spread over all GPUs that the process sees."""
INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


def load_base(
    model_dir: Path, *, dtype: str, marker: MarkerToken | None, device: str, quantize: str | None = None
) -> transformers.PreTrainedModel:
    """Load the base model in eval mode, with the row of an added marker at its initial value; attention is ``sdpa`` where it exists.

    Args:
        model_dir: Folder with config.json and *.safetensors.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        marker: Marker token that needs a row, or None.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for layers spread over all GPUs.
        quantize: ``nf4`` for linear layers in 4 bits with double quantisation, ``int8`` for 8 bits, or None. They compute in ``dtype``.

    Raises:
        ModelError: the folder holds no causal language model that transformers can load without remote code.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **_placement(device, dtype=dtype, quantize=quantize),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"model folder {model_dir}: transformers cannot load it ({_reason(error)})") from error
    if device != SPREAD and quantize is None:
        model = model.to(device)
    hold_positions(model)
    _keep_plain_quantization(model)
    if marker is not None:
        add_marker_row(model, marker)
    return model.eval()


def _reason(error: Exception) -> str:
    """Return an error as one line; if transformers proposes to run the model's own code, the line says that this is never done."""
    text = " ".join(str(error).split())
    return "it has no code for this kind of model, and a model's own is never run here" if "trust_remote_code" in text else text


def _placement(device: str, *, dtype: str, quantize: str | None) -> dict[str, Any]:
    """Return the arguments of loading; plain weights for one device are moved there afterwards, which is fastest."""
    if quantize is not None:
        quantization = _quantization(quantize, dtype=dtype)
        return {"quantization_config": quantization, "device_map": device if device == SPREAD else {"": device}}
    return {"device_map": SPREAD} if device == SPREAD else {}


def _quantization(quantize: str, *, dtype: str) -> transformers.BitsAndBytesConfig:
    """Return the settings of bitsandbytes. 4-bit weights lie in tensors of ``dtype``, which ZeRO can split like any others."""
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        bnb_4bit_quant_storage=getattr(torch, dtype),
    )


def _keep_plain_quantization(model: transformers.PreTrainedModel) -> None:
    """Prevent the special form of 4-bit weights for some processors.

    bitsandbytes 0.50 packs them at the first forward pass where a CPU knows AVX512-BF16, rounds their scales, and cannot go on
    after ``state_dict()``, which PEFT calls when an adapter comes: the base then answers differently.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def empty_base(model_dir: Path, *, dtype: str, marker: MarkerToken | None, quantize: str | None = None) -> transformers.PreTrainedModel:
    """Build the base model without weights: parameters on the meta device, room for the marker's row, buffers in place.

    Raises:
        ModelError: no configuration of a causal language model that transformers knows.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
            model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model folder {model_dir}: transformers cannot build it ({_reason(error)})") from error
    hold_positions(model)
    model.name_or_path = str(model_dir)  # an adapter's configuration says what it was made for
    model.tie_weights()
    if quantize is not None:
        quantizer = AutoHfQuantizer.from_config(_quantization(quantize, dtype=dtype))
        quantizer.preprocess_model(model=model, device_map=None)
        quantizer.postprocess_model(model)
        _keep_plain_quantization(model)
    if marker is not None and marker.token_id >= num_rows(model):
        model.resize_token_embeddings(marker.token_id + 1, mean_resizing=False)
    return model


def hold_positions(model: transformers.PreTrainedModel, *, num_tokens: int = 0) -> None:
    """Fix the frequencies of dynamic NTK for sequences of ``num_tokens``; models with other positions are not changed.

    transformers takes the last position of every forward pass for the length: keys that were kept would have been turned by other
    frequencies than the queries that meet them, and an answer would depend on how its prompt was cut.
    """
    for layer in model.modules():
        config = getattr(layer, "config", None)
        if hasattr(layer, "original_inv_freq") and (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
            layer.rope_type = "default"  # which is never recomputed
            frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, layer.inv_freq.device, seq_len=num_tokens)
            layer.register_buffer("inv_freq", frequencies, persistent=False)


class StoredWeights:
    """The tensors in a model folder's safetensors files, by the names that transformers gives them in a model.

    Files are mapped into memory, so a tensor takes room only while it is used.
    """

    def __init__(self, model_dir: Path, model: transformers.PreTrainedModel) -> None:
        """Find the tensors of ``model``, which may be empty.

        Raises:
            ModelError: a file is missing or cut off, or several stored tensors make up one of the model.
        """
        self._folder = model_dir
        self._files: dict[str, Any] = {path.name: self._open(path) for path in _weight_files(model_dir)}
        places = self._places(model)
        self.files = {name: {stored: places.get(stored) for stored in file.keys()} for name, file in self._files.items()}  # noqa: SIM118
        """By file, the stored name of each tensor and its name in the model, or None where the model has no such tensor."""
        self._found = {known: (name, stored) for name, tensors in self.files.items() for stored, known in tensors.items() if known}

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor that a model calls ``name``, on the CPU, as it is stored.

        Raises:
            ModelError: no such tensor in the folder.
        """
        if name not in self._found:
            raise ModelError(f"model folder {self._folder}: its safetensors hold no {name}; save the model again with save_pretrained(...)")
        file, stored = self._found[name]
        return self.read_stored(file, stored)

    def read_stored(self, file: str, stored: str) -> torch.Tensor:
        """Return a tensor by its file and its name there."""
        tensor: torch.Tensor = self._files[file].get_tensor(stored)
        return tensor

    def _open(self, path: Path) -> Any:
        try:
            return safetensors.safe_open(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read ({error}); fetch or save the model again") from error

    def _places(self, model: transformers.PreTrainedModel) -> dict[str, str]:
        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        known = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        places = {}
        for stored in (name for file in self._files.values() for name in file.keys()):  # noqa: SIM118 (a handle, not a dict)
            name, fused = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
            if fused is not None:
                raise ModelError(
                    f"model folder {self._folder}: {name} of a {type(model).__name__} is made of several stored tensors ({stored}, …), "
                    "which cannot be read one by one; fine-tune this model up to ZeRO stage 2, and use its adapter unmerged"
                )
            if name in known:
                places[stored] = name
        return places


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / INDEX
    if not index.is_file():
        return [model_dir / SINGLE_FILE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: is no index of safetensors ({error}); fetch or save the model again") from error
    return [model_dir / name for name in sorted(names)]


@torch.no_grad()
def add_marker_row(model: transformers.PreTrainedModel, marker: MarkerToken) -> None:
    """Give ``marker`` a row in the input and output embeddings; a reserved marker's rows stay as they are.

    The tables grow only where ``token_id`` lies beyond them (many models have spare rows).
    """
    if marker.token_id >= num_rows(model):
        model.resize_token_embeddings(marker.token_id + 1, mean_resizing=False)
    for table in vocabulary_tables(model):
        start_marker_row(table, marker)


@torch.no_grad()
def start_marker_row(table: torch.Tensor, marker: MarkerToken) -> None:
    """Set an added marker's row of a vocabulary table to the mean of the rows of its own text in ordinary tokens."""
    if marker.added:
        table[marker.token_id] = table[list(marker.initial_ids)].float().mean(0).to(table.dtype)


def read_adapter(adapter_dir: Path, *, device: str) -> tuple[peft.PeftConfig, dict[str, torch.Tensor]]:
    """Return the configuration and the tensors of the adapter in a checkpoint folder.

    Raises:
        CheckpointError: no adapter there, or a damaged one.
    """
    try:
        return peft.PeftConfig.from_pretrained(str(adapter_dir)), peft.load_peft_weights(str(adapter_dir), device=device)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"adapter {adapter_dir}: cannot be read ({reason}); train it again") from error


def load_adapter(base: transformers.PreTrainedModel, adapter_dir: Path) -> peft.PeftModel:
    """Load the adapter of a checkpoint folder onto ``base``; ``unload()`` of the result gives ``base`` back.

    Raises:
        CheckpointError: no adapter there, one of another base model, or one that overwrites base weights.
    """
    config, weights = read_adapter(adapter_dir, device=str(base.device))
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
    unmatched = [*outcome.unexpected_keys, *_unfilled(model, outcome.missing_keys)]
    if unmatched:
        model.unload()
        raise CheckpointError(f"{misfit}: {unmatched[0]} has no counterpart")
    return model.eval()


def _unfilled(model: peft.PeftModel, missing: Sequence[str]) -> list[str]:
    """Return the adapter tensors that the file did not fill, except those that are tied to a filled one."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".default" in name}
    filled = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
    return [name for name in missing if name in state and state[name].data_ptr() not in filled]


@torch.no_grad()
def put_in_rows(model: peft.PeftModel) -> None:
    """Write an adapter's trained vocabulary rows into the tables, where PEFT would copy a whole table in every forward pass."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            for name in layer.active_adapters:
                weight = layer.get_base_layer().weight
                weight[layer.token_indices[name]] = layer.trainable_tokens_delta[name].to(weight)
                layer.merged_adapters.append(name)


@torch.no_grad()
def take_back_rows(model: peft.PeftModel) -> None:
    """Undo ``put_in_rows``."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer) and layer.merged:
            layer.unmerge()


def num_rows(model: transformers.PreTrainedModel) -> int:
    """Return the rows of the input embeddings: entries of the vocabulary, and spare ones."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def vocabulary_tables(model: transformers.PreTrainedModel) -> list[torch.Tensor]:
    """Return the tensors with one row per vocabulary entry: input embeddings, and the output layer's where it is not tied."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("weight", "bias")]
    return list({tensor.data_ptr(): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}.values())
