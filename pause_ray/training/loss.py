"""The loss of a batch, without the logits of all its tokens. Knows torch and the PEFT model, no DeepSpeed and no Ray.

Logits of a long row are the largest tensor in training: 128K tokens × a vocabulary of 128K are 64 GiB in float32. Here they are
computed for tokens with a loss only, in chunks, and each chunk's gradient to the hidden states is computed while its logits exist.
That costs the matrix products of an ordinary loss and no more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed import ProcessGroup

from pause_ray.data.shards import NO_LOSS
from pause_ray.training.attention import Layout, use_document_attention
from pause_ray.training.batching import Batch
from pause_ray.training.memory import CHUNK_LOGITS
from pause_ray.training.model import output_layer

PLAIN_OUTPUT = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text"}
"""Architectures whose logits are those of the output layer, with Gemma's soft cap where the config has one. Others may scale
them, so their own forward pass computes the logits."""


class LossModel(nn.Module):
    """A trainable model whose forward pass returns the summed cross-entropy of a batch; DeepSpeed's engine wraps it."""

    def __init__(self, model: peft.PeftModel, *, sequence_group: ProcessGroup | None = None) -> None:
        """Wrap ``model`` and make it attend document by document; on a GPU, use Liger's kernels if they are installed.

        ``sequence_group`` are the workers that share each row's tokens with this one.

        Raises:
            ModelError: an architecture whose attention cannot be replaced.
        """
        super().__init__()
        self.model = model
        self._sequence_group = sequence_group
        base = model.get_base_model()
        use_document_attention(base)
        if base.device.type == "cuda":
            _use_liger_kernels(base)
        self.output = _Output(base) if _has_plain_output(base) else None

    def forward(
        self, *, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor, documents: tuple[tuple[int, int], ...]
    ) -> torch.Tensor:
        """Return the cross-entropy in nats of this worker's part of a ``Batch``, summed over tokens, as a float32 scalar."""
        with_loss = (targets[0] != NO_LOSS).nonzero()[:, 0]
        wanted = targets[0, with_loss]
        base = self.model.get_base_model()
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "use_cache": False,
            "layout": Layout(documents, self._sequence_group),
        }
        if self.output is None:
            logits: torch.Tensor = base(**inputs, logits_to_keep=with_loss).logits[0]
            return F.cross_entropy(logits.float(), wanted, reduction="sum")
        hidden: torch.Tensor = base.get_decoder()(**inputs).last_hidden_state
        return self.output(hidden[0, with_loss], wanted)  # type: ignore[no-any-return]


def tensors(batch: Batch, *, device: torch.device | str) -> dict[str, Any]:
    """Return the arguments of ``LossModel`` for ``batch``."""
    arrays = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "targets": batch.targets}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()} | {"documents": batch.documents}


def _use_liger_kernels(base: transformers.PreTrainedModel) -> None:
    """Put fused norms and MLPs (arXiv 2410.10989) into this model; models that are loaded later in this process stay unchanged."""
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        return
    from transformers.integrations.liger import apply_liger_kernel

    code = vars(sys.modules[type(base).__module__])
    before = dict(code)
    apply_liger_kernel(base, {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False})
    code.update(before)


def _has_plain_output(base: transformers.PreTrainedModel) -> bool:
    layer, _, _ = output_layer(base)
    return base.config.model_type in PLAIN_OUTPUT and type(layer) is nn.Linear and not layer.weight.requires_grad


class _Output(nn.Module):
    """Output layer and loss in one module, because ZeRO-3 gathers the layer's weights only while a module runs."""

    def __init__(self, base: transformers.PreTrainedModel) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, as a submodule would give its parameters second names
        self._softcap: float | None = getattr(base.config, "final_logit_softcapping", None)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        layer, rows, row_ids = output_layer(self._base[0])
        table = _Table(layer.weight, layer.bias, row_ids, self._softcap)
        return _SummedLoss.apply(hidden, rows, targets, table)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Table:
    """Computes logits of hidden states."""

    weight: torch.Tensor
    """(vocabulary, hidden), frozen."""
    bias: torch.Tensor | None
    row_ids: list[int] | None
    """Vocabulary entries whose rows are trained and replace those of ``weight``."""
    softcap: float | None

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Return logits (tokens, vocabulary) in float32, before the soft cap."""
        found = hidden @ self.weight.T if self.bias is None else torch.addmm(self.bias, hidden, self.weight.T)
        if rows is not None:
            found[:, self.row_ids] = hidden @ rows.T
        return found.float()


class _SummedLoss(torch.autograd.Function):
    """Summed cross-entropy of (tokens, hidden) and targets (tokens,); gradients for the hidden states and the trained rows."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rows: torch.Tensor | None, targets: torch.Tensor, table: _Table) -> torch.Tensor:
        learns = any(ctx.needs_input_grad)
        own_rows = None if rows is None else rows.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden) if learns else None
        of_rows = torch.zeros_like(rows, dtype=torch.float32) if learns and rows is not None else None
        size = max(1, CHUNK_LOGITS // len(table.weight))
        for begin in range(0, len(hidden), size):
            chunk = slice(begin, begin + size)
            loss, slope = _loss_and_slope(table.logits(hidden[chunk], own_rows), targets[chunk], table.softcap, learns=learns)
            total += loss
            if gradient is None:
                continue
            slope = slope.to(hidden.dtype)
            if own_rows is not None and of_rows is not None:
                at_rows = slope[:, table.row_ids]
                slope[:, table.row_ids] = 0
                gradient[chunk] = slope @ table.weight + at_rows @ own_rows
                of_rows += at_rows.T @ hidden[chunk]
            else:
                torch.mm(slope, table.weight, out=gradient[chunk])
        ctx.save_for_backward(gradient, None if of_rows is None or rows is None else of_rows.to(rows.dtype))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, rows = ctx.saved_tensors
        return hidden * slopes[0].to(hidden.dtype), None if rows is None else rows * slopes[0].to(rows.dtype), None, None


def _loss_and_slope(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, *, learns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and its derivative by ``logits``, which are overwritten; without ``learns`` the derivative is undefined."""
    bend = None
    if softcap is not None:
        bent = torch.tanh(logits / softcap)
        bend = 1 - bent.square() if learns else None
        logits = bent.mul_(softcap)
    targets = targets[:, None]
    wanted = logits.gather(1, targets)
    highest = logits.amax(1, keepdim=True)
    shares = logits.sub_(highest).exp_()
    sums = shares.sum(1, keepdim=True)
    loss = (sums.log() + highest - wanted).double().sum()
    if learns:
        shares.div_(sums)
        shares.scatter_add_(1, targets, shares.new_full((), -1).expand_as(targets))
        if bend is not None:
            shares.mul_(bend)
    return loss, shares
