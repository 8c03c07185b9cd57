"""The training log: what a row tells of its optimizer step, how it is written, and how another process follows it. Knows no optimizer.

A row has the fields of ``step_record``; ``mfu`` is there only where the peak of the GPU is known, and ``validation_loss``, in nats
per token with a loss, where validation followed the step.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pause_ray.core.errors import ModelError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import space_errors, write_text
from pause_ray.models.shape import ModelShape

FORWARD_AND_BACKWARD = 2
"""Matrix products per frozen weight: forward, and the gradient of its input. Full fine-tuning has a third one, the weight's gradient."""
ATTENTION_PASSES = 3
"""Forward, and twice as much backward: scores and weighted sum have two inputs each, and both get gradients."""
PEAK_TFLOPS: Mapping[str, float] = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.4,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 311.8,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX A6000": 154.8,
}
"""Part of the device's name → dense 16-bit matrix operations per second with float32 sums, in 10¹², from the makers' data sheets
(figures without sparsity). The first name that matches counts."""
SERIES = (
    *("loss", "validation_loss", "learning_rate", "gradient_norm"),
    *("tokens_per_second", "padding_share", "mfu", "peak_memory_bytes"),
)
"""Fields of a row that are shown as curves; MLflow has them as ``training_loss`` and so on."""


def step_record(
    *,
    step: int,
    loss: float,
    learning_rate: float,
    gradient_norm: float,
    tokens: int,
    loss_tokens: int,
    computed_tokens: int,
    seconds: float,
    peak_memory_bytes: int,
    mfu: float | None = None,
) -> JsonObject:
    """Return one row of the training log; all figures are of the whole step, all workers together.

    Args:
        step: Counted from 1.
        loss: Mean cross-entropy per token with a loss, in nats.
        learning_rate: As AdamW used it.
        gradient_norm: Global L2 norm before clipping.
        tokens: Tokens of the step's rows, without padding.
        loss_tokens: Tokens that have a loss.
        computed_tokens: Tokens that went through the model, with padding.
        seconds: Time from reading the rows to the end of the optimizer's step, without validation and checkpoint.
        peak_memory_bytes: Largest peak of any worker so far.
        mfu: ``model_flops_utilization``.
    """
    record: JsonObject = {
        "step": step,
        "loss": loss,
        "learning_rate": learning_rate,
        "gradient_norm": gradient_norm,
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "padding_share": round(1 - tokens / computed_tokens, 4),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_bytes": peak_memory_bytes,
    }
    return record | ({} if mfu is None else {"mfu": round(mfu, 4)})


def known_shape(model_dir: Path) -> ModelShape | None:
    """Return the sizes of the model in this folder, or None for an architecture whose operations cannot be counted."""
    try:
        return ModelShape.load(model_dir)
    except ModelError:
        return None


