"""DeepSpeed: its configuration, its process set-up, and the state of a training inside its engine. Knows no Ray and no file layout.

All private interfaces of DeepSpeed stand here; ``tests/training/test_private_interfaces.py`` tells which of them an upgrade changed.
The saved state of every trained parameter is its float32 master and AdamW's two moments, whole and by parameter name: nothing in it
depends on the number of workers or on the ZeRO stage, so a training can resume under others. Learning rate, row order and dropout
follow from the step and need no saving.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed
from torch import nn

from pause_ray.core.errors import CheckpointError, SpecError
from pause_ray.core.spec import JsonObject
from pause_ray.training.batching import batch_layout
from pause_ray.training.spec import TrainSpec
from pause_ray.training.zero_config import deepspeed_config

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's two kinds of dynamic loss scale."""


def prepare_process(device: str) -> None:
    """Make the settings that DeepSpeed reads when it is first used in a process: accelerator, log level, no compiling.

    On a CPU it would compile for half a minute a shared-memory op that only its inference uses; an empty table of
    compatible ops skips that.
    """
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Use the process group that Ray Train made; without one, make a group of this process alone and destroy it afterwards.

    DeepSpeed caches groups per process: without its own teardown the next training in this process would use dead ones.
    ZeRO-3 also replaces ``torch.nn.functional.linear``, which an inference engine in this process must not inherit.
    """
    import deepspeed.comm

    if torch.distributed.is_initialized():
        deepspeed.comm.init_distributed(verbose=False)
        yield
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = "0"
    linear = torch.nn.functional.linear
    try:
        deepspeed.comm.init_distributed(verbose=False)
        yield
    finally:
        torch.nn.functional.linear = linear
        deepspeed.comm.destroy_process_group()
        del os.environ["LOCAL_RANK"]


def check_machine(train: TrainSpec, *, device: str) -> None:
    """Refuse float16 and an offload to NVMe where this machine cannot do them, before a model is loaded.

    Raises:
        SpecError: the device does not compute in float16, or DeepSpeed's asynchronous I/O cannot be built or used.
    """
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if train.precision == "float16" and not deepspeed.get_accelerator().is_fp16_supported():
        raise SpecError(f"train.precision float16: this {device} does not compute in it; use bfloat16 or float32")
    offloads = (train.zero.offload_optimizer, train.zero.offload_parameters)
    if "nvme" in offloads and not AsyncIOBuilder().is_compatible(verbose=False):
        raise SpecError(
            "train.zero: offload to nvme needs DeepSpeed's async_io, which does not work on this machine; "
            "install libaio with its headers and a C++ compiler on every node, or offload to cpu"
        )


def start(model: nn.Module, config: JsonObject) -> Any:
    """Return DeepSpeed's engine around ``model``."""
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    if config["zero_optimization"]["stage"] == 0:
        # Its bfloat16 wrapper allocates AdamW's state by a step with zero gradients, which counts as one in the bias
        # correction: the first real step would be 0.74 of its size. The state comes back by itself.
        engine.basic_optimizer.state.clear()
    return engine


def release(engine: Any) -> None:
    """Free the weights' memory: ZeRO-3's backward hooks keep the model alive as long as the process lives."""
    masters = [master for group in engine.basic_optimizer.param_groups for master in group["params"]]
    parameters = [*engine.module.parameters(), *masters]
    engine.basic_optimizer.state.clear()
    engine.destroy()
    for parameter in parameters:
        parameter.grad = None
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = torch.empty(0, dtype=parameter.dtype)


def trained_parameters(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by their names in the PEFT model; under ZeRO-3 each process holds a part of each."""
    return {name: parameter for name, parameter in engine.module.model.named_parameters() if parameter.requires_grad}


def gather_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return every trained parameter in the precision of the model, whole and on the CPU. All ranks must call it."""
    import deepspeed

    trained = trained_parameters(engine)
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}


def applied_steps(engine: Any) -> int:
    """Return the number of AdamW's steps; fewer than the training's where float16 overflowed."""
    return max((int(entry["step"]) for entry in engine.basic_optimizer.state.values() if "step" in entry), default=0)


