"""The model that is trained: base weights, a LoRA adapter, the marker's embedding row. Knows torch and PEFT, no Ray.

All private interfaces of PEFT stand here; ``tests/training/test_private_interfaces.py`` tells which of them an upgrade changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from pause_ray.core.errors import ModelError, SpecError
from pause_ray.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pause_ray.models.weights import StoredWeights, empty_base, load_base, start_marker_row
from pause_ray.text.tokenizer import MarkerToken
from pause_ray.training.deepspeed import shard_parameters
from pause_ray.training.spec import LoraSpec, TrainSpec

ADAPTER = "default"
"""Name that PEFT gives to the only adapter of a model."""


def load_trainable(train: TrainSpec, *, model_dir: Path, marker: MarkerToken | None, seed: int, device: str, stage: int) -> peft.PeftModel:
    """Return the base model with frozen weights and a new adapter, in training mode.

    The adapter is trained and, with ``marker``, that token's row of the input embeddings, which is also the output row
    where the model ties them. The adapter's initial values follow from ``seed`` and the names of its tensors alone. Under
    ZeRO stage 3 weights are read and sharded layer by layer, so that no worker ever holds the whole model.

    Args:
        train: What is trained, and how.
        model_dir: Folder of the base model.
        marker: Token whose embedding row is trained, or None.
        seed: Seed of the adapter's initial values.
        device: ``cpu`` or ``cuda:N``.
        stage: ZeRO stage; 3 needs torch.distributed.

    Raises:
        SpecError: ``train.lora`` does not fit the model, or ``train.quantize`` does not fit the stage.
        ModelError: the base model cannot be loaded.
    """
    if train.quantize and train.lora.dora and stage == 3 and device == "cpu":
        raise SpecError(
            f"train.lora.dora with quantize {train.quantize} under ZeRO stage 3 needs GPUs: on a CPU, PEFT replaces "
            "the weights that ZeRO has sharded; use a stage up to 2"
        )
    empty = empty_base(model_dir, dtype=train.precision, marker=marker, quantize=train.quantize if stage == 3 else None)
    config = adapter_config(train.lora, empty, marker)
    start = functools.partial(start_adapter, seed=seed, dtype=getattr(torch, train.precision))
    if stage == 3:
        loader = ShardingLoader(empty, model_dir, train=train, marker=marker, device=device)
        without_magnitudes = dataclasses.replace(config, use_dora=False)  # DoRA's magnitudes cannot be computed from empty weights
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


def adapter_config(lora: LoraSpec, base: transformers.PreTrainedModel, marker: MarkerToken | None) -> peft.LoraConfig:
    """Return PEFT's configuration of an adapter for ``base``, which has none yet.

    Raises:
        SpecError: the rank or the targets do not fit ``base``.
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
    """Return linear layers of the text decoder: short names, or full ones where another part of the model has layers of the same name."""
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
    """Return the name of the input embedding in PEFT's form: ``embed_tokens`` in Llama, ``wte`` in GPT-2."""
    table = base.get_input_embeddings()
    name = next(name for name, layer in base.named_modules() if layer is table)
    return str(name.rpartition(".")[2])


@torch.no_grad()
def start_adapter(name: str, layer: LoraLayer, *, seed: int, dtype: torch.dtype) -> None:
    """Initialize one layer as PEFT does, but drawn by seed and name, so that order, device and precision do not matter."""
    inner = layer.lora_A[ADAPTER].weight
    number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1
    values = torch.empty(inner.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=torch.Generator().manual_seed(number))
    inner.copy_(values)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


