"""What a running training has learned so far, whole and by parameter name, taken out of DeepSpeed's engine and put back.

For every trained parameter: its float32 master and AdamW's two moments. Nothing in it depends on the number of workers or
on the ZeRO stage, so a training goes on under others. Learning rate, row order and dropout follow from the step and need
no saving. Knows no file layout (``pause_ray.models.checkpoint``) and no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import torch.distributed
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn

from pause_ray.core.errors import CheckpointError, ModelError
from pause_ray.core.spec import JsonObject
from pause_ray.models.weights import StoredWeights, start_marker_row
from pause_ray.text.tokenizer import MarkerToken
from pause_ray.training.batching import batch_layout
from pause_ray.training.spec import TrainSpec
from pause_ray.training.zero_config import deepspeed_config

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's two kinds of dynamic loss scale remember."""


def trained_parameters(engine: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by their names in the PEFT model; under ZeRO-3 each process holds a part of each."""
    return {name: parameter for name, parameter in engine.module.model.named_parameters() if parameter.requires_grad}


def gather_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every trained parameter as the model computes with it, whole and on the CPU. All ranks must call it."""
    import deepspeed

    trained = trained_parameters(engine)
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}


def applied_steps(engine: Any) -> int:
    """Steps that AdamW has made; fewer than those of the training where float16 overflowed."""
    return max((int(entry["step"]) for entry in engine.basic_optimizer.state.values() if "step" in entry), default=0)


def gather(engine: Any) -> dict[str, torch.Tensor] | None:
    """Masters and moments by ``kind/parameter``, float32 on the CPU; None on every rank but the first. All ranks must call it.

    At most one whole tensor is made at a time on the accelerator.
    """
    first = torch.distributed.get_rank() == 0
    whole = {
        f"{kind}/{name}": part.detach().to("cpu", copy=True) if first else None
        for kind in (MASTER, *MOMENTS)
        for name, part in _parts(engine, kind)
    }
    return {name: part for name, part in whole.items() if part is not None} if first else None


def restore(engine: Any, tensors: Mapping[str, torch.Tensor], *, applied: int) -> None:
    """Put back what ``gather`` took, into an engine of any stage and world size. All ranks must call it, with the same tensors."""
    import deepspeed

    _begin(engine, applied)
    trained = trained_parameters(engine)
    masters = _masters(engine)
    for index, (name, parameter) in enumerate(trained.items()):
        for kind in (MASTER, *MOMENTS):
            value = tensors[f"{kind}/{name}"].to(engine.device)
            if _sharded(parameter):
                _set_shard(parameter, value, kind)
            elif kind == MASTER:
                masters[index].data.copy_(value)
            else:
                engine.basic_optimizer.state[masters[index]][kind].copy_(value)
    with deepspeed.zero.GatheredParameters(list(trained.values()), modifier_rank=0), torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"{MASTER}/{name}"])


def loss_scale(engine: Any) -> JsonObject:
    """What float16's dynamic loss scale remembers; empty without one."""
    scale = _scale_of(engine)
    return {name: getattr(scale, name) for name in _SCALE_FIELDS if hasattr(scale, name)}


def unapplied_scale(engine: Any) -> float:
    """Return the factor by which the caller has to multiply the loss, because DeepSpeed's plain float16 optimizer divides by it."""
    return float(getattr(getattr(engine.optimizer, "loss_scale_config", None), "cur_scale", 1.0))


def restore_loss_scale(engine: Any, remembered: JsonObject) -> None:
    """Put back ``loss_scale``."""
    scale = _scale_of(engine)
    for name, value in remembered.items():
        if hasattr(scale, name):
            setattr(scale, name, value)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: disk full. Safetensors' own writing goes through Rust, whose error for a full disk says less.
    """
    path.write_bytes(safetensors.torch.save({name: part.contiguous() for name, part in sorted(tensors.items())}))


def read_tensors(path: Path, *, trained: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Read what ``write_tensors`` wrote.

    Args:
        path: Safetensors file.
        trained: Shape of each trained parameter by name; under ZeRO-3 the whole one's.

    Raises:
        CheckpointError: it is not of these parameters.
    """
    tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    expected = {f"{kind}/{name}": shape for kind in (MASTER, *MOMENTS) for name, shape in trained.items()}
    found = {name: part.shape for name, part in tensors.items()}
    if found != expected:
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise CheckpointError(f"{path}: {names[0]} does not fit the model that is trained; remove {path.parent} and run again")
    return tensors


