"""How a model is fine-tuned: specs only. Defaults are those of the paper (arXiv 2502.20405)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pause_ray.core.errors import SpecError
from pause_ray.core.spec import JsonObject, Spec
from pause_ray.models.checkpoint import RunningTraining
from pause_ray.text.tokenizer import MarkerToken

FORMAT = 3
"""Version of training in the digest of an adapter; raised when the same job begins to give another one."""
Offload = Literal["none", "cpu", "nvme"]


class LoraSpec(Spec):
    """Low-rank adaptation (arXiv 2106.09685)."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: int = Field(default=16, ge=1)
    """Numerator of the update's scale, which is alpha / rank, or alpha / √rank with ``rslora``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the linear layers that get an adapter; null: all layers of attention and MLP."""
    rslora: bool = False
    """Use the rank-stabilised scale (arXiv 2312.03732)."""
    dora: bool = False
    """Train direction and magnitude separately (DoRA, arXiv 2402.09353)."""

    def check_rank(self, hidden_size: int) -> None:
        """Refuse a rank above the model's ``hidden_size``.

        Raises:
            SpecError: the rank is larger.
        """
        if self.rank > hidden_size:
            raise SpecError(
                f"train.lora.rank {self.rank}: above the model's hidden size {hidden_size}, so not low; choose at most {hidden_size}"
            )

    def check_targets(self, layers: Collection[str]) -> None:
        """Refuse targets that are not among the model's linear ``layers``.

        Raises:
            SpecError: naming the unknown targets and the layers.
        """
        unknown = sorted(set(self.targets or ()) - set(layers))
        if unknown:
            raise SpecError(f"train.lora.targets: {unknown} name no linear layer of the model; it has {sorted(layers)}")


class ZeroSpec(Spec):
    """DeepSpeed ZeRO (arXiv 1910.02054): how memory is spread over workers. It changes rounding at most, so it is not part of a digest."""

    stage: Literal[0, 1, 2, 3, "auto"] = 0
    """0: data parallel; 1: shards optimizer state; 2: also gradients; 3: also parameters. ``auto``: the first of these that fits memory."""
    offload_optimizer: Offload = "none"
    """Where optimizer state is kept between steps."""
    offload_parameters: Offload = "none"
    """Where base weights are kept while they are not computed with; stage 3 only."""
    nvme_path: str | None = None
    """Absolute path of a folder on each node's local disk, for ``nvme``."""
    bucket_elements: int = Field(default=50_000_000, ge=1_000)
    """Elements that are sent at a time; fewer take less memory and more messages."""

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> Self:
        if self.offload_parameters != "none" and self.stage not in (3, "auto"):
            raise ValueError(f"offload_parameters {self.offload_parameters} needs stage 3, the only one that shards parameters")
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError(f"offload_optimizer {self.offload_optimizer} needs stage 1, 2 or 3")
        uses_nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if uses_nvme != (self.nvme_path is not None):
            raise ValueError("nvme_path goes with an offload to nvme: give both or neither")
        if self.nvme_path is not None and (not self.nvme_path.startswith("/") or ".." in self.nvme_path.split("/")):
            raise ValueError(f"nvme_path {self.nvme_path}: must be an absolute path without .., such as /mnt/scratch/offload")
        return self


class TrainSpec(Spec):
    """LoRA fine-tuning of the base model and, for an added or reserved marker, of the marker's embedding row."""

    max_steps: int = Field(default=60, ge=1)
    """Optimizer steps."""
    micro_batch_size: int = Field(default=2, ge=1)
    """Sequences in one forward pass of one worker."""
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    """``micro_batch_size × gradient_accumulation_steps`` sequences make one optimizer step, however many workers share them."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate, which the warm-up ends at."""
    warmup_steps: int = Field(default=6, ge=0)
    """Optimizer steps of the linear warm-up from zero."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of base weights and activations while training; trained weights and optimizer state are float32."""
    quantize: Literal["nf4", "int8"] | None = None
    """Precision of the frozen base weights. ``nf4``: 4 bits with double quantisation (QLoRA, arXiv 2305.14314), computed in ``precision``;
    ``int8``: 8 bits (arXiv 2208.07339), up to ZeRO stage 2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and up to half as much time again."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Workers that share the tokens of each sequence (DeepSpeed Ulysses, arXiv 2309.14509)."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between two validations on ``corpus.validation_rows``; null: only after the last step."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints of the training itself; null: only when the process is asked to end."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of latest checkpoints that are kept; the one with the best validation loss is kept too."""
    lora: LoraSpec = LoraSpec()
    """The adapter."""
    zero: ZeroSpec = ZeroSpec()
    """Sharding of optimizer state, gradients and parameters over workers."""

    @model_validator(mode="after")
    def _quantized_base_fits(self) -> Self:
        if self.quantize and self.precision == "float32":
            raise ValueError(f"quantize {self.quantize} computes in 16 bits; set precision to bfloat16")
        if self.quantize == "int8" and self.zero.stage in (3, "auto"):
            raise ValueError("quantize int8 gives wrong losses under ZeRO stage 3 (bitsandbytes issue 1451); use nf4, or a stage up to 2")
        return self

    @property
    def rows_per_step(self) -> int:
        """Sequences of one optimizer step, all workers together."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def step_formula(self) -> str:
        """The factors of ``rows_per_step`` with their values, for messages."""
        return (
            f"train.micro_batch_size {self.micro_batch_size} × train.gradient_accumulation_steps {self.gradient_accumulation_steps} = "
            f"{self.rows_per_step}"
        )

    def identity(self) -> JsonObject:
        """Return the fields that decide the adapter; batch layout and sharding are left out, as they change rounding only."""
        layout = {"micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "sequence_parallel", "zero"}
        left_out = layout | {"validate_every", "checkpoint_every", "keep_checkpoints"}
        kept = {name: value for name, value in self.resolved().items() if name not in left_out}
        return kept | {"rows_per_step": self.rows_per_step}


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that decides an adapter, and how many threads may compute it."""

    train: TrainSpec
    model_dir: Path
    """Base model: config.json, tokenizer.json, *.safetensors."""
    base_digest: str
    """``model_digest`` of that folder."""
    shards: Path
    """Folder of a complete shard set."""
    marker: MarkerToken | None
    """Marker token whose embedding row is trained, or None."""
    policy: JsonObject | None
    """The resolved pause policy of the shards, for the record; None without pauses."""
    seed: int
    """Seed of the row order and of the adapter's first values."""
    threads: int | None
    """Threads of one worker on a CPU; None divides the machine's cores among the workers on it."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Everything that a training worker needs; picklable."""

    job: TrainJob
    """The training, with paths that every node sees."""
    on_gpu: bool | None
    """Whether to train on a GPU; None: on the process's GPU if it has one."""
    folder: Path
    """Folder in which the first worker writes log and adapter."""
    running: RunningTraining
    """Checkpoints of the training itself."""
    until: int
    """Optimizer steps after which the adapter is written and the workers end; ``train.max_steps`` is the whole training."""
