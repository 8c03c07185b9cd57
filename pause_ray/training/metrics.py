"""What one row of the training log says of its step. Counts and measures; knows no optimizer, no Ray and no file.

A row has the fields of ``step_record``: always the same ones, except that ``mfu`` stands only where the peak of the GPU is known.
Where the step was followed by a look at the held-out rows, ``validation_loss`` is added, in nats per labelled token.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pause_ray.core.errors import ModelError
from pause_ray.core.spec import JsonObject
from pause_ray.core.storage import space_errors, write_text
from pause_ray.data.shards import PackedRow
from pause_ray.models.shape import ModelShape

if TYPE_CHECKING:
    import torch


FORWARD_AND_BACKWARD = 2
"""Matrix products per frozen weight: forward, and the gradient of its input. A frozen weight needs no gradient of its own, which is
a third of what full fine-tuning computes."""
ATTENTION_PASSES = 3
"""Scores and mixing have two inputs each, and both get gradients: twice the forward's operations on the way back."""
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
(the figures without sparsity); the first that fits counts."""
SERIES = (
    "loss",
    "validation_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "padding_share",
    "mfu",
    "peak_memory_bytes",
)
"""Fields of a row that are worth a curve; MLflow has them as ``training_loss`` and so on."""


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
    """One row of the training log; all figures are of the whole step, all workers together.

    Args:
        step: Counted from 1.
        loss: Mean cross-entropy per labelled token, in nats.
        learning_rate: With which the step was made.
        gradient_norm: Global L2 norm before clipping.
        tokens: Of the step's rows, without padding.
        loss_tokens: Those that are learned.
        computed_tokens: With padding: what went through the model (``computed_tokens``).
        seconds: From reading the rows to the end of the optimizer's step; no validation, no checkpoint.
        peak_memory_bytes: The most that any worker has held so far (``peak_memory_bytes``).
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


def computed_tokens(lengths: Mapping[int, int], *, passes: Iterable[Iterable[Sequence[int]]], parts: int = 1) -> int:
    """Tokens that go through the model in one step: the rows of a pass lie end to end, filled up to equal parts.

    Args:
        lengths: Row number → tokens.
        passes: ``passes[group][pass]`` holds row numbers, as ``loop.deal`` gives them.
        parts: Workers that share the tokens of a pass.
    """
    together = (sum(lengths[row] for row in rows) for group in passes for rows in group)
    return sum(tokens + -tokens % parts for tokens in together)


def known_shape(model_dir: Path) -> ModelShape | None:
    """Sizes of the model in this folder, or None for a kind whose operations cannot be counted: it trains all the same."""
    try:
        return ModelShape.load(model_dir)
    except ModelError:
        return None


def step_flops(shape: ModelShape, *, document_tokens: Iterable[int], loss_tokens: int, recomputed: bool = False) -> int:
    """Operations that one step with a frozen base needs, two per multiply-add: forward and backward, whatever is recomputed or padded.

    Attention counts what a causal mask leaves: each token with those before it in its document, as far as the layer's
    window reaches. Logits count for labelled tokens. The adapter's own products, about 1 % at rank 16, are left out.

    Args:
        shape: Of the base model.
        document_tokens: Length of each document in the step's rows.
        loss_tokens: Of the whole step.
        recomputed: Count the layers' second forward pass under gradient checkpointing, which is no part of an MFU.
    """
    score_flops = 4 * shape.num_heads * shape.head_dim
    linear_flops = shape.forward_flops(new_tokens=1, past_tokens=0, logit_rows=0) - shape.num_layers * score_flops
    head_flops = 2 * shape.hidden_size * shape.vocab_size * loss_tokens
    linear = attention = 0
    for tokens in document_tokens:
        linear += linear_flops * tokens
        attention += score_flops * sum(_seen(tokens, window) for window in shape.windows)
    again = linear + attention if recomputed else 0
    return FORWARD_AND_BACKWARD * (linear + head_flops) + ATTENTION_PASSES * attention + again


