"""How near prefill of long contexts comes to the device's own matmul rate, and its peak memory to the plan.

    python bench/prefill_rate.py                           # on a GPU: Llama-3.2-3B's shape, random bf16 weights, 32K to 128K tokens
    python bench/prefill_rate.py --shape tiny --dtype float32 --lengths 1024 2048      # on a CPU, to see that it runs

Random weights cost what trained ones do. The rate is counted operations / seconds, against the best of three large matrix
products in the same precision in the same run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from rich.console import Console
from tables import as_table

from pause_ray.inference.engine import Completion, HfEngineSpec, LoadedAs, PromptStep
from pause_ray.inference.hf import HfEngine
from pause_ray.models.shape import ModelShape
from pause_ray.text.prompts import BuiltPrompt

SHAPES = {
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "vocab_size": 128_256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 128_256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 512},
}
"""Llama 3.2 3B, Llama 3.1 8B (their published config.json), and one for a CPU; 8 key-value heads each."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One context length."""

    tokens: int
    seconds: float
    tflops: float
    """Per second."""
    of_matmul: float
    """Share of the measured matmul rate."""
    planned_bytes: int
    """Weights, keys and values."""
    peak_bytes: int | None
    """What torch held at most; None on a CPU."""


def make_model(folder: Path, *, shape: str, dtype: str, device: str) -> None:
    """A model folder of random weights with a byte-level tokenizer."""
    config = transformers.LlamaConfig(
        **SHAPES[shape], num_key_value_heads=8, max_position_embeddings=262_144, tie_word_embeddings=True, eos_token_id=0
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    model.to("cpu").save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: place + 1 for place, letter in enumerate(alphabet)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def matmul_flops(*, dtype: str, device: str, size: int) -> float:
    """Best rate of a square product, operations per second."""
    left, right = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    best = 0.0
    for _ in range(4):  # the first warms up
        _wait()
        start = time.perf_counter()
        for _ in range(4):
            left @ right
        _wait()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    return best


def measure(engine: HfEngine, shape: ModelShape, *, tokens: int, dtype: str, rate: float) -> Row:
    """Answer one prompt of random tokens, twice; the second time counts."""
    ids = np.random.default_rng(tokens).integers(1, 256, size=tokens, dtype=np.int32)
    step = PromptStep(prompt=BuiltPrompt.plain(ids), keep_tokens=0, draft_ids=(), max_new_tokens=1)
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        _wait()
        start = time.perf_counter()
        [(_, outcome)] = engine.answer([step])
        _wait()
        seconds = time.perf_counter() - start
        if not isinstance(outcome, Completion):
            raise outcome
    flops = shape.prompt_flops(prompt_tokens=tokens, kept_tokens=0, chunk_tokens=engine.chunk_tokens)
    value_bytes = 4 if dtype == "float32" else 2
    return Row(
        tokens=tokens,
        seconds=seconds,
        tflops=flops / seconds / 1e12,
        of_matmul=flops / seconds / rate,
        planned_bytes=shape.weight_bytes(dtype) + tokens * shape.kv_bytes_per_token(value_bytes),
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


COLUMNS: dict[str, Callable[[Row], str | None]] = {
    "tokens": lambda row: f"{row.tokens:,}",
    "seconds": lambda row: f"{row.seconds:.2f}",
    "TFLOP/s": lambda row: f"{row.tflops:.2f}",
    "of matmul": lambda row: f"{row.of_matmul:.0%}",
    "GiB planned": lambda row: f"{row.planned_bytes / 2**30:.2f}",
    "GiB peak": lambda row: None if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
}


def main() -> None:
    """Measure every length and print one table."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 65_536, 131_072])
    parser.add_argument("--chunk", type=int, help="prompt tokens per forward pass")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    rate = matmul_flops(dtype=args.dtype, device=args.device, size=8192 if on_gpu else 1024)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder, shape=args.shape, dtype=args.dtype, device=args.device)
        engine = HfEngine(HfEngineSpec(chunk_tokens=args.chunk), device=args.device)
        engine.use(LoadedAs(model_dir=folder, dtype=args.dtype))
        shape = ModelShape.load(folder)
        rows = [measure(engine, shape, tokens=tokens, dtype=args.dtype, rate=rate) for tokens in args.lengths]
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    title = f"{args.shape}, {args.dtype}, {name}, matmul {rate / 1e12:.2f} TFLOP/s, chunk {engine.chunk_tokens}"
    Console().print(as_table(rows, COLUMNS, title=title))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
