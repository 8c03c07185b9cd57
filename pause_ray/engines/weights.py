"""Weights in this process: the base model, the marker's row, an adapter, put in and taken out. Knows no prompt and no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from safetensors import SafetensorError

from pause_ray.errors import CheckpointError, ModelError
from pause_ray.text.tokens import MarkerToken

SPREAD = "auto"
"""Device of a model whose layers are spread over all GPUs that the process sees."""


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


@torch.no_grad()
def add_marker_row(model: transformers.PreTrainedModel, marker: MarkerToken) -> None:
    """Give ``marker`` a row in the input and output embeddings; a reserved marker's rows stay as they are.

    The tables grow only where ``token_id`` lies beyond them (many models have spare rows). An added marker starts as
    the mean of the rows of its own text in ordinary tokens, in both tables, so the result has no chance in it.
    """
    if marker.token_id >= num_rows(model):
        model.resize_token_embeddings(marker.token_id + 1, mean_resizing=False)
    if marker.added:
        sources = list(marker.initial_ids)
        for table in vocabulary_tables(model):
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


def _unfilled(model: peft.PeftModel, missing: Sequence[str]) -> list[str]:
    """Adapter tensors that the file did not fill; those that are tied to a filled one are."""
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
    """Rows of the input embeddings: entries of the vocabulary, and spare ones."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def vocabulary_tables(model: transformers.PreTrainedModel) -> list[torch.Tensor]:
    """The tensors with one row per vocabulary entry: input embeddings, and the output layer's where it is not tied."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("weight", "bias")]
    return list({tensor.data_ptr(): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}.values())
