"""How a model is fine-tuned. Only specs; the defaults are the paper's (arXiv 2502.20405)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pause_ray.spec import Spec

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraSpec(Spec):
    """Low-rank adaptation (arXiv 2106.09685)."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: int = Field(default=16, ge=1)
    """Scale of the update is alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] = Field(default=ATTENTION_AND_MLP, min_length=1)
    """Names of the linear layers that get an adapter."""


class ZeroSpec(Spec):
    """DeepSpeed ZeRO (arXiv 1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 0
    """0: data parallel; 1: optimizer state sharded; 2: and gradients; 3: and parameters."""


class TrainSpec(Spec):
    """LoRA fine-tuning of the base model and, for an added or reserved marker, of the marker's embedding row."""

    steps: int = Field(default=60, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=2, ge=1)
    """Rows in one forward pass of one worker."""
    accumulation: int = Field(default=4, ge=1)
    """batch_size × accumulation rows make one optimizer step, however many workers share them."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak, reached after the warm-up."""
    warmup_steps: int = Field(default=6, ge=0)
    """Linear warm-up from zero."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of base weights and activations while training; optimizer state is float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraSpec = LoraSpec()
    """The adapter."""
    zero: ZeroSpec = ZeroSpec()
    """How optimizer state, gradients and parameters are spread over workers."""
