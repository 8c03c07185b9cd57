"""What a training and its scoring take on given GPUs: memory, time, tokens, money, and the smallest sufficient cluster.

It is computed from sizes and a table of GPUs and loads nothing. Times include computing and moving weights, by assumptions in
``Hardware``, ``HOST_LINK_GB_PER_SECOND`` and ``LOCAL_DISK_GB_PER_SECOND``, but not starting, loading, validation and checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from pydantic import Field

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, Spec
from pause_ray.evaluation.prefix_plan import PlannedPrompt, PrefillForecast, forecast_prefill, new_tokens, split_for_actors
from pause_ray.evaluation.suite import SuiteSpec, cells
from pause_ray.inference.engine import default_chunk_tokens, default_decode_batch
from pause_ray.models.shape import BYTES, ModelShape
from pause_ray.training.batching import batch_layout, check_heads
from pause_ray.training.memory import ROOM, MemoryPlan, Workers, cheapest_plan, plan_memory, possible_stages, what_would_fit
from pause_ray.training.metrics import step_flops
from pause_ray.training.spec import TrainSpec

MOST_GPUS = 1024
"""The largest cluster that is considered, in GPUs."""
HOST_LINK_GB_PER_SECOND = 25.0
"""Assumed speed between a GPU and its machine's memory, which holds offloaded weights: PCIe 4.0 in practice."""
LOCAL_DISK_GB_PER_SECOND = 5.0
"""Assumed speed of a machine's local disk, for all its GPUs together."""


class GpuSpec(Spec):
    """One kind of GPU."""

    name: str = Field(min_length=1)
    """The name for ``--gpu``."""
    memory_gb: float = Field(gt=0)
    """Memory in 10⁹ bytes."""
    bf16_tflops: float = Field(gt=0)
    """Peak speed of dense 16-bit matrix operations, in 10¹² per second."""
    memory_gb_per_second: float = Field(gt=0)
    """Bandwidth of its memory."""
    link_gb_per_second: float = Field(gt=0)
    """Bandwidth to the other GPUs of its machine, one way."""
    price_per_hour: float = Field(ge=0)
    """The price of one GPU."""
    currency: str = "USD"
    """The currency of the price."""
    price_source: str = Field(min_length=1)
    """The page on which the price was seen."""
    price_date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    """The date on which it was seen."""


