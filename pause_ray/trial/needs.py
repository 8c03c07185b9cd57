"""Estimates what a training and its scoring take on given GPUs: memory, time, tokens, money, and the smallest sufficient cluster.

From sizes and a table of GPUs alone; loads nothing. Times are those of computing and of moving weights, with assumptions that are
named where they are used (``Site``, ``HOST_LINK_GB_PER_SECOND``); starting, loading, validation and checkpoints come on top.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, Spec, read_yaml
from pause_ray.evaluation.prefix_plan import Forecast, PlannedPrompt, forecast, new_tokens, split_for_actors
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
"""Assumed between a GPU and its machine's memory, where offloaded weights wait: PCIe 4.0, as it is reached."""
LOCAL_DISK_GB_PER_SECOND = 5.0
"""Assumed of a machine's local disk, for all its GPUs together."""
_MEMORY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(GB|GiB)?", re.IGNORECASE)


class GpuSpec(Spec):
    """One kind of GPU."""

    name: str = Field(min_length=1)
    """The name for ``--gpu``."""
    memory_gb: float = Field(gt=0)
    """10⁹ bytes."""
    bf16_tflops: float = Field(gt=0)
    """Dense 16-bit matrix operations per second at most, in 10¹²."""
    memory_gb_per_second: float = Field(gt=0)
    """Bandwidth of its memory."""
    link_gb_per_second: float = Field(gt=0)
    """To the other GPUs of its machine, one way."""
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
        """The GPU of that name; without one, the first with that much memory, or the first with 80 GB.

        A given ``memory_gb`` replaces that of the table.

        Raises:
            SpecError: none of that name, or none of that size.
        """
        wanted = 80 if memory_gb is None else memory_gb
        if name is not None:
            found = next((gpu for gpu in self.gpus if gpu.name.lower() == name.lower()), None)
        else:
            found = next((gpu for gpu in self.gpus if gpu.memory_gb == wanted), None)
        if found is None:
            asked = f"--gpu {name}" if name is not None else f"--gpu-memory {wanted:g}GB"
            known = ", ".join(f"{gpu.name} ({gpu.memory_gb:g} GB)" for gpu in self.gpus)
            raise SpecError(f"{asked}: not in the table of GPUs, which has {known}; name one of them with --gpu, or add yours to the table")
        return found if memory_gb is None else found.model_copy(update={"memory_gb": memory_gb})


def read_gpus(path: Path) -> GpuTable:
    """The table in a YAML file.

    Raises:
        SpecError: no such file, or a field that breaks a rule.
    """
    return GpuTable.parse(read_yaml(path), origin=str(path))


def parse_memory(text: str) -> float:
    """``80GB``, ``80`` or ``74.5GiB`` in 10⁹ bytes.

    Raises:
        SpecError: anything else.
    """
    found = _MEMORY.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise SpecError(f"--gpu-memory {text}: expected a size such as 80GB or 40GiB")
    return float(found[1]) * (2**30 / 1e9 if (found[2] or "").lower() == "gib" else 1)


@dataclass(frozen=True, kw_only=True)
class Site:
    """The GPUs that are planned for, and assumptions about them."""

    gpu: GpuSpec
    gpus: int
    gpus_per_node: int
    utilization: float
    """Assumed share of the GPUs' peak that matrix operations reach."""
    network_gb_per_second: float
    """Assumed between machines, of each machine."""

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

    prompts: Forecast
    answer_tokens: int
    """The most that an answer has."""
    kv_bytes: float
    """Keys and values of a prompt, on average: what each token of an answer reads besides the weights."""

    @property
    def flops(self) -> float:
        """The operations of all prompts and of answers of full length."""
        return self.prompts.prefill_flops + self.prompts.num_prompts * self.prompts.answer_flops


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Time and money of one part of the work."""

    tokens: int
    """Training: of all steps' rows. Scoring: those computed, after what prompts share."""
    flops: float
    """With what is computed again in the backward pass, and answers of full length."""
    seconds: float
    cost: float
    bound_by: str
    """The bottleneck: ``computing``; ``moving weights`` over the slowest link; ``writing answers``, token by token."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One model's training and scoring on one site."""

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
    training: Spent | None
    evaluation: Spent | None
    """None where nothing is scored here, or where all GPUs together cannot hold the model."""
    gpus_per_model: int
    """GPUs that hold one copy of the model while it is scored; 0 where nothing is scored here."""
    smallest: int | None
    """Fewest GPUs that do both; None where not even ``MOST_GPUS`` do."""

    def as_json(self) -> JsonObject:
        """Plain data."""
        memory = None
        if self.memory is not None:
            sums = {"gpu_bytes": self.memory.worker_bytes, "host_bytes": self.memory.host_bytes}
            memory = {"stage": self.memory.stage, **sums, "gpu_parts": self.memory.worker, "host_parts": self.memory.host}
        train = None if self.train is None else self.train.resolved() | {"rows_per_step": self.train.rows_per_step}
        return asdict(self) | {"memory": memory, "train": train}


