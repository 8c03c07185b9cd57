"""Memory of a fine-tuning, part by part, computed from sizes alone. Needs no torch, no model and no GPU.

What a step holds is what autograd keeps of a decoder layer with frozen weights and adapters (every norm's float32 input, the
adapters' inputs, queries, keys, values and their result, the parts of the MLP), the trained weights with gradients and AdamW's
state as DeepSpeed's stages divide them, the logits of one chunk of learned tokens, and buffers. Peaks measured for the small
model are within 15 % of it (``tests/real/test_memory.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

from pause_ray.core.errors import SpecError
from pause_ray.models.shape import BYTES, ModelShape
from pause_ray.training.batching import batch_layout
from pause_ray.training.spec import TrainSpec
from pause_ray.training.zero_config import LIVE_BUCKETS, WHOLE_ELEMENTS

ROOM = 0.9
"""Share of a GPU that a plan may fill: the rest is lost between the blocks of torch's allocator."""
DOUBT = 0.15
"""Relative error that a plan may have. A training is refused only if it would not fit with so much less memory either."""
CHUNK_LOGITS = 2**24
"""Logits that ``training.loss`` computes at a time: 64 MiB in float32."""
BLOCK = 512
"""Queries at a time in layers whose attention needs a mask: one mask of block × (window + block) then serves the whole document."""
HEAP_HOLES = 0.85
"""Memory lost in holes of the heap on CPUs, as a share of the activations: glibc cannot reuse a freed aligned block for a request of
the same size. Measured with glibc 2.36; ``MALLOC_MMAP_THRESHOLD_=262144`` avoids the holes and costs time."""
GPU_RUNTIME_BYTES = 1_000_000_000
"""Estimate for CUDA context, kernels, cuBLAS workspace and NCCL's buffers in each GPU."""
GPU_PROCESS_BYTES = 3_000_000_000
"""Estimate for the resident memory of one worker with torch, CUDA, DeepSpeed and Ray loaded."""
CPU_PROCESS_BYTES = 700_000_000
"""Measured resident memory of one worker without CUDA."""
NVME_BUFFER_BYTES = 1_000_000_000
"""DeepSpeed's page-locked buffers of one worker that moves parameters to a local disk: five of 10⁸ 16-bit numbers."""
PARTS = (
    *("weights", "gathered weights", "adapter", "gradients", "optimizer"),
    *("activations", "heap holes", "logits", "buffers", "runtime"),
)
"""Parts of a worker's memory; a plan contains those that are not empty."""
HOST_PARTS = ("processes", "training", "loading", "offloaded")
"""Parts of a machine's memory. ``loading`` is over before ``offloaded`` begins."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Number and kind of training workers."""

    number: int
    per_node: int
    on_gpu: bool = True
    """Whether each worker has a GPU; otherwise workers are processes on CPUs."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by part. Parts do not overlap, and all of them exist at the peak unless their docs say otherwise."""

    stage: int
    """ZeRO stage."""
    worker: dict[str, int]
    """Parts in one GPU; for workers on CPUs, in one process, without what its imports take."""
    host: dict[str, int]
    """Parts in one machine. ``loading`` is over before ``offloaded`` begins."""
    reading_bytes: int = 0
    """Peak of a worker on a CPU under stage 3 before training begins: weights twice, in the mapped files and sharded, and one table in
    transit. The system reclaims the files' pages when they are needed."""

    @property
    def worker_bytes(self) -> int:
        """Peak memory of one worker."""
        return max(sum(self.worker.values()), self.reading_bytes)

    @property
    def host_bytes(self) -> int:
        """Peak memory of one machine."""
        phases = ("loading", "offloaded")
        return sum(size for part, size in self.host.items() if part not in phases) + max(self.host.get(part, 0) for part in phases)


def plan_memory(
    train: TrainSpec, *, shape: ModelShape, workers: Workers, stage: int, longest_row_tokens: int, loss_tokens: int | None = None
) -> MemoryPlan:
    """Return what one worker and one machine hold at the peak under ZeRO ``stage``, whatever the spec says.

    ``longest_row_tokens`` includes pauses; ``loss_tokens`` are those with a loss in one row, None where all may have one.
    """
    rows = batch_layout(train, num_workers=max(workers.number, train.sequence_parallel), even=False).micro_rows
    tokens = math.ceil(rows * longest_row_tokens / train.sequence_parallel)
    with_loss = tokens if loss_tokens is None else min(tokens, rows * loss_tokens)
    sizes = _Sizes(train, shape, workers, stage, tokens=tokens, loss_tokens=with_loss, longest=longest_row_tokens)
    return MemoryPlan(stage=stage, worker=sizes.worker(), host=sizes.host(), reading_bytes=sizes.reading())


