"""Weights for ZeRO stage 3: read layer by layer and cut up at once, so that no process ever holds the model. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn

from pause_ray.engines.weights import StoredWeights, start_marker_row
from pause_ray.errors import ModelError
from pause_ray.text.tokens import MarkerToken
from pause_ray.train.deepspeed_config import deepspeed_config
from pause_ray.train.loop import share
from pause_ray.train.spec import TrainSpec


class Dealer:
    """Fills an empty base model, in which an adapter may have been put meanwhile, and deals its parameters to all workers.

    Every worker reads every tensor, so that what depends on whole weights (4-bit statistics, DoRA's magnitudes, the
    marker's first row) needs no messages; from the second worker of a node on, the files lie in the page cache.
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
        self._first: Any = None

    def fill(self, model: peft.PeftModel, *, start: Callable[[str, LoraLayer], None]) -> None:
        """Give every parameter its value and cut it up.

        Args:
            model: The base model with an empty adapter without DoRA, whose layers are made anew when their base weights are there.
            start: Called with each adapter layer and its name while it is whole; sets its first values.

        Raises:
            ModelError: a tensor is missing in the files, or of another shape.
        """
        ((adapter, config),) = model.peft_config.items()
        config.use_dora = self._train.lora.dora
        self._fill_buffers()
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LoraLayer):
                self._fill_weights(layer.get_base_layer())
                layer.update_layer(adapter, config.r, config.lora_alpha, config=config)
                start(name, layer)
                self._deal(layer.parameters())
        for module in dict.fromkeys(module for module, _ in self._owners.values()):
            self._fill_weights(module)
            if module not in self._tables:
                self._deal(module.parameters(recurse=False))
        for layer in model.modules():
            if isinstance(layer, TrainableTokensLayer):
                _start_rows(layer)
        self._deal(model.parameters())

    def _fill_buffers(self) -> None:
        for name, (module, leaf) in self._buffers.items():
            buffer = module.get_buffer(leaf)
            value = self._stored.read(name) if name in self._stored else buffer
            module._buffers[leaf] = value.to(self._device, buffer.dtype)

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
        value = torch.zeros(parameter.shape, dtype=self._dtype(parameter))
        value[: stored.shape[0]] = stored
        if in_table and self._marker is not None:
            start_marker_row(value, self._marker)
        return value

    def _dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return parameter.dtype if type(parameter) is nn.Parameter else getattr(torch, self._train.precision)

    def _deal(self, parameters: Iterable[nn.Parameter]) -> None:
        """Cut parameters up among all workers, with the settings that training will use; those that are cut up already stay."""
        whole = [parameter for parameter in parameters if not hasattr(parameter, "ds_id")]
        if not whole:
            return
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=whole)
            return
        import deepspeed

        workers = torch.distributed.get_world_size()
        config = deepspeed_config(self._train, share=share(self._train, num_workers=workers, even=False), stage=3, world_size=workers)
        deepspeed.zero.Init(module=nn.ParameterList(whole), config_dict_or_path=config)
        self._first = whole[0]


def _owner(base: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and its name there: a wrapping may rename the module, and keeps it."""
    path, _, leaf = name.rpartition(".")
    return base.get_submodule(path), leaf


def _placed(empty: nn.Parameter, value: torch.Tensor, *, device: torch.device) -> nn.Parameter:
    """``value`` as the kind of parameter that ``empty`` is; a 4-bit one is quantised on the way to the device."""
    if type(empty) is nn.Parameter:
        return nn.Parameter(value.to(device), requires_grad=empty.requires_grad)
    kind: Any = type(empty)
    quantised: nn.Parameter = kind(value, **{**empty.__dict__, "requires_grad": False}).to(device)
    return quantised


@torch.no_grad()
def _start_rows(layer: TrainableTokensLayer) -> None:
    """Trained vocabulary rows start as the table's."""
    table = layer.get_base_layer().weight
    for adapter, tokens in layer.token_indices.items():
        if layer.trainable_tokens_delta[adapter].is_meta:
            rows = table[tokens]
            layer.trainable_tokens_delta[adapter] = nn.Parameter(rows.clone())
            layer.trainable_tokens_original[adapter] = rows.clone()