class GpuTable(Spec):
    """A file of GPUs (``cluster/gpus.yaml``)."""

    gpus: tuple[GpuSpec, ...] = Field(min_length=1)
    """The GPUs, in the order in which they are preferred where no name is given."""

    def choose(self, *, name: str | None, memory_gb: float | None) -> GpuSpec:
        """Return the GPU of that name; without one, the first with that much memory, or the first with 80 GB.

        A given ``memory_gb`` replaces that of the table.

        Raises:
            SpecError: The table has no GPU of that name or size.
        """
        wanted = 80 if memory_gb is None else memory_gb
        for gpu in self.gpus:
            if gpu.memory_gb == wanted if name is None else gpu.name.lower() == name.lower():
                return gpu if memory_gb is None else gpu.model_copy(update={"memory_gb": memory_gb})
        option = f"--gpu {name}" if name is not None else f"--gpu-memory {wanted:g}GB"
        known = ", ".join(f"{gpu.name} ({gpu.memory_gb:g} GB)" for gpu in self.gpus)
        raise SpecError(f"{option}: not in the table of GPUs, which has {known}; name one of them with --gpu, or add yours to the table")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The GPUs that are planned for, and assumptions about them."""

    gpu: GpuSpec
    gpus: int
    gpus_per_node: int
    utilization: float
    """Assumed share of the GPUs' peak that matrix operations reach."""
    network_gb_per_second: float
    """Assumed network bandwidth of each machine."""

    @property
    def memory_bytes(self) -> int:
        """The memory of one GPU."""
        return round(self.gpu.memory_gb * 1e9)

    @property
    def flops_per_second(self) -> float:
        """The assumed speed of one GPU."""
        return self.gpu.bf16_tflops * 1e12 * self.utilization

    def cost(self, seconds: float) -> float:
        """Return the price of all GPUs for this time, in the table's currency."""
        return seconds / 3600 * self.gpus * self.gpu.price_per_hour


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Sizes of the training sequences."""

    longest_tokens: int
    mean_tokens: float
    loss_tokens: int
    """The number of tokens of one sequence that have a loss."""


@dataclass(frozen=True)
class Grid:
    """The scoring of one trial."""

    prompts: PrefillForecast
    answer_tokens: int
    """The most tokens that an answer has."""
    kv_bytes: float
    """Keys and values of an average prompt, which each token of its answer reads besides the weights."""

    @property
    def flops(self) -> float:
        """The operations of all prompts and of answers of full length."""
        return self.prompts.prefill_flops + self.prompts.num_prompts * self.prompts.answer_flops


@dataclass(frozen=True, kw_only=True)
class PlannedWork:
    """Time and money of a training or of a scoring."""

    tokens: int
    """Training: tokens of the rows of all steps. Scoring: tokens that are computed, after what prompts share."""
    flops: float
    """Operations, including those that the backward pass computes again, and answers of full length."""
    seconds: float
    cost: float
    bound_by: str
    """The bottleneck: ``computing``; ``moving weights`` over the slowest link; ``writing answers``, token by token."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One model's training and scoring on given hardware."""

    label: str
    parameters: int
    trained_parameters: int
    """The adapter's parameters, without a marker's row."""
    train: TrainSpec | None
    longest_row_tokens: int
    memory: MemoryPlan | None
    """None where nothing is trained."""
    remedy: str | None
    """A change that would make the training fit; None where it fits."""
    training: PlannedWork | None
    evaluation: PlannedWork | None
    """None where nothing is scored here, or where all GPUs together cannot hold the model."""
    gpus_per_model: int
    """GPUs that hold one copy of the model while it is scored; 0 where nothing is scored here."""
    smallest: int | None
    """Fewest GPUs that can do both; None where not even ``MOST_GPUS`` can."""

    def misfits(self, hardware: Hardware) -> list[str]:
        """Return sentences that say what does not fit on the GPUs, and what would."""
        found = [] if self.remedy is None else [f"the training does not fit; {self.remedy}"]
        if self.gpus_per_model > hardware.gpus:
            needed = f"scoring needs {self.gpus_per_model} GPUs of this size for one copy of the model, and there are {hardware.gpus}"
            found.append(f"{needed}; give more (--gpus), or larger ones (--gpu)")
        return found

    def as_json(self) -> JsonObject:
        """Return the plan as plain data."""
        memory = None
        if self.memory is not None:
            sums = {"gpu_bytes": self.memory.worker_bytes, "host_bytes": self.memory.host_bytes}
            memory = {"stage": self.memory.stage, **sums, "gpu_parts": self.memory.worker, "host_parts": self.memory.host}
        train = None if self.train is None else self.train.resolved() | {"rows_per_step": self.train.rows_per_step}
        return asdict(self) | {"memory": memory, "train": train}