@dataclass(frozen=True)
class _Sizes:
    """Computes the parts of a plan, in bytes."""

    train: TrainSpec
    shape: ModelShape
    workers: Workers
    stage: int
    _: KW_ONLY
    tokens: int
    """Tokens in one worker's forward pass."""
    loss_tokens: int
    """Those of ``tokens`` that have a loss."""
    longest: int
    """Tokens of the longest row, whose tokens several workers may share."""

    def worker(self) -> dict[str, int]:
        activations = self._activations
        sizes = (
            0 if self._parameters_offloaded else self._weights_share,
            self._gathered,
            self._adapter,
            self._gradients,
            0 if self._optimizer_offloaded else self._optimizer,
            activations,
            0 if self.workers.on_gpu else round(HEAP_HOLES * activations),
            self._logits,
            self._buffers,
            GPU_RUNTIME_BYTES if self.workers.on_gpu else 0,
        )
        return {part: size for part, size in zip(PARTS, sizes, strict=True) if size}

    def host(self) -> dict[str, int]:
        here = min(self.workers.per_node, self.workers.number)
        if not self.workers.on_gpu:
            return {"processes": here * CPU_PROCESS_BYTES, "training": here * max(sum(self.worker().values()), self.reading())}
        parts = {"processes": here * GPU_PROCESS_BYTES, "loading": here * self._loading, "offloaded": here * self._offloaded}
        return {part: size for part, size in parts.items() if size}

    def reading(self) -> int:
        if self.workers.on_gpu or self.stage < 3:
            return 0
        return self._weights + self._weights_share + self.shape.vocab_size * self.shape.hidden_size * self._value

    @property
    def _value(self) -> int:
        return BYTES[self.train.precision]

    @property
    def _weights(self) -> int:
        norms = self.shape.num_layers * (self.shape.norm_weights + self.shape.bias_weights) * self._value
        return self.shape.weight_bytes(self.train.precision, self.train.quantize) + norms

    @property
    def _weights_share(self) -> int:
        return math.ceil(self._weights / self.workers.number) if self.stage == 3 else self._weights

    @property
    def _parameters_offloaded(self) -> bool:
        return self.train.zero.offload_parameters != "none" and self.stage == 3

    @property
    def _optimizer_offloaded(self) -> bool:
        return self.train.zero.offload_optimizer != "none" and self.stage > 0

    @property
    def _gathered(self) -> int:
        if self.stage < 3 or (self.workers.number == 1 and not self._parameters_offloaded):
            return 0
        return min(self._weights, LIVE_BUCKETS * self.train.zero.bucket_elements * self._value)

    @property
    def _targets(self) -> dict[str, tuple[int, int]]:
        chosen = self.train.lora.targets
        return {name: size for name, size in self.shape.linear_layers.items() if chosen is None or name in chosen}

    @property
    def _trained(self) -> int:
        return self.shape.lora_parameters(self.train.lora.rank, targets=self.train.lora.targets, dora=self.train.lora.dora)

    @property
    def _adapter(self) -> int:
        if self.stage < 3:
            return self._trained * self._value
        matrices = [self.train.lora.rank * width for size in self._targets.values() for width in size]
        whole = self.shape.num_layers * sum(size for size in matrices if size <= WHOLE_ELEMENTS)
        return (whole + math.ceil((self._trained - whole) / self.workers.number)) * self._value

    @property
    def _gradients(self) -> int:
        return math.ceil(self._trained / (self.workers.number if self.stage >= 2 else 1)) * self._value

    @property
    def _optimizer(self) -> int:
        """Two moments; where the trained weights are no float32 master themselves, also a master and float32 gradients."""
        own_master = self.stage == 0 and self.train.precision == "float32"
        per_weight = 8 if own_master else 16
        return math.ceil(self._trained / (self.workers.number if self.stage else 1)) * per_weight

    @property
    def _activations(self) -> int:
        """Activations kept of all layers, and those that one layer needs temporarily."""
        shape, value = self.shape, self._value
        sizes = {masked: self._kept_of_a_layer(masked=masked) for masked in (False, True)}
        layers = [sizes[self._masked(window)] for window in shape.windows]
        kept = shape.num_layers * shape.hidden_size * value + max(layers) if self.train.gradient_checkpointing else sum(layers)
        widest = max(outputs for _, outputs in shape.linear_layers.values())
        top = shape.hidden_size * (4 + value)
        dequantized = max(inputs * outputs for inputs, outputs in shape.linear_layers.values()) if self.train.quantize else 0
        heads = math.ceil(shape.num_heads / self.train.sequence_parallel)
        scores = heads * min(BLOCK, self.longest) * self.longest * (value + 8) if shape.caps_scores else 0
        return self.tokens * (kept + top + 3 * widest * value) + dequantized * value + scores

    @property
    def _logits(self) -> int:
        """Logits of one chunk in the model's precision and in float32, and gradients of all hidden states with a loss."""
        rows = min(self.loss_tokens, max(1, CHUNK_LOGITS // self.shape.vocab_size))
        return rows * self.shape.vocab_size * (self._value + 8) + 2 * self.loss_tokens * self.shape.hidden_size * self._value

    def _masked(self, window: int | None) -> bool:
        """Return whether a layer's attention needs a mask, and so one key and value for every query head."""
        return self.shape.caps_scores or (window is not None and window < self.longest)

    def _kept_of_a_layer(self, *, masked: bool) -> int:
        """Return the bytes per token that autograd keeps of one layer for the backward pass."""
        shape, lora, value = self.shape, self.train.lora, self._value
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        norms = 4 * (shape.num_norms * shape.hidden_size + (queries + keys if shape.normalizes_heads else 0))  # float32 always
        attention = value * (2 * queries + 2 * (keys + queries if masked else keys))
        mlp = value * 3 * shape.intermediate_size
        adapters = sum(value * (lora.rank + (2 * outputs if lora.dora else 0)) for _, outputs in self._targets.values())
        if lora.dropout:  # each layer's input after dropout, and the dropout mask
            mask = 1 if self.workers.on_gpu else value
            inputs = sum(width * (value + mask) for width, _ in self._targets.values())
        else:
            read = {_READS.get(name, name): width for name, (width, _) in self._targets.items()}
            inputs = value * sum(read.values())
        return norms + attention + mlp + adapters + inputs

    @property
    def _buffers(self) -> int:
        if self.workers.number == 1 and self.stage == 0:
            return 0
        bucket = self.train.zero.bucket_elements
        used = bucket if self.workers.on_gpu and self.stage else min(bucket, self._trained)  # untouched pages take no memory
        return used * self._value

    @property
    def _loading(self) -> int:
        """Host memory while loading: the whole model before it goes to the GPU, or one tensor with quantisation or stage 3."""
        if self.stage < 3 and self.train.quantize is None:
            return self._weights
        return self.shape.vocab_size * self.shape.hidden_size * (4 + self._value)

    @property
    def _offloaded(self) -> int:
        zero, size = self.train.zero, 0
        if self._optimizer_offloaded:
            size += self._optimizer if zero.offload_optimizer == "cpu" else 4 * self._trained // self.workers.number
        if self._parameters_offloaded:
            size += self._weights_share if zero.offload_parameters == "cpu" else NVME_BUFFER_BYTES
        return size


_READS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layer → another layer that reads the same input."""


def possible_stages(train: TrainSpec) -> tuple[int, ...]:
    """Return the stages that a spec permits, from the least communication to the least memory."""
    if train.zero.stage != "auto":
        return (train.zero.stage,)
    if train.zero.offload_parameters != "none":
        return (3,)
    return (1, 2, 3) if train.zero.offload_optimizer != "none" else (0, 1, 2, 3)


def cheapest_plan(
    train: TrainSpec, *, shape: ModelShape, workers: Workers, memory_bytes: int, longest_row_tokens: int, loss_tokens: int | None = None
) -> MemoryPlan | None:
    """Return the plan of the first possible stage that fits workers with ``memory_bytes`` each; None if none fits."""
    for stage in possible_stages(train):
        plan = plan_memory(train, shape=shape, workers=workers, stage=stage, longest_row_tokens=longest_row_tokens, loss_tokens=loss_tokens)
        if plan.worker_bytes <= ROOM * memory_bytes:
            return plan
    return None


def resolve_stage(train: TrainSpec, *, shape: ModelShape | None, workers: int, memory_bytes: int | None, longest_row_tokens: int) -> int:
    """Return the stage that a training runs with: the spec's, or for ``auto`` the cheapest that fits.

    Nothing is checked without ``shape`` (a model whose sizes are unknown) or ``memory_bytes`` (of one GPU; None on CPUs).

    Raises:
        SpecError: no permitted stage fits; the message says which changes would fit.
    """
    stages = possible_stages(train)
    if shape is None or memory_bytes is None:
        return stages[0]
    on_gpus = Workers(number=workers, per_node=workers)
    found = cheapest_plan(train, shape=shape, workers=on_gpus, memory_bytes=memory_bytes, longest_row_tokens=longest_row_tokens)
    if found is not None:
        return found.stage
    least = plan_memory(train, shape=shape, workers=on_gpus, stage=stages[-1], longest_row_tokens=longest_row_tokens)
    if least.worker_bytes * (1 - DOUBT) <= memory_bytes:
        return least.stage
    raise SpecError(
        f"train.zero.stage {train.zero.stage}: {_largest_parts(least, workers=workers)} exceed the {gigabytes(memory_bytes)} of a GPU; "
        + what_would_fit(train, shape=shape, workers=on_gpus, memory_bytes=memory_bytes, longest_row_tokens=longest_row_tokens)
    )


def gigabytes(size: float) -> str:
    """Format bytes as ``12.3 GB`` (10⁹ bytes) or ``340 MB``."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"


def _largest_parts(plan: MemoryPlan, *, workers: int) -> str:
    largest = sorted(plan.worker.items(), key=lambda part: -part[1])[:2]
    parts = ", ".join(f"{part} {gigabytes(size)}" for part, size in largest)
    subject = "one worker" if workers == 1 else f"each of {workers} workers"
    return f"{gigabytes(plan.worker_bytes)} ({parts}) for {subject} at stage {plan.stage}"


def what_would_fit(train: TrainSpec, *, shape: ModelShape, workers: Workers, memory_bytes: int, longest_row_tokens: int) -> str:
    """Return the remedy for a plan that does not fit: the fewest changes, cheapest first; then more workers."""
    for number in (workers.number * 2**power for power in range(9)):
        layout = Workers(number=number, per_node=workers.per_node)

        def fits(changes: Iterable[_Change], layout: Workers = layout) -> bool:
            changed = _with(train, changes)
            if layout != workers and changed.rows_per_step % (layout.number // changed.sequence_parallel):
                return False  # more workers could not share the rows of a step
            plan = cheapest_plan(changed, shape=shape, workers=layout, memory_bytes=memory_bytes, longest_row_tokens=longest_row_tokens)
            return plan is not None

        found = _fewest(list(_changes(train, shape=shape, workers=number)), fits)
        if found is not None:
            more = [f"{number} workers"] if number > workers.number else []
            return f"what would fit: {' and '.join([*more, *(text for text, _ in found)])}"
    return f"nothing makes rows of {longest_row_tokens:,} tokens fit; choose shorter ones (corpus.sequence_len), or larger GPUs"


_Change = tuple[str, dict[str, Any]]
"""A possible change of a train spec: its text in a message, and the changed fields, those of ``zero`` in a mapping of their own."""


def _fewest(offered: list[_Change], fits: Callable[[Iterable[_Change]], bool]) -> list[_Change] | None:
    """Return the shortest prefix of ``offered`` that fits, without the changes that it does not need; None if nothing fits."""
    for last in range(len(offered) + 1):
        chosen = offered[:last]
        if fits(chosen):
            for change in offered[:last]:
                without = [other for other in chosen if other is not change]
                chosen = without if fits(without) else chosen
            return chosen
    return None


def _changes(train: TrainSpec, *, shape: ModelShape, workers: int) -> Iterator[_Change]:
    if train.zero.stage != "auto" and train.quantize != "int8":
        yield "train.zero.stage: auto", {"zero": {"stage": "auto"}}
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing: true", {"gradient_checkpointing": True}
    if train.micro_batch_size > 1:
        smaller = {"micro_batch_size": 1, "gradient_accumulation_steps": train.rows_per_step}
        yield f"train.micro_batch_size: 1 with train.gradient_accumulation_steps: {train.rows_per_step}", smaller
    parts = [parts for parts in (2, 4, 8, 16, 32) if train.sequence_parallel < parts <= shape.num_heads and workers % parts == 0]
    for number in parts[-1:]:
        yield f"train.sequence_parallel: {number}", {"sequence_parallel": number}
    if train.zero.offload_parameters == "none" and train.quantize != "int8":
        yield "train.zero.offload_parameters: cpu", {"zero": {"stage": "auto", "offload_parameters": "cpu"}}
    if train.quantize is None and train.precision != "float32":
        yield "train.quantize: nf4", {"quantize": "nf4"}


def _with(train: TrainSpec, changes: Iterable[_Change]) -> TrainSpec:
    fields, zero = dict[str, Any](), dict[str, Any]()
    for _, changed in changes:
        fields |= changed
        zero |= changed.get("zero", {})
    return train.model_copy(update=fields | {"zero": train.zero.model_copy(update=zero)})
