"""Tokens per second of training, side by side with Hugging Face's Trainer + PEFT: one model, one run, the same rows in the same order.

    python bench/train.py --json train.json              # SmolLM2-135M on a CPU: about half an hour on 2 cores
    python bench/train.py --steps 6 --repeats 1          # a quick look
    python bench/train.py --start                        # seconds from fit() to the end of the first step, against the bare stack
    python bench/train.py --shapes 3b 8b --tokens 4096 32768 131072 --quantize none nf4      # random weights, on a GPU

Both sides get the same base weights, first values of the adapter, precision, rows in the same order, batch size,
gradient accumulation, learning rate of every step, AdamW and gradient clipping. Each does with the rows what it always does:
Trainer pads those of a batch to the longest. Rows are sorted by length within a step, which suits both. Sides run in
processes of their own, in an order that turns with every repeat; figures are medians over repeats. Steps are timed from
outside, from the end of the first to the end of the last. Peak memory is the process's on a CPU and torch's on a GPU. Losses
are compared step by step.

``needle`` rows learn their last 24 tokens, as ``needle_sft`` does; ``text`` rows learn every token.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prefill_rate import SHAPES, make_model
from rich.console import Console
from tables import as_table

from pause_ray.core.spec import read_yaml
from pause_ray.core.storage import Storage
from pause_ray.data.shards import NO_LOSS, PackedRow, rows_to_table, seal, write_rows
from pause_ray.models.shape import ModelShape
from pause_ray.models.sources import resolve_model
from pause_ray.models.spec import ModelSpec
from pause_ray.training.batching import num_loss_tokens
from pause_ray.training.metrics import model_flops_utilization, step_flops
from pause_ray.training.spec import LoraSpec, TrainSpec

ROOT = Path(__file__).resolve().parents[1]
SIDES = Path(__file__).with_name("train_sides.py")
ANSWER_TOKENS = 24
SEED = 7
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
"""Of two sides' losses in any step, in nats per learned token: float32 differs by the order of sums only; in 16 bits
Trainer keeps the adapter in float32 where DeepSpeed computes in 16 bits with float32 masters (0.03 seen in three steps)."""
err = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained in one comparison."""

    name: str
    train: TrainSpec
    model_dir: Path
    rows: Sequence[PackedRow]
    sides: tuple[str, ...]
    threads: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side of one workload; medians over the repeats."""

    name: str
    tokens_per_second: float | None
    """Without padding; None where the side ran out of memory."""
    peak_memory_bytes: int | None
    final_loss: float | None
    ratio: float | None
    """Of its tokens per second to Trainer's; None where Trainer was not run."""
    mfu: float | None = None
    """Share of the GPU's peak (``telemetry.step_flops``); None on a CPU."""
    seconds_to_first_step: float | None = None
    """From the call to the end of the first step, model loading included."""


def make_rows(kind: str, *, number: int, shortest: int, longest: int, vocab_size: int) -> list[PackedRow]:
    """Rows of random tokens with lengths drawn evenly; what is to be learned is said in the row, so that it can be learned."""
    draw = np.random.default_rng(SEED)
    rows = []
    for _ in range(number):
        ids = draw.integers(3, vocab_size, size=int(draw.integers(shortest, longest + 1)), dtype=np.int32)
        ids[-ANSWER_TOKENS:] = ids[ANSWER_TOKENS : 2 * ANSWER_TOKENS]
        labels = ids.copy()
        if kind == "needle":
            labels[:-ANSWER_TOKENS] = NO_LOSS
        rows.append(PackedRow(input_ids=ids, labels=labels, num_pauses=0, num_documents=1))
    return rows


def measure(workload: Workload, *, repeats: int) -> list[Row]:
    """Run every side ``repeats`` times, in turn."""
    with tempfile.TemporaryDirectory() as place:
        case = write_case(workload, Path(place))
        results: dict[str, list[dict[str, Any] | None]] = {side: [] for side in workload.sides}
        for repeat in range(repeats):
            for side in workload.sides if repeat % 2 == 0 else reversed(workload.sides):
                with err.status(f"{workload.name}: {side}, {repeat + 1} of {repeats}"):
                    results[side].append(run_side(side, case, threads=workload.threads))
    compare_losses(workload, results)
    rows = [_row(workload, side, [its for its in results[side] if its is not None]) for side in workload.sides]
    base = next((row.tokens_per_second for row in rows if row.name.endswith("/trainer")), None)
    return [replace(row, ratio=row.tokens_per_second / base if base and row.tokens_per_second else None) for row in rows]


