"""How much less work a planned NIH grid is: one model, one run, side by side, and whether the answers are the same.

    python bench/nih_grid.py                       # SmolLM2-135M, 8 lengths up to 4,096 tokens, about 20 minutes on 2 cores
    python bench/nih_grid.py --model FOLDER --device cuda --step 4096 --json grid.json

Variants, each on the same cells as its baseline:
  generate   what everyone does: transformers' ``generate`` on every cell
  percent    the walk over a percent-depth grid, with and without drafts
  lattice    the walk over a lattice grid, with and without drafts
Counted operations are those of the forward passes that really ran, by torch's own counter on their shapes.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tables import as_table

from pause_ray.core.spec import inline_files, read_yaml
from pause_ray.core.storage import Storage
from pause_ray.evaluation.answer import CellRunner, PlannedCell, plan_cells
from pause_ray.evaluation.haystack import load_haystack, prompt_builder
from pause_ray.evaluation.suite import SuiteSpec, cells
from pause_ray.inference.engine import EngineError, HfEngineSpec, LoadedAs, default_chunk_tokens, default_prefix_block_size
from pause_ray.inference.hf import HfEngine
from pause_ray.inference.kv_cache import BatchCache
from pause_ray.inference.prefix_attention import flop_counter
from pause_ray.models.shape import ModelShape
from pause_ray.models.sources import resolve_model
from pause_ray.models.spec import ModelSpec
from pause_ray.models.weights import load_base
from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker

TABLE_COLUMNS = 130
ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = read_yaml(ROOT / "sweeps" / "quickstart.yaml")["trial"]["model"]
Shapes = list[tuple[int, int, int]]
"""(tokens before, new tokens, rows of logits) of forward passes, or of each answer's part in one."""
Answers = dict[str, tuple[int, ...]]
"""Cell → answer."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant."""

    name: str
    cells: int
    prefilled_tokens: int
    decoded_tokens: int
    planned_tokens: int
    predicted_flops: int
    counted_flops: int
    seconds: float
    ratio: float
    """Seconds of the baseline on the same cells / seconds."""
    identical: int
    """Answers that equal the baseline's, id by id."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all variants share."""

    model_dir: Path
    dtype: str
    device: str
    max_new_tokens: int
    shape: ModelShape
    prefix_block_size: int
    """What can be kept in this precision."""

    def compare(self, name: str, suite: SuiteSpec, runner: CellRunner, *, chunk_tokens: int) -> Iterator[Row]:
        """The baseline on the suite's cells, then the walk without drafts and with them."""
        grid = cells(suite, identity="bench", replicate=0, seed=0)
        each = plan_cells(grid, runner=runner, prefix_block_size=1, reuse="none", drafts=False)
        answers, base = self._generate(each, name=f"generate ({name})")
        yield base
        for drafts in (False, True):
            engine = HfEngine(HfEngineSpec(chunk_tokens=chunk_tokens), device=self.device)
            engine.use(LoadedAs(model_dir=self.model_dir, dtype=self.dtype))
            asked = plan_cells(grid, runner=runner, prefix_block_size=engine.prefix_block_size, drafts=drafts)
            yield self._walk(asked, engine, name=f"{name}, drafts" if drafts else name, answers=answers, base=base)

    def _generate(self, asked: Sequence[PlannedCell], *, name: str) -> tuple[Answers, Row]:
        model = load_base(self.model_dir, dtype=self.dtype, marker=None, device=self.device)
        ends = list(ModelTokenizer.load(self.model_dir).end_ids)
        settings = transformers.GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
        )

        def run() -> Answers:
            answers = {}
            for cell, step in asked:
                ids = torch.as_tensor(step.prompt.ids, dtype=torch.long, device=model.device)[None]
                output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                answer = [int(token) for token in output[0, ids.shape[1] :]]
                answers[cell.id] = tuple(token for token in answer if token not in ends)
            return answers

        answers, shapes, seconds = _timed(model, run)
        tokens = sum(step.prompt.prompt_tokens for _, step in asked)
        predicted = sum(self.shape.forward_flops(new_tokens=len(step.prompt.ids), past_tokens=0, logit_rows=1) for _, step in asked)
        return answers, Row(
            name=name,
            cells=len(asked),
            prefilled_tokens=tokens,
            decoded_tokens=sum(map(len, answers.values())),
            planned_tokens=tokens,
            predicted_flops=predicted + self._decoding(asked, answers),
            counted_flops=self._counted(shapes),
            seconds=seconds,
            ratio=1.0,
            identical=len(answers),
        )

    def _walk(self, asked: Sequence[PlannedCell], engine: HfEngine, *, name: str, answers: Answers, base: Row) -> Row:
        steps = [step for _, step in asked]

        def run() -> list[tuple[int, Any]]:
            return list(engine.answer(steps))

        outcomes, shapes, seconds = _timed(engine.model, run)
        found: Answers = {}
        prefilled = decoded = 0
        for place, outcome in outcomes:
            if isinstance(outcome, EngineError):
                raise outcome
            found[asked[place].cell.id] = outcome.ids
            prefilled += outcome.prefilled_tokens
            decoded += outcome.decoded_tokens
        return Row(
            name=name,
            cells=len(asked),
            prefilled_tokens=prefilled,
            decoded_tokens=decoded,
            planned_tokens=sum(len(step.prompt.ids) - step.keep_tokens for step in steps),
            predicted_flops=self._prefill(asked, chunk_tokens=engine.chunk_tokens) + self._decoding(asked, answers),
            counted_flops=self._counted(shapes),
            seconds=seconds,
            ratio=base.seconds / seconds,
            identical=sum(found[cell] == answers[cell] for cell in answers),
        )

    def _prefill(self, asked: Sequence[PlannedCell], *, chunk_tokens: int) -> int:
        return sum(
            self.shape.prompt_flops(
                prompt_tokens=len(step.prompt.ids),
                kept_tokens=step.keep_tokens,
                chunk_tokens=chunk_tokens,
                prefix_block_size=self.prefix_block_size,
            )
            for _, step in asked
        )

    def _decoding(self, asked: Sequence[PlannedCell], answers: Answers) -> int:
        """Of the answers, token by token: a draft that is verified costs the same operations in fewer passes."""
        flops = 0
        for cell, step in asked:
            for place in range(min(len(answers[cell.id]), self.max_new_tokens - 1)):
                flops += self.shape.forward_flops(new_tokens=1, past_tokens=len(step.prompt.ids) + place, logit_rows=1)
        return flops

    def _counted(self, shapes: Shapes) -> int:
        """Operations of forward passes of these shapes, by torch's counter on a model without memory.

        Counted for the fewest and the most tokens before each number of new ones, with one row of logits; the rest is a straight line.
        """
        config = transformers.AutoConfig.from_pretrained(self.model_dir)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")

        def count(past: int, new: int, *, rows: int = 1) -> int:
            cache = transformers.DynamicCache(config=config)
            if past:
                size = (1, self.shape.num_kv_heads, past, self.shape.head_dim)
                for layer in range(self.shape.num_layers):
                    cache.update(torch.empty(size, device="meta"), torch.empty(size, device="meta"), layer)
            with flop_counter() as counter, torch.no_grad():
                model(input_ids=torch.zeros((1, new), dtype=torch.long, device="meta"), past_key_values=cache, logits_to_keep=rows)
            return int(counter.get_total_flops())

        row = count(0, 2, rows=2) - count(0, 2)
        total = sum((rows - 1) * row for _, _, rows in shapes)
        for new in {new for _, new, _ in shapes}:
            pasts = [past for past, its, _ in shapes if its == new]
            low, high = min(pasts), max(pasts)
            least = count(low, new)
            slope = (count(high, new) - least) / (high - low) if high > low else 0.0
            total += round(sum(least + slope * (past - low) for past in pasts))
        return total


