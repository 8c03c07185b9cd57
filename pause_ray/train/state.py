"""What a running training has learned so far, whole and by parameter name, taken out of DeepSpeed's engine and put back.

For every trained parameter: its float32 master and AdamW's two moments. Nothing in it depends on the number of workers or
on the ZeRO stage, so a training goes on under others. Learning rate, row order and dropout follow from the step and need
no saving. Knows no file layout (``pause_ray.checkpoint``) and no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed

from pause_ray.errors import CheckpointError
from pause_ray.spec import JsonObject

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