def whole_shapes(engine: Any) -> dict[str, torch.Size]:
    """Shape of each trained parameter, whole."""
    return {name: torch.Size(getattr(part, "ds_shape", part.shape)) for name, part in trained_parameters(engine).items()}


def _parts(engine: Any, kind: str) -> Any:
    """(name, whole tensor of this kind) of every trained parameter; the tensor lives until the next one is asked for."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    masters = _masters(engine)
    for index, (name, parameter) in enumerate(trained_parameters(engine).items()):
        if not _sharded(parameter):
            master = masters[index]
            yield name, master if kind == MASTER else engine.basic_optimizer.state[master][kind]
        elif kind == MASTER:
            yield name, safe_get_full_fp32_param(parameter)
        else:
            yield name, safe_get_full_optimizer_state(parameter, kind)


def _set_shard(parameter: Any, whole: torch.Tensor, kind: str) -> None:
    """Put this process's part of ``whole`` where ZeRO keeps it."""
    import deepspeed.utils as zero

    if hasattr(parameter, "ds_id"):
        # DeepSpeed 0.19.8's own setters of whole tensors forget the padding that makes equal parts.
        group, size = parameter.ds_process_group, parameter.ds_tensor.numel()
        padded = torch.zeros(size * torch.distributed.get_world_size(group), dtype=whole.dtype, device=whole.device)
        padded[: whole.numel()] = whole.flatten()
        part = padded[size * torch.distributed.get_rank(group) :][:size]
        if kind == MASTER:
            zero.safe_set_local_fp32_param(parameter, part)
        else:
            zero.safe_set_local_optimizer_state(parameter, part, kind)
    elif kind == MASTER:
        zero.safe_set_full_fp32_param(parameter, whole)
    else:
        zero.safe_set_full_optimizer_state(parameter, whole, kind)


def _sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO has cut this parameter's master and moments up; without it each has a master of its own."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _masters(engine: Any) -> list[torch.Tensor]:
    """What AdamW steps on in this process: without ZeRO one tensor for each parameter, in their order, otherwise flat partitions."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 takes them out of the groups between steps
    return list(flat) if flat is not None else [master for group in engine.basic_optimizer.param_groups for master in group["params"]]


def _begin(engine: Any, applied: int) -> None:
    """Give AdamW the state that it would otherwise make in its first step, and let ZeRO find it."""
    for master in _masters(engine):
        engine.basic_optimizer.state[master] = {
            "step": torch.tensor(float(applied)),
            **{kind: torch.zeros_like(master) for kind in MOMENTS},
        }
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _scale_of(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


class ShardingLoader:
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
        self._first_parameter: Any = None

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
                self._shard(layer.parameters())
        for module in dict.fromkeys(module for module, _ in self._owners.values()):
            self._fill_weights(module)
            if module not in self._tables:
                self._shard(module.parameters(recurse=False))
        for layer in model.modules():
            if isinstance(layer, TrainableTokensLayer):
                _start_rows(layer)
        self._shard(model.parameters())

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

    def _shard(self, parameters: Iterable[nn.Parameter]) -> None:
        """Cut parameters up among all workers, with the settings that training will use; those that are cut up already stay."""
        whole = [parameter for parameter in parameters if not hasattr(parameter, "ds_id")]
        if not whole:
            return
        if self._first_parameter is not None:
            self._first_parameter.convert_to_zero_parameters(param_list=whole)
            return
        import deepspeed

        workers = torch.distributed.get_world_size()
        config = deepspeed_config(
            self._train, layout=batch_layout(self._train, num_workers=workers, even=False), stage=3, world_size=workers
        )
        deepspeed.zero.Init(module=nn.ParameterList(whole), config_dict_or_path=config)
        self._first_parameter = whole[0]


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