def _timed(model: Any, run: Callable[[], Any]) -> tuple[Any, Shapes, float]:
    """What ``run`` gives, the shapes of the forward passes it made, and its seconds."""
    with _recorded(model) as shapes:
        start = time.perf_counter()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result, shapes, time.perf_counter() - start


@contextmanager
def _recorded(model: Any) -> Iterator[Shapes]:
    shapes: Shapes = []

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        cache, kept = inputs.get("past_key_values"), inputs.get("logits_to_keep", 0)
        if isinstance(cache, BatchCache):
            shapes.extend((new.branch.num_tokens, new.end - new.begin, new.end - new.begin) for new in cache.slices)
            return
        new = int(inputs["input_ids"].shape[1])
        rows = len(kept) if isinstance(kept, torch.Tensor) else kept or new
        shapes.append((int(cache.get_seq_length()) if cache is not None else 0, new, rows))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def _suite(lengths: Sequence[int], **grid: Any) -> SuiteSpec:
    path = ROOT / "eval" / "suites" / "single.yaml"
    data = inline_files(read_yaml(path), ("task.needles",), origin=path)
    del data["depth_percent"]
    return SuiteSpec.parse({**data, "context_tokens": list(lengths), **grid}, origin="bench")


def _runner(suite: SuiteSpec, model_dir: Path, cache: Path) -> CellRunner:
    tokenizer = ModelTokenizer.load(model_dir)
    marker = resolve_marker(tokenizer, None)
    haystack = load_haystack(suite, cache=cache, seed=0, replicate=0)
    builder = prompt_builder(haystack, suite=suite, tokenizer=tokenizer, policy=None, marker=marker, seed=0)
    return CellRunner(builder=builder, tokenizer=tokenizer, policy=None, marker=marker, max_new_tokens=suite.max_new_tokens)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.name,
    "cells": lambda row: str(row.cells),
    "prefilled": lambda row: f"{row.prefilled_tokens:,}",
    "planned": lambda row: f"{row.planned_tokens:,}",
    "decoded": lambda row: f"{row.decoded_tokens:,}",
    "TFLOP predicted": lambda row: f"{row.predicted_flops / 1e12:.2f}",
    "TFLOP counted": lambda row: f"{row.counted_flops / 1e12:.2f}",
    "seconds": lambda row: f"{row.seconds:.1f}",
    "ratio": lambda row: f"{row.ratio:.2f}",
    "identical": lambda row: f"{row.identical}/{row.cells}",
}