def gather(engine: Any) -> dict[str, torch.Tensor] | None:
    """Return masters and moments by ``kind/parameter``, float32 on the CPU; None on every rank but the first.

    All ranks must call it. At most one whole tensor exists at a time on the accelerator.
    """
    first = torch.distributed.get_rank() == 0
    whole: dict[str, torch.Tensor] = {}
    for kind in (MASTER, *MOMENTS):
        for name, part in _parts(engine, kind):
            if first:
                whole[f"{kind}/{name}"] = part.detach().to("cpu", copy=True)
    return whole if first else None


def step_state(engine: Any) -> JsonObject:
    """Return what a checkpoint contains beside the result of ``gather``; the loss scale is empty without float16."""
    scale = _scale_of(engine)
    fields = {name: getattr(scale, name) for name in _SCALE_FIELDS if hasattr(scale, name)}
    return {"applied_steps": applied_steps(engine), "skipped_steps": engine.skipped_steps, "loss_scale": fields}


def restore(engine: Any, tensors: Mapping[str, torch.Tensor], *, state: JsonObject) -> None:
    """Load the results of ``gather`` and ``step_state`` into an engine of any stage and world size. All ranks must call it alike."""
    import deepspeed

    engine.skipped_steps = state["skipped_steps"]
    for name, value in state["loss_scale"].items():
        if hasattr(_scale_of(engine), name):
            setattr(_scale_of(engine), name, value)
    _begin(engine, state["applied_steps"])
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


def unapplied_scale(engine: Any) -> float:
    """Return the factor by which the caller has to multiply the loss, because DeepSpeed's plain float16 optimizer divides by it."""
    return float(getattr(getattr(engine.optimizer, "loss_scale_config", None), "cur_scale", 1.0))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full. (Safetensors writes through Rust, whose error for a full disk is less clear.)
    """
    path.write_bytes(safetensors.torch.save({name: part.contiguous() for name, part in sorted(tensors.items())}))


def read_tensors(path: Path, engine: Any) -> dict[str, torch.Tensor]:
    """Read a file that ``write_tensors`` wrote.

    Raises:
        CheckpointError: the file is not of the parameters that ``engine`` trains.
    """
    tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    shapes = {name: torch.Size(getattr(part, "ds_shape", part.shape)) for name, part in trained_parameters(engine).items()}
    expected = {f"{kind}/{name}": shape for kind in (MASTER, *MOMENTS) for name, shape in shapes.items()}
    found = {name: part.shape for name, part in tensors.items()}
    if found != expected:
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise CheckpointError(f"{path}: {names[0]} does not fit the model that is trained; remove {path.parent} and run again")
    return tensors


def _parts(engine: Any, kind: str) -> Any:
    """Yield (name, whole tensor of this kind) of every trained parameter; a tensor is valid until the next one is requested."""
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
    """Copy this process's part of ``whole`` to where ZeRO keeps it."""
    import deepspeed.utils as zero

    if hasattr(parameter, "ds_id"):
        # DeepSpeed 0.19.8's setters of whole tensors ignore the padding that makes parts equal.
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
    """Return whether ZeRO has divided this parameter's master and moments; otherwise the parameter has a master of its own."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _masters(engine: Any) -> list[torch.Tensor]:
    """Return AdamW's tensors in this process: without ZeRO one for each parameter, in their order, otherwise flat partitions."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 takes them out of the groups between steps
    return list(flat) if flat is not None else [master for group in engine.basic_optimizer.param_groups for master in group["params"]]


def _begin(engine: Any, applied: int) -> None:
    """Give AdamW the state that its first step would otherwise make, and let ZeRO link it."""
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


def shard_parameters(parameters: list[nn.Parameter], *, like: Any, train: TrainSpec) -> None:
    """Divide whole ``parameters`` among all workers under ZeRO stage 3, with the settings of parameter ``like`` or else of ``train``."""
    if like is not None:
        like.convert_to_zero_parameters(param_list=parameters)
        return
    import deepspeed

    workers = torch.distributed.get_world_size()
    layout = batch_layout(train, num_workers=workers, even=False)
    config = deepspeed_config(train, layout=layout, stage=3, world_size=workers)
    deepspeed.zero.Init(module=nn.ParameterList(parameters), config_dict_or_path=config)
