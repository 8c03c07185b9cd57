"""The figures of the quickstart that a change of the code's structure must not change.

It runs the quickstart's sweep in float32 on one thread (or reads one that is there) and collects the values of its
shard sets, the loss of every training step, its adapters, the answers and scores of its cells and its table of arms,
and besides the token ids of 200 prompts over all suites. ``--write`` stores them, without it they are compared:

    python bench/reference.py --storage runs/reference            # a quarter of an hour on 2 cores the first time

Figures that are computed in floating point are compared with a tolerance; everything else must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "tests" / "reference" / "quickstart.json"
NUM_PROMPTS = 200
TOLERANCE = 1e-4
"""Relative and absolute; the same code gives the same figures on one machine, another processor rounds otherwise."""

NOT_COMPARED = ("answering_seconds", "cost")
"""Columns of the table of arms that differ from run to run."""


def run_quickstart(storage: Path) -> None:
    """Run what is missing of the quickstart, on one thread."""
    command = [sys.executable, "-m", "pause_ray", "sweep", "sweeps/quickstart.yaml", "--storage", str(storage)]
    command += ["--set", "trial.resources.threads=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def read_shards(folder: Path) -> dict[str, Any]:
    """The rows of a shard set: how many, how long, and digests of their tokens and of the positions that are trained on."""
    import pyarrow.parquet as pq

    rows = []
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        if "input_ids" in table.column_names:
            rows += table.to_pylist()
    rows.sort(key=lambda row: row["row"])
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "input_ids": digest([row["input_ids"] for row in rows]),
        "labels": digest([row["labels"] for row in rows]),
        "document_starts": digest([row["document_starts"] for row in rows]),
        "pauses": sum(row["num_pauses"] for row in rows),
        "content_tokens": sum(row["content_tokens"] for row in rows),
    }


def read_adapter(folder: Path) -> dict[str, Any]:
    """The norm of an adapter's tensors over all layers, by kind of tensor, and the loss of each of its training's steps."""
    from safetensors.torch import load_file

    squares: dict[str, float] = {}
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        for name, tensor in load_file(path).items():
            kind = re.sub(r"\.\d+\.", ".*.", name)
            squares[kind] = squares.get(kind, 0.0) + float((tensor.double() ** 2).sum())
    losses = [json.loads(line)["loss"] for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return {"losses": losses, "norms": {kind: total**0.5 for kind, total in sorted(squares.items())}}


def read_cells(trial: Path) -> dict[str, list[Any]]:
    """The answer and the score of each of a trial's cells, by length and depth."""
    rows = [json.loads(line) for line in (trial / "cells.jsonl").read_text().splitlines()]
    return {
        f"{row['context_tokens']} tokens, {row['depth_percent']} %": [row["response"], row["score"]]
        for row in sorted(rows, key=lambda row: (row["context_tokens"], row["depth_percent"]))
    }


def read_arms(folder: Path) -> list[dict[str, str]]:
    """The rows of the table of arms."""
    with (folder / "arms.csv").open(newline="") as lines:
        return [{name: cell for name, cell in row.items() if name not in NOT_COMPARED} for row in csv.DictReader(lines)]


def read_sweep(storage: Path) -> dict[str, Any]:
    """Everything that is compared of the quickstart's sweep."""
    (folder,) = (storage / "sweeps").glob("quickstart-*")
    trials = {}
    for entry in json.loads((folder / "sweep.json").read_text())["trials"]:
        trial = storage / "trials" / entry["digest"]
        manifest = json.loads((trial / "manifest.json").read_text())
        spec = json.loads((trial / "spec.json").read_text())
        every = spec["pauses"]["every"] if spec["pauses"] else None
        rank = spec["train"]["lora"]["rank"] if spec["train"] else None
        trials[f"{entry['arm']} every={every} rank={rank}"] = {
            "shards": read_shards(storage / "shards" / manifest["shards"]) if manifest["shards"] else None,
            "adapter": read_adapter(Path(manifest["checkpoint"])) if manifest["checkpoint"] else None,
            "cells": read_cells(trial),
        }
    return {"trials": trials, "arms": read_arms(folder)}


