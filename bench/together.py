"""Seconds and memory of training several LoRA adapters together on one base, against one after another: the same jobs in one run.

    python bench/together.py --json together.json        # four adapters on SmolLM2-135M on a CPU: some minutes on 2 cores
    python bench/together.py --shapes 3b 8b --tokens 512 4096 --adapters 2 4 8      # random weights, on a GPU

Both sides do all that ``fit`` does, in a process that trains all adapters without starting another (as a sweep does): load the model,
train, write and seal each adapter. One after another that is DeepSpeed at stage 0; the model is loaded for each. Jobs differ in rank
and seed, thus in the order of their rows. Each side runs in a process of its own, in an order that turns with every repeat; figures
are medians. Their adapters' losses are compared step by step. ``in steps`` is the time that the training logs account for: what
remains is loading and writing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tables import as_table

from pause_ray.engines.cost import ModelShape
from pause_ray.engines.engine import ModelSpec
from pause_ray.engines.model_source import resolve_model
from pause_ray.rows import rows_to_table, seal, write_rows
from pause_ray.spec import read_yaml
from pause_ray.storage import Storage
from pause_ray.train.launch import TrainJob, fit
from pause_ray.train.spec import LoraSpec, TrainSpec
from pause_ray.train.telemetry import peak_memory_bytes
from pause_ray.train.together import fit_together

ROOT = Path(__file__).resolve().parents[1]
RANKS = (4, 8, 16, 32)
SIDES = ("one_by_one", "together")
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Of two sides' losses in any step, in nats per learned token."""
err = Console(stderr=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One side of one workload; medians over the repeats."""

    name: str
    adapters: int
    seconds: float | None
    """From the first call to the last sealed adapter; None where memory did not hold it."""
    step_seconds: float | None
    """Of that, in optimizer steps."""
    processor_seconds: float | None
    """Of all threads, from start to end: what a CPU that others use too can still be compared by."""
    tokens_per_second: float | None
    """Of all adapters, in steps."""
    peak_memory_bytes: int | None
    times: float | None
    """How many times as fast as one after another."""


def jobs_of(case: dict[str, Any]) -> list[TrainJob]:
    return [
        TrainJob(
            train=TrainSpec.parse(case["train"] | {"lora": LoraSpec(rank=RANKS[number % len(RANKS)]).resolved()}, origin="case"),
            model_dir=Path(case["model_dir"]),
            base_digest="bench",
            shards=Path(case["shards"]),
            marker=None,
            policy=None,
            seed=number,
            threads=case["threads"],
        )
        for number in range(case["adapters"])
    ]


def run(side: str, case: dict[str, Any]) -> dict[str, Any]:
    """What one side does, in this process."""
    import torch

    jobs, places = jobs_of(case), {"num_workers": 0, "cpus_per_worker": 1, "gpus_per_worker": 0}
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.open(Path(folder))
        started, busy = time.perf_counter(), time.process_time()
        if side == "together":
            made: Sequence[Any] = fit_together(jobs, storage=storage, progress=lambda *_: None, **places)
        else:
            made = [fit(job, storage=storage, progress=lambda *_: None, **places) for job in jobs]
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - busy
        logs = [checkpoint.losses() for checkpoint in made]
    return {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "step_seconds": sum(row["seconds"] for log in logs for row in log),
        "tokens": sum(row["tokens"] for log in logs for row in log),
        "losses": [[row["loss"] for row in log] for log in logs],
        "peak_memory_bytes": peak_memory_bytes("cuda" if torch.cuda.is_available() else "cpu"),
    }


def in_process(side: str, case: dict[str, Any]) -> dict[str, Any] | None:
    """What the side printed, or None if memory did not hold it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(case["threads"]), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--side", side, "--case", json.dumps(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            return None
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(name: str, case: dict[str, Any], *, repeats: int) -> list[Row]:
    """Run both sides ``repeats`` times, in turn."""
    results: dict[str, list[dict[str, Any] | None]] = {side: [] for side in SIDES}
    for repeat in range(repeats):
        for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
            with err.status(f"{name}, {case['adapters']} adapters: {side}, {repeat + 1} of {repeats}"):
                results[side].append(in_process(side, case))
    compare_losses(name, case, results)
    rows = [_row(name, side, case, [its for its in results[side] if its is not None]) for side in SIDES]
    alone = rows[0].seconds
    return [dataclasses.replace(row, times=alone / row.seconds if alone and row.seconds else None) for row in rows]


def compare_losses(name: str, case: dict[str, Any], results: dict[str, list[dict[str, Any] | None]]) -> None:
    """Refuse to compare the speed of sides that did not train the same.

    Raises:
        SystemExit: some step's losses lie further apart than the precision explains.
    """
    alone, together = (next((its for its in results[side] if its is not None), None) for side in SIDES)
    if alone is None or together is None:
        return
    pairs = [pair for logs in zip(alone["losses"], together["losses"], strict=True) for pair in zip(*logs, strict=True)]
    apart = max(abs(a - b) for a, b in pairs)
    err.print(f"{name}, {case['adapters']} adapters: losses are at most {apart:.2g} nats apart", highlight=False)
    if apart > LARGEST_DIFFERENCE[case["train"]["precision"]]:
        raise SystemExit(f"{name}: {alone['losses']}\n{together['losses']}: not the same training")


def _row(name: str, side: str, case: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Row:
    median = {field: statistics.median(its[field] for its in runs) for field in runs[0] if field != "losses"} if runs else {}
    return Row(
        name=f"{name}/{side}",
        adapters=case["adapters"],
        seconds=median.get("seconds"),
        step_seconds=median.get("step_seconds"),
        processor_seconds=median.get("processor_seconds"),
        tokens_per_second=median["tokens"] / median["step_seconds"] if median else None,
        peak_memory_bytes=int(median["peak_memory_bytes"]) if median else None,
        times=None,
    )


def cases(args: argparse.Namespace, model_dir: Path, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One for each precision, length and number of adapters; rows learn their last 24 tokens."""
    from train import ANSWER_TOKENS, make_rows

    vocab_size = ModelShape.load(model_dir).vocab_size
    for tokens in args.tokens:
        shards = folder / f"rows-{tokens}"
        shards.mkdir()
        shortest = max(tokens // 2, 2 * ANSWER_TOKENS)
        rows = make_rows(
            "needle", number=args.steps * args.batch * args.accumulation, shortest=shortest, longest=tokens, vocab_size=vocab_size
        )
        write_rows(shards / "rows.parquet", [rows_to_table(rows, first_row=0)])
        seal(shards, shards=[shards / "rows.parquet"], manifest={})
        for precision in args.precision:
            train = TrainSpec(
                steps=args.steps,
                batch_size=args.batch,
                accumulation=args.accumulation,
                warmup_steps=2,
                precision=precision,
                quantize=args.quantize,
                gradient_checkpointing=tokens > args.keep_up_to,
            )
            for adapters in args.adapters:
                places = {"model_dir": str(model_dir.absolute()), "shards": str(shards), "threads": args.threads}
                yield f"{precision} {tokens}", {"train": train.resolved(), "adapters": adapters, **places}


COLUMNS: dict[str, Callable[[Row], str | None]] = {
    "variant": lambda row: row.name,
    "adapters": lambda row: str(row.adapters),
    "seconds": lambda row: row.seconds and f"{row.seconds:.1f}",
    "in steps": lambda row: row.step_seconds and f"{row.step_seconds:.1f}",
    "CPU s": lambda row: row.processor_seconds and f"{row.processor_seconds:.1f}",
    "tokens/s": lambda row: row.tokens_per_second and f"{row.tokens_per_second:,.0f}",
    "peak GiB": lambda row: row.peak_memory_bytes and f"{row.peak_memory_bytes / 2**30:.2f}",
    "times": lambda row: row.times and f"{row.times:.2f}",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; default: the quickstart's")
    parser.add_argument("--shapes", nargs="+", default=[], help="random weights of these shapes of bench/prefill_rate.py instead")
    parser.add_argument("--adapters", type=int, nargs="+", default=[4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="longest row")
    parser.add_argument("--precision", nargs="+", choices=list(LARGEST_DIFFERENCE), default=["bfloat16"])
    parser.add_argument("--quantize", choices=["nf4", "int8"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep-up-to", type=int, default=8192, help="longest rows without gradient checkpointing")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--storage", default="runs", help="where the quickstart's model is kept")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print one table."""
    args = parse()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a note on a kernel of a CPU
    if args.side:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        print(json.dumps(run(args.side, args.case)))
        return
    import torch
    from prefill_rate import make_model

    rows: list[Row] = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in args.shapes or [None]:
        with tempfile.TemporaryDirectory() as place:
            if shape:
                model_dir = Path(place) / "model"
                model_dir.mkdir()
                make_model(model_dir, shape=shape, dtype="bfloat16", device=device)
            else:
                quickstart = read_yaml(ROOT / "sweeps" / "quickstart.yaml")["trial"]["model"]
                cache = Storage.open(args.storage).cache
                model_dir = args.model or resolve_model(ModelSpec.parse(quickstart, origin="quickstart"), cache=cache)
            for name, case in cases(args, model_dir, Path(place)):
                rows += measure(f"{shape} {name}" if shape else name, case, repeats=args.repeats)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads"
    Console(width=140).print(
        as_table(rows, COLUMNS, title=f"{where}, torch {torch.__version__}, {args.steps} steps each, {args.repeats} runs")
    )
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