def step_flops(shape: ModelShape, *, document_tokens: Iterable[int], loss_tokens: int, recomputed: bool = False) -> int:
    """Return the operations of one step with a frozen base, two per multiply-add, without padding.

    Attention counts the pairs that a causal mask leaves: each token with those before it in its document, as far as the
    layer's window reaches. Logits count for tokens with a loss. The adapter's products, about 1 % at rank 16, are left out.

    Args:
        shape: Sizes of the base model.
        document_tokens: Length of each document in the step's rows.
        loss_tokens: Tokens with a loss in the whole step.
        recomputed: Whether to count the second forward pass under gradient checkpointing, which is no part of an MFU.
    """
    score_flops = 4 * shape.num_heads * shape.head_dim
    linear_flops = shape.forward_flops(new_tokens=1, past_tokens=0, logit_rows=0) - shape.num_layers * score_flops
    head_flops = 2 * shape.hidden_size * shape.vocab_size * loss_tokens
    linear = attention = 0
    for tokens in document_tokens:
        linear += linear_flops * tokens
        for window in shape.windows:
            reach = tokens if window is None else min(window, tokens)
            attention += score_flops * (reach * (reach + 1) // 2 + (tokens - reach) * reach)
    again = linear + attention if recomputed else 0
    return FORWARD_AND_BACKWARD * (linear + head_flops) + ATTENTION_PASSES * attention + again


def model_flops_utilization(flops: float, *, seconds: float, device_name: str, workers: int = 1) -> float | None:
    """Return a step's operations as a share of the workers' peak (MFU, arXiv 2204.02311, appendix B); None for unknown GPUs.

    Args:
        flops: ``step_flops`` of the step.
        seconds: Duration of the step.
        device_name: Name that the GPUs' driver reports.
        workers: Number of workers with such a GPU each.
    """
    peak = next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
    return None if peak is None else flops / (seconds * workers * peak)


def peak_memory_bytes(device: str) -> int:
    """Return the peak memory of this process: torch's tensors on a GPU, resident memory on a CPU.

    ``device`` is named as in torch: ``cpu``, ``cuda``, ``cuda:1``.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: it also counts the memory that a forked process had before exec.
        peak_kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(peak_kib)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def training_series(rows: Iterable[JsonObject]) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) by curve, of the rows that have a value."""
    kept = list(rows)
    series = {f"training_{name}": [(int(row["step"]), float(row[name])) for row in kept if row.get(name) is not None] for name in SERIES}
    return {name: points for name, points in series.items() if points}


def step_summary(row: JsonObject) -> str:
    """Return a row's part of a progress line: ``loss 0.412 · 268 tokens/s · MFU 46 %``."""
    rate = f"{row['tokens_per_second']:,.0f} tokens/s"
    mfu = [f"MFU {row['mfu']:.0%}"] if "mfu" in row else []
    return " · ".join([f"loss {row['loss']:.3f}", rate, *mfu])


POLL_SECONDS = 0.5
"""Time between two reads of a growing log; a step takes seconds."""
Progress = Callable[[int, int, JsonObject], None]
"""Called with (steps done, steps in all, that step's row of the training log), from a separate thread."""


class TrainingLogWriter:
    """Keeps the rows of a training log, as every worker may have to save them in a checkpoint, and writes the file on one of them."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Keep ``path`` for ``begin``, which makes the file if this worker ``writes`` it."""
        self._path = path
        self._writes = writes
        self.rows: list[JsonObject] = []
        """Rows of all steps so far."""

    def begin(self, rows: Sequence[JsonObject]) -> None:
        """Start the file with the rows of the steps that a checkpoint contains."""
        self.rows = list(rows)
        if self._writes:
            write_text(self._path, "".join(_line(row) for row in self.rows))

    def append(self, row: JsonObject) -> None:
        """Add the row of a step.

        Raises:
            StorageError: the disk is full.
        """
        self.rows.append(row)
        if self._writes:
            # Not mode "a", which would begin a new log in the middle if the file was removed.
            with space_errors(self._path), self._path.open("r+", encoding="utf-8") as file:
                file.seek(0, os.SEEK_END)
                file.write(_line(row))


def _line(row: JsonObject) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


class TrainingLogReader:
    """Reads the new rows of a growing training log. Restarted workers replace the file by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_rows = 0

    def new_rows(self) -> list[JsonObject]:
        """Return the complete rows after the last call; repeated steps are not returned again."""
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        new = lines[self._num_rows :]
        self._num_rows += len(new)
        return [json.loads(line) for line in new]


@contextlib.contextmanager
def following(path: Path, *, steps: int, progress: Progress) -> Iterator[Future[None]]:
    """Call ``progress`` with each row of a growing training log, whether this process or workers elsewhere write it.

    An exception of ``progress`` ends the reports and not the training; the future that is yielded raises it when the block has ended.
    """
    ended = threading.Event()

    def follow() -> None:
        growing = TrainingLogReader(path)
        while True:
            last_look = ended.wait(POLL_SECONDS)
            for row in growing.new_rows():
                progress(row["step"], steps, row)
            if last_look:
                return

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="training-progress") as thread:
        try:
            yield thread.submit(follow)
        finally:
            ended.set()