class TrainedRow(TrainableTokensLayer):  # type: ignore[misc]
    """PEFT's layer of trained vocabulary rows, without its copy of the whole table and the table's gradient in every pass."""

    def forward_adapters(self, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute what PEFT's method computes; ``x`` is tokens, or the output layer's input."""
        if self.disable_adapters or self.merged or not active_adapters:
            untrained: torch.Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)
            return untrained
        result: torch.Tensor = self.base_layer(x)
        for adapter in active_adapters:
            rows, tokens = self.trainable_tokens_delta[adapter], self.token_indices[adapter]
            if isinstance(self.base_layer, nn.Embedding):
                scale = self._get_embed_scale()
                for token, row in zip(tokens, rows, strict=True):
                    here = (x == token).unsqueeze(-1)
                    result = torch.where(here, (row if scale is None else row * scale.to(row)).to(result), result)
            else:
                indices = torch.tensor(tokens, device=result.device)
                result = result.index_copy(-1, indices, nn.functional.linear(x, rows.to(x)).to(result))
        return result


def output_layer(base: transformers.PreTrainedModel) -> tuple[Any, torch.Tensor | None, list[int] | None]:
    """Return the output layer under its adapter, the vocabulary rows that the adapter trains, and the tokens of these rows."""
    layer = base.get_output_embeddings()
    if not isinstance(layer, TrainableTokensWrapper):
        return layer, None, None
    adapter = layer.token_adapter
    if adapter.disable_adapters:
        return adapter.base_layer, None, None
    (name,) = adapter.active_adapters
    return adapter.base_layer, adapter.trainable_tokens_delta[name], adapter.token_indices[name]


def write_adapter(model: peft.PeftModel, *, trained: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the files that ``PeftModel.from_pretrained`` reads; equal tensors give equal bytes.

    ``model`` may be sharded: the weights are those in ``trained``, every trained parameter of the adapter by name, whole.

    Raises:
        OSError: the disk is full. (PEFT writes through Rust, whose error for a full disk is less clear.)
    """
    tensors = peft.get_peft_model_state_dict(model, state_dict=trained, adapter_name=ADAPTER, save_embedding_layers=False)
    config = model.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n", encoding="utf-8")
    whole = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    (folder / ADAPTER_WEIGHTS).write_bytes(safetensors.torch.save(whole, metadata={"format": "pt"}))


class ShardingLoader:
    """Loads weights into an empty base model, which may have an adapter by now, and shards its parameters over all workers.

    Every worker reads every tensor, so that what depends on whole weights (4-bit statistics, DoRA's magnitudes, the
    marker's initial row) needs no messages; from a node's second worker on, the files are in the page cache.
    """

    def __init__(
        self, base: transformers.PreTrainedModel, model_dir: Path, *, train: TrainSpec, marker: MarkerToken | None, device: str
    ) -> None:
        """Find each parameter of ``base`` in the files of ``model_dir``.

        Raises:
            ModelError: a file is missing or cut off, or its tensors do not fit the model one by one.
        """
        self._base, self._train, self._marker, self._device = base, train, marker, torch.device(device)
        self._stored = StoredWeights(model_dir, base)
        self._tables = (base.get_input_embeddings(), base.get_output_embeddings())
        self._names: dict[int, list[str]] = {}
        for name, parameter in base.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self._owners = {name: _owner(base, name) for names in self._names.values() for name in names}
        self._buffers = {name: _owner(base, name) for name, _ in base.named_buffers()}
        self._first_parameter: Any = None

    def fill(self, model: peft.PeftModel, *, start: Callable[[str, LoraLayer], None]) -> None:
        """Load and shard every parameter of ``model``, the base model with an empty adapter without DoRA.

        An adapter layer is made anew once its base weights are loaded; ``start`` sets its initial values while it is whole.

        Raises:
            ModelError: a tensor is missing in the files, or of another shape.
        """
        ((adapter, config),) = model.peft_config.items()
        config.use_dora = self._train.lora.dora
        for name, (module, leaf) in self._buffers.items():
            buffer = module.get_buffer(leaf)
            value = self._stored.read(name) if name in self._stored else buffer
            module._buffers[leaf] = value.to(self._device, buffer.dtype)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LoraLayer):
                self._fill_weights(layer.get_base_layer())
                layer.update_layer(adapter, config.r, config.lora_alpha, config=config)
                start(name, layer)
                self._shard(layer.parameters())
        for module in dict.fromkeys(module for module, _ in self._owners.values()):
            self._fill_weights(module)
            if module not in self._tables:
                self._shard(module.parameters(recurse=False))
        for layer in model.modules():
            if isinstance(layer, TrainableTokensLayer):
                _start_rows(layer)
        self._shard(model.parameters())

    def _fill_weights(self, module: nn.Module) -> None:
        for parameter in list(module.parameters(recurse=False)):
            names = self._names.get(id(parameter))
            if not parameter.is_meta or names is None:
                continue
            tied_to_others = self._base.all_tied_weights_keys
            name = next((name for name in names if name in self._stored and name not in tied_to_others), names[0])
            value = _placed(parameter, self._value(name, parameter, in_table=module in self._tables), device=self._device)
            for alias in names:
                owner, leaf = self._owners[alias]
                owner._parameters[leaf] = value

    def _value(self, name: str, parameter: nn.Parameter, *, in_table: bool) -> torch.Tensor:
        stored = self._stored.read(name)
        missing = parameter.shape[0] - stored.shape[0]
        if stored.shape[1:] != parameter.shape[1:] or missing < 0 or (missing and not in_table):
            raise ModelError(
                f"{name}: stored as {tuple(stored.shape)}, but config.json wants {tuple(parameter.shape)}; fetch the model again"
            )
        dtype = parameter.dtype if type(parameter) is nn.Parameter else getattr(torch, self._train.precision)
        value = torch.zeros(parameter.shape, dtype=dtype)
        value[: stored.shape[0]] = stored
        if in_table and self._marker is not None:
            start_marker_row(value, self._marker)
        return value

    def _shard(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide parameters among all workers, unless they are divided already."""
        whole = [parameter for parameter in parameters if not hasattr(parameter, "ds_id")]
        if whole:
            shard_parameters(whole, like=self._first_parameter, train=self._train)
            self._first_parameter = whole[0] if self._first_parameter is None else self._first_parameter


def _owner(base: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor, and its name there; PEFT may rename the module later but keeps the object."""
    path, _, leaf = name.rpartition(".")
    return base.get_submodule(path), leaf


def _placed(empty: nn.Parameter, value: torch.Tensor, *, device: torch.device) -> nn.Parameter:
    """Return ``value`` as a parameter of the type of ``empty``; a 4-bit parameter is quantised while it moves to the device."""
    if type(empty) is nn.Parameter:
        return nn.Parameter(value.to(device), requires_grad=empty.requires_grad)
    kind: Any = type(empty)
    quantised: nn.Parameter = kind(value, **{**empty.__dict__, "requires_grad": False}).to(device)
    return quantised


@torch.no_grad()
def _start_rows(layer: TrainableTokensLayer) -> None:
    """Initialize trained vocabulary rows with the table's rows."""
    table = layer.get_base_layer().weight
    for adapter, tokens in layer.token_indices.items():
        if layer.trainable_tokens_delta[adapter].is_meta:
            rows = table[tokens]
            layer.trainable_tokens_delta[adapter] = nn.Parameter(rows.clone())
            layer.trainable_tokens_original[adapter] = rows.clone()