def make_plan(
    label: str,
    *,
    shape: ModelShape,
    train: TrainSpec | None,
    rows: Rows,
    grid: Grid | None,
    hardware: Hardware,
    rows_may_grow: bool = False,
) -> Plan:
    """Plan one training (or none) and the scoring of one grid (or none).

    In the search for the smallest cluster, ``rows_may_grow`` gives every GPU a row of each step, although that is another training.

    Raises:
        SpecError: The GPUs cannot share the rows of a step or the tokens of a row, or the adapter does not fit the model.
    """
    memory = remedy = training = None
    if train is not None:
        train.lora.check_rank(shape.hidden_size)
        train.lora.check_targets(shape.linear_layers.keys())
        check_heads(train, num_heads=shape.num_heads)
        batch_layout(train, num_workers=hardware.gpus)
        memory, remedy = _memory(train, shape=shape, rows=rows, hardware=hardware)
        training = _training(train, shape=shape, rows=rows, hardware=hardware, stage=memory.stage)
    gpus_per_model = 0 if grid is None else math.ceil((grid.prompts.weight_bytes + grid.prompts.kv_bytes) / (ROOM * hardware.memory_bytes))
    return Plan(
        label=label,
        parameters=shape.num_parameters,
        trained_parameters=shape.lora_parameters(train.lora.rank, targets=train.lora.targets, dora=train.lora.dora) if train else 0,
        train=train,
        longest_row_tokens=rows.longest_tokens,
        memory=memory,
        remedy=remedy,
        training=training,
        evaluation=_scoring(grid, gpus_per_model=gpus_per_model, hardware=hardware) if grid else None,
        gpus_per_model=gpus_per_model,
        smallest=_smallest(train, shape=shape, rows=rows, hardware=hardware, least=max(1, gpus_per_model), rows_may_grow=rows_may_grow),
    )


def _cheapest(train: TrainSpec, *, shape: ModelShape, rows: Rows, hardware: Hardware, gpus: int) -> MemoryPlan | None:
    workers, longest = Workers(number=gpus, per_node=hardware.gpus_per_node), rows.longest_tokens
    memory_bytes, loss_tokens = hardware.memory_bytes, rows.loss_tokens
    return cheapest_plan(
        train, shape=shape, workers=workers, memory_bytes=memory_bytes, longest_row_tokens=longest, loss_tokens=loss_tokens
    )


def _memory(train: TrainSpec, *, shape: ModelShape, rows: Rows, hardware: Hardware) -> tuple[MemoryPlan, str | None]:
    """Return the first stage that fits; if none does, the one with the least memory, and a remedy."""
    found = _cheapest(train, shape=shape, rows=rows, hardware=hardware, gpus=hardware.gpus)
    if found is not None:
        return found, None
    workers = Workers(number=hardware.gpus, per_node=hardware.gpus_per_node)
    longest, stage = rows.longest_tokens, possible_stages(train)[-1]
    least = plan_memory(train, shape=shape, workers=workers, stage=stage, longest_row_tokens=longest, loss_tokens=rows.loss_tokens)
    return least, what_would_fit(train, shape=shape, workers=workers, memory_bytes=hardware.memory_bytes, longest_row_tokens=longest)


def step_work(train: TrainSpec, *, shape: ModelShape, rows: Rows) -> tuple[int, int]:
    """Return the tokens and operations of one optimizer step, including those that the backward pass computes again."""
    tokens = round(rows.mean_tokens * train.rows_per_step)
    documents = [round(rows.mean_tokens)] * train.rows_per_step
    with_loss = min(rows.loss_tokens * train.rows_per_step, tokens)
    return tokens, step_flops(shape, document_tokens=documents, loss_tokens=with_loss, recomputed=train.gradient_checkpointing)


def _training(train: TrainSpec, *, shape: ModelShape, rows: Rows, hardware: Hardware, stage: int) -> PlannedWork:
    tokens, flops = step_work(train, shape=shape, rows=rows)
    computing = flops / (hardware.gpus * hardware.flops_per_second)
    moving = _moving_seconds(train, shape=shape, hardware=hardware) if stage == 3 else 0.0
    seconds = train.max_steps * max(computing, moving)
    return PlannedWork(
        tokens=tokens * train.max_steps,
        flops=flops * train.max_steps,
        seconds=seconds,
        cost=hardware.cost(seconds),
        bound_by="computing" if computing >= moving else "moving weights",
    )