def write_case(workload: Workload, folder: Path) -> Path:
    """Everything that a side reads, under ``folder``; returns the case's file."""
    import peft
    import safetensors.torch

    from pause_ray.training.model import load_trainable

    shards = folder / "shards"
    shards.mkdir()
    write_rows(shards / "rows.parquet", [rows_to_table(workload.rows, first_row=0)])
    seal(shards, shards=[shards / "rows.parquet"], manifest={})
    model = load_trainable(workload.train, model_dir=workload.model_dir, marker=None, seed=SEED, device=_device(), stage=0)
    adapter = {name: tensor.contiguous().cpu() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    safetensors.torch.save_file(adapter, folder / "adapter.safetensors")
    path = folder / "case.json"
    case = {"train": workload.train.resolved(), "seed": SEED, "threads": workload.threads}
    places = {"model_dir": workload.model_dir.absolute(), "shards": shards, "adapter": folder / "adapter.safetensors"}
    path.write_text(json.dumps(case | {name: str(place) for name, place in places.items()}))
    return path


def run_side(side: str, case: Path, *, threads: int) -> dict[str, Any] | None:
    """What the side printed, or None if the GPU's memory did not hold it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, SIDES, side, case], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            return None
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare_losses(workload: Workload, results: dict[str, list[dict[str, Any] | None]]) -> None:
    """Refuse to compare the speed of sides that did not train the same.

    Raises:
        SystemExit: some step's losses lie further apart than the precision explains.
    """
    runs = {side: its for side, found in results.items() for its in found if its is not None}
    for (side, mine), (other, its) in ((a, b) for a in runs.items() for b in runs.items() if a[0] < b[0]):
        apart = max(abs(a - b) for a, b in zip(mine["losses"], its["losses"], strict=True))
        err.print(f"{workload.name}: losses of {side} and {other} are at most {apart:.2g} nats apart", highlight=False)
        if apart > LARGEST_DIFFERENCE[workload.train.precision]:
            raise SystemExit(f"{workload.name}: {side} {mine['losses']}\n{other} {its['losses']}: not the same training")


def _row(workload: Workload, side: str, runs: Sequence[dict[str, Any]]) -> Row:
    name = f"{workload.name}/{side}"
    if not runs:
        return Row(name=name, tokens_per_second=None, peak_memory_bytes=None, final_loss=None, ratio=None)
    train = workload.train
    lengths = [len(row.input_ids) for row in workload.rows]
    timed_steps = train.max_steps - 1
    tokens = sum(lengths) - _tokens_of_first_step(workload)
    seconds = statistics.median(run["ends"][-1] - run["ends"][0] for run in runs)
    return Row(
        name=name,
        tokens_per_second=tokens / seconds if timed_steps else None,
        peak_memory_bytes=int(statistics.median(run["peak_memory_bytes"] for run in runs)),
        final_loss=statistics.median(run["losses"][-1] for run in runs),
        ratio=None,
        mfu=_mfu(workload, seconds) if timed_steps else None,
        seconds_to_first_step=statistics.median(run["ends"][0] for run in runs),
    )


def _tokens_of_first_step(workload: Workload) -> int:
    from pause_ray.training.batching import rows_of_step

    train = workload.train
    first = rows_of_step(0, num_rows=len(workload.rows), rows_per_step=train.rows_per_step, seed=SEED)
    return sum(len(workload.rows[number].input_ids) for number in first)


def _mfu(workload: Workload, seconds: float) -> float | None:
    """Of all steps but the first, whose rows count as an equal share here."""
    if not torch.cuda.is_available():
        return None
    lengths = [len(row.input_ids) for row in workload.rows]
    labelled = sum(num_loss_tokens(row) for row in workload.rows)
    flops = step_flops(ModelShape.load(workload.model_dir), document_tokens=lengths, loss_tokens=labelled)
    timed = (workload.train.max_steps - 1) / workload.train.max_steps
    return model_flops_utilization(flops * timed, seconds=seconds, device_name=torch.cuda.get_device_name())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def cpu_workloads(args: argparse.Namespace, model_dir: Path) -> Iterator[Workload]:
    """Both kinds of rows in each precision, on the real small model."""
    vocab_size = ModelShape.load(model_dir).vocab_size
    for precision in args.precision:
        for kind in args.rows:
            train = _train(args, precision=precision, quantize=None, long=False)
            number = train.max_steps * train.rows_per_step
            longest = args.tokens[0]
            rows = make_rows(kind, number=number, shortest=max(longest // 2, 2 * ANSWER_TOKENS), longest=longest, vocab_size=vocab_size)
            name = f"{kind} {precision} {longest}"
            yield Workload(name=name, train=train, model_dir=model_dir, rows=rows, sides=tuple(args.sides), threads=args.threads)


def gpu_workloads(args: argparse.Namespace, model_dir: Path, shape: str) -> Iterator[Workload]:
    """Rows of exactly so many tokens, all learned; Trainer beside them up to a length."""
    vocab_size = ModelShape.load(model_dir).vocab_size
    for tokens in args.tokens:
        for quantize in args.quantize:
            train = _train(args, precision="bfloat16", quantize=None if quantize == "none" else quantize, long=tokens > args.keep_up_to)
            rows = make_rows("text", number=train.max_steps * train.rows_per_step, shortest=tokens, longest=tokens, vocab_size=vocab_size)
            sides = tuple(side for side in args.sides if side != "trainer" or tokens <= args.trainer_up_to)
            length = f"{tokens // 1024}K" if tokens % 1024 == 0 else tokens
            name = f"{shape} {'QLoRA' if train.quantize else 'LoRA'} {length}"
            yield Workload(name=name, train=train, model_dir=model_dir, rows=rows, sides=sides, threads=args.threads)


def _train(args: argparse.Namespace, *, precision: str, quantize: str | None, long: bool) -> TrainSpec:
    return TrainSpec.model_validate(
        {
            "max_steps": args.steps,
            "micro_batch_size": args.batch,
            "gradient_accumulation_steps": args.accumulation,
            "warmup_steps": 2,
            "precision": precision,
            "quantize": quantize,
            "gradient_checkpointing": long,
            "lora": LoraSpec(rank=args.rank),
        }
    )


def start_rows(args: argparse.Namespace, model_dir: Path) -> list[Row]:
    """The start of one Ray Train worker, ours and the bare stack's: one row of 256 tokens, one step."""
    train = TrainSpec(max_steps=1, micro_batch_size=1, gradient_accumulation_steps=1, warmup_steps=0, precision="float32")
    rows = make_rows("text", number=1, shortest=256, longest=256, vocab_size=ModelShape.load(model_dir).vocab_size)
    sides = ("start", "bare_start")
    workload = Workload(name="first step", train=train, model_dir=model_dir, rows=rows, sides=sides, threads=args.threads)
    found = measure(workload, repeats=args.repeats)
    bare = found[1].seconds_to_first_step
    return [replace(row, peak_memory_bytes=None, ratio=bare / row.seconds_to_first_step) for row in found]  # type: ignore[operator]


COLUMNS: dict[str, Callable[[Row], str | None]] = {
    "variant": lambda row: row.name,
    "tokens/s": lambda row: row.tokens_per_second and f"{row.tokens_per_second:,.1f}",
    "peak GiB": lambda row: row.peak_memory_bytes and f"{row.peak_memory_bytes / 2**30:.2f}",
    "final loss": lambda row: row.final_loss and f"{row.final_loss:.4f}",
    "times Trainer": lambda row: row.ratio and f"{row.ratio:.2f}",
    "MFU": lambda row: row.mfu and f"{row.mfu:.1%}",
    "s to first step": lambda row: row.seconds_to_first_step and f"{row.seconds_to_first_step:.1f}",
}


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; default: the quickstart's")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[], help="random weights of these shapes instead")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="longest row; with --shapes the length of all rows")
    parser.add_argument("--rows", nargs="+", choices=["needle", "text"], default=["needle", "text"])
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--quantize", nargs="+", choices=["none", "nf4"], default=["none"], help="with --shapes")
    parser.add_argument("--sides", nargs="+", choices=["pause_ray", "step", "trainer"], default=["pause_ray", "trainer"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1 if on_gpu else 3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep-up-to", type=int, default=8192, help="longest rows without gradient checkpointing")
    parser.add_argument("--trainer-up-to", type=int, default=8192, help="longest rows that Trainer gets")
    parser.add_argument("--start", action="store_true", help="measure the start instead")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--storage", default="runs", help="where the quickstart's model is kept")
    return parser.parse_args()


def main() -> None:
    """Measure and print one table."""
    args = parse()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a note on a kernel of a CPU
    rows: list[Row] = []

    def keep(more: Sequence[Row]) -> None:
        rows.extend(more)
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")

    if args.shapes:
        for shape in args.shapes:
            with tempfile.TemporaryDirectory() as place:
                make_model(Path(place), shape=shape, dtype="bfloat16", device=_device())
                for workload in gpu_workloads(args, Path(place), shape):
                    keep(measure(workload, repeats=args.repeats))
    else:
        quickstart = read_yaml(ROOT / "sweeps" / "quickstart.yaml")["trial"]["model"]
        cache = Storage.open(args.storage).cache
        model_dir = args.model or resolve_model(ModelSpec.parse(quickstart, origin="quickstart"), cache=cache)
        if args.start:
            keep(start_rows(args, model_dir))
        else:
            for workload in cpu_workloads(args, model_dir):
                keep(measure(workload, repeats=args.repeats))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads"
    Console(width=140).print(
        as_table(rows, COLUMNS, title=f"{name}, torch {torch.__version__}, {args.repeats} runs of {args.steps} steps each")
    )


if __name__ == "__main__":
    main()