def make_plan(
    label: str, *, shape: ModelShape, train: TrainSpec | None, rows: Rows, grid: Grid | None, site: Site, rows_may_grow: bool = False
) -> Plan:
    """Plan one training (or none) and the scoring of one grid (or none).

    Args:
        label: For the reader.
        shape: Of the model.
        train: How it is fine-tuned.
        rows: On what.
        grid: What is asked.
        site: Where.
        rows_may_grow: In the search for the smallest cluster, give every GPU a row of each step, although that is another training.

    Raises:
        SpecError: rows per step, or tokens of a row, that the GPUs cannot share, or an adapter that does not fit the model.
    """
    memory = remedy = training = None
    if train is not None:
        train.lora.check_rank(shape.hidden_size)
        train.lora.check_targets(shape.linear_layers.keys())
        check_heads(train, num_heads=shape.num_heads)
        batch_layout(train, num_workers=site.gpus)
        memory, remedy = _memory(train, shape=shape, rows=rows, site=site)
        training = _training(train, shape=shape, rows=rows, site=site, stage=memory.stage)
    copies = 0 if grid is None else math.ceil((grid.prompts.weight_bytes + grid.prompts.kv_bytes) / (ROOM * site.memory_bytes))
    return Plan(
        label=label,
        parameters=shape.num_parameters,
        trained_parameters=_trained(train, shape) if train else 0,
        train=train,
        longest_row_tokens=rows.longest_tokens,
        memory=memory,
        remedy=remedy,
        training=training,
        evaluation=_evaluation(grid, gpus_per_model=copies, site=site) if grid else None,
        gpus_per_model=copies,
        smallest=_smallest(train, shape=shape, rows=rows, site=site, least=max(1, copies), rows_may_grow=rows_may_grow),
    )


def _trained(train: TrainSpec, shape: ModelShape) -> int:
    return shape.lora_parameters(train.lora.rank, targets=train.lora.targets, dora=train.lora.dora)


def _memory(train: TrainSpec, *, shape: ModelShape, rows: Rows, site: Site) -> tuple[MemoryPlan, str | None]:
    workers = Workers(number=site.gpus, per_node=site.gpus_per_node)
    longest, memory_bytes = rows.longest_tokens, site.memory_bytes
    found = cheapest_plan(
        train, shape=shape, workers=workers, memory_bytes=memory_bytes, longest_row_tokens=longest, loss_tokens=rows.loss_tokens
    )
    if found is not None:
        return found, None
    stage = possible_stages(train)[-1]
    least = plan_memory(train, shape=shape, workers=workers, stage=stage, longest_row_tokens=longest, loss_tokens=rows.loss_tokens)
    return least, what_would_fit(train, shape=shape, workers=workers, memory_bytes=memory_bytes, longest_row_tokens=longest)


def step_work(train: TrainSpec, *, shape: ModelShape, rows: Rows) -> tuple[int, int]:
    """Tokens and operations of one optimizer step, with what is computed again in the backward pass."""
    tokens = round(rows.mean_tokens * train.rows_per_step)
    documents = [round(rows.mean_tokens)] * train.rows_per_step
    learned = min(rows.loss_tokens * train.rows_per_step, tokens)
    return tokens, step_flops(shape, document_tokens=documents, loss_tokens=learned, recomputed=train.gradient_checkpointing)


def _training(train: TrainSpec, *, shape: ModelShape, rows: Rows, site: Site, stage: int) -> Spent:
    tokens, computed = step_work(train, shape=shape, rows=rows)
    computing = computed / (site.gpus * site.flops_per_second)
    moving = _moving_seconds(train, shape=shape, site=site) if stage == 3 else 0.0
    seconds = train.max_steps * max(computing, moving)
    return Spent(
        tokens=tokens * train.max_steps,
        flops=computed * train.max_steps,
        seconds=seconds,
        cost=site.cost(seconds),
        bound_by="computing" if computing >= moving else "moving weights",
    )


