"""The model that is trained: base weights, a LoRA adapter, the marker's embedding row. Knows torch and PEFT, no DeepSpeed and no Ray."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from pause_ray.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pause_ray.engines.weights import load_base
from pause_ray.errors import SpecError
from pause_ray.rows import NO_LOSS
from pause_ray.text.tokens import MarkerToken
from pause_ray.train.loop import Batch
from pause_ray.train.spec import TrainSpec


def load_trainable(train: TrainSpec, *, model_dir: Path, marker: MarkerToken | None, seed: int, device: str) -> peft.PeftModel:
    """The base model with frozen weights and a fresh adapter, in training mode.

    Trained are the adapter and, with ``marker``, that token's row of the input embeddings, which is the output row too
    where the model ties them. ``seed`` decides the adapter's first values.

    Raises:
        SpecError: a name in ``train.lora.targets`` fits no linear layer of the model.
        ModelError: the base model cannot be loaded.
    """
    base = load_base(model_dir, dtype=train.precision, marker=marker, device=device)
    if train.lora.targets is not None:
        _check_targets(base, train.lora.targets)
    rows = {_embedding_name(base): [marker.token_id]} if marker else None
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=train.lora.rank,
            lora_alpha=train.lora.alpha,
            lora_dropout=train.lora.dropout,
            target_modules=list(train.lora.targets) if train.lora.targets is not None else "all-linear",
            trainable_token_indices=rows,
        ),
    )
    if train.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _check_targets(base: nn.Module, targets: tuple[str, ...]) -> None:
    linear = {name.rpartition(".")[2] for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    unknown = [name for name in targets if name not in linear]
    if unknown:
        raise SpecError(f"train.lora.targets: {unknown} fit no linear layer of the model; it has {sorted(linear)}")


def _embedding_name(base: nn.Module) -> str:
    """Name of the input embedding, as PEFT wants it: ``embed_tokens`` in Llama, ``wte`` in GPT-2."""
    table = base.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, layer in base.named_modules() if layer is table)
    return str(name.rpartition(".")[2])


def summed_loss(model: nn.Module, batch: Batch, *, device: str) -> torch.Tensor:
    """Cross-entropy in nats, summed over the learned positions of ``batch``; logits are made only from the first of them on."""
    logits = model(
        input_ids=torch.from_numpy(batch.input_ids).to(device),
        attention_mask=torch.from_numpy(batch.attention_mask).to(device),
        position_ids=torch.from_numpy(batch.position_ids).to(device),
        logits_to_keep=batch.logits_to_keep,
        use_cache=False,
    ).logits
    targets = torch.from_numpy(batch.targets).to(device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=NO_LOSS, reduction="sum")


def write_adapter(model: peft.PeftModel, *, trained: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what ``PeftModel.from_pretrained`` reads; equal tensors give equal bytes.

    Args:
        model: Where the adapter's shape and configuration come from; its own weights may be partitioned.
        trained: Every trained parameter by name, whole.
        folder: Where the two files go.

    Raises:
        OSError: disk full. PEFT's own writing goes through Rust, whose error for a full disk says less.
    """
    tensors = peft.get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    config = model.peft_config["default"].to_dict() | {"inference_mode": True}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n", encoding="utf-8")
    whole = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    (folder / ADAPTER_WEIGHTS).write_bytes(safetensors.torch.save(whole, metadata={"format": "pt"}))