def prompts(cache: Path) -> dict[str, str]:
    """Pauses, length and a digest of the token ids of prompts over all suites."""
    from pause_ray.core.spec import inline_files, read_yaml
    from pause_ray.evaluation.haystack import ask, load_haystack, prompt_builder
    from pause_ray.evaluation.suite import SuiteSpec, cells
    from pause_ray.models.sources import resolve_model
    from pause_ray.models.spec import ModelSpec
    from pause_ray.text.pauses import PausePolicy
    from pause_ray.text.tokenizer import ModelTokenizer, resolve_marker
    from pause_ray.trial.spec import FILE_FIELDS

    model = ModelSpec.parse(read_yaml(ROOT / "sweeps" / "quickstart.yaml")["trial"]["model"], origin="quickstart")
    tokenizer = ModelTokenizer.load(resolve_model(model, cache=cache))
    policies = [
        None,
        PausePolicy(unit="paragraph"),
        PausePolicy(unit="sentence", every=3),
        PausePolicy(unit="tokens", every=64, token="added"),
    ]
    names = sorted(path.stem for path in (ROOT / "eval" / "suites").glob("*.yaml"))
    found: dict[str, str] = {}
    for number, name in enumerate(names):
        path = ROOT / "eval" / "suites" / f"{name}.yaml"
        suite = SuiteSpec.parse(inline_files({"eval": str(path)}, FILE_FIELDS, origin=path)["eval"], origin=name)
        grid = [cell for cell in cells(suite, identity="", replicate=0, seed=0) if cell.context_tokens <= 16384]
        share = NUM_PROMPTS // len(names) + (number < NUM_PROMPTS % len(names))
        chosen = [grid[place * len(grid) // share] for place in range(share)]
        haystack = load_haystack(suite, cache=cache, seed=0, replicate=0)
        for place, cell in enumerate(chosen):
            policy = policies[place % len(policies)]
            marker = resolve_marker(tokenizer, policy)
            builder = prompt_builder(haystack, suite=suite, tokenizer=tokenizer, policy=policy, marker=marker, seed=0, cache=cache)
            prompt = ask(cell, builder)
            found[f"{name} {place}"] = f"{prompt.num_pauses} pauses, {len(prompt.ids)} tokens, {digest(prompt.ids.tolist())}"
    return found


def digest(value: Any) -> str:
    """A short digest of plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def differences(stored: Any, found: Any, place: str = "") -> list[str]:
    """Where two collections of figures differ; numbers may differ by ``TOLERANCE``."""
    if isinstance(stored, dict) and isinstance(found, dict):
        names = sorted(stored.keys() | found.keys())
        return [line for name in names for line in differences(stored.get(name), found.get(name), f"{place}/{name}")]
    if isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        return [line for index, pair in enumerate(zip(stored, found, strict=True)) for line in differences(*pair, f"{place}[{index}]")]
    if isinstance(stored, str) and isinstance(found, str) and stored != found:
        with contextlib.suppress(ValueError):  # a number of the table of arms
            stored, found = float(stored), float(found)
    if isinstance(stored, float) and isinstance(found, float) and math.isclose(stored, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return []
    return [] if stored == found else [f"{place}: {str(stored)[:80]} before, {str(found)[:80]} now"]


def main() -> int:
    """Collect the figures; store or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "reference", help="where the sweep is run, or has been run")
    parser.add_argument("--write", action="store_true", help="store the figures instead of comparing them")
    parser.add_argument("--prompts-only", action="store_true", help="only the prompts' token ids (a minute)")
    arguments = parser.parse_args()
    storage = arguments.storage.resolve()
    found: dict[str, Any] = {"prompts": prompts(storage / "cache")}
    if not arguments.prompts_only:
        run_quickstart(storage)
        found |= read_sweep(storage)
    if arguments.write:
        STORED.parent.mkdir(parents=True, exist_ok=True)
        STORED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return 0
    stored = json.loads(STORED.read_text())
    lines = differences({name: stored[name] for name in found}, found)
    print("\n".join(lines) or f"equal: {len(found['prompts'])} prompts" + (f", {len(found['trials'])} trials" if "trials" in found else ""))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