def main() -> None:
    """Run all variants and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or source of a model; default: the quickstart's")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--step", type=int, default=512, help="tokens between lengths, and between positions of the lattice")
    parser.add_argument("--lengths", type=int, default=8, help="number of lengths: step, 2 step, ...")
    parser.add_argument("--depths", type=float, nargs="+", default=[10, 30, 50, 70, 90], help="percent depths of the percent grid")
    parser.add_argument("--grids", nargs="+", default=["percent", "lattice"], choices=["percent", "lattice"])
    parser.add_argument("--chunk", type=int, help="prompt tokens per forward pass")
    parser.add_argument("--storage", default="runs", help="where the model and the essays are cached")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    cache = Storage.open(args.storage).cache
    spec = {"source": args.model} if args.model else QUICKSTART
    model_dir = resolve_model(ModelSpec.parse(spec, origin="--model"), cache=cache)
    lengths = [args.step * (place + 1) for place in range(args.lengths)]
    suites = {"percent": _suite(lengths, depth_percent=args.depths), "lattice": _suite(lengths, lattice_tokens=args.step)}
    chunk = args.chunk or default_chunk_tokens(on_gpu=args.device != "cpu")
    bench = Bench(
        model_dir=model_dir,
        dtype=args.dtype,
        device=args.device,
        max_new_tokens=suites["percent"].max_new_tokens,
        shape=ModelShape.load(model_dir),
        prefix_block_size=default_prefix_block_size(dtype=args.dtype, quantize=None, chunk_tokens=chunk),
    )
    rows: list[Row] = []
    console = Console()
    console.width = max(console.width, TABLE_COLUMNS)
    for name, suite in ((name, suites[name]) for name in args.grids):
        for row in bench.compare(name, suite, _runner(suite, model_dir, cache), chunk_tokens=chunk):
            console.print(f"{row.name}: {row.seconds:.1f} s", highlight=False)
            rows.append(row)
    console.print(as_table(rows, COLUMNS, title=f"NIH grid, {torch.get_num_threads()} threads, torch {torch.__version__}"))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