def _moving_seconds(train: TrainSpec, *, shape: ModelShape, site: Site) -> float:
    """Stage 3 brings all weights to every GPU on the way there and back, in every pass of a step; each GPU fetches its share first."""
    nodes = math.ceil(site.gpus / site.gpus_per_node)
    gigabytes = shape.weight_bytes(train.precision, train.quantize) / 1e9 * 2 * batch_layout(train, num_workers=site.gpus).passes
    fetched = {"none": 0.0, "cpu": gigabytes / site.gpus / HOST_LINK_GB_PER_SECOND, "nvme": gigabytes / nodes / LOCAL_DISK_GB_PER_SECOND}
    within = gigabytes / site.gpu.link_gb_per_second if site.gpus > 1 else 0.0
    between = gigabytes * (nodes - 1) / nodes / site.network_gb_per_second
    return max(fetched[train.zero.offload_parameters], within, between)


def _evaluation(grid: Grid, *, gpus_per_model: int, site: Site) -> Spent | None:
    """Prompts by operations, answers by the memory that each of their tokens reads; None where the model does not fit.

    Answers are written one at a time. A model that is spread over several GPUs computes on one of them at a time.
    """
    copies, prompts = site.gpus // gpus_per_model, grid.prompts
    if not copies:
        return None
    answer_tokens = prompts.num_prompts * grid.answer_tokens
    reading = answer_tokens * (prompts.weight_bytes + grid.kv_bytes) / (site.gpu.memory_gb_per_second * 1e9)
    computing = prompts.prefill_flops / site.flops_per_second
    seconds = (computing + reading) / copies
    return Spent(
        tokens=prompts.prefilled_tokens,
        flops=grid.flops,
        seconds=seconds,
        cost=site.cost(seconds),
        bound_by="computing" if computing >= reading else "writing answers",
    )


def _smallest(train: TrainSpec | None, *, shape: ModelShape, rows: Rows, site: Site, least: int, rows_may_grow: bool) -> int | None:
    for number in _cluster_sizes(site.gpus_per_node):
        if number < least:
            continue
        if train is None:
            return number
        groups, spare = divmod(number, train.sequence_parallel)
        if rows_may_grow and groups > train.rows_per_step:
            train = train.model_copy(update={"micro_batch_size": 1, "gradient_accumulation_steps": groups})
        if spare or not groups or train.rows_per_step % groups:
            continue
        workers = Workers(number=number, per_node=site.gpus_per_node)
        if cheapest_plan(
            train,
            shape=shape,
            workers=workers,
            memory_bytes=site.memory_bytes,
            longest_row_tokens=rows.longest_tokens,
            loss_tokens=rows.loss_tokens,
        ):
            return number
    return None


def _cluster_sizes(per_node: int) -> Sequence[int]:
    """Up to one machine any number, then whole machines."""
    return [*range(1, per_node), *range(per_node, MOST_GPUS + 1, per_node)]


def grid_of(suite: SuiteSpec, *, shape: ModelShape, site: Site, dtype: str) -> Grid:
    """About what scoring takes, from a suite's lengths and positions without its texts: pauses and the chat around are left out."""
    planned = [
        PlannedPrompt(prompt=0, keep_tokens=cell.context_tokens - max(1, round(new)), num_tokens=cell.context_tokens)
        for run in split_for_actors(cells(suite, identity="", replicate=0, seed=0), num_actors=site.gpus)
        for cell, new in zip(run, new_tokens(run), strict=True)
    ]
    prompts = forecast(
        planned,
        shape,
        chunk_tokens=default_chunk_tokens(on_gpu=True),
        decode_batch=default_decode_batch(dtype=dtype, quantize=None),
        max_new_tokens=suite.max_new_tokens,
        dtype=dtype,
    )
    return grid_of_prompts(prompts, shape=shape, answer_tokens=suite.max_new_tokens, dtype=dtype)


def grid_of_prompts(prompts: Forecast, *, shape: ModelShape, answer_tokens: int, dtype: str) -> Grid:
    """The scoring of ``prompts``, with answers of ``answer_tokens``, keys and values in ``dtype``."""
    return Grid(prompts, answer_tokens, shape.kv_bytes_per_token(BYTES[dtype]) * prompts.asked_tokens / prompts.num_prompts)