def _seen(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key it sees, in one document and one layer."""
    reach = tokens if window is None else min(window, tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


def peak_flops(device_name: str) -> float | None:
    """Peak 16-bit operations per second of a GPU by the name that its driver gives; None for one that is not in ``PEAK_TFLOPS``."""
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def model_flops_utilization(flops: float, *, seconds: float, device_names: Sequence[str]) -> float | None:
    """Share of the workers' peak that the step's operations came to (MFU, arXiv 2204.02311, appendix B); None without known GPUs.

    Args:
        flops: ``step_flops``.
        seconds: That the step took.
        device_names: One per worker; empty on CPUs.
    """
    peaks = [peak_flops(name) for name in device_names]
    known = [peak for peak in peaks if peak is not None]
    return flops / (seconds * math.fsum(known)) if known and len(known) == len(peaks) else None


def measured_utilization(
    model_dir: Path, rows: Iterable[PackedRow], *, loss_tokens: int, seconds: float, device: torch.device, workers: int
) -> float | None:
    """``model_flops_utilization`` of a step with these ``rows``; None on a CPU, and where model or GPU is not known."""
    shape = _kept_shape(model_dir)
    if device.type != "cuda" or shape is None:
        return None
    import torch

    ends = ((row, np.append(row.document_starts[1:], len(row.input_ids))) for row in rows)
    documents = [int(tokens) for row, end in ends for tokens in end - row.document_starts]
    flops = step_flops(shape, document_tokens=documents, loss_tokens=loss_tokens)
    return model_flops_utilization(flops, seconds=seconds, device_names=[torch.cuda.get_device_name(device)] * workers)


_kept_shape = functools.cache(known_shape)


def peak_memory_bytes(device: str) -> int:
    """The most that this process has held: torch's tensors on a GPU, resident memory on a CPU.

    Args:
        device: As torch names it: ``cpu``, ``cuda``, ``cuda:1``.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: what a process had before it became this program counts there, so a fork's parent too.
        peak_kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(peak_kib)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def training_series(rows: Iterable[JsonObject]) -> dict[str, list[tuple[int, float]]]:
    """Curve → (step, value), of the rows that have it."""
    kept = list(rows)
    series = {f"training_{name}": [(int(row["step"]), float(row[name])) for row in kept if row.get(name) is not None] for name in SERIES}
    return {name: points for name, points in series.items() if points}


def step_words(row: JsonObject) -> str:
    """What a progress line says of a row: ``loss 0.412 · 268 tokens/s · MFU 46 %``."""
    rate = f"{row['tokens_per_second']:,.0f} tokens/s"
    mfu = [f"MFU {row['mfu']:.0%}"] if "mfu" in row else []
    return " · ".join([f"loss {row['loss']:.3f}", rate, *mfu])


POLL_SECONDS = 0.5
"""Between two looks at a log that grows; a step takes seconds."""
Progress = Callable[[int, int, JsonObject], None]
"""Called with (steps done, steps in all, that step's row of the training log), from a thread of its own."""


class WrittenLog:
    """A training's own log. Every worker has one, since every worker may have to save it; one of them writes."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Nothing is there before ``begin``."""
        self._path = path
        self._writes = writes
        self.rows: list[JsonObject] = []
        """Of all steps so far."""

    def begin(self, rows: Sequence[JsonObject]) -> None:
        """Begin with the rows of the steps that a checkpoint has."""
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
            # Not "a": a file that was taken away is an error and not a log that begins in the middle.
            with space_errors(self._path), self._path.open("r+", encoding="utf-8") as file:
                file.seek(0, os.SEEK_END)
                file.write(_line(row))


def _line(row: JsonObject) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


class GrowingLog:
    """A training log, read on from where it was read last. Workers that start again put a shorter one in its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_number = 0
        self._read_bytes = 0
        """Of this file, whole lines only."""
        self._read_rows = 0
        self._given_rows = 0

    def new_rows(self) -> list[JsonObject]:
        """The complete rows beyond those that were given; steps that are taken again are not given again."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._file_number or found.st_size < self._read_bytes:
                    self._file_number, self._read_bytes, self._read_rows = found.st_ino, 0, 0
                file.seek(self._read_bytes)
                lines, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        rows: list[JsonObject] = [json.loads(line) for line in lines.splitlines()]
        given = max(0, self._given_rows - self._read_rows)
        self._read_bytes += len(lines) + len(end)
        self._read_rows += len(rows)
        self._given_rows = max(self._given_rows, self._read_rows)
        return rows[given:]


@contextlib.contextmanager
def following(path: Path, *, steps: int, progress: Progress, failures: list[Exception]) -> Iterator[None]:
    """Pass each row of a growing training log to ``progress``: the same way for one process and for workers elsewhere.

    What ``progress`` raises is added to ``failures``: it ends the telling and not the training.
    """
    ended = threading.Event()

    def follow() -> None:
        growing = GrowingLog(path)
        while True:
            last_look = ended.wait(POLL_SECONDS)
            for row in growing.new_rows():
                progress(row["step"], steps, row)
            if last_look:
                return

    def guarded() -> None:
        try:
            follow()
        except Exception as error:  # noqa: BLE001 (a thread's border: raised when the adapter is safe)
            failures.append(error)

    thread = threading.Thread(target=guarded, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
