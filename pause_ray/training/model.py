"""The model that is trained: base weights, a LoRA adapter, the marker's embedding row. Knows torch and PEFT, no Ray."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn

from pause_ray.core.errors import SpecError
from pause_ray.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pause_ray.models.weights import empty_base, load_base
from pause_ray.text.tokenizer import MarkerToken
from pause_ray.training.deepspeed import ShardingLoader
from pause_ray.training.spec import LoraSpec, TrainSpec

ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""


def load_trainable(train: TrainSpec, *, model_dir: Path, marker: MarkerToken | None, seed: int, device: str, stage: int) -> peft.PeftModel:
    """The base model with frozen weights and a fresh adapter, in training mode.

    Trained are the adapter and, with ``marker``, that token's row of the input embeddings, which is the output row too
    where the model ties them. The adapter's first values follow from ``seed`` and the names of its tensors alone. Under
    ZeRO stage 3 weights are read and dealt to all workers layer by layer, so that none ever holds the model.

    Args:
        train: What is trained, and how.
        model_dir: Folder of the base model.
        marker: Whose row is trained, or None.
        seed: Of the adapter's first values.
        device: ``cpu`` or ``cuda:N``.
        stage: ZeRO stage; 3 needs torch.distributed.

    Raises:
        SpecError: ``train.lora`` does not fit the model, or ``train.quantize`` not the stage.
        ModelError: the base model cannot be loaded.
    """
    _check_quantized(train, stage=stage, device=device)
    empty = empty_base(model_dir, dtype=train.precision, marker=marker, quantize=train.quantize if stage == 3 else None)
    config = adapter_config(train.lora, empty, marker)
    start = functools.partial(start_adapter, seed=seed, dtype=getattr(torch, train.precision))
    if stage == 3:
        loader = ShardingLoader(empty, model_dir, train=train, marker=marker, device=device)
        without_magnitudes = dataclasses.replace(config, use_dora=False)  # DoRA's cannot be taken from empty weights
        model = peft.get_peft_model(empty, without_magnitudes, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        loader.fill(model, start=start)
    else:
        base = load_base(model_dir, dtype=train.precision, marker=marker, device=device, quantize=train.quantize)
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                start(name, layer)
    for layer in model.modules():
        if type(layer) is TrainableTokensLayer:
            layer.__class__ = TrainedRow
    if train.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _check_quantized(train: TrainSpec, *, stage: int, device: str) -> None:
    if train.quantize == "int8" and stage == 3:
        raise SpecError("train.quantize int8 gives wrong losses under ZeRO stage 3 (bitsandbytes issue 1451); use nf4, or a stage up to 2")
    if train.quantize and train.lora.dora and stage == 3 and device == "cpu":
        raise SpecError(
            f"train.lora.dora with quantize {train.quantize} under ZeRO stage 3 needs GPUs: on a CPU, PEFT puts new weights in the place "
            "of those that ZeRO has dealt; use a stage up to 2"
        )


def adapter_config(lora: LoraSpec, base: transformers.PreTrainedModel, marker: MarkerToken | None) -> peft.LoraConfig:
    """PEFT's words for an adapter of ``base``, in which there is none yet.

    Raises:
        SpecError: a rank or targets that ``base`` does not have.
    """
    lora.check_rank(base.config.get_text_config().hidden_size)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=_targets(base, lora),
        trainable_token_indices={_embedding_name(base): [marker.token_id]} if marker else None,
    )


def _targets(base: transformers.PreTrainedModel, lora: LoraSpec) -> list[str]:
    """Linear layers of the text decoder: short names, or whole ones where another part of the model has layers of the same name."""
    decoder = base.get_decoder()
    start = next(name for name, layer in base.named_modules() if layer is decoder)
    linear = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear)]
    inside = [name for name in linear if name.startswith(f"{start}." if start else "")]
    short = {name.rpartition(".")[2] for name in inside} - {"lm_head"}
    lora.check_targets(short)
    chosen = set(lora.targets or short)
    meant = [name for name in inside if name.rpartition(".")[2] in chosen]
    hit = [name for name in linear if name.rpartition(".")[2] in chosen]
    return sorted(chosen) if hit == meant else meant


def _embedding_name(base: transformers.PreTrainedModel) -> str:
    """Name of the input embedding, as PEFT wants it: ``embed_tokens`` in Llama, ``wte`` in GPT-2."""
    table = base.get_input_embeddings()
    name = next(name for name, layer in base.named_modules() if layer is table)
    return str(name.rpartition(".")[2])


@torch.no_grad()
def start_adapter(name: str, layer: LoraLayer, *, seed: int, dtype: torch.dtype) -> None:
    """First values of one layer as PEFT has them, but drawn by seed and name: order, device and precision change nothing."""
    inner = layer.lora_A[ADAPTER].weight
    number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1
    values = torch.empty(inner.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=torch.Generator().manual_seed(number))
    inner.copy_(values)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


class TrainedRow(TrainableTokensLayer):  # type: ignore[misc]
    """PEFT's layer of trained vocabulary rows without its copy of the whole table, and the table's gradient, in every pass."""

    def forward_adapters(self, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's: ``x`` is tokens, or the output layer's input."""
        if self.disable_adapters or self.merged or not active_adapters:
            untrained: torch.Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)
            return untrained
        result: torch.Tensor = self.base_layer(x)
        for adapter in active_adapters:
            result = self._put_rows(result, x, adapter)
        return result

    def _put_rows(self, result: torch.Tensor, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """What the table made of ``x``, with what it would make of it with the rows of ``adapter``."""
        rows = self.trainable_tokens_delta[adapter]
        if isinstance(self.base_layer, nn.Embedding):
            scale = self._get_embed_scale()
            for token, row in zip(self.token_indices[adapter], rows, strict=True):
                here = (x == token).unsqueeze(-1)
                result = torch.where(here, (row if scale is None else row * scale.to(row)).to(result), result)
            return result
        tokens = torch.tensor(self.token_indices[adapter], device=result.device)
        return result.index_copy(-1, tokens, nn.functional.linear(x, rows.to(x)).to(result))


def write_adapter(model: peft.PeftModel, *, trained: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what ``PeftModel.from_pretrained`` reads; equal tensors give equal bytes.

    Args:
        model: Where the adapter's shape and configuration come from; its own weights may be partitioned.
        trained: Every trained parameter of the adapter by name, whole.
        folder: Where the two files go.

    Raises:
        OSError: disk full. PEFT's own writing goes through Rust, whose error for a full disk says less.
    """
    tensors = peft.get_peft_model_state_dict(model, state_dict=trained, adapter_name=ADAPTER, save_embedding_layers=False)
    config = model.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n", encoding="utf-8")
    whole = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    (folder / ADAPTER_WEIGHTS).write_bytes(safetensors.torch.save(whole, metadata={"format": "pt"}))