def _moving_seconds(train: TrainSpec, *, shape: ModelShape, hardware: Hardware) -> float:
    """Return the time of one step in which stage 3 gathers all weights on every GPU, forward and backward in each of its passes."""
    gpus, nodes = hardware.gpus, math.ceil(hardware.gpus / hardware.gpus_per_node)
    gigabytes = shape.weight_bytes(train.precision, train.quantize) / 1e9 * 2 * batch_layout(train, num_workers=gpus).passes
    cpu, nvme = gigabytes / gpus / HOST_LINK_GB_PER_SECOND, gigabytes / nodes / LOCAL_DISK_GB_PER_SECOND
    within = gigabytes / hardware.gpu.link_gb_per_second if gpus > 1 else 0.0
    between = gigabytes * (nodes - 1) / nodes / hardware.network_gb_per_second
    return max({"none": 0.0, "cpu": cpu, "nvme": nvme}[train.zero.offload_parameters], within, between)


def _scoring(grid: Grid, *, gpus_per_model: int, hardware: Hardware) -> PlannedWork | None:
    """Return the time of prompts, by operations, and of answers, by the memory that each token reads; None if the model does not fit.

    Answers are written one at a time. A model that is spread over several GPUs computes on one of them at a time.
    """
    copies, prompts = hardware.gpus // gpus_per_model, grid.prompts
    if not copies:
        return None
    answer_tokens = prompts.num_prompts * grid.answer_tokens
    reading = answer_tokens * (prompts.weight_bytes + grid.kv_bytes) / (hardware.gpu.memory_gb_per_second * 1e9)
    computing = prompts.prefill_flops / hardware.flops_per_second
    seconds = (computing + reading) / copies
    return PlannedWork(
        tokens=prompts.prefilled_tokens,
        flops=grid.flops,
        seconds=seconds,
        cost=hardware.cost(seconds),
        bound_by="computing" if computing >= reading else "writing answers",
    )


def _smallest(train: TrainSpec | None, *, shape: ModelShape, rows: Rows, hardware: Hardware, least: int, rows_may_grow: bool) -> int | None:
    per_node = hardware.gpus_per_node
    sizes: list[int] = [*range(1, per_node), *range(per_node, MOST_GPUS + 1, per_node)]  # parts of a machine, then whole ones
    for gpus in [size for size in sizes if size >= least]:
        if train is None:
            return gpus
        groups, spare = divmod(gpus, train.sequence_parallel)
        if rows_may_grow and groups > train.rows_per_step:
            train = train.model_copy(update={"micro_batch_size": 1, "gradient_accumulation_steps": groups})
        can_share = groups and not spare and train.rows_per_step % groups == 0
        if can_share and _cheapest(train, shape=shape, rows=rows, hardware=hardware, gpus=gpus):
            return gpus
    return None


def grid_of(suite: SuiteSpec, *, shape: ModelShape, hardware: Hardware, dtype: str) -> Grid:
    """Estimate the scoring from a suite's lengths and positions, without its texts, pauses and chat."""
    planned = [
        PlannedPrompt(prompt=0, keep_tokens=cell.context_tokens - max(1, round(new)), num_tokens=cell.context_tokens)
        for run in split_for_actors(cells(suite, identity="", replicate=0, seed=0), num_actors=hardware.gpus)
        for cell, new in zip(run, new_tokens(run), strict=True)
    ]
    prompts = forecast_prefill(
        planned,
        shape,
        chunk_tokens=default_chunk_tokens(on_gpu=True),
        decode_batch=default_decode_batch(dtype=dtype, quantize=None),
        max_new_tokens=suite.max_new_tokens,
        dtype=dtype,
    )
    return grid_of_prompts(prompts, shape=shape, answer_tokens=suite.max_new_tokens, dtype=dtype)


def grid_of_prompts(prompts: PrefillForecast, *, shape: ModelShape, answer_tokens: int, dtype: str) -> Grid:
    """Return the scoring of prompts that are planned, with keys and values in ``dtype``."""
    return Grid(prompts, answer_tokens, shape.kv_bytes_per_token(BYTES[dtype]) * prompts.asked_tokens / prompts.num_prompts)
